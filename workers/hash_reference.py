"""The reference hasher: one hashlib.update per record, in the order of the specification. Slow on purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..shm.layout import CHUNK_SIZE, EPCM_ENTRY, PAGE_SIZE
from . import records
from .sha256 import Chain, EaddSpan, Span, check_eadd_span, check_pairing, check_span

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_FLAGS, _CHUNKS, _LINEAR = (EPCM_ENTRY.struct(name) for name in ("flags", "chunks", "linear"))
_FLAGS_AT, _CHUNKS_AT, _LINEAR_AT = (EPCM_ENTRY.offset(name) for name in ("flags", "chunks", "linear"))


class HashlibChain:
    """A chain on hashlib.sha256, which exports no midstate."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.length = 0

    def update(self, records: ReadableBuffer) -> None:
        """Append whole 64-byte blocks."""
        size = memoryview(records).nbytes
        if size % 64:
            raise ValueError(f"records are whole 64-byte blocks, got {size} bytes")
        self._hash.update(records)
        self.length += size

    def eadd_run(self, page: int, count: int, flags: int, /) -> None:
        """Append the EADDs of ``count`` pages."""
        if page < 0 or count < 0:
            raise ValueError(f"no run of {count} pages at page {page}")
        for linear in range(page, page + count):
            self.update(records.eadd(linear * PAGE_SIZE, flags))

    def midstate(self) -> bytes:
        """Not with hashlib."""
        raise NotImplementedError("hashlib exports no midstate")

    def digest(self) -> bytes:
        """SHA-256 of all so far."""
        return self._hash.digest()


def page_numbers(span: Span | EaddSpan) -> Iterator[int]:
    """The pages of ``span``, in order."""
    for number in range(span.blocks):
        first = span.first + number * span.stride
        if first >= span.end:
            return
        yield from range(first, min(first + span.block, span.end))


class ReferenceHasher:
    """Record by record."""

    name = "reference"
    midstates = False
    lanes = 1

    def start(self) -> Chain:
        """A new chain."""
        return HashlibChain()

    def resume(self, midstate: bytes, length: int) -> Chain:
        """Not with hashlib."""
        raise NotImplementedError("hashlib cannot resume from a midstate")

    def extend(self, chains: Sequence[Chain], spans: Sequence[Span]) -> None:
        """Append each span's records to its chain, one update a record."""
        check_pairing(chains, spans)
        for chain, span in zip(chains, spans, strict=True):
            check_span(span)
            _check_data(span)
            for page in page_numbers(span):
                _extend_page(chain, span, page)

    def extend_eadd(self, chains: Sequence[Chain], spans: Sequence[EaddSpan]) -> None:
        """Append each span's EADDs to its chain."""
        check_pairing(chains, spans)
        for chain, span in zip(chains, spans, strict=True):
            check_eadd_span(span)
            for page in page_numbers(span):
                chain.update(records.eadd((span.base + page) * PAGE_SIZE, span.flags))


def _entry(span: Span, page: int) -> tuple[int, int, int]:
    """(flags, chunks, linear) of ``page``."""
    entries, at = memoryview(span.pages.entries).cast("B"), page * EPCM_ENTRY.size
    return (
        _FLAGS.unpack_from(entries, at + _FLAGS_AT)[0],
        _CHUNKS.unpack_from(entries, at + _CHUNKS_AT)[0],
        _LINEAR.unpack_from(entries, at + _LINEAR_AT)[0],
    )


def _check_data(span: Span) -> None:
    if span.pages.data is None and any(_entry(span, page)[1] for page in page_numbers(span)):
        raise ValueError("a page of the span is measured, but the span has no data")


def _extend_page(chain: Chain, span: Span, page: int) -> None:
    flags, chunks, linear = _entry(span, page)
    chain.update(records.eadd(linear * PAGE_SIZE, flags))
    if not chunks:
        return
    assert span.pages.data is not None  # checked before anything was appended
    data = memoryview(span.pages.data).cast("B")[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    for at in records.chunk_offsets(chunks):
        chain.update(records.eextend(linear * PAGE_SIZE + at))
        chain.update(data[at : at + CHUNK_SIZE])
