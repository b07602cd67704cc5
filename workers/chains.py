"""Images measured as one chain each (scheme ``sgx``), side by side in the lanes of a hasher.

A chain cannot be cut, so an image that is one chain fills one lane, however large it is. Two images fill two:
each call of the hasher appends a piece of both. The pieces of a call have about as many bytes of records,
whatever their pages are, for a lane with less would run out and leave the other alone. What one image has
left of a part opens the next call, and when it ends, the next image takes its lane::

    image A    [ 512 pages ][ 93 ][   202 pages   ][ 202 pages ]           C  [ 512 pages ][ …
    image B    [ 512 pages ][ 93 ][ 16,384 EADDs  ][ 16,384 EADDs ]  …  [ 512 pages ][ …

Pieces are bounded, so that a call takes milliseconds and its buffers a few MiB, whatever the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..shm.dtypes import EPCM_DTYPE
from .parts import DataPart, EaddPart, FillPart, Part, StreamRegion, parts
from .records import EEXTEND_SIZE, HEADER_SIZE
from .sha256 import EaddSpan, Hasher, Pages, Span
from .shares import FILL_BATCH, FillPages

PIECE: Final = FILL_BATCH  # measured pages in a piece
EADD_PIECE: Final = 1 << 14  # pages in a piece of EADDs; the bytes of 202 measured ones


def record_size(chunks: int) -> int:
    """Bytes of the records of a page of which ``chunks`` (a mask) are measured."""
    return HEADER_SIZE + chunks.bit_count() * EEXTEND_SIZE


class ImageChain:
    """One image as one chain, which opens with ``opening``; its pages are given out in pieces, in order."""

    def __init__(self, hasher: Hasher, opening: bytes, regions: Sequence[StreamRegion]) -> None:
        self.chain = hasher.start()
        self.chain.update(opening)
        self._parts = parts(regions)
        self._part: Part | None = None
        self._given = 0  # pages of the part
        self._page_size = 0.0  # bytes of records a page, the mean of the part
        self._fill_pages = FillPages()

    def offer(self) -> float:
        """Bytes of records that the next piece may have; 0: the image has ended.

        The piece before it must have been hashed: its pages may be gone when the next part is asked for.
        Raises ValueError for an impossible region.
        """
        if self._part is None or self._given == self._part.page_count:
            self._part, self._given = next(self._parts, None), 0
            if self._part is None:
                return 0
            self._page_size = _mean_record_size(self._part)
        return self._most(self._part) * self._page_size

    def take(self, size: float) -> Span | EaddSpan:
        """The next piece: ``size`` bytes of records as near as whole pages come, at most what was offered."""
        part, at = self._part, self._given
        if part is None:
            raise ValueError("a piece may be taken only after one was offered")
        count = min(self._most(part), max(1, round(size / self._page_size)))
        self._given += count
        match part:
            case EaddPart():
                return EaddSpan(part.linear, part.flags, at, count, count, 1, at + count)
            case FillPart():
                entries = _entries(part.linear + at, count, part.flags, part.chunks)
                return Span(Pages(entries, self._fill_pages.of(part.fill)), 0, count, count, 1, count)
            case DataPart():
                return Span(part.pages, at, count, count, 1, at + count)

    def _most(self, part: Part) -> int:
        """Pages that the next piece may have."""
        return min(part.page_count - self._given, EADD_PIECE if isinstance(part, EaddPart) else PIECE)

    def digest(self) -> bytes:
        """SHA-256 of all pieces so far."""
        return self.chain.digest()


def advance(hasher: Hasher, lanes: Sequence[ImageChain], size: float) -> None:
    """Append a piece to every chain of ``lanes`` in one call; ``size`` is the least that they offered.

    A chain that is at pages of which only the EADD is measured is no reason to leave another one alone: its
    piece is then given as pages without data, which cost the hasher more than numbers do, but less than an
    empty lane.
    """
    chains = [lane.chain for lane in lanes]
    pieces = [lane.take(size) for lane in lanes]
    eadds = [piece for piece in pieces if isinstance(piece, EaddSpan)]
    if len(eadds) == len(pieces):
        hasher.extend_eadd(chains, eadds)
    else:
        hasher.extend(chains, [_with_entries(p) if isinstance(p, EaddSpan) else p for p in pieces])


def _with_entries(piece: EaddSpan) -> Span:
    """The same pages of one run by their EPCM entries."""
    count = piece.block
    entries = _entries(piece.base + piece.first, count, piece.flags, 0)
    return Span(Pages(entries, None), 0, count, count, 1, count)


def _entries(linear: int, count: int, flags: int, chunks: int) -> memoryview:
    """EPCM entries of ``count`` pages that follow one another."""
    entries = np.zeros(count, EPCM_DTYPE)
    entries["flags"], entries["chunks"] = flags, chunks
    entries["linear"] = np.arange(linear, linear + count, dtype=np.int64)
    return entries.data


def _mean_record_size(part: Part) -> float:
    match part:
        case EaddPart():
            return record_size(0)
        case FillPart():
            return record_size(part.chunks)
        case DataPart():
            # Small regions stand together in one part, so its pages may differ.
            entries = np.frombuffer(memoryview(part.pages.entries), EPCM_DTYPE, part.page_count)
            measured = int(np.unpackbits(np.ascontiguousarray(entries["chunks"]).view(np.uint8)).sum())
            return HEADER_SIZE + measured / part.page_count * EEXTEND_SIZE
