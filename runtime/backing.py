"""The files behind an image: what lets every process copy its pages, not the one alone that made it.

An image that was loaded has the file that it was loaded from. One that was built has a memfd, sealed: nobody,
not even its maker, can change or shorten it any more, so workers may map it. An image of hand-made regions
has none; the host copies it. Besides, regions may stand in layers: files that several images share.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
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

    It closes with its last user at the latest.
    """

    def __init__(
        self, fd: int, mapping: mmap.mmap | memoryview | None = None, digest: str | None = None
    ) -> None:
        """Takes the descriptor; ``mapping``, of all of it, is closed with it if nobody has a view of it.
        ``digest``: what names it in a store."""
        self.digest: Final = digest
        self._fd, self._mapping = fd, mapping
        # Not __del__: while that runs, a weak reference can still bring the object back, in another thread.
        self._end = weakref.finalize(self, _close, fd, mapping)
        self._end.atexit = False
        self._lent: weakref.ref[Backing] | None = None

    @property
    def fd(self) -> int:
        """Open for reading; -1 when closed."""
        return self._fd if self._end.alive else -1

    @property
    def view(self) -> memoryview:
        """All of a file that was mapped. Raises ValueError if it was not, or is closed."""
        if self._mapping is None:
            raise ValueError("this file is not mapped")
        return memoryview(self._mapping)

    def lend(self) -> Backing:
        """The file on a descriptor of its own, which this one's :meth:`close` leaves open. All who borrow at
        a time have the same one, and it closes with the last of them. Raises OSError."""
        lent = None if self._lent is None else self._lent()
        if lent is None:
            # Two threads at once make two, which is as good.
            lent = Backing(os.dup(self.fd))
            self._lent = weakref.ref(lent)
        return lent

    def close(self) -> None:
        """Close the file. The mapping goes with its last view. May be called again."""
        self._end()


def _close(fd: int, mapping: mmap.mmap | memoryview | None) -> None:
    os.close(fd)
    with contextlib.suppress(BufferError):
        if isinstance(mapping, memoryview):
            mapping.release()
        elif mapping is not None:
            mapping.close()


def pack(regions: Sequence[Region]) -> tuple[list[Region], Backing | None]:
    """The same regions with their contents in one sealed memfd; as they were where there is nothing to pack.

    What stands in a layer stays there. Raises OSError where the kernel has no memfd.
    """
    places: list[int | None] = []
    pages = 0
    for region in regions:
        size = 0 if region.content is None or region.layer else memoryview(region.content).nbytes
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
