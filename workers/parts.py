"""An image's regions as a bounded walk of parts, each of one kind that a hasher takes whole.

A region may describe 31 million pages and an image may consist of ten thousand one-page regions, so neither
pages nor regions are the unit that :mod:`enturbo.workers.stream` works in:

    EaddPart    pages of which only the EADD is measured: three numbers, however many they are
    FillPart    measured pages that all hold one repeated u32
    DataPart    measured pages hashed where the region's content lies, cut into windows
                or a batch of many small regions, copied together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..shm.dtypes import EPCM_DTYPE
from ..shm.layout import ALL_CHUNKS, PAGE_SIZE
from .sha256 import Pages

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WINDOW: Final = 4096  # pages; a multiple of 2 * MAX_BLOCK, so that a window holds both domains of a pair
STAGE: Final = 512  # pages
SMALL: Final = 64  # pages; fewer are copied into a batch rather than hashed on their own


class StreamRegion(Protocol):
    """What measuring needs to know of a region.

    ``offset`` in bytes; ``flags`` SECINFO.FLAGS; ``chunks`` the mask of measured chunks; ``content`` its
    bytes, zero-padded to ``page_count`` pages, or None: then ``fill``, a u32, is repeated.
    """

    @property
    def offset(self) -> int: ...
    @property
    def page_count(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def content(self) -> ReadableBuffer | None: ...
    @property
    def fill(self) -> int: ...


class EaddPart(NamedTuple):
    """Pages ``first`` .. ``first`` + ``page_count`` - 1 of the stream, from linear page ``linear`` on."""

    first: int
    page_count: int
    linear: int
    flags: int


class FillPart(NamedTuple):
    """The same, with measured chunks of pages that repeat ``fill``."""

    first: int
    page_count: int
    linear: int
    flags: int
    chunks: int
    fill: int


class DataPart(NamedTuple):
    """The same, page ``first`` + i being page i of ``pages``. Valid until the next part is asked for."""

    first: int
    page_count: int
    pages: Pages


Part = EaddPart | FillPart | DataPart


class _Piece(NamedTuple):
    """A run of pages from one source: ``data`` (zero-padded), or else ``fill``."""

    page_count: int
    linear: int
    flags: int
    chunks: int
    data: memoryview | None
    fill: int


def parts(regions: Sequence[StreamRegion]) -> Iterator[Part]:
    """The pages of ``regions`` in order. Raises ValueError for a region that makes no sense."""
    stage = _Stage()
    window = np.zeros(WINDOW, EPCM_DTYPE)
    first = 0
    for region in regions:
        for piece in _pieces(region):
            if piece.page_count <= SMALL:
                if stage.count + piece.page_count > STAGE:
                    yield stage.take(first)
                stage.add(piece)
            else:
                if stage.count:
                    yield stage.take(first)
                yield from _large(piece, first, window)
            first += piece.page_count
    if stage.count:
        yield stage.take(first)


def _pieces(region: StreamRegion) -> Iterator[_Piece]:
    """Whole pages of content, the last page of it, what is left."""
    linear, misaligned = divmod(region.offset, PAGE_SIZE)
    if misaligned or linear < 0 or region.page_count < 0 or not 0 <= region.chunks <= ALL_CHUNKS:
        raise ValueError(
            f"no region: offset {region.offset:#x}, {region.page_count} pages, chunks {region.chunks:#x}"
        )
    done = 0
    fill = region.fill
    if region.content is not None and region.chunks:
        fill = 0
        raw = memoryview(region.content)
        if raw.nbytes > region.page_count * PAGE_SIZE:
            raise ValueError(f"{raw.nbytes} bytes of content in {region.page_count} pages")
        for data in _views(raw):
            count = -(-data.nbytes // PAGE_SIZE)
            yield _Piece(count, linear + done, region.flags, region.chunks, data, 0)
            done += count
    elif region.content is not None:
        fill = 0
    if done < region.page_count:
        yield _Piece(region.page_count - done, linear + done, region.flags, region.chunks, None, fill)


def _views(raw: memoryview) -> Iterator[memoryview]:
    """``raw`` as whole pages in place, then the short last page; copied by and by if it is not contiguous."""
    if not raw.c_contiguous:
        if raw.ndim != 1 or raw.itemsize != 1:
            raise ValueError("content must be C-contiguous or one-dimensional bytes")
        for at in range(0, len(raw), SMALL * PAGE_SIZE):
            yield memoryview(raw[at : at + SMALL * PAGE_SIZE].tobytes())
        return
    view = raw.cast("B")
    whole = len(view) - len(view) % PAGE_SIZE
    if whole:
        yield view[:whole]
    if whole < len(view):
        yield view[whole:]


def _large(piece: _Piece, first: int, window: NDArray[Any]) -> Iterator[Part]:
    count, linear, flags, chunks, data, fill = piece
    if not chunks:
        yield EaddPart(first, count, linear, flags)
        return
    if data is None:
        yield FillPart(first, count, linear, flags, chunks, fill)
        return
    window["flags"] = flags
    window["chunks"] = chunks
    done = 0
    while done < count:
        length = min(count - done, WINDOW - (first + done) % WINDOW)
        window["linear"][:length] = np.arange(linear + done, linear + done + length, dtype=np.int64)
        pages = Pages(window[:length].data, data[done * PAGE_SIZE : (done + length) * PAGE_SIZE])
        yield DataPart(first + done, length, pages)
        done += length


class _Stage:
    """Small pieces copied together."""

    def __init__(self) -> None:
        self._entries = np.zeros(STAGE, EPCM_DTYPE)
        self._data = bytearray(0)
        self.count = 0

    def add(self, piece: _Piece) -> None:
        """Copy one piece behind those that are there."""
        at, self.count = self.count, self.count + piece.page_count
        entries = self._entries[at : self.count]
        entries["flags"], entries["chunks"] = piece.flags, piece.chunks
        entries["linear"] = np.arange(piece.linear, piece.linear + piece.page_count, dtype=np.int64)
        if not self._data:
            self._data = bytearray(STAGE * PAGE_SIZE)
        if piece.chunks:
            size = piece.page_count * PAGE_SIZE
            start = at * PAGE_SIZE
            if piece.data is None:
                self._data[start : start + size] = piece.fill.to_bytes(4, "little") * (size // 4)
            else:
                self._data[start : start + piece.data.nbytes] = piece.data
                rest = size - piece.data.nbytes
                self._data[start + size - rest : start + size] = bytes(rest)

    def take(self, end: int) -> DataPart:
        """All of it, as the part that ends before page ``end`` of the stream."""
        count, self.count = self.count, 0
        return DataPart(end - count, count, Pages(self._entries[:count].data, self._data))
