"""One interface, three hashers: chains of SHA-256 over the records of pages.

    reference   one hashlib.update per record, plainly readable
    hashlib     headers laid out by numpy around a batch of pages, one hashlib.update per batch
    native      the C extension: pages in place, one or two lanes, midstates

All give the same digests. A :class:`Chain` is one hash; a :class:`Span` says which pages a call appends.
Hashers give the GIL back while they work and may be used from many threads, a chain from one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from ..shm.errors import EnturboError
from ..shm.layout import EPCM_ENTRY, PAGE_SIZE

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAX_PAGES: Final = 1 << 40
"""Far above any enclave: page numbers and counts stay below it."""


class Pages(NamedTuple):
    """EPCM entries (32 bytes a page; flags, chunks and linear are used) and page bytes (4096 a page).

    ``data`` may be None if no page that is hashed has a measured chunk.
    """

    entries: ReadableBuffer
    data: ReadableBuffer | None


class Span(NamedTuple):
    """Pages [first + k * stride, min(first + k * stride + block, end)) for k in range(blocks), in order."""

    pages: Pages
    first: int
    block: int
    stride: int
    blocks: int
    end: int


class EaddSpan(NamedTuple):
    """The same walk over pages of which only the EADD is measured: page p is at linear page ``base`` + p."""

    base: int
    flags: int
    first: int
    block: int
    stride: int
    blocks: int
    end: int


class Chain(Protocol):
    """One SHA-256 chain, between two 64-byte blocks."""

    @property
    def length(self) -> int:
        """Bytes hashed, a multiple of 64."""

    def update(self, records: ReadableBuffer) -> None:
        """Append whole 64-byte blocks; ValueError for anything else."""

    def eadd_run(self, page: int, count: int, flags: int, /) -> None:
        """Append the EADDs of the linear pages ``page`` .. ``page`` + ``count`` - 1."""

    def midstate(self) -> bytes:
        """Eight u32 words, little-endian. NotImplementedError if the hasher has no midstates."""

    def digest(self) -> bytes:
        """SHA-256 of all so far, 32 bytes. The chain goes on."""


class Hasher(Protocol):
    """Starts chains and appends spans of pages to them."""

    @property
    def name(self) -> str:
        """reference, hashlib or native."""

    @property
    def midstates(self) -> bool:
        """Whether chains can be exported and resumed."""

    @property
    def lanes(self) -> int:
        """How many chains one call advances at the same time."""

    def start(self) -> Chain:
        """A new chain."""

    def resume(self, midstate: bytes, length: int) -> Chain:
        """The chain that exported ``midstate`` after ``length`` bytes, or NotImplementedError."""

    def extend(self, chains: Sequence[Chain], spans: Sequence[Span]) -> None:
        """Append the records of ``spans[i]`` to ``chains[i]``. The chains must be different ones.

        An unmeasured page contributes its EADD alone. Raises ValueError for a span that makes no sense or
        misses its data, IndexError if it reaches beyond its buffers.
        """

    def extend_eadd(self, chains: Sequence[Chain], spans: Sequence[EaddSpan]) -> None:
        """Append the EADDs of ``spans[i]`` to ``chains[i]``."""


def span_limit(span: Span | EaddSpan) -> int:
    """One past the last page that ``span`` touches, or 0. Raises ValueError on odd numbers."""
    for name in ("first", "block", "stride", "blocks", "end"):
        value = getattr(span, name)
        if not 0 <= value <= MAX_PAGES:
            raise ValueError(f"span.{name} is {value}")
    if span.block == 0 or span.stride < span.block:
        raise ValueError(
            f"span.block is {span.block} and span.stride {span.stride}: blocks must not be empty or overlap"
        )
    if span.blocks == 0 or span.first >= span.end:
        return 0
    last = min(span.blocks - 1, (span.end - 1 - span.first) // span.stride)
    return min(span.first + last * span.stride + span.block, span.end)


def check_eadd_span(span: EaddSpan) -> None:
    """Raise ValueError if ``span`` makes no sense or has a page at a negative offset."""
    limit = span_limit(span)
    if abs(span.base) > MAX_PAGES or (limit and not 0 <= span.base + span.first <= MAX_PAGES - limit):
        raise ValueError(f"EADD span: no page offset at base {span.base}, first {span.first}, limit {limit}")


def check_span(span: Span) -> None:
    """Raise ValueError if ``span`` makes no sense, IndexError if it reaches beyond its buffers."""
    limit = span_limit(span)
    for what, buffer, size in (
        ("EPCM entries", span.pages.entries, EPCM_ENTRY.size),
        ("data", span.pages.data, PAGE_SIZE),
    ):
        if buffer is not None and memoryview(buffer).nbytes // size < limit:
            held = memoryview(buffer).nbytes // size
            raise IndexError(f"span reaches page {limit - 1}, its {what} end after {held}")


def check_pairing(chains: Sequence[Chain], spans: Sequence[object]) -> None:
    """Raise ValueError unless there is one span a chain."""
    if len(chains) != len(spans):
        raise ValueError(f"{len(chains)} chains, but {len(spans)} spans")


def _reference() -> Hasher:
    from .hash_reference import ReferenceHasher

    return ReferenceHasher()


def _numpy() -> Hasher:
    from .hash_numpy import NumpyHasher

    return NumpyHasher()


def _native() -> Hasher:
    from .hash_native import NativeHasher

    return NativeHasher()


# Best first.
_HASHERS: Final[dict[str, Callable[[], Hasher]]] = {
    "native": _native,
    "hashlib": _numpy,
    "reference": _reference,
}


def get_hasher(name: str | None = None) -> Hasher:
    """The hasher ``name``; None: the one that $ENTURBO_HASHER names, else the best available.

    Raises EnturboError, with the choices, if there is none of that name or it was not built.
    """
    wanted = name or os.environ.get("ENTURBO_HASHER") or None
    if wanted is None:
        missing = _missing_native()
        return _HASHERS["hashlib" if missing else "native"]()
    if wanted not in _HASHERS:
        raise EnturboError(f"no hasher {wanted!r}: expected one of {', '.join(available())}")
    try:
        return _HASHERS[wanted]()
    except ImportError as error:
        raise EnturboError(
            f"hasher {wanted!r} is not available ({error}): expected one of {', '.join(available())}"
        ) from error


def _missing_native() -> str | None:
    """Why the C extension cannot be imported, or None if it can."""
    try:
        from . import _sha256  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def available() -> list[str]:
    """Names for :func:`get_hasher`, best first."""
    missing = _missing_native()
    return [name for name in _HASHERS if name != "native" or missing is None]


def hasher_report() -> dict[str, object]:
    """For ``enturbo doctor``: names available, the one in use, native kernel, why native is missing."""
    missing = _missing_native()
    kernel = None
    if missing is None:
        from . import _sha256

        kernel = _sha256.KERNEL
    chosen = os.environ.get("ENTURBO_HASHER") or available()[0]
    return {"available": available(), "default": chosen, "native_kernel": kernel, "native_missing": missing}
