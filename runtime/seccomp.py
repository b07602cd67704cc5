"""seccomp: binding a process to a filter, and the host's end of the calls that it holds.

What the filter decides stands in :mod:`enturbo.runtime.filter`. A held call sleeps in the kernel until the
holder of the *listener* answers its notification; before VERIFIED nobody reads any.

Source: seccomp(2), seccomp_unotify(2), Documentation/userspace-api/seccomp_filter.rst. Standard library only;
the zygote imports this module.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import Final, NamedTuple

from ..shm import libc

_SECCOMP: Final = 317
_SET_MODE_FILTER: Final = 1
_GET_ACTION_AVAIL: Final = 2
# NEW_LISTENER | TSYNC | TSYNC_ESRCH | WAIT_KILLABLE_RECV: all threads; and no signal makes a held call that
# the host has begun to answer start anew.
_FLAGS: Final = 8 | 1 | 16 | 32

_NOTIFY: Final = 0x7FC0_0000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes) -> int:
    """Bind all threads of this process to ``program`` for good; returns the listener. Raises OSError.

    From here on only what is free may be called until somebody outside has the listener.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    argument = _Program(len(program) // 8, ctypes.addressof(buffer))
    return libc.syscall(_SECCOMP, _SET_MODE_FILTER, _FLAGS, ctypes.addressof(argument))


def probe() -> bool:
    """Whether the kernel has notifications with all that is needed here. Changes nothing."""
    if platform.machine() != "x86_64":
        return False
    action = ctypes.c_uint32(_NOTIFY)
    try:
        libc.syscall(_SECCOMP, _GET_ACTION_AVAIL, 0, ctypes.addressof(action))
        libc.syscall(_SECCOMP, _SET_MODE_FILTER, _FLAGS, 0)
    except OSError as error:
        return error.errno == errno.EFAULT  # the flags are known, and then there was no program
    return False


class Notification(NamedTuple):
    """A held call: its cookie, the thread that sleeps, the call's number and its six arguments."""

    id: int
    pid: int
    number: int
    args: tuple[int, ...]


_RECV: Final = 0xC0502100
_SEND: Final = 0xC0182101
_ID_VALID: Final = 0x40082102
_ADDFD: Final = 0x40182103
_SET_FLAGS: Final = 0x40082104
_SYNC_WAKE_UP: Final = 1
_CONTINUE: Final = 1
_ADDFD_SETFD: Final = 1
_ADDFD_SEND: Final = 2


class _Received(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("nr", ctypes.c_int32),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    )


class _Answer(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("val", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    )


class _Added(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("srcfd", ctypes.c_uint32),
        ("newfd", ctypes.c_uint32),
        ("newfd_flags", ctypes.c_uint32),
    )


class Listener:
    """The host's end of a sealed process. Takes the descriptor.

    A call whose thread was killed meanwhile is gone; answering it is no error. When the descriptor is closed
    held calls fail with ENOSYS, and so do all later ones.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # An answer costs a tenth when the sleeper then runs on our core (Linux 6.6; no matter before).
        libc.ioctl_value(fd, _SET_FLAGS, _SYNC_WAKE_UP)

    def receive(self) -> Notification | None:
        """The oldest call that nobody has received; waits for one. None: its thread is gone, or all are.

        Poll the descriptor first: it is readable when there is one.
        """
        received = _Received()
        if libc.ioctl(self.fd, _RECV, received):
            return None
        return Notification(received.id, received.pid, received.nr, tuple(received.args))

    def is_alive(self, call: Notification) -> bool:
        """Whether its thread still waits: only then does ``pid`` mean that thread."""
        return libc.ioctl(self.fd, _ID_VALID, ctypes.c_uint64(call.id)) == 0

    def allow(self, call: Notification) -> None:
        """Let the kernel carry it out, with whatever its pointers point to by then."""
        libc.ioctl(self.fd, _SEND, _Answer(call.id, 0, 0, _CONTINUE))

    def answer(self, call: Notification, value: int) -> None:
        """It returns ``value``; the kernel does nothing."""
        libc.ioctl(self.fd, _SEND, _Answer(call.id, value, 0, 0))

    def deny(self, call: Notification, number: int = errno.EPERM) -> None:
        """It fails with the errno ``number``."""
        libc.ioctl(self.fd, _SEND, _Answer(call.id, 0, -number, 0))

    def give(self, call: Notification, fd: int, *, cloexec: bool) -> int:
        """The process gets a copy of our ``fd``, and the call returns its number; -1 if it is gone."""
        flags = 0o2000000 if cloexec else 0
        added = _Added(call.id, _ADDFD_SEND, fd, 0, flags)
        return libc.ioctl_result(self.fd, _ADDFD, added)

    def put(self, call: Notification, fd: int, number: int, *, cloexec: bool) -> bool:
        """A copy of our ``fd`` becomes descriptor ``number`` of the process, instead of what that was."""
        flags = 0o2000000 if cloexec else 0
        return libc.ioctl_result(self.fd, _ADDFD, _Added(call.id, _ADDFD_SETFD, fd, number, flags)) >= 0

    def close(self) -> None:
        """Let go of it. May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
