"""The file behind an image: what lets every process copy its pages, not the one alone that made it.

An image that was loaded has the file that it was loaded from. One that was built has a memfd, sealed: nobody,
not even its maker, can change or shorten it any more, so workers may map it. An image of hand-made regions
has none; the host copies it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..shm.layout import PAGE_SIZE
from ..shm.mapping import HUGE_PAGE, allocate_huge, map_shared
from ..workers.copying import copy_into
from .region import Region

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Backing:
    """A file that holds regions' contents, each from a page on, zero-padded to whole pages.

    ``fd`` is open for reading; -1 when closed.
    """

    def __init__(self, fd: int, mapping: mmap.mmap | None = None) -> None:
        """Takes the descriptor; ``mapping`` is closed with it if nobody has a view of it."""
        self.fd = fd
        self._mapping = mapping

    def close(self) -> None:
        """Close the file. The mapping goes with its last view. May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with contextlib.suppress(BufferError):
                mapping.close()

    def __del__(self) -> None:
        self.close()


def pack(regions: Sequence[Region]) -> tuple[list[Region], Backing | None]:
    """The same regions with their contents in one sealed memfd; as they were where there is nothing to pack.

    Raises OSError where the kernel has no memfd.
    """
    places: list[int | None] = []
    pages = 0
    for region in regions:
        size = 0 if region.content is None else memoryview(region.content).nbytes
        places.append(pages if size else None)
        pages += -(-size // PAGE_SIZE)
    if not pages:
        return list(regions), None
    size = pages * PAGE_SIZE
    fd = os.memfd_create("enturbo-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        _write(fd, size, regions, places)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        backing = Backing(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(fd)
    view = map_shared(backing.fd, size, writable=False)
    return [
        region if place is None else _moved(region, view, place)
        for region, place in zip(regions, places, strict=True)
    ], backing


def _moved(region: Region, view: memoryview, place: int) -> Region:
    assert region.content is not None
    at = place * PAGE_SIZE
    content = view[at : at + memoryview(region.content).nbytes]
    return replace(region, content=content, file_page=place)


def _write(fd: int, size: int, regions: Sequence[Region], places: Sequence[int | None]) -> None:
    """Fill the memfd, in huge pages where they are granted: readers then need few page-table entries."""
    view = map_shared(fd, size)
    if size >= HUGE_PAGE:
        allocate_huge(fd, view, 0, size // HUGE_PAGE)
    for region, place in zip(regions, places, strict=True):
        if place is not None and region.content is not None:
            with memoryview(region.content) as raw, raw.cast("B") as content:
                copy_into(view[place * PAGE_SIZE :], content)
    view.release()  # the last view: a file that is mapped for writing cannot be sealed
