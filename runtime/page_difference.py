"""The first page in which two images differ, in EADD order.

Pages are compared by runs: where both images say "zeros" or a fill, a million pages are one comparison, and
contents are compared a piece at a time where they lie. Memory is bounded whatever the images' size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from ..shm.layout import CHUNK_SIZE, CHUNKS_PER_PAGE, PAGE_SIZE

if TYPE_CHECKING:
    from .region import Region

PIECE_PAGES: Final = 64  # pages compared at a time
SHOWN_BYTES: Final = 32  # of the first run of differing bytes


class Extent(NamedTuple):
    """Adjacent pages of one kind, however many regions they came in. ``label``: the first region's."""

    offset: int
    pages: int
    flags: int
    chunks: int
    label: str = ""

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What the extent is; the label is not."""
        return self[:4]


@dataclass(frozen=True)
class PageDifference:
    """The first page, in EADD order, in which two images differ.

    Args:
        number: in EADD order, from 0.
        what: ``"page"``: one image has no more; ``"offset"``, ``"flags"``, ``"measured"`` or ``"bytes"``.
        a, b: the page in each image, as an extent of one page; None: there is none.
        in_mrenclave: False: only bytes differ, and those are not measured.
        at: of ``"bytes"``: offset in the page of the first that differs.
        bytes_a, bytes_b: of ``"bytes"``: the run of differing bytes there, at most SHOWN_BYTES of it.
        run: its length in all, within the page.
    """

    number: int
    what: str
    a: Extent | None
    b: Extent | None
    in_mrenclave: bool = True
    at: int | None = None
    bytes_a: bytes = b""
    bytes_b: bytes = b""
    run: int = 0


class _Run(NamedTuple):
    """Some pages of a region, from page ``start`` of it on."""

    region: Region
    start: int
    pages: int

    def page(self, number: int) -> Extent:
        """The page ``number`` of the run."""
        region = self.region
        offset = region.offset + (self.start + number) * PAGE_SIZE
        return Extent(offset, 1, region.flags, region.chunks, region.label)


def first_page(a: Iterable[Region], b: Iterable[Region]) -> PageDifference | None:
    """The first difference that MRENCLAVE sees; without one, the first in bytes that it does not."""
    unmeasured: PageDifference | None = None
    number = 0
    for run_a, run_b in _in_step(a, b):
        if run_a is None or run_b is None:
            return PageDifference(number, "page", run_a and run_a.page(0), run_b and run_b.page(0))
        page_a, page_b = run_a.page(0), run_b.page(0)
        for what in ("offset", "flags", "chunks"):
            if getattr(page_a, what) != getattr(page_b, what):
                name = "measured" if what == "chunks" else what
                return PageDifference(number, name, page_a, page_b)
        chunks = page_a.chunks
        if chunks or unmeasured is None:
            for found in _first_bytes(run_a, run_b, number, chunks, unmeasured is None):
                if found.in_mrenclave:
                    return found
                unmeasured = unmeasured or found
        number += run_a.pages
    return unmeasured


def _in_step(a: Iterable[Region], b: Iterable[Region]) -> Iterator[tuple[_Run | None, _Run | None]]:
    """Both images cut where either has a border; at the end, what is left of the longer one."""
    rest: list[_Run | None] = [None, None]
    sources = [iter(a), iter(b)]
    while True:
        for side in (0, 1):
            run = rest[side]
            if run is None or not run.pages:
                region = next(sources[side], None)
                rest[side] = None if region is None else _Run(region, 0, region.page_count)
        run_a, run_b = rest
        if run_a is None or run_b is None:
            if run_a is not run_b:
                yield run_a, run_b
            return
        pages = min(run_a.pages, run_b.pages)
        yield run_a._replace(pages=pages), run_b._replace(pages=pages)
        rest = [_Run(run.region, run.start + pages, run.pages - pages) for run in (run_a, run_b)]


def _first_bytes(a: _Run, b: _Run, number: int, chunks: int, unmeasured: bool) -> Iterator[PageDifference]:
    """The first measured bytes that differ in two runs of equal length; ``unmeasured``: and before them the
    first that are not measured, if they stand before those."""
    own = max(_content_pages(a), _content_pages(b))
    page = 0
    while page < a.pages:
        # Behind the contents both are one pattern: the first page tells about all of them.
        pages = min(own - page, PIECE_PAGES, a.pages - page) if page < own else 1
        piece_a, piece_b = _bytes(a, page, pages), _bytes(b, page, pages)
        for at in () if piece_a == piece_b else _differing_chunks(piece_a, piece_b):
            measured = bool(chunks >> at // CHUNK_SIZE % CHUNKS_PER_PAGE & 1)
            if measured or unmeasured:
                yield _page_bytes(a, b, number, page + at // PAGE_SIZE, measured)
                unmeasured = False
            if measured or not chunks:
                return
        if page >= own:
            return
        page += pages


def _content_pages(run: _Run) -> int:
    """Pages of the run that have bytes of their own; those behind them are zeros or a fill."""
    content = run.region.content
    if content is None:
        return 0
    with memoryview(content) as view:
        return -(-view.nbytes // PAGE_SIZE) - run.start


def _bytes(run: _Run, page: int, pages: int) -> bytes:
    size = pages * PAGE_SIZE
    if run.region.content is None:
        return run.region.fill.to_bytes(4, "little") * (size // 4)
    start = (run.start + page) * PAGE_SIZE
    with memoryview(run.region.content) as view, view.cast("B") as content:
        return bytes(content[start : start + size]).ljust(size, b"\0")


def _differing_chunks(a: bytes, b: bytes) -> Iterator[int]:
    for start in range(0, len(a), PAGE_SIZE):
        if a[start : start + PAGE_SIZE] == b[start : start + PAGE_SIZE]:
            continue
        for at in range(start, start + PAGE_SIZE, CHUNK_SIZE):
            if a[at : at + CHUNK_SIZE] != b[at : at + CHUNK_SIZE]:
                yield at


def _page_bytes(a: _Run, b: _Run, number: int, page: int, measured: bool) -> PageDifference:
    bytes_a, bytes_b = _bytes(a, page, 1), _bytes(b, page, 1)
    chunks = a.region.chunks
    differs = [
        at
        for at in range(PAGE_SIZE)
        if bytes_a[at] != bytes_b[at] and bool(chunks >> at // CHUNK_SIZE & 1) is measured
    ]
    first = differs[0]
    run = next((n for n, at in enumerate(differs) if at != first + n), len(differs))
    shown = slice(first, first + min(run, SHOWN_BYTES))
    return PageDifference(
        number + page,
        "bytes",
        a.page(page),
        b.page(page),
        in_mrenclave=measured,
        at=first,
        bytes_a=bytes_a[shown],
        bytes_b=bytes_b[shown],
        run=run,
    )
