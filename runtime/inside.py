"""The enclave's own process, from the fork on: shed the zygote, map the pages, serve calls.

    fork ─► die with the zygote, own session ─► map ─► close every descriptor ─► seal ─► importer ─► calls
                                                 │                │               │
              EPC pages and EPCM entries; no ────┘                │               └─ enturbo.runtime.sealing;
              descriptor of them stays                            │                  userfaultfd and listener
              left: 0 /dev/null, 1 2 output pipes, launch socket ─┘                  are given to the zygote

A process that is sealed has its pages under userfaultfd (:class:`enturbo.runtime.gate.KernelGate`), one that
is not asks a cooperative gate.

Nothing here touches the image before its gate says so: even the program manifest is read through it. The
calls' results go into the launch socket at once; the host does not read it before the launch is VERIFIED.
Standard library and msgpack only.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ..shm import libc
from ..shm.errors import EnturboError, GateTimeout
from ..shm.layout import PAGE_SIZE
from ..shm.uffd import MODE_MINOR, MODE_MISSING, MODE_WP, Userfaultfd
from .context import Context
from .files import MOUNT, Files
from .gate import Gate, KernelGate, Mapped, map_enclave
from .importer import BaseFinder, forget_carried, install
from .libraries import Libraries, MemoryFiles
from .mailbox import Mailbox
from .manifests import HEADER
from .messages import MAX_FRAME, MessageError, Stream, StreamClosed
from .mount import Mount
from .program import decode, peek_length, split_handler
from .sealing import Base
from .sealing import seal as seal_process
from .spec import EnclaveSpec, SealSpec

LAUNCH_FD: Final = 3
# In a sealed process. No descriptor can get these numbers again: RLIMIT_NOFILE is 1000 there.
SEALED_LAUNCH_FD: Final = 1000  # the one number on which the filter lets sendmsg through, besides
GIFT_FD: Final = (
    1001  # the socket by which descriptors are given away, closed before any code of the image runs
)
PAGEMAP_FD: Final = 1002
_NOFILE: Final = 1024
_ANY_FD: Final = 0x7FFF_FFFF
EXIT_SETUP: Final = 70  # the process could not be made an enclave; the reason is on its stderr
GIFT: Final = struct.Struct("<Q")  # goes with listener, memory, userfaultfd: the address of the first page
MAX_TEXT: Final = 1 << 18  # characters of an error's message or traceback that are sent


class OcallError(EnturboError):
    """The host refused an OCALL, or its function failed."""


@dataclass(frozen=True)
class Descriptors:
    """What the host sent along, in this order."""

    epc_rw: int
    epc_ro: int
    epcm_ro: int
    launch: int
    stdout: int
    stderr: int


@dataclass(frozen=True)
class Sealing:
    """What a sealed process needs besides: the zygote's preparations, and where it gives things away."""

    spec: SealSpec
    base: Base
    gift: socket.socket


def enclave_main(
    spec: EnclaveSpec, fds: Descriptors, base: BaseFinder, zygote: int, sealing: Sealing | None
) -> NoReturn:
    """Become the enclave that ``spec`` describes; never returns into the zygote's code."""
    status = EXIT_SETUP
    try:
        _leave_zygote(zygote)
        # Errors from here on are the enclave's output: held, and dropped if it is REJECTED.
        os.dup2(fds.stdout, 1)
        os.dup2(fds.stderr, 2)
        mapped = map_enclave(spec, fds.epc_rw, fds.epc_ro, fds.epcm_ro, fixed=sealing is not None)
        if sealing is None:
            gate = Gate(spec, mapped.memory, mapped.entries, spec.first_linear)
            os.dup2(fds.launch, LAUNCH_FD, inheritable=False)
            close_all_but(0, 1, 2, LAUNCH_FD)
            stream = Stream(socket.socket(fileno=LAUNCH_FD))
        else:
            gate, stream = _seal(spec, fds, mapped, sealing)
        _Enclave(gate, base, stream).serve()
        status = 0
    except BaseException:  # noqa: BLE001  the boundary of the process: nothing may unwind into the zygote
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _seal(spec: EnclaveSpec, fds: Descriptors, mapped: Mapped, sealing: Sealing) -> tuple[KernelGate, Stream]:
    """Gate the pages, shed every descriptor, seal the process, and give away what can undo any of that.

    The order matters: userfaultfd and /proc/self/mem can be had only before the seal, the listener only by
    it, and no code of the image has run before the last of them is gone from here.
    """
    seal = sealing.spec
    uffd = _gate_pages(spec, seal, mapped.address) if seal.gated else None
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_NOFILE, hard))
    for fd, number in (
        (fds.launch, SEALED_LAUNCH_FD),
        (sealing.gift.detach(), GIFT_FD),
        (pagemap, PAGEMAP_FD),
    ):
        os.dup2(fd, number, inheritable=False)
    kept = {0, 1, 2, SEALED_LAUNCH_FD, GIFT_FD, PAGEMAP_FD, memory, *sealing.base.fds}
    close_all_but(*kept, *(() if uffd is None else (uffd.fd,)))
    # The low numbers are taken, so that nothing else gets one that others had (see `null` of the seal).
    os.dup2(0, LAUNCH_FD, inheritable=False)
    stream = Stream(socket.socket(fileno=SEALED_LAUNCH_FD))
    gift = socket.socket(fileno=GIFT_FD)
    listener = seal_process(
        sealing.base, scratch=seal.scratch or None, read=seal.read, write=seal.write, null=(0, LAUNCH_FD)
    )
    given = [listener, memory, *(() if uffd is None else (uffd.fd,))]
    socket.send_fds(gift, [GIFT.pack(mapped.address)], given)
    gift.close()
    for fd in given:
        os.close(fd)
    gate = KernelGate(
        spec, mapped.memory, mapped.entries, spec.first_linear, user_mode_only=seal.user_mode_only
    )
    gate.keep_pagemap(PAGEMAP_FD)
    return gate, stream


def _gate_pages(spec: EnclaveSpec, seal: SealSpec, address: int) -> Userfaultfd:
    uffd = Userfaultfd.create(seal.features, user_mode_only=seal.user_mode_only)
    for run in spec.runs:
        if run.gated:
            start = address + (run.linear - spec.first_linear) * PAGE_SIZE
            uffd.register(start, run.count * PAGE_SIZE, MODE_MISSING | MODE_WP | MODE_MINOR)
    return uffd


def _leave_zygote(zygote: int) -> None:
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:  # it died before the line above
        os._exit(EXIT_SETUP)
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.set_name("enturbo-enclave")
    sys.argv[:] = ["enclave"]


def close_all_but(*kept: int) -> None:
    """Close every other descriptor of this process."""
    after = 0
    for fd in sorted(set(kept)):
        if fd > after:  # of an empty range Python makes a loop over all numbers
            os.closerange(after, fd)
        after = fd + 1
    os.closerange(after, _ANY_FD)


class _Enclave:
    """One enclave's loop: a call at a time, in the main thread, which is the handler's thread too."""

    def __init__(self, gate: Gate, base: BaseFinder, stream: Stream) -> None:
        self._gate = gate
        self._base = base
        self._stream = stream
        self._mailbox = Mailbox(stream, _key)
        self._pid = os.getpid()
        self._handler: Callable[[Any, Context], Any] | None = None
        self._context: Context | None = None
        self._entry = ("", "")  # module and function of the handler
        self._ocalls = 0
        self._counting = threading.Lock()

    def serve(self) -> None:
        """Answer calls until the host closes the launch socket."""
        try:
            self._stream.send({"ready": time.monotonic_ns()})
            while True:
                request = self._mailbox.wait("call")
                self._answer(request["call"], request["event"])
        except MessageError:
            return

    def _answer(self, call: int, event: Any) -> None:
        times = {"first": 0, "end": 0, "eaug": 0, "shadow": 0}
        try:
            reply = {"result": call, "value": self._run(event, times)}
        except BaseException as error:  # noqa: BLE001  the handler's boundary: every error becomes a reply
            times["end"] = times["end"] or time.monotonic_ns()
            reply = {"error": call, **_describe(error, "exit" if isinstance(error, SystemExit) else None)}
        if os.getpid() != self._pid:
            os._exit(0)  # a child that the handler forked and let return: it answers for nobody
        times["eaug"], times["shadow"] = self._gate.eaug, self._gate.shadow
        _flush()
        try:
            self._stream.send(reply | times)
        except StreamClosed:
            raise
        except MessageError as error:
            if "result" not in reply:
                raise
            failure = MessageError(f"the handler's result cannot be sent (limit {MAX_FRAME} bytes): {error}")
            self._stream.send({"error": call, **_describe(failure, "result")} | times)

    def _run(self, event: Any, times: dict[str, int]) -> Any:
        handler, context = self._load()
        times["first"] = time.monotonic_ns()
        value = handler(event, context)
        times["end"] = time.monotonic_ns()
        return value

    def _load(self) -> tuple[Callable[[Any, Context], Any], Context]:
        """Manifest, importer and handler, at the first call; what failed is tried again at the next."""
        if self._context is None:
            read = self._gate.read_view
            program = decode(read(0, peek_length(read(0, HEADER.size))))
            files = Files(program, read)
            memory = MemoryFiles(files)
            libraries = Libraries(files, memory)
            install(files, libraries, self._base)
            Mount(files, memory, libraries).install()
            forget_carried(files)
            self._entry = split_handler(program.handler)
            self._context = Context(program, self._gate, files, memory, self._ocall)
        if self._handler is None:
            module, function = self._entry
            self._handler = getattr(importlib.import_module(module), function)
        return self._handler, self._context

    def _ocall(self, name: str, args: tuple[Any, ...]) -> Any:
        with self._counting:
            self._ocalls += 1
            number = self._ocalls
        self._stream.send({"ocall": number, "name": name, "args": list(args)})
        reply = self._mailbox.wait(("reply", number))
        if "error" in reply:
            raise OcallError(f"ocall {name!r}: {reply['error']}")
        return reply["value"]


def _key(message: Any) -> object:
    return "call" if "call" in message else ("reply", message["reply"])


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the handler closed or replaced it, or nobody reads any more


def _describe(error: BaseException, kind: str | None) -> dict[str, str]:
    """Type, message and traceback as text that a message can carry."""
    module = getattr(type(error), "__module__", None)
    name = type(error).__qualname__
    if isinstance(module, str) and module not in ("builtins", "__main__"):
        name = f"{module}.{name}"
    first = error.__traceback__
    while first is not None and not first.tb_frame.f_code.co_filename.startswith(MOUNT):
        first = first.tb_next  # how we came to the image's code says nothing to its author
    return {
        "kind": kind or ("gate" if isinstance(error, GateTimeout) else "raise"),
        "type": _clean(name),
        "message": _clean(_text_of(lambda: str(error))),
        "traceback": _clean(_text_of(lambda: "".join(traceback.format_exception(type(error), error, first)))),
    }


def _text_of(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as failure:  # noqa: BLE001  a handler's own exception may fail at being told, too
        return f"<its text could not be made: {type(failure).__qualname__}>"


def _clean(text: str) -> str:
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text)} characters)"
    return text.encode("utf-8", "backslashreplace").decode()
