"""Shared-memory segments: created nameless, allocated before use, handed on by descriptor.

A segment is made by :class:`multiprocessing.shared_memory.SharedMemory`, opened once more by descriptor and
unlinked at once. From then on it has no name: nothing is left in ``/dev/shm`` whatever dies, and nobody can
attach to it by guessing. Its pages are allocated before anybody touches them, so that a full ``/dev/shm`` is
an error here and never a SIGBUS in whoever writes first: as huge pages where the kernel grants them, which is
several times faster and leaves every process one page-table entry in 512 to fill, else by
``posix_fallocate``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from multiprocessing.shared_memory import SharedMemory
from typing import Final

from .errors import EnturboError, SharedMemoryFull
from .layout import PAGE_SIZE
from .mapping import HUGE_PAGE, allocate_huge, map_shared

SHM_DIRECTORY: Final = "/dev/shm"
ALLOCATE_STEP: Final = 32 << 20  # bytes; 2 to 10 ms each, more where the machine itself meets them first


class Segment:
    """One mapped segment. ``view`` is its bytes, ``fd`` a descriptor that this object owns."""

    def __init__(self, fd: int, size: int) -> None:
        """Map ``size`` bytes of ``fd`` read-write and take ownership of the descriptor."""
        self.fd = fd
        self.size = size
        self.allocated = 0  # bytes from the start that are safe to touch
        self.huge = 0  # bytes of these that are huge pages, as far as this process has asked for them
        self._ask_for_huge = size >= HUGE_PAGE
        self.view = map_shared(fd, size)

    @classmethod
    def create(cls, size: int, *, allocate: bool = True) -> Segment:
        """A new zeroed segment of at least ``size`` bytes (rounded up to pages).

        With ``allocate=False`` the caller runs :meth:`allocate_step` until it returns False, before the
        bytes beyond ``allocated`` are touched. Raises :class:`SharedMemoryFull`.
        """
        size = max(PAGE_SIZE, -(-size // PAGE_SIZE) * PAGE_SIZE)
        check_room(size)
        named = SharedMemory(create=True, size=size)
        try:
            fd = os.open(f"{SHM_DIRECTORY}/{named.name.lstrip('/')}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            named.close()
            named.unlink()
        segment = cls(fd, size)
        try:
            while allocate and segment.allocate_step():
                pass
        except BaseException:
            segment.close()
            raise
        return segment

    @classmethod
    def attach(cls, fd: int, size: int) -> Segment:
        """Map a segment that another process created and allocated; takes the descriptor."""
        segment = cls(fd, size)
        segment.allocated = size
        return segment

    def allocate_step(self) -> bool:
        """Allocate the next stretch; False when all of the segment is allocated."""
        length = min(ALLOCATE_STEP, self.size - self.allocated)
        if length <= 0:
            return False
        try:
            if self._ask_for_huge:
                count = length // HUGE_PAGE
                # Once refused, no more are asked for.
                self._ask_for_huge = allocate_huge(self.fd, self.view, self.allocated, count)
                self.huge += count * HUGE_PAGE if self._ask_for_huge else 0
            # Nothing is left to do where huge pages were granted.
            os.posix_fallocate(self.fd, self.allocated, length)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SharedMemoryFull(self.size, *room()) from error
            raise
        self.allocated += length
        return self.allocated < self.size

    def description(self) -> int:
        """A new read-write open file description: locks taken on it exclude those of all others."""
        return reopen(self.fd, os.O_RDWR)

    def read_only(self) -> int:
        """A new descriptor that can be mapped for reading alone."""
        return reopen(self.fd, os.O_RDONLY)

    def close(self) -> None:
        """Give the descriptor back and unmap. Twice is fine.

        Views that somebody still holds keep the mapping (and nothing else) until they are gone.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        view, self.view = self.view, memoryview(b"")
        with contextlib.suppress(BufferError):
            view.release()


def reopen(fd: int, flags: int) -> int:
    """Open the file behind ``fd`` once more: a description of its own, close-on-exec."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def room() -> tuple[int, int]:
    """(free, total) bytes of ``/dev/shm``."""
    try:
        stat = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        raise EnturboError(f"{SHM_DIRECTORY} is needed for shared memory: {error}") from error
    return stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize


def check_room(size: int) -> None:
    """Raise :class:`SharedMemoryFull` at once when ``size`` bytes cannot fit."""
    free, total = room()
    if size > free:
        raise SharedMemoryFull(size, free, total)
