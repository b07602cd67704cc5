"""The few C library calls that Python does not offer, through ctypes.

Python's :mod:`mmap` keeps a duplicate of the descriptor it maps, and a descriptor of the EPC that stays open
would let an enclave map other pages, or its own with other rights. It also cannot be told an address, and
huge pages need an aligned one. So mappings are made here. Standard library only; the zygote imports it.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000

MADV_DONTFORK: Final = 10
MADV_NOHUGEPAGE: Final = 15
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25

PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
PR_SET_CHILD_SUBREAPER: Final = 36

_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.syscall.restype = ctypes.c_long


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def mmap(address: int | None, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map ``length`` bytes and return the address. Raises OSError. See mmap(2)."""
    result = _libc.mmap(address, length, protection, flags, fd, offset)
    if result == _MAP_FAILED or result is None:
        raise _error(f"mmap of {length} bytes")
    return int(result)


def munmap(address: int, length: int) -> None:
    """Unmap whole pages. Raises OSError. See munmap(2)."""
    if _libc.munmap(address, length) != 0:
        raise _error(f"munmap of {length} bytes")


def mprotect(address: int, length: int, protection: int) -> None:
    """Change the protection of mapped pages. Raises OSError. See mprotect(2)."""
    if _libc.mprotect(address, length, protection) != 0:
        raise _error(f"mprotect of {length} bytes")


def madvise(address: int, length: int, advice: int) -> None:
    """Advise the kernel about mapped pages. Raises OSError. See madvise(2)."""
    if _libc.madvise(address, length, advice) != 0:
        raise _error(f"madvise {advice} of {length} bytes")


def ioctl(fd: int, request: int, argument: ctypes.Structure | ctypes.c_uint64) -> int:
    """An ioctl(2) that fills ``argument``: 0, or the errno."""
    return 0 if _libc.ioctl(fd, request, ctypes.byref(argument)) == 0 else ctypes.get_errno()


def ioctl_result(fd: int, request: int, argument: ctypes.Structure) -> int:
    """An ioctl(2) that returns something: that, or -1."""
    return int(_libc.ioctl(fd, request, ctypes.byref(argument)))


def ioctl_value(fd: int, request: int, value: int) -> int:
    """An ioctl(2) with a plain number: 0, or the errno."""
    return 0 if _libc.ioctl(fd, request, ctypes.c_void_p(value)) == 0 else ctypes.get_errno()


def syscall(number: int, *arguments: int) -> int:
    """A system call that has no wrapper, with plain numbers. Raises OSError. See syscall(2)."""
    result = int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))
    if result < 0:
        raise _error(f"system call {number}")
    return result


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process. Raises OSError. See prctl(2)."""
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise _error(f"prctl {option}")


def set_name(name: str) -> None:
    """Name this process for ``ps`` and ``top`` (at most 15 bytes)."""
    text = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(text))


def memory(address: int, length: int) -> memoryview:
    """A writable view of ``length`` mapped bytes at ``address``. It does not keep the mapping alive."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


def address_of(view: memoryview) -> int:
    """The address of the first byte of a writable view."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
