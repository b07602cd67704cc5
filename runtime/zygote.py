"""The zygote: a small warm interpreter that forks enclaves and makes sure that they end.

It preloads the base (frequent standard-library modules, msgpack, the enclave's side of this package; no
numpy, which images bring themselves), is single-threaded, and is the subreaper of everything that enclaves
start. An enclave may fork but not detach: a process that becomes the zygote's child without being a live
enclave's main process has lost its parent, and is killed on sight.

    host ── control socket ──► zygote ──fork──► enclave ──► its children …
         (also the lifeline)      ▲ orphans come back here, are killed and reaped

When the host dies, seen on its pidfd or as the end of the control socket, all enclaves and their descendants
are killed and the zygote exits. Idle, it sleeps without a timeout.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from ..shm import libc
from .importer import BaseFinder, base_finder, confine
from .inside import GIFT, Descriptors, Sealing, close_all_but, enclave_main
from .messages import MessageError, Stream
from .sealing import Base, hide_arguments
from .spec import EnclaveSpec, SealSpec

SWEEP: Final = 0.05  # seconds between looks for orphans while enclaves live
ENDING: Final = 0.002  # the same while one is being ended
REPLY: Final = 5.0  # seconds that the host may take to accept a reply
SEALED: Final = 5.0  # for a forked process to seal itself
EXIT: Final = 5.0  # seconds to get rid of all enclaves when the host is gone

# Imported one at a time while nobody asks for anything, so that the first launch waits for none of them.
_FREQUENT: Final = """
encodings.latin_1 json re collections.abc functools itertools random math hashlib base64 datetime _strptime
decimal string textwrap logging csv io struct zlib pathlib tempfile shutil urllib.parse uuid statistics heapq
bisect copy typing enum dataclasses contextlib queue threading concurrent.futures.thread secrets hmac sqlite3
pickle zoneinfo ipaddress subprocess inspect asyncio
"""
PRELOAD: Final = tuple(_FREQUENT.split())


@dataclass
class _Ending:
    """A request to end an enclave, until main process and descendants are gone or its time is up."""

    enclave: int
    deadline: float
    status: int | None = None


class _Zygote:
    def __init__(self, control: socket.socket, host: int) -> None:
        self._stream = Stream(control, descriptors=True)
        self._host = host
        self._base: BaseFinder = base_finder()
        self._preload = list(reversed(PRELOAD))
        # Main processes that are not reaped, by the number of the request that asked for them: a process
        # number may be used again, a request's never.
        self._mains: dict[int, int] = {}
        self._endings: dict[int, _Ending] = {}
        # The gates of living enclaves, by the same number. The host holds each too; as long as either does,
        # nothing that sleeps on a page is let through (see enturbo.runtime.pager).
        self._gates: dict[int, int] = {}
        self._base_of_seals: Base | None = None
        self._scratch: set[str] = set()  # folders whose contents end with the host
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Any death wakes the poll: one that ends a wait is seen at once, not at the next sweep.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the host is gone."""
        poll = select.poll()
        for fd in (self._stream.fileno(), self._host, self._woken):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._patience())}
            if self._host in ready:
                return
            if self._woken in ready:
                os.read(self._woken, 4096)
            if self._stream.fileno() in ready:
                try:
                    for request in self._stream.pump():
                        self._handle(request)
                except MessageError:
                    return
            elif not ready:
                self._preload_one()
            self._sweep()

    def end_all(self) -> None:
        """Kill every enclave and every descendant."""
        deadline = time.monotonic() + EXIT
        while (children := _children()) and time.monotonic() < deadline:
            for pid in children:
                _kill_and_reap(pid)
            time.sleep(0.001)
        for folder in self._scratch:
            shutil.rmtree(folder, ignore_errors=True)

    def _patience(self) -> float | None:
        """Milliseconds to sleep at most."""
        if self._preload:
            return 0
        if self._endings:
            return ENDING * 1000
        return SWEEP * 1000 if self._mains else None

    def _preload_one(self) -> None:
        if not self._preload:
            return
        try:
            importlib.import_module(self._preload.pop())
        except ImportError:
            return  # an interpreter built without it; whoever needs it is told at their own import
        if not self._preload:
            # Enclaves do this for themselves too; done here it costs none of them the time.
            confine(self._base)
            gc.collect()
            gc.freeze()

    def _handle(self, request: dict[str, Any]) -> None:
        number = request["id"]
        match request["do"]:
            case "spawn":
                fds = Descriptors(*self._stream.take_fds(request["fds"]))
                try:
                    seal = request["seal"]
                    self._spawn(
                        number,
                        EnclaveSpec.from_message(request["spec"]),
                        fds,
                        None if seal is None else SealSpec.from_message(seal),
                    )
                finally:
                    for fd in vars(fds).values():
                        os.close(fd)
            case "end":
                enclave = request["enclave"]
                self._endings[number] = _Ending(enclave, time.monotonic() + request["timeout"])
                if enclave in self._mains:
                    os.kill(self._mains[enclave], signal.SIGKILL)
            case "modules":
                self._reply({"id": number, "modules": sorted(sys.modules)})

    def _spawn(self, number: int, spec: EnclaveSpec, fds: Descriptors, seal: SealSpec | None) -> None:
        zygote = os.getpid()
        gift, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sealing = None
        if seal is not None:
            sealing = Sealing(seal, self._seal_base(), theirs)
            if seal.scratch:
                self._scratch.add(os.path.dirname(seal.scratch))
        try:
            pid = os.fork()
        except OSError as error:
            gift.close()
            theirs.close()
            self._reply({"id": number, "failed": f"fork: {error}"})
            return
        if pid == 0:
            enclave_main(spec, fds, self._base, zygote, sealing)
        theirs.close()
        if sealing is not None:
            sealing.base.used()
        self._mains[number] = pid
        address = 0
        given: list[int] = []
        if seal is not None:
            address, given = self._accept(gift, pid)
            if len(given) > 2:
                self._gates[number] = os.dup(given[2])
        gift.close()
        given.insert(0, os.pidfd_open(pid))
        try:
            self._reply({"id": number, "pid": pid, "fds": len(given), "address": address}, *given)
        finally:
            for fd in given:
                os.close(fd)
            if self._base_of_seals is not None:
                self._base_of_seals.prepare()  # the next one's, while nobody waits

    def _accept(self, gift: socket.socket, pid: int) -> tuple[int, list[int]]:
        """What a sealed process gives away once. It runs nothing of the image before that, so it is trusted.

        One that fails has said why on its stderr, which is its output: the host learns by its death. One that
        does not answer is killed.
        """
        gift.settimeout(SEALED)
        try:
            message, given, _, _ = socket.recv_fds(gift, GIFT.size, 3)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            return 0, []
        return (GIFT.unpack(message)[0], given) if message else (0, given)

    def _seal_base(self) -> Base:
        if self._base_of_seals is None:
            self._base_of_seals = Base()
        self._base_of_seals.prepare()
        return self._base_of_seals

    def _reply(self, message: dict[str, Any], *fds: int) -> None:
        self._stream.send(message, REPLY, fds)

    def _sweep(self) -> None:
        """Kill orphans, reap, and answer the endings that are complete or late.

        A dead process's children are the zygote's before it can be reaped. So a list of children that is
        taken after an enclave's main process was reaped, and holds no stranger, says that nothing of that
        enclave is left.
        """
        for enclave in {ending.enclave for ending in self._endings.values()}:
            self._reap(enclave)
        mains = set(self._mains.values())
        strangers = [pid for pid in _children() if pid not in mains]
        for pid in strangers:
            _kill_and_reap(pid)
        now = time.monotonic()
        for number, ending in list(self._endings.items()):
            gone = not strangers and ending.enclave not in self._mains
            if gone or now > ending.deadline:
                del self._endings[number]
                self._reply({"id": number, "gone": gone, "status": ending.status})

    def _reap(self, enclave: int) -> None:
        """Reap a main process that is dead, and tell everyone who waits for it how it ended."""
        if enclave not in self._mains:
            return
        reaped, status = os.waitpid(self._mains[enclave], os.WNOHANG)
        if reaped:
            del self._mains[enclave]
            # The process is gone, and with it its memory: there is nobody left to be let through.
            if enclave in self._gates:
                os.close(self._gates.pop(enclave))
            for ending in self._endings.values():
                if ending.enclave == enclave:
                    ending.status = os.waitstatus_to_exitcode(status)


def _kill_and_reap(pid: int) -> None:
    # Not reaped yet, and only this process may reap it: the number is still that process's.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    """Every child of this single-threaded process, zombies too."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb", buffering=0) as file:
            return [int(child) for child in file.readall().split()]
    except FileNotFoundError:
        return _children_by_parent(pid)


def _children_by_parent(parent: int) -> list[int]:
    """The same on a kernel without CONFIG_PROC_CHILDREN."""
    children = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                # The second field is a name in parentheses that may hold anything; the fourth is the parent.
                fields = file.readall().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            children.append(int(name))
    return children


def main(control: str, host: str) -> None:
    """Serve the host: ``control`` is the socket's descriptor, ``host`` the host's pidfd."""
    # What the host ignores or blocks is not for its enclaves to inherit; SIGCHLD above all, without which
    # dead children would vanish unseen.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (
        signal.SIGCHLD,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGALRM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, signal.SIG_DFL)
    libc.set_name("enturbo-zygote")
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    hide_arguments()  # of all forks: others can read where their arguments stand, and they can write there
    close_all_but(0, 1, 2, int(control), int(host))
    for fd in (int(control), int(host)):
        os.set_inheritable(fd, False)
    zygote = _Zygote(socket.socket(fileno=int(control)), int(host))
    try:
        zygote.serve()
    finally:
        zygote.end_all()
        os._exit(0)
