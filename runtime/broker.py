"""The broker: answers the held system calls of one enclave, from VERIFIED on, by list and by policy.

    held call ─► on the list, and its numbers are right ─► the kernel carries it out
              ─► socket, connect ───────────────────────► the host does it, if the policy names the target
              ─► anything else ─────────────────────────► EPERM

The kernel is told to go on only where plain numbers decide, or where it decides itself what the call may
reach: Landlock, for files, folders and signals. So it does not matter that what a pointer points to may
change after the look at it. The one address that is read, connect's, is read once, and it is the host that
connects, to its own copy.

What a release list means: chmod, chown, times, extended attributes, locks by flock, sending by address,
listening, executing and everything that has no name here are refused. Landlock does not govern them, and
they would reach files and processes outside.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from . import landlock
from .policy import Address, Policy, Target
from .seccomp import Listener, Notification
from .syscalls import NUMBERS

log = logging.getLogger("enturbo.enclave")

CONNECT_SECONDS: Final = 10
CONNECTING: Final = 32  # connects of one enclave at a time; more fail with EAGAIN
KEPT_SOCKETS: Final = 64  # that an enclave has made and not connected; of more, the oldest cannot be
WAKE_SECONDS: Final = 0.002  # for a thread to wake up when its call was answered
_SLICE: Final = 0.05  # seconds between looks whether the broker is closed
_ADDRESS_BYTES: Final = 128  # struct sockaddr_storage
_SETID: Final = 0o6000
_NAMES: Final = {number: name for name, number in NUMBERS.items()}

# Where a file or folder may be made, changed or removed is decided by Landlock, at the operation. Descriptors
# are the process's own.
_FILES: Final = """
open openat creat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat
truncate fsync fdatasync sync_file_range fallocate copy_file_range sendfile splice tee chdir fchdir
"""
# Of the process itself, its children and its memory.
_OWN: Final = """ exit exit_group fork vfork wait4 waitid umask timer_create timer_settime timer_gettime
timer_getoverrun timer_delete mmap futex futex_wake futex_wait futex_waitv futex_requeue set_tid_address
"""
# Landlock lets them reach this process and its children alone, from ABI 6 on.
_SIGNALS: Final = "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo"
_RUN: Final = frozenset(NUMBERS[name] for name in (_FILES + _OWN).split())
_SIGNAL: Final = frozenset(NUMBERS[name] for name in _SIGNALS.split())
# Which argument is the mode of a new file or folder.
_MODES: Final = {
    NUMBERS[name]: at for name, at in (("open", 2), ("openat", 3), ("creat", 1), ("mkdir", 1), ("mkdirat", 2))
}
# CLONE_VM, VFORK, SETTLS, PARENT_SETTID, CHILD_CLEARTID, CHILD_SETTID: what fork, vfork and posix_spawn use.
_CLONE: Final = 0x100 | 0x4000 | 0x80000 | 0x100000 | 0x200000 | 0x1000000
_FCNTLS: Final = (5, 6, 7, 36, 37, 38, 1031)  # record locks, SETPIPE_SZ
_PRCTLS: Final = (2, 3, 16)  # PR_GET_PDEATHSIG, GET_DUMPABLE, GET_NAME


# What is set before a connect and stays: level, option, size.
_OPTIONS: Final = (
    *((socket.SOL_SOCKET, option, 4) for option in (socket.SO_KEEPALIVE, socket.SO_REUSEADDR)),
    *((socket.SOL_SOCKET, option, 4) for option in (socket.SO_BROADCAST, socket.SO_OOBINLINE)),
    *((socket.SOL_SOCKET, option, 16) for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)),
    (socket.SOL_SOCKET, socket.SO_LINGER, 8),
    *((socket.IPPROTO_TCP, option, 4) for option in (socket.TCP_NODELAY, socket.TCP_KEEPIDLE)),
    *((socket.IPPROTO_TCP, option, 4) for option in (socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4),
)


class Broker:
    """The answers to one enclave's held calls. Takes both descriptors.

    ``memory`` is the process's /proc/self/mem, which it opened before it was sealed: nobody else may look
    into it. ``pid``: its main process.
    """

    def __init__(self, listener: int, memory: int, pid: int, policy: Policy) -> None:
        self._listener = Listener(listener)
        self._memory, self._pid, self._policy = memory, pid, policy
        self._lock = threading.Lock()
        self._sockets: dict[tuple[int, int], socket.socket] = {}  # by process and number; not connected yet
        self._connecting: set[threading.Thread] = set()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake_r = self._wake_w = -1
        self._denied: set[int] = set()
        number = NUMBERS
        self._special: dict[int, Callable[[Notification], None]] = {
            number["clone"]: self._clone,
            number["fcntl"]: self._fcntl,
            number["ioctl"]: lambda call: self._listener.deny(call, errno.ENOTTY),
            number["prctl"]: self._prctl,
            number["prlimit64"]: self._of_itself(0),
            number["setrlimit"]: self._allow,
            number["sched_setaffinity"]: self._of_itself(0),
            number["setpriority"]: self._priority,
            number["socket"]: self._socket,
            number["connect"]: self._connect,
        }

    def start(self) -> None:
        """Answer what is held, in the order in which it came, and all that comes. Once."""
        if self._thread is None:
            self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._thread = threading.Thread(target=self._run, name="enturbo-broker", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End it and let go of everything; what is held after that fails (ENOSYS). May be called again."""
        if self._thread is not None:
            os.write(self._wake_w, b"\0")
            self._thread.join()
            self._thread = None
        self._closing.set()
        with self._lock:
            connecting = list(self._connecting)
        for thread in connecting:
            thread.join()
        self.forget()

    def forget(self) -> None:
        """Close all descriptors; all that is to be done in a forked child of the host."""
        self._listener.close()
        for name in ("_memory", "_wake_r", "_wake_w"):
            fd: int = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)
        for each in self._sockets.values():
            each.close()
        self._sockets.clear()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener.fd, select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        while True:
            for fd, events in poll.poll():
                if fd == self._wake_r:
                    return
                if events & select.POLLIN:
                    call = self._listener.receive()
                    if call is not None:
                        self._answer(call)
                elif events & (select.POLLHUP | select.POLLERR):
                    return  # every process that it was for is gone

    def _answer(self, call: Notification) -> None:
        """Whatever happens here, the call gets one answer and the next one is served."""
        try:
            special = self._special.get(call.number)
            if special is not None:
                special(call)
            elif self._runs(call):
                self._allow(call)
            else:
                self._deny(call)
        except OSError as error:
            self._listener.deny(call, error.errno or errno.EIO)
        except Exception:
            log.exception("the held call %s could not be answered", _NAMES.get(call.number, call.number))
            self._listener.deny(call)

    def _runs(self, call: Notification) -> bool:
        if call.number in _SIGNAL:
            # Before ABI 6 nothing but the number tells whom it would reach.
            return landlock.abi() >= 6 or (call.args[0] == self._pid and call.number != NUMBERS["tkill"])
        mode = _MODES.get(call.number)
        return call.number in _RUN and (mode is None or not call.args[mode] & _SETID)

    def _allow(self, call: Notification) -> None:
        """Let the kernel carry it out, and wait until its thread has been running for that.

        So calls of several threads are carried out in the order in which they were made: when the next one is
        answered this one has begun, and the next one's thread still has to wake up.
        """
        before = _turns_of(call.pid)
        self._listener.allow(call)
        until = time.monotonic() + WAKE_SECONDS
        while _turns_of(call.pid) == before and time.monotonic() < until:
            time.sleep(0)

    def _deny(self, call: Notification) -> None:
        if call.number not in self._denied:
            self._denied.add(call.number)
            name = _NAMES.get(call.number, str(call.number))
            log.info("enclave process %d: %s refused; the policy does not name it", self._pid, name)
        self._listener.deny(call)

    # ---------------------------------------------------------------------------------- plain numbers

    def _decide(self, call: Notification, allowed: bool) -> None:
        if allowed:
            self._allow(call)
        else:
            self._deny(call)

    def _clone(self, call: Notification) -> None:
        flags = call.args[0]
        self._decide(call, flags & 0xFF == signal.SIGCHLD and not flags & ~0xFF & ~_CLONE)

    def _fcntl(self, call: Notification) -> None:
        self._decide(call, call.args[1] & 0xFFFF_FFFF in _FCNTLS)

    def _prctl(self, call: Notification) -> None:
        self._decide(call, call.args[0] & 0xFFFF_FFFF in _PRCTLS)

    def _of_itself(self, at: int) -> Callable[[Notification], None]:
        """Allowed if argument ``at`` names nobody, the thread that calls, or its process."""

        def decide(call: Notification) -> None:
            self._decide(call, call.args[at] & 0xFFFF_FFFF in (0, call.pid, self._pid))

        return decide

    def _priority(self, call: Notification) -> None:
        of_process = call.args[0] & 0xFFFF_FFFF == 0
        self._decide(call, of_process and call.args[1] & 0xFFFF_FFFF in (0, call.pid, self._pid))

    # ---------------------------------------------------------------------------------------- sockets

    def _socket(self, call: Notification) -> None:
        """The host makes it and gives it away; what it keeps tells what to connect in its place."""
        family, kind, protocol = (value & 0xFFFF_FFFF for value in call.args[:3])
        flags = kind & (socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if not any(_fits(target, family, kind & ~flags) for target in self._policy.targets):
            self._deny(call)
            return
        made = socket.socket(family, kind & ~flags, protocol)
        made.setblocking(not flags & socket.SOCK_NONBLOCK)
        process = _process_of(call.pid)
        number = self._listener.give(call, made.fileno(), cloexec=bool(flags & socket.SOCK_CLOEXEC))
        if number < 0:
            made.close()
            return
        with self._lock:
            old = self._sockets.pop((process, number), None)
            self._sockets[process, number] = made
            if len(self._sockets) > KEPT_SOCKETS:
                old = self._sockets.pop(next(iter(self._sockets)))
        if old is not None:
            old.close()

    def _connect(self, call: Notification) -> None:
        number, pointer, length = call.args[0] & 0xFFFF_FFFF, call.args[1], call.args[2] & 0xFFFF_FFFF
        key = _process_of(call.pid), number
        theirs = self._sockets.get(key)
        # Of a forked child there is no memory to be read, and its parent's may hold something else by now.
        if theirs is None or key[0] != self._pid:
            self._deny(call)
            return
        family, address = _parse(os.pread(self._memory, min(length, _ADDRESS_BYTES), pointer))
        if address is None or not self._listener.is_alive(call):
            self._deny(call)
        elif family != theirs.family:
            self._listener.deny(call, errno.EAFNOSUPPORT)
        else:
            # On a thread of its own: names are looked up and hosts answer when they do; other calls wait.
            thread = threading.Thread(target=self._reach, args=(call, key, theirs, address), daemon=True)
            with self._lock:
                begun = len(self._connecting) < CONNECTING
                if begun:
                    self._connecting.add(thread)
            if begun:
                thread.start()
            else:
                self._listener.deny(call, errno.EAGAIN)

    def _may_reach(self, sock: socket.socket, address: Address) -> bool:
        for target in self._policy.targets:
            if _fits(target, sock.family, sock.type):
                with contextlib.suppress(OSError):
                    if address in target.resolve():
                        return True
        return False

    def _reach(
        self, call: Notification, key: tuple[int, int], theirs: socket.socket, address: Address
    ) -> None:
        """Connect a socket that they have no part in, with an end to it, and put it where theirs is."""
        error, blocking = errno.EPERM, True
        try:
            if not self._may_reach(theirs, address):
                raise PermissionError(errno.EPERM, "the policy does not name it")
            blocking = os.get_blocking(theirs.fileno())
            with _like(theirs) as ours:  # ours is closed: the peer must see it when they close theirs
                error = self._connect_ours(ours, address, wait=blocking)
                ours.setblocking(blocking)
                under_way = error == errno.EINPROGRESS and not blocking
                if (not error or under_way) and not self._listener.put(
                    call, ours.fileno(), key[1], cloexec=True
                ):
                    error = errno.EBADF
        except OSError as failure:
            error = failure.errno if failure.errno and failure.errno > 0 else errno.EINVAL
        with self._lock:
            if error in (0, errno.EINPROGRESS) and self._sockets.get(key) is theirs:
                self._sockets.pop(key).close()  # it is another now; after a failure they may try again
            self._connecting.discard(threading.current_thread())
        if error:
            self._listener.deny(call, error)
        else:
            self._listener.answer(call, 0)

    def _connect_ours(self, ours: socket.socket, address: Address, *, wait: bool) -> int:
        """0 or an errno; ETIMEDOUT past CONNECT_SECONDS, ECANCELED when the broker is closed."""
        until = time.monotonic() + CONNECT_SECONDS
        error = ours.connect_ex(address)
        poll = select.poll()
        poll.register(ours, select.POLLOUT)
        while wait and error in (errno.EINPROGRESS, errno.EAGAIN):
            if self._closing.is_set():
                return errno.ECANCELED
            if time.monotonic() > until:
                return errno.ETIMEDOUT
            if error == errno.EAGAIN:  # a Unix socket whose listener has as many as it takes
                self._closing.wait(_SLICE)
                error = ours.connect_ex(address)
            elif poll.poll(_SLICE * 1000):
                return ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return 0 if error == errno.EISCONN else error


def _like(theirs: socket.socket) -> socket.socket:
    """A socket of the same kind with the same options, that does not block."""
    ours = socket.socket(theirs.family, theirs.type, theirs.proto)
    try:
        ours.setblocking(False)
        for level, option, size in _OPTIONS:
            with contextlib.suppress(OSError):  # not one of this kind
                value = theirs.getsockopt(level, option, size)
                if value != ours.getsockopt(level, option, size):
                    ours.setsockopt(level, option, value)
    except BaseException:
        ours.close()
        raise
    return ours


def _fits(target: Target, family: int, kind: int) -> bool:
    """Whether a socket of this family and kind is for such a target."""
    if isinstance(target.address, str):
        return family == socket.AF_UNIX
    return family in (socket.AF_INET, socket.AF_INET6) and kind == target.kind


def _parse(data: bytes) -> tuple[int, Address | None]:
    """Family and socket address: host and port, or the path of a Unix socket; None: neither."""
    if len(data) < 2:
        return 0, None
    (family,) = struct.unpack_from("<H", data)
    if family == socket.AF_INET and len(data) >= 8:
        return family, (socket.inet_ntop(family, data[4:8]), int.from_bytes(data[2:4], "big"))
    if family == socket.AF_INET6 and len(data) >= 24:
        return family, (socket.inet_ntop(family, data[8:24]), int.from_bytes(data[2:4], "big"))
    if family == socket.AF_UNIX and len(data) > 2 and data[2]:
        return family, os.path.normpath(os.fsdecode(data[2:].split(b"\0")[0]))
    return family, None


def _turns_of(thread: int) -> bytes:
    """How often a thread got a processor; empty when it is gone, or the kernel does not count."""
    try:
        with open(f"/proc/{thread}/schedstat", "rb", buffering=0) as file:
            return file.readall().split()[2]
    except (OSError, IndexError):
        return b""


def _process_of(thread: int) -> int:
    """The process that a thread belongs to; descriptors are a process's."""
    with open(f"/proc/{thread}/status", "rb", buffering=0) as file:
        for line in file.readall().splitlines():
            if line.startswith(b"Tgid:"):
                return int(line.split()[1])
    raise ProcessLookupError(errno.ESRCH, f"thread {thread} is gone")
