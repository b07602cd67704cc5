"""userfaultfd: the kernel lets no access to a page through before its flags say so.

    EPCM flag                   userfaultfd
    VALID set                   UFFDIO_CONTINUE: the EPC's page is mapped; before, who touches it sleeps
    WRLOCK set, with it         UFFDIO_CONTINUE with WP: mapped and write-protected in one step
    WRLOCK cleared              UFFDIO_WRITEPROTECT off, which wakes the writers that sleep
    REJECTED                    UFFDIO_POISON: what is not mapped yet raises SIGBUS
    VERIFIED                    UFFDIO_UNREGISTER: all of it is as if it had never been gated

An enclave registers its own mapping, gives the descriptor away and keeps none; mappings of host and workers
are untouched. Any holder of the descriptor may issue any of these. When the last one closes it, what sleeps
is let through: so at least two trusted processes hold it while an enclave lives
(:mod:`enturbo.runtime.pager`).

Source: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst. Standard library
only; the zygote imports this module.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final, NamedTuple

from . import libc
from .layout import PAGE_SIZE

_SYSCALL: Final = 323  # userfaultfd(2) on x86-64
_USER_MODE_ONLY: Final = 1

_API: Final = 0xC018AA3F
_REGISTER: Final = 0xC020AA00
_UNREGISTER: Final = 0x8010AA01
_WAKE: Final = 0x8010AA02
_WRITEPROTECT: Final = 0xC018AA06
_CONTINUE: Final = 0xC020AA07
_POISON: Final = 0xC020AA08

MODE_MISSING: Final = 1
MODE_WP: Final = 2
MODE_MINOR: Final = 4

FEATURE_MINOR_SHMEM: Final = 1 << 10
FEATURE_WP_SHMEM: Final = 1 << 12
FEATURE_POISON: Final = 1 << 14
NEEDED: Final = FEATURE_MINOR_SHMEM | FEATURE_WP_SHMEM

_CONTINUE_WP: Final = 2
_API_VERSION: Final = 0xAA
_EVENT_PAGEFAULT: Final = 0x12
_FLAG_WP: Final = 2
_MESSAGE = struct.Struct("<B7xQQI4x")
_FAULTS_AT_ONCE: Final = 64
_PATIENCE: Final = 1000  # retries while the address space is being changed by a fork


class Fault(NamedTuple):
    """Somebody sleeps at ``address``. ``protected``: a store to a page that is mapped and write-protected."""

    address: int
    protected: bool


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Api(ctypes.Structure):
    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class _Register(ctypes.Structure):
    _fields_ = (*_Range._fields_, ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class _Protect(ctypes.Structure):
    _fields_ = (*_Range._fields_, ("mode", ctypes.c_uint64))


class _Moved(ctypes.Structure):
    """The arguments of CONTINUE and POISON; ``done``: bytes, or minus an errno."""

    _fields_ = (*_Range._fields_, ("mode", ctypes.c_uint64), ("done", ctypes.c_int64))


def _open(flags: int) -> int:
    return libc.syscall(_SYSCALL, os.O_CLOEXEC | os.O_NONBLOCK | flags)


def probe(*, user_mode_only: bool) -> int:
    """The features that a descriptor of this kind would have; 0 where there is none. Changes nothing."""
    if platform.machine() != "x86_64":
        return 0
    try:
        fd = _open(_USER_MODE_ONLY if user_mode_only else 0)
    except OSError:
        return 0
    try:
        api = _Api(_API_VERSION, 0, 0)
        return int(api.features) if libc.ioctl(fd, _API, api) == 0 else 0
    finally:
        os.close(fd)


class Userfaultfd:
    """A descriptor, and what its holder may do with it. Addresses and lengths are bytes, whole pages.

    Errors that say "the enclave is gone" (or lifted the gate) are not raised: there is nobody left to serve.
    """

    def __init__(self, fd: int) -> None:
        """Takes ``fd``, which was made by :meth:`create` in whatever process."""
        self.fd = fd

    @classmethod
    def create(cls, features: int, *, user_mode_only: bool) -> Userfaultfd:
        """For the calling process's own memory, with ``features`` of those that :func:`probe` found.

        ``user_mode_only``: needs no privilege; system calls that touch a gated page then fail with EFAULT
        instead of sleeping. Raises OSError.
        """
        fd = _open(_USER_MODE_ONLY if user_mode_only else 0)
        error = libc.ioctl(fd, _API, _Api(_API_VERSION, features, 0))
        if error:
            os.close(fd)
            raise OSError(error, f"UFFDIO_API: {os.strerror(error)}")
        return cls(fd)

    def register(self, address: int, length: int, mode: int) -> None:
        """From now on accesses to pages that are not mapped here sleep. Raises OSError."""
        error = libc.ioctl(self.fd, _REGISTER, _Register(address, length, mode, 0))
        if error:
            raise OSError(error, f"UFFDIO_REGISTER of {length} bytes: {os.strerror(error)}")

    def unregister(self, address: int, length: int) -> None:
        """The range is as if it had never been registered; who sleeps on it goes on.

        Everybody is woken once more afterwards: the kernel wakes before it excludes faults that run under a
        lock of their mapping alone (seen on Linux 6.18), and one that comes in between would sleep for ever.
        """
        libc.ioctl(self.fd, _UNREGISTER, _Range(address, length))
        libc.ioctl(self.fd, _WAKE, _Range(address, length))

    def map(self, address: int, length: int, *, protect: bool) -> bool:
        """Map pages that are in the segment, write-protected or not, and wake who sleeps on them.

        Pages that are mapped already stay as they are. False when the enclave is gone.
        """
        return self._move(_CONTINUE, address, length, _CONTINUE_WP if protect else 0)

    def poison(self, address: int, length: int) -> bool:
        """Accesses to pages that are not mapped raise SIGBUS from now on. False when the enclave is gone."""
        return self._move(_POISON, address, length, 0)

    def allow_stores(self, address: int, length: int) -> bool:
        """Take the write protection off, and wake who sleeps on it. False when the enclave is gone."""
        argument = _Protect(address, length, 0)
        for _ in range(_PATIENCE):
            error = libc.ioctl(self.fd, _WRITEPROTECT, argument)
            if error != errno.EAGAIN:
                return error == 0
        return False

    def faults(self) -> list[Fault]:
        """Who sleeps and was not told yet; empty when nobody. The descriptor does not block."""
        try:
            data = os.read(self.fd, _MESSAGE.size * _FAULTS_AT_ONCE)
        except (BlockingIOError, OSError):
            return []
        found = []
        for at in range(0, len(data) - _MESSAGE.size + 1, _MESSAGE.size):
            event, flags, address, _ = _MESSAGE.unpack_from(data, at)
            if event == _EVENT_PAGEFAULT:
                found.append(Fault(address, bool(flags & _FLAG_WP)))
        return found

    def close(self) -> None:
        """Let go of it. May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _move(self, request: int, address: int, length: int, mode: int) -> bool:
        end, retries = address + length, 0
        while address < end:
            argument = _Moved(address, end - address, mode, 0)
            error = libc.ioctl(self.fd, request, argument)
            if argument.done > 0:
                address += argument.done  # the rest, if any, begins with a page that stopped it
                retries = 0
            elif error == errno.EEXIST:
                address += PAGE_SIZE
            elif error == errno.EAGAIN and retries < _PATIENCE:
                retries += 1
            elif error:
                return False
        return True
