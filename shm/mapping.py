"""Shared mappings at an address that allows huge pages, released when the last view of them is gone.

The kernel maps two MiB with one page-table entry only where address and file offset agree modulo two MiB;
:mod:`mmap` takes whatever address comes, so mappings are made by libc inside a larger reservation.
"""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from typing import Final

from . import libc
from .layout import PAGE_SIZE

HUGE_PAGE: Final = 2 << 20  # bytes; on every processor for which anything here is tried


def map_shared(fd: int, size: int, *, writable: bool = True) -> memoryview:
    """Map ``size`` bytes (at least one) of ``fd``, shared; the caller keeps the descriptor. Raises OSError.

    The view, and every view made of it, keeps the mapping alive; with the last one it is gone.
    """
    protection = libc.PROT_READ | (libc.PROT_WRITE if writable else 0)
    address = _aligned(fd, size, protection)
    owner = (ctypes.c_ubyte * size).from_address(address)
    # At exit the kernel unmaps; a finalizer then could pull memory away under a thread that still runs.
    weakref.finalize(owner, libc.munmap, address, size).atexit = False
    view = memoryview(owner).cast("B")
    return view if writable else view.toreadonly()


def _aligned(fd: int, size: int, protection: int) -> int:
    if size < HUGE_PAGE:
        return libc.mmap(None, size, protection, libc.MAP_SHARED, fd)
    address = reserve(size, 0)
    try:
        return libc.mmap(address, size, protection, libc.MAP_SHARED | libc.MAP_FIXED, fd)
    except OSError:
        libc.munmap(address, -(-size // PAGE_SIZE) * PAGE_SIZE)
        raise


def reserve(size: int, remainder: int, at: int | None = None) -> int:
    """Reserve address space for ``size`` bytes, inaccessible; the address is ``remainder`` modulo two MiB.

    ``remainder``: a multiple of the page size. ``at``: behind this address, a multiple of two MiB, and
    nowhere else. Raises OSError.
    """
    size = -(-size // PAGE_SIZE) * PAGE_SIZE
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
    if at is not None:
        return libc.mmap(at + remainder, size, libc.PROT_NONE, flags | libc.MAP_FIXED_NOREPLACE)
    base = libc.mmap(None, size + HUGE_PAGE, libc.PROT_NONE, flags)
    address = base + (remainder - base) % HUGE_PAGE
    if address > base:
        libc.munmap(base, address - base)
    libc.munmap(address + size, base + HUGE_PAGE - address)
    return address


def allocate_huge(fd: int, view: memoryview, start: int, count: int) -> bool:
    """Allocate ``count`` huge pages of a fresh shared-memory file, mapped by ``view``, from ``start`` on.

    False where none are granted: an older kernel, switched off, memory too fragmented. The kernel collapses
    only what has a page in it, so each gets a first one, allocated by descriptor and then touched. Raises
    OSError (ENOSPC) if even those do not fit.
    """
    try:
        for at in range(start, start + count * HUGE_PAGE, HUGE_PAGE):
            os.posix_fallocate(fd, at, PAGE_SIZE)
            view[at] = 0
        libc.madvise(address_of(view) + start, count * HUGE_PAGE, libc.MADV_COLLAPSE)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return False
    return True


def address_of(view: memoryview) -> int:
    """Where a writable view begins."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def populate(view: memoryview) -> bool:
    """Have all pages of a writable view in this process's page tables; False where the kernel cannot.

    For memory that is allocated: elsewhere this would allocate it (and fail, not kill, if there is no room).
    """
    try:
        libc.madvise(address_of(view), len(view), libc.MADV_POPULATE_WRITE)
    except OSError:  # before Linux 5.14
        return False
    return True
