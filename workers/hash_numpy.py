"""The hasher without the C extension: numpy lays headers around a batch of pages, hashlib hashes the batch.

A template holds the records of 64 fully measured pages with all constant header bytes in place. A batch
writes offsets and flags, copies its page data between the headers by one strided assignment, and is one
hashlib.update: about four times fewer interpreter steps a byte than one update per record. Pages that are
measured in part pick their blocks from the same template by a mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..shm.dtypes import EPCM_DTYPE
from ..shm.layout import ALL_CHUNKS, CHUNK_SIZE, CHUNKS_PER_PAGE, PAGE_SIZE
from . import records
from .hash_reference import HashlibChain
from .sha256 import (
    Chain,
    EaddSpan,
    Span,
    check_eadd_span,
    check_pairing,
    check_span,
)

BATCH: Final = 64  # pages; more gains nothing and leaves the second-level cache
EADD_BATCH: Final = 4096
PAGE_RECORDS: Final = records.HEADER_SIZE + CHUNKS_PER_PAGE * records.EEXTEND_SIZE
PAGE_BLOCKS: Final = PAGE_RECORDS // 64
_BLOCKS_A_CHUNK: Final = records.EEXTEND_SIZE // 64
_ZERO_PAGE: Final = bytes(PAGE_SIZE)
_OFFSET_WORD: Final = 1  # u64 words into a header
_FLAGS_WORD: Final = 2


class _Scratch(threading.local):
    """Buffers of one thread: hashlib gives the GIL back, so threads must not share them."""

    def __init__(self) -> None:
        page = records.page_records(0, 0, ALL_CHUNKS, _ZERO_PAGE)
        self.pages = np.tile(np.frombuffer(page, np.uint8), (BATCH, 1))
        words = self.pages.view("<u8")
        self.eadd_offsets = words[:, _OFFSET_WORD]
        self.eadd_flags = words[:, _FLAGS_WORD]
        self.eextend_offsets = words[:, records.HEADER_SIZE // 8 + _OFFSET_WORD :: records.EEXTEND_SIZE // 8]
        chunks = self.pages[:, records.HEADER_SIZE :].reshape(BATCH, CHUNKS_PER_PAGE, records.EEXTEND_SIZE)
        self.data = chunks[:, :, records.HEADER_SIZE :]
        self.blocks = self.pages.reshape(BATCH, PAGE_BLOCKS, 64)
        self.mask = np.ones((BATCH, PAGE_BLOCKS), np.bool_)
        self.chunk_offsets = np.arange(CHUNKS_PER_PAGE, dtype=np.uint64) * np.uint64(CHUNK_SIZE)
        self.chunk_bits = np.arange(CHUNKS_PER_PAGE, dtype=np.uint16)
        eadd = np.frombuffer(records.eadd(0, 0), "<u8")
        self.eadds = np.tile(eadd, (EADD_BATCH, 1))


class NumpyChain(HashlibChain):
    """A hashlib chain whose EADD-only runs are laid out in batches."""

    def __init__(self, scratch: _Scratch) -> None:
        super().__init__()
        self._scratch = scratch

    def eadd_run(self, page: int, count: int, flags: int, /) -> None:
        """Append the EADDs of ``count`` pages."""
        if page < 0 or count < 0:
            raise ValueError(f"no run of {count} pages at page {page}")
        if count:
            _extend_eadd(self._scratch, self, EaddSpan(page, flags, 0, count, count, 1, count))


def batches(span: Span | EaddSpan, limit: int) -> Iterator[tuple[int, int, int]]:
    """``span`` cut into (first, blocks, length): ``blocks`` blocks of ``length``, at most ``limit`` pages."""
    first, block, stride, blocks, end = span[-5:]
    if stride == block:  # one run
        block, blocks = max(1, min(block * blocks, end - first)), min(blocks, 1)
        stride = block
    whole = min(blocks, max(0, (end - first - block) // stride + 1)) if end - first >= block else 0
    if block <= limit:
        step = limit // block
        for number in range(0, whole, step):
            yield first + number * stride, min(step, whole - number), block
    else:
        for number in range(whole):
            start = first + number * stride
            yield from _pieces(start, start + block, limit)
    if whole < blocks:  # the last block may be short
        start = first + whole * stride
        yield from _pieces(start, min(start + block, end), limit)


def _pieces(start: int, stop: int, limit: int) -> Iterator[tuple[int, int, int]]:
    for at in range(start, stop, limit):
        yield at, 1, min(limit, stop - at)


class NumpyHasher:
    """hashlib, fed by numpy."""

    name = "hashlib"
    midstates = False
    lanes = 1

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def start(self) -> Chain:
        """A new chain."""
        return NumpyChain(self._scratch)

    def resume(self, midstate: bytes, length: int) -> Chain:
        """Not with hashlib."""
        raise NotImplementedError("hashlib cannot resume from a midstate")

    def extend(self, chains: Sequence[Chain], spans: Sequence[Span]) -> None:
        """Append each span's records to its chain."""
        check_pairing(chains, spans)
        for chain, span in zip(chains, spans, strict=True):
            check_span(span)
            for first, blocks, length in batches(span, BATCH):
                _extend(self._scratch, chain, span, first, blocks, length)

    def extend_eadd(self, chains: Sequence[Chain], spans: Sequence[EaddSpan]) -> None:
        """Append each span's EADDs to its chain."""
        check_pairing(chains, spans)
        for chain, span in zip(chains, spans, strict=True):
            check_eadd_span(span)
            _extend_eadd(self._scratch, chain, span)


def _strided(
    buffer: Any,
    dtype: Any,
    item: int,
    first: int,
    stride: int,
    shape: tuple[int, ...],
    inner: tuple[int, ...],
) -> NDArray[Any]:
    """Blocks of pages of ``buffer`` (``item`` bytes a page) as an array over its memory."""
    return np.ndarray(shape, dtype, memoryview(buffer).cast("B"), first * item, (stride * item, item, *inner))


def _extend(scratch: _Scratch, chain: Chain, span: Span, first: int, blocks: int, length: int) -> None:
    """One batch: ``blocks`` blocks of ``length`` pages, the first at page ``first``."""
    count = blocks * length
    item = EPCM_DTYPE.itemsize
    # Copied: entries stand in shared memory, and each is to be one value for mask, flags and offset alike.
    entries = (
        _strided(span.pages.entries, EPCM_DTYPE, item, first, span.stride, (blocks, length), ())
        .reshape(-1)
        .copy()
    )
    offsets = entries["linear"].astype(np.uint64) * np.uint64(PAGE_SIZE)
    chunks = entries["chunks"]
    scratch.eadd_offsets[:count] = offsets
    scratch.eadd_flags[:count] = entries["flags"]
    measured = int(np.count_nonzero(chunks))
    if measured == 0:
        chain.update(np.ascontiguousarray(scratch.pages[:count, : records.HEADER_SIZE]).data)
        return
    if span.pages.data is None:
        raise ValueError("a page of the span is measured, but the span has no data")
    np.add(offsets[:, None], scratch.chunk_offsets, out=scratch.eextend_offsets[:count])
    data = _strided(
        span.pages.data,
        np.uint8,
        PAGE_SIZE,
        first,
        span.stride,
        (blocks, length, CHUNKS_PER_PAGE, CHUNK_SIZE),
        (CHUNK_SIZE, 1),
    )
    scratch.data[:count].reshape(blocks, length, CHUNKS_PER_PAGE, CHUNK_SIZE)[...] = data
    if (chunks == ALL_CHUNKS).all():
        chain.update(scratch.pages[:count].data)
        return
    present = (chunks[:, None] >> scratch.chunk_bits & 1).astype(np.bool_)
    scratch.mask[:count, 1:] = np.repeat(present, _BLOCKS_A_CHUNK, axis=1)
    chain.update(scratch.blocks[:count][scratch.mask[:count]].data)


def _extend_eadd(scratch: _Scratch, chain: Chain, span: EaddSpan) -> None:
    eadds = scratch.eadds
    eadds[:, _FLAGS_WORD] = span.flags
    for first, blocks, length in batches(span, EADD_BATCH):
        starts = np.arange(blocks, dtype=np.int64) * span.stride + (span.base + first)
        pages = starts[:, None] + np.arange(length, dtype=np.int64)
        eadds[: blocks * length, _OFFSET_WORD] = pages.reshape(-1).astype(np.uint64) * np.uint64(PAGE_SIZE)
        chain.update(eadds[: blocks * length].data)
