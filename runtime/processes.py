"""The host's side of the zygote: start it, ask it for enclaves, have them ended, survive its death.

Every wait has a number. A zygote that does not answer in time is killed, and its enclaves with it: nothing
else could tell what became of them. Whatever a zygote leaves behind carries its token in its environment,
so the host can find and kill that too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..shm.errors import EnturboError
from ..workers.bootstrap import child_command
from .mailbox import Mailbox
from .messages import MessageError, Stream
from .spec import EnclaveSpec, Run, SealSpec

__all__ = ["EnclaveProcess", "EnclaveSpec", "Run", "SealSpec", "Zygote", "ZygoteLost", "kill_strays"]

TOKEN: Final = "ENTURBO_ZYGOTE"
MARGIN: Final = 2.0  # seconds that a zygote may take to answer beyond what it was given


class ZygoteLost(EnturboError):
    """The zygote died or does not answer. Its enclaves are dead."""


@dataclass
class EnclaveProcess:
    """An enclave's main process. ``pid`` stays its own until :meth:`Zygote.end` has reaped it.

    ``pidfd`` becomes readable when the process ends; -1 after :meth:`close`. ``returncode`` is known after
    it was ended: the exit status, or minus the signal's number; None if it could not be learned.
    """

    pid: int
    pidfd: int
    token: str
    number: int
    returncode: int | None = field(default=None)
    # Of a sealed process; -1 of any other, and once somebody has taken them over.
    listener: int = -1  # its held system calls
    memory: int = -1  # its /proc/self/mem, to be read
    uffd: int = -1  # the gate of its pages, where they are gated
    address: int = 0  # and where it has its first one

    def take(self, name: str) -> int:
        """The descriptor ``listener``, ``memory`` or ``uffd``; it is the caller's from now on."""
        fd: int = getattr(self, name)
        setattr(self, name, -1)
        return fd

    def close(self) -> None:
        """Close the descriptors that are still its own. May be called again."""
        for name in ("pidfd", "listener", "memory", "uffd"):
            fd = self.take(name)
            if fd >= 0:
                os.close(fd)


class _Incarnation:
    """One zygote process and the host's ends to it."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        host = os.pidfd_open(os.getpid())
        try:
            argv, env = child_command(
                "enturbo.runtime.zygote",
                [str(theirs.fileno()), str(host)],
                ["msgpack"],
                whole_environment=False,
                extra={TOKEN: self.token},
            )
            self.process = subprocess.Popen(
                argv,
                env=env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if _is_open(2) else subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), host),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(host)
        self.pidfd = os.pidfd_open(self.process.pid)
        self.stream = Stream(ours, descriptors=True)
        self.mailbox = Mailbox(self.stream, self._sort)
        self.unclaimed: dict[int, list[int]] = {}  # descriptors that arrived, by the request they answer

    def _sort(self, message: dict[str, Any]) -> int:
        number: int = message["id"]
        if "fds" in message:
            self.unclaimed[number] = self.stream.take_fds(message["fds"])
        return number

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self, timeout: float) -> bool:
        """End it by closing its lifeline, kill it past ``timeout``; True if nothing of it is left."""
        with contextlib.suppress(OSError):
            self.stream.sock.shutdown(socket.SHUT_RDWR)
        if not wait_pidfd(self.pidfd, timeout):
            self.kill()
        self.process.wait()
        self._close_all()
        return kill_strays(self.token, MARGIN)

    def kill(self) -> None:
        """Kill it and wait for its death; its enclaves' main processes die with it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        wait_pidfd(self.pidfd, MARGIN)

    def _close_all(self) -> None:
        self.stream.close()
        for fd in (self.pidfd, *(fd for fds in self.unclaimed.values() for fd in fds)):
            os.close(fd)
        self.pidfd = -1
        self.unclaimed.clear()

    def forget(self) -> None:
        self._close_all()
        self.process.returncode = 0  # another process's child: nothing to wait for, nothing to warn about


class Zygote:
    """A zygote that is started when needed and again when it died. Safe to use from several threads.

    The constructor starts nothing. Times are seconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: _Incarnation | None = None
        self._processes: list[EnclaveProcess] = []
        self._requests = 0
        self._closed = False

    def start(self) -> None:
        """Start the process if none lives; returns without waiting until it can serve."""
        self._incarnation()

    @property
    def alive(self) -> bool:
        """Is there a zygote process?"""
        current = self._current
        return current is not None and current.alive

    @property
    def pidfd(self) -> int:
        """Readable when the zygote dies; -1 if none was started."""
        current = self._current
        return -1 if current is None else current.pidfd

    @property
    def pid(self) -> int:
        """The zygote's process number; 0 if none was started."""
        current = self._current
        return 0 if current is None else current.process.pid

    @property
    def token(self) -> str:
        """What the zygote and all that it starts carry as ``ENTURBO_ZYGOTE``; empty if none was started."""
        current = self._current
        return "" if current is None else current.token

    def spawn(
        self,
        spec: EnclaveSpec,
        epc_rw_fd: int,
        epc_ro_fd: int,
        epcm_ro_fd: int,
        launch_sock: socket.socket | int,
        stdout_w: int,
        stderr_w: int,
        timeout: float,
        seal: SealSpec | None = None,
    ) -> EnclaveProcess:
        """Fork an enclave process. The caller keeps, and closes, the descriptors that it passed.

        ``seal``: how the process is sealed, and whether its pages are gated; None: neither. Raises
        ZygoteLost, after which no process of this call is left; EnturboError if the fork failed, or if the
        process could not be sealed.
        """
        launch = launch_sock if isinstance(launch_sock, int) else launch_sock.fileno()
        fds = (epc_rw_fd, epc_ro_fd, epcm_ro_fd, launch, stdout_w, stderr_w)
        current = self._incarnation()
        request = {
            "do": "spawn",
            "spec": spec.to_message(),
            "seal": None if seal is None else seal.to_message(),
            "fds": len(fds),
        }
        reply = self._ask(current, request, timeout, fds)
        if "failed" in reply:
            raise EnturboError(f"no enclave process: {reply['failed']}")
        number = reply["id"]
        pidfd, *more = current.unclaimed.pop(number)
        process = EnclaveProcess(reply["pid"], pidfd, current.token, number)
        if more:
            process.listener, process.memory, *gate = more
            process.uffd, process.address = (gate[0], reply["address"]) if gate else (-1, 0)
        with self._lock:
            self._processes.append(process)
        return process

    def end(self, process: EnclaveProcess, timeout: float) -> bool:
        """Kill an enclave; True once its main process and all descendants are gone, False past ``timeout``.

        Until it is True the enclave's pages may still be written. It can be called again. The pidfd stays
        open for whoever watches it; close it with :meth:`EnclaveProcess.close`.
        """
        until = time.monotonic() + timeout
        current = self._current
        if current is not None and current.token == process.token and current.alive:
            request = {"do": "end", "enclave": process.number, "timeout": timeout}
            with contextlib.suppress(ZygoteLost):
                reply = self._ask(current, request, timeout + MARGIN)
                if reply["status"] is not None:
                    process.returncode = reply["status"]
                return bool(reply["gone"])
        # Its zygote is gone. The main process dies with it; its descendants are found by the token, or where
        # that cannot be read (sealed processes are not dumpable) by their session.
        main = process.pidfd < 0 or wait_pidfd(process.pidfd, max(0.0, until - time.monotonic()))
        return kill_strays(process.token, max(0.0, until - time.monotonic()), process.pid) and main

    def modules(self, timeout: float) -> list[str]:
        """The names in the zygote's ``sys.modules``: what every enclave begins with."""
        return list(self._ask(self._incarnation(), {"do": "modules"}, timeout)["modules"])

    def close(self, timeout: float) -> bool:
        """End the zygote, all enclaves and all their descendants, and close every descriptor.

        True if nothing is left. May be called again; nothing can be started afterwards.
        """
        with self._lock:
            self._closed = True
            current, self._current = self._current, None
            processes, self._processes = self._processes, []
        gone = current is None or current.close(timeout)
        for process in processes:
            process.close()
        return gone

    def fds(self) -> list[int]:
        """Every descriptor that this object holds."""
        current = self._current
        own = [] if current is None else [current.stream.fileno(), current.pidfd]
        return own + [process.pidfd for process in self._processes if process.pidfd >= 0]

    def forget(self) -> None:
        """In a forked child of the host: close the copies of all descriptors, and touch nothing else.

        The locks may be held by threads that the child does not have, so none is taken.
        """
        self._lock = threading.Lock()
        self._closed = True
        current, self._current = self._current, None
        if current is not None:
            current.forget()
        for process in self._processes:
            process.close()
        self._processes = []

    def _incarnation(self) -> _Incarnation:
        with self._lock:
            if self._closed:
                raise EnturboError("the zygote has been closed")
            if self._current is not None and not self._current.alive:
                self._current.close(0.0)
                self._current = None
            if self._current is None:
                self._current = _Incarnation()
            self._processes = [process for process in self._processes if process.pidfd >= 0]
            return self._current

    def _ask(
        self, current: _Incarnation, request: dict[str, Any], timeout: float, fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Send a request and wait for its reply. Raises ZygoteLost, the zygote being dead then."""
        with self._lock:
            self._requests += 1
            number = self._requests
        until = time.monotonic() + timeout
        try:
            current.stream.send({"id": number, **request}, timeout, fds)
            reply: dict[str, Any] = current.mailbox.wait(number, max(0.0, until - time.monotonic()))
        except MessageError as error:
            current.kill()
            status = current.process.poll()
            raise ZygoteLost(f"the zygote is lost (exit status {status}): {error}") from error
        return reply


def wait_pidfd(pidfd: int, timeout: float) -> bool:
    """Wait until the process of ``pidfd`` has ended; False past ``timeout`` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def kill_strays(token: str, timeout: float = MARGIN, session: int = 0) -> bool:
    """Kill every process whose environment carries a zygote's token; False if some outlive ``timeout``.

    Also those of ``session``, the number of an enclave's main process: they cannot leave it, and while one of
    them lives the kernel gives that number to nobody else.
    """
    until = time.monotonic() + timeout
    needle = f"{TOKEN}={token}".encode()
    while True:
        numbers = map(int, filter(str.isdigit, os.listdir("/proc")))
        left = [pid for pid in numbers if _is_stray(pid, needle, session)]
        if not left:
            return True
        dead = [_kill_stray(pid, needle, session, until) for pid in left]
        if not all(dead) or time.monotonic() > until:
            return False


def _kill_stray(pid: int, needle: bytes, session: int, until: float) -> bool:
    """Kill one process if it still is a stray; False if it is not dead by ``until``."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # Looked at again: the number may have become another process's before the pidfd was opened.
        if _is_stray(pid, needle, session):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return wait_pidfd(pidfd, max(0.0, until - time.monotonic()))
    except (ProcessLookupError, PermissionError):
        return True  # gone, or not ours: it can only have become another's
    finally:
        os.close(pidfd)
    return True


def _is_stray(pid: int, needle: bytes, session: int) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            if needle in file.readall().split(b"\0"):
                return True
    except OSError:
        pass
    if not session:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            head, _, rest = file.readall().rpartition(b")")
    except OSError:
        return False
    fields = rest.split()
    # The name is the enclave's for good: sealed processes cannot change it.
    return head.endswith(b"(enturbo-enclave") and fields[0] != b"Z" and int(fields[3]) == session


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
