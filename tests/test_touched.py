"""Pages that somebody waits for are copied ahead of their turn, by measurers driven by hand and real ones.

VALID is then no prefix any more. So: nobody copies a VALID page again, nobody hashes one that is not, whoever
dies where. As in test_filling.py "death" is an exception out of a fault point where no process is named.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage, Region, Runtime
from enturbo.runtime.backing import pack
from enturbo.runtime.startup import COPY_PIECE, Piece, Preference, Start
from enturbo.runtime.touching import Toucher
from enturbo.shm.epcm import Epcm, Rows
from enturbo.shm.launches import Claims, Launch
from enturbo.shm.layout import (
    COPY_BY_HOST,
    COPY_FIRST,
    COPY_FUSED,
    EPCM_ENTRY,
    FAULT_SMC,
    PAGE_SIZE,
    SCHEME_ENTURBO,
    SCHEME_SGX,
)
from enturbo.shm.memory import Memory
from enturbo.workers.faults import FILL_POINTS, POINTS
from enturbo.workers.measure import Measurer, settled
from enturbo.workers.sha256 import Span, get_hasher
from enturbo.workers.stream import domain_digests
from enturbo.workers.view import Outcome

WAIT = 30.0
MODES = {"first": COPY_FIRST, "fused": COPY_FUSED}
PREFERENCES: tuple[Preference, ...] = ("start", "verified")
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Died(BaseException):
    """A measurer dies here."""


def until(condition: Callable[[], object]) -> None:
    """Look again and again, for a bounded time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def image_of(pages: int, seed: int = 3) -> EnclaveImage:
    """Single pages and short runs of every source, measured or not."""
    chance = random.Random(seed)
    regions: list[Region] = []
    page = 0
    while page < pages:
        count = min(chance.choice((1, 2, 7)), pages - page)
        options: dict[str, Any] = chance.choice(
            (
                {"content": chance.randbytes(count * PAGE_SIZE - 100)},
                {"content": chance.randbytes(count * PAGE_SIZE)},
                {"fill": chance.randrange(1, 1 << 32)},
                {},
            )
        )
        options["measured"] = chance.choice((True, True, False, 0x8421))
        regions.append(Region(page * PAGE_SIZE, count, 0x203, **options))
        page += count
    packed, backing = pack(regions)
    return EnclaveImage(packed, size=1 << max(12, (pages * PAGE_SIZE - 1).bit_length()), backing=backing)


def bytes_of(image: EnclaveImage) -> bytes:
    out = b""
    for region in image.regions:
        content = bytes(region.content or b"") or region.fill.to_bytes(4, "little") * (region.size // 4)
        out += content.ljust(region.size, b"\0")
    return out


class Looking:
    """The native hasher (or another), which looks at VALID of all that it is given to hash."""

    def __init__(self, bench: Bench, name: str = "native") -> None:
        self.bench, self.hasher = bench, get_hasher(name)

    def extend(self, chains: Any, spans: list[Span]) -> None:
        valid = self.bench.valid()
        for span in spans:
            for block in range(span.blocks):
                first = span.first + block * span.stride
                assert valid[first : min(first + span.block, span.end)].all(), (first, span)
        self.hasher.extend(chains, spans)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hasher, name)


class Bench:
    """One launch in a small memory, behind ``before`` pages of nobody's.

    Pages whose bytes are to be copied hold other ones before. ``EPCM`` tells of a page that becomes VALID
    twice.
    """

    def __init__(
        self,
        image: EnclaveImage,
        mode: int,
        *,
        domains: int = 4,
        block: int = 2,
        group: int = 1,
        before: int = 3,
        source_fd: int | None = None,
    ) -> None:
        self.image, self.before, self.content = image, before, bytes_of(image)
        self.memory = Memory.create(before + image.page_count, 1)
        while self.memory.allocate_step():
            pass
        if source_fd is None and image.backing is not None:
            source_fd = image.backing.fd
        scheme = SCHEME_SGX if domains == 1 else SCHEME_ENTURBO
        self.launch = Launch(1, scheme, domains, block, before, image.page_count, image.size, 1, mode, group)
        self.measurers: list[Measurer] = []
        self.poisoned: dict[int, bytes] = {}
        page, epcm = before, self.memory.epcm
        for region in image.regions:
            epcm.describe(
                page,
                region.page_count,
                flags=region.flags,
                chunks=region.chunks,
                linear=region.offset // PAGE_SIZE,
                generation=1,
            )
            if region.content is not None and region.file_page is not None:
                assert source_fd is not None
                pages = -(-memoryview(region.content).nbytes // PAGE_SIZE)
                epcm.set_file_source(page, pages, source_fd, region.file_page)
            elif region.fill:
                epcm.set_fill_source(page, region.page_count, region.fill)
            page += region.page_count
        for number in np.flatnonzero(epcm.entries["source"]).tolist():
            self.memory.epc.pages(number, 1)[:] = b"\xaa" * PAGE_SIZE
        with Claims(self.memory.control_segment.fd) as claims:
            assert claims.take_range(0)
            self.memory.launches.open_launch(0, self.launch, claims, settled(self.launch))

    def measurer(self, fault: Callable[[str], None] | None = None, hasher: str = "native") -> Measurer:
        claims = Claims(self.memory.control_segment.fd)
        looking = cast(Any, Looking(self, hasher))
        self.measurers.append(Measurer(self.memory, claims, looking, fault=fault))
        return self.measurers[-1]

    def entries(self, name: str) -> Any:
        return self.memory.epcm.entries[name][self.before : self.before + self.launch.page_count]

    def valid(self) -> Mask:
        return np.asarray(self.entries("valid") == 1)

    def pages_of_row(self, page: int) -> range:
        """The image's pages that stand in one row with ``page``."""
        launch = self.launch
        width = launch.claim_domains * launch.block
        stride = launch.domains * launch.block
        first = page - page % stride + page % stride // width * width
        return range(first, min(first + width, launch.page_count))

    def poison(self) -> None:
        """What an enclave may do: write to every page that is VALID and under no lock."""
        free = self.valid() & ((self.entries("chunks") == 0) | (self.entries("released") == 1))
        for page in np.flatnonzero(free).tolist():
            if page not in self.poisoned:
                assert self.page(page) == self.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE], page
                self.poisoned[page] = bytes([page % 251]) * PAGE_SIZE
                self.memory.epc.pages(self.before + page, 1)[:] = self.poisoned[page]

    def page(self, page: int) -> bytes:
        return bytes(self.memory.epc.pages(self.before + page, 1))

    def check_pages(self, pages: Iterator[int] | range) -> None:
        for page in pages:
            right = self.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            assert self.page(page) == self.poisoned.get(page, right), page

    def finish(self, measurer: Measurer) -> None:
        """Go on with one measurer to the end; all is as it should be then."""
        for _ in range(10_000):
            outcome = measurer.step(0, 1)
            if outcome is not Outcome.WORKED:
                break
        assert outcome is Outcome.FINISHED
        self.check()

    def check(self) -> None:
        assert self.valid().all()
        assert (self.entries("released") == 1).all()
        self.check_pages(range(self.launch.page_count))
        smc, launch = self.memory.launches.smc(0), self.launch
        found = [smc.newest(domain, 1) for domain in range(launch.domains)]
        if launch.scheme == SCHEME_SGX:
            expected = [self.image.measure("sgx", hasher="reference").digest]
        else:
            expected = domain_digests(self.image.regions, launch.domains, launch.block, hasher="reference")
        assert [each.state if each is not None and each.final else None for each in found] == expected

    def close(self) -> None:
        for measurer in self.measurers:
            measurer.claims.close()
            measurer.forget()
        self.memory.close()
        self.image.close()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def never_valid_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes a page VALID has copied it: no page that is VALID may be among them."""
    set_valid, set_rows = Epcm.set_valid, Epcm.set_valid_rows

    def looking(epcm: Epcm, first: int, count: int, generation: int) -> None:
        assert not (epcm.entries["valid"][first : first + count] == generation).any()
        set_valid(epcm, first, count, generation)

    def looking_rows(epcm: Epcm, rows: Rows, start: int, end: int, generation: int) -> None:
        for row in range(start, end):
            first = rows.base + row * rows.stride + rows.column
            last = min(first + rows.width, rows.end)
            assert not (epcm.entries["valid"][first:last] == generation).any()
        set_rows(epcm, rows, start, end, generation)

    monkeypatch.setattr(Epcm, "set_valid", looking)
    monkeypatch.setattr(Epcm, "set_valid_rows", looking_rows)


# ------------------------------------------------------------------------------------------------ the EPCM


@settings(max_examples=100, deadline=None)
@given(
    pages=st.integers(1, 80),
    domains=st.sampled_from([1, 2, 4, 8]),
    block=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1 << 32),
)
def test_rows_that_are_missing(pages: int, domains: int, block: int, seed: int) -> None:
    """Against a look at each page: any rows of any domains, short last rows too."""
    chance = random.Random(seed)
    base = chance.randrange(5)
    epcm = Epcm(memoryview(bytearray((base + pages) * EPCM_ENTRY.size)), base + pages)
    for page in range(pages):
        if chance.random() < 0.8:
            epcm.entries["valid"][base + page] = 7
    width = chance.choice([size for size in (1, 2, 4) if domains % size == 0])
    first = chance.randrange(domains // width) * width
    stride = domains * block
    rows = Rows(base, stride, first * block, width * block, pages // stride, base + pages)
    total = -(-(pages - first * block) // stride)
    if total <= 0:
        return
    start = chance.randrange(total)
    end = chance.randrange(start, total) + 1
    missing = epcm.missing_rows(rows, start, end, 7)
    expected = [
        [
            page < pages and int(epcm.entries["valid"][base + page]) != 7
            for page in range(row * stride + first * block, row * stride + (first + width) * block)
        ]
        for row in range(start, end)
    ]
    assert missing.tolist() == expected
    whole = [not any(row) for row in expected]
    assert epcm.count_valid_rows(rows, start, end, 7) == (
        whole.index(False) if False in whole else len(whole)
    )
    assert epcm.missing_rows(rows, start, end, 8).sum() == sum(
        min(width * block, pages - row * stride - first * block) for row in range(start, end)
    )


# ------------------------------------------------------------------------------------------- one touched row


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("pages", "domains", "block", "group"),
    [
        (64, 4, 2, 1),
        (61, 4, 2, 1),
        (61, 4, 2, 2),
        (61, 8, 2, 2),
        (33, 1, 4, 1),
        (7, 32, 1, 1),
        (50, 2, 16, 1),
    ],
)
def test_a_touched_page_is_copied_with_its_row_and_nothing_else(
    bench: Callable[..., Bench], mode: str, pages: int, domains: int, block: int, group: int
) -> None:
    """Groups of pairs, a short last row, one domain, fewer blocks than domains."""
    it = bench(image_of(pages), MODES[mode], domains=domains, block=block, group=group)
    toucher = it.measurer()
    expected = np.zeros(pages, np.bool_)
    for page in random.Random(pages).sample(range(pages), pages):
        assert toucher.fill_touched(0, 1, page) is Outcome.WORKED
        row = it.pages_of_row(page)
        expected[row.start : row.stop] = True
        assert (it.valid() == expected).all()
        it.poison()
        it.check_pages(row)
        with Claims(it.memory.control_segment.fd) as others:
            assert others.take_range(0)  # the claim was given back
    assert not it.memory.launches.copied[0].any()
    it.finish(it.measurer())


@pytest.mark.parametrize("mode", MODES)
def test_what_touching_comes_to(bench: Callable[..., Bench], mode: str) -> None:
    it = bench(image_of(64), MODES[mode])
    toucher = it.measurer()
    with Claims(it.memory.control_segment.fd) as somebody:
        assert somebody.claim(0, 1)
        assert toucher.fill_touched(0, 1, 4) is Outcome.BUSY  # page 4 belongs to domain 2, so to pair 1
        assert not it.valid().any()
        assert toucher.fill_touched(0, 1, 3) is Outcome.WORKED
        somebody.give_back(0, 1)
        assert toucher.fill_touched(0, 1, 4) is Outcome.WORKED
        assert somebody.take_range(0)
        assert toucher.fill_touched(0, 1, 4) is Outcome.WORKED  # needs no claim: it is VALID
        assert toucher.fill_touched(0, 1, 64) is Outcome.WORKED  # so are pages behind the image
        assert toucher.fill_touched(0, 1, 12) is Outcome.BUSY
        with pytest.raises(ValueError, match="page -1"):
            toucher.fill_touched(0, 1, -1)
    assert toucher.fill_touched(0, 2, 12) is Outcome.GONE
    it.memory.launches.report_fault(0, 1, FAULT_SMC)
    assert toucher.fill_touched(0, 1, 12) is Outcome.FAULT
    assert int(it.valid().sum()) == 8


@pytest.mark.parametrize("end", ["closed", "aborted", "closed before the claim"])
def test_nothing_is_copied_for_a_launch_that_has_ended(bench: Callable[..., Bench], end: str) -> None:
    it = bench(image_of(64), COPY_FIRST)
    toucher = it.measurer()
    assert toucher._view(0, 1) is not None
    claim = toucher.claims.claim

    def claim_late(slot: int, pair: int, group: int = 1) -> bool:
        it.memory.launches.close_launch(0)
        return claim(slot, pair, group)

    if end == "closed":
        it.memory.launches.close_launch(0)
    elif end == "aborted":
        it.memory.launches.copy_aborted[0] = 1
    else:
        toucher.claims.claim = claim_late  # type: ignore[method-assign, assignment]
    assert toucher.fill_touched(0, 1, 12) is Outcome.GONE
    assert not it.valid().any()
    with Claims(it.memory.control_segment.fd) as others:
        assert others.take_range(0)


def test_who_cannot_copy_says_so(bench: Callable[..., Bench]) -> None:
    """The host copies; the file is out of reach: WAITING. The file is too short: a fault."""
    it = bench(image_of(64), COPY_BY_HOST)
    assert it.measurer().fill_touched(0, 1, 12) is Outcome.WAITING
    it = bench(image_of(64), COPY_FIRST)
    outsider = it.measurer()
    outsider.sources._host = 0  # there is no /proc/0
    assert all(outsider.fill_touched(0, 1, page) in (Outcome.WAITING, Outcome.WORKED) for page in range(64))
    missing = int(np.flatnonzero(~it.valid())[0])
    with Claims(it.memory.control_segment.fd) as somebody:
        assert somebody.claim(0, 0)
        assert somebody.claim(0, 1)
        assert outsider.fill_touched(0, 1, missing) is Outcome.WAITING  # and no claim is in its way
    assert not it.memory.launches.fault[0]
    view = outsider._view(0, 1)
    assert view is not None
    view.can_fill = True
    assert outsider._filler.fill(view, view.row_with(missing)[0], 8) is Outcome.WAITING
    assert not it.memory.launches.copied[0].any()
    it.finish(it.measurer())
    file = os.memfd_create("short")
    try:
        os.ftruncate(file, PAGE_SIZE)
        it = bench(image_of(64), COPY_FUSED, source_fd=file)
        toucher = it.measurer()
        assert Outcome.FAULT in [toucher.fill_touched(0, 1, page) for page in range(64)]
        assert int(it.memory.launches.fault[0]) == 1
    finally:
        os.close(file)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_missing_of_a_row_is_copied(bench: Callable[..., Bench], mode: str) -> None:
    """Somebody died while it made the row VALID, or the rows behind it: those pages are an enclave's now."""
    it = bench(image_of(96, 7), MODES[mode], block=4)
    for page in (9, 11, 12, 40, 80, 81, 82, 83, 84, 85, 86, 87, 95):
        it.memory.epc.pages(it.before + page, 1)[:] = it.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        it.memory.epcm.set_valid(it.before + page, 1, 1)
    it.poison()
    toucher = it.measurer()
    assert toucher.fill_touched(0, 1, 10) is Outcome.WORKED
    it.check_pages(range(8, 16))
    assert it.valid()[8:16].all()
    assert not it.valid()[:8].any()
    it.finish(it.measurer())


@pytest.mark.parametrize("mode", MODES)
def test_ordinary_copying_passes_over_touched_rows_alone(bench: Callable[..., Bench], mode: str) -> None:
    """Rows between them are copied together: touching one of them parts a claim's rows in two."""
    regions = [Region(0, 512, 0x203, random.Random(1).randbytes(512 * PAGE_SIZE))]
    packed, backing = pack(regions)
    it = bench(EnclaveImage(packed, size=1 << 21, backing=backing), MODES[mode], domains=2, block=8)
    toucher, points = it.measurer(), list[str]()
    for row in (3, 10, 11, 31):
        assert toucher.fill_touched(0, 1, row * 16) is Outcome.WORKED
    worker = it.measurer(points.append)
    view = worker._view(0, 1)
    assert view is not None
    assert worker._filler.fill(view, 0, 32) is Outcome.WORKED
    assert points == ["filling", "filled", "valid"] * 3  # 0 .. 2, 4 .. 9, 12 .. 30
    assert int(view.copied[0]) == 32
    it.finish(worker)


# --------------------------------------------------------------------------------------------------- hashing


@pytest.mark.parametrize("mode", ["by host", *MODES])
@pytest.mark.parametrize("hasher", ["native", "hashlib"])
def test_a_page_that_is_not_valid_is_never_hashed(
    bench: Callable[..., Bench], mode: str, hasher: str
) -> None:
    """The last page of each block is VALID, or all blocks but the first: that tells nothing of the others."""
    for block in (4, 1):
        it = bench(image_of(64), MODES.get(mode, COPY_BY_HOST), block=block)
        measurer = it.measurer(hasher=hasher)
        if mode != "by host":
            measurer._view(0, 1).can_fill = False  # type: ignore[union-attr]
        for page in range(64):
            if page // it.launch.domains >= 1 if block == 1 else page % 4 == 3:
                at = it.before + page
                it.memory.epc.pages(at, 1)[:] = it.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                it.memory.epcm.set_valid(at, 1, 1)
        assert measurer.step(0, 1) is Outcome.WAITING
        assert not it.memory.launches.smc(0).released.any()
        assert not (it.entries("released") == 1).any()
        for page in np.flatnonzero(~it.valid()).tolist():
            at = it.before + page
            it.memory.epc.pages(at, 1)[:] = it.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            it.memory.epcm.set_valid(at, 1, 1)
        it.finish(measurer)


def test_the_stripe_ends_before_the_first_page_that_is_not_valid(bench: Callable[..., Bench]) -> None:
    it = bench(image_of(64), COPY_BY_HOST, domains=2, block=2, before=0)
    for page in range(64):
        if page != 21:  # of domain 0, block 5
            it.memory.epc.pages(page, 1)[:] = it.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            it.memory.epcm.set_valid(page, 1, 1)
    measurer = it.measurer()
    while measurer.step(0, 1) is Outcome.WORKED:
        pass
    assert it.memory.launches.smc(0).released[:2].tolist() == [5, 16]
    it.memory.epc.pages(21, 1)[:] = it.content[21 * PAGE_SIZE : 22 * PAGE_SIZE]
    it.memory.epcm.set_valid(21, 1, 1)
    it.finish(measurer)


# -------------------------------------------------------------------------------------------- interleavings


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(1, 90),
    shape=st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (32, 1)]),
    block=st.sampled_from([1, 2, 16]),
    mode=st.sampled_from(sorted(MODES)),
    hasher=st.sampled_from(["native", "native", "hashlib"]),
    deaths=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1 << 32),
)
def test_any_interleaving_with_touches_and_deaths(
    pages: int, shape: tuple[int, int], block: int, mode: str, hasher: str, deaths: float, seed: int
) -> None:
    """Three measurers, two that touch, an enclave that writes wherever it may, in random order."""
    chance = random.Random(seed)

    def fault(point: str) -> None:
        if chance.random() < deaths:
            raise Died

    domains, group = shape
    it = Bench(image_of(pages, seed), MODES[mode], domains=domains, block=block, group=group)
    try:
        who = [it.measurer(fault, hasher) for _ in range(5)]
        outcome = Outcome.WORKED
        for _ in range(6000):
            number = chance.randrange(5)
            try:
                if number < 3:
                    view = who[number]._view(0, 1)
                    if view is not None and chance.random() < 0.5:
                        view.stripe = chance.choice((1, 2, 16))
                    outcome = who[number].step(0, 1)
                elif chance.random() < 0.5:
                    page = chance.randrange(pages)
                    touched = who[number].fill_touched(0, 1, page)
                    assert touched is Outcome.WORKED
                    assert it.valid()[page]
                    it.check_pages(range(page, page + 1))
            except Died:
                who[number].claims.close()
                who[number] = it.measurer(fault, hasher)
                continue
            if chance.random() < 0.5:
                it.poison()
            if number < 3 and outcome is Outcome.FINISHED:
                break
        assert outcome is Outcome.FINISHED
        it.check()
    finally:
        it.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", FILL_POINTS)
def test_going_on_after_who_touched_has_died(bench: Callable[..., Bench], mode: str, point: str) -> None:
    it = bench(image_of(96), MODES[mode])

    def fault(name: str) -> None:
        if name == point:
            raise Died

    for page in (90, 52, 17):
        toucher = it.measurer(fault)
        with pytest.raises(Died):
            toucher.fill_touched(0, 1, page)
        toucher.claims.close()
        assert it.valid()[page] == (point == "valid")
        it.poison()
    second = it.measurer()
    assert second.fill_touched(0, 1, 52) is Outcome.WORKED
    assert it.valid()[52]
    it.poison()
    it.finish(it.measurer())


@pytest.mark.parametrize("mode", MODES)
def test_going_on_after_a_death_between_two_pages_of_a_touched_row(
    bench: Callable[..., Bench], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench(image_of(96), MODES[mode], block=4)
    set_rows = Epcm.set_valid_rows

    def dying(epcm: Epcm, rows: Rows, start: int, end: int, generation: int) -> None:
        epcm.set_valid(rows.base + start * rows.stride + rows.column, 3, generation)
        raise Died

    monkeypatch.setattr(Epcm, "set_valid_rows", dying)
    toucher = it.measurer()
    with pytest.raises(Died):
        toucher.fill_touched(0, 1, 36)
    toucher.claims.close()
    monkeypatch.setattr(Epcm, "set_valid_rows", set_rows)
    assert np.flatnonzero(it.valid()).tolist() == [32, 33, 34]
    it.poison()
    it.finish(it.measurer())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", [*FILL_POINTS, *POINTS])
def test_going_on_after_a_death_with_rows_valid_ahead(
    bench: Callable[..., Bench], mode: str, point: str
) -> None:
    """A worker dies in its second stripe while every third row of the image is VALID."""
    it = bench(image_of(200), MODES[mode])
    toucher, reached = it.measurer(), list[str]()
    for page in range(8, 200, 12):
        assert toucher.fill_touched(0, 1, page) is Outcome.WORKED

    def fault(name: str) -> None:
        reached.append(name)
        if name == point and reached.count(point) == 2:
            raise Died

    worker = it.measurer(fault)
    view = worker._view(0, 1)
    assert view is not None
    view.stripe = 1

    def run() -> None:
        for _ in range(1000):
            worker.step(0, 1)
            it.poison()

    with pytest.raises(Died):
        run()
    worker.claims.close()
    it.poison()
    it.finish(it.measurer())


# ----------------------------------------------------------------------------------------------- processes

CHILD = """
import os, sys
from enturbo.shm.launches import Claims
from enturbo.shm.memory import Memory, MemoryFds
from enturbo.workers import faults
from enturbo.workers.measure import Measurer
from enturbo.workers.sha256 import get_hasher
memory = Memory.attach(MemoryFds(*map(int, sys.argv[1:7])))
claims = Claims(memory.control_segment.fd)
fault = faults.from_environment()
toucher = Measurer(memory, claims, get_hasher("hashlib"), host=os.getppid(), fault=fault)
toucher.fill_touched(0, 1, int(sys.argv[7]))
sys.exit(7)
"""


@pytest.mark.parametrize("point", FILL_POINTS)
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_process_that_dies_or_stops_while_it_copies_a_touched_row(
    bench: Callable[..., Bench], point: str, action: str, tmp_path: Path
) -> None:
    """A claim of a dead one is free at once; of a stopped one it is not, until it is killed."""
    it = bench(image_of(96), COPY_FUSED)
    fds = it.memory.fds()
    mark = tmp_path / "fault"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, fds), "52"],
        env={**os.environ, "ENTURBO_FAULT": f"{point}={action}:{mark}"},
        pass_fds=fds[::2],
    )
    try:
        until(mark.exists)
        mine = it.measurer()
        if action == "stop":
            until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
            # Page 52 is of domain 2. The other pair is nobody's, and can be finished meanwhile.
            assert mine.fill_touched(0, 1, 4) is Outcome.BUSY
            while mine.step(0, 1) is Outcome.WORKED:
                pass
            assert it.memory.launches.smc(0).released[:4].tolist() == [12, 12, 0, 0]
            child.kill()
        assert child.wait(WAIT) == -signal.SIGKILL
        assert it.valid()[52] == (point == "valid")
        it.poison()
        assert mine.fill_touched(0, 1, 52) is Outcome.WORKED
        it.finish(mine)
    finally:
        child.kill()
        child.wait(WAIT)


@pytest.mark.slow
@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize("point", [*FILL_POINTS, *POINTS])
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_worker_that_dies_or_stops_with_rows_valid_ahead(
    make_image: Any,
    all_copy: Any,
    prefer: Any,
    point: str,
    action: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real workers; the host touches as soon as the launch is open."""
    path = tmp_path / "fault"
    monkeypatch.setenv("ENTURBO_FAULT", f"{point}={action}:{path}")
    image = all_copy(make_image(900, heap=100))
    expected = image.measure(domains=4, block=4)
    opened = Start.open

    def touching(start: Start, *args: Any, **options: Any) -> None:
        opened(start, *args, **options)
        toucher = start.toucher()
        for page in (999, 898, *range(16, 900, 48)):
            toucher.want(page)
        toucher.close()

    monkeypatch.setattr(Start, "open", touching)
    with Runtime(epc="8MiB", workers=2, progress_timeout=0.2) as runtime:
        assert runtime.wait_workers(WAIT)
        for _ in range(30):
            with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                assert enclave.wait_verified(WAIT) == expected.digest
                place = enclave._start.place
                found = bytes(runtime.memory.epc.pages(place.first_page, 900))
                assert found == bytes(image.regions[0].content or b"")
            if path.exists():
                break
        assert path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("prefer", PREFERENCES)
def test_touching_from_many_threads_while_workers_copy(make_image: Any, all_copy: Any, prefer: Any) -> None:
    """Three threads want pages all over the image from before it is open until it is VERIFIED."""
    image = all_copy(make_image(2500, heap=500))
    with Runtime(epc="32MiB", workers=2) as runtime:
        assert runtime.warm(WAIT)
        for number in range(8):
            expected = image.measure(domains=(2, 8, 32)[number % 3], block=(1, 16, 4)[number % 3])
            over, seen = threading.Event(), set[Outcome]()
            with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                start = enclave._start

                def hammer(seed: int, start: Start = start, over: Any = over, seen: Any = seen) -> None:
                    chance, toucher = random.Random(seed), start.toucher()
                    try:
                        while not over.is_set():
                            seen.add(toucher.want(chance.randrange(3000)))
                    finally:
                        toucher.close()

                threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(3)]
                for thread in threads:
                    thread.start()
                try:
                    assert enclave.wait_verified(WAIT) == expected.digest
                finally:
                    over.set()
                    for thread in threads:
                        thread.join(WAIT)
                place = start.place
                found = bytes(runtime.memory.epc.pages(place.first_page, 2500))
                assert found == bytes(image.regions[0].content or b"")
            assert seen <= {Outcome.WORKED, Outcome.BUSY, Outcome.GONE}
            assert Outcome.WORKED in seen
        assert runtime.stats()["worker_deaths"] == 0


def test_a_toucher_that_is_closed_touches_nothing(runtime: Runtime, make_image: Any, all_copy: Any) -> None:
    """Closing waits for the copy that is under way: its claim is not to be had before."""
    image = all_copy(make_image(300))
    expected = image.measure()
    with runtime.launch(image, expected=expected) as enclave:
        enclave.wait_verified(WAIT)
        toucher = enclave._start.toucher()
        assert toucher.want(7) is Outcome.WORKED
        measurer = toucher._measurer
        began, go = threading.Event(), threading.Event()

        def slow(slot: int, generation: int, page: int) -> Outcome:
            began.set()
            assert go.wait(WAIT)
            assert toucher._claims.fileno() >= 0
            return Outcome.WORKED

        measurer.fill_touched = slow  # type: ignore[method-assign]
        wanting = threading.Thread(target=toucher.want, args=(7,))
        wanting.start()
        assert began.wait(WAIT)
        closing = threading.Thread(target=toucher.close)
        closing.start()
        time.sleep(0.02)
        assert closing.is_alive()
        go.set()
        for thread in (wanting, closing):
            thread.join(WAIT)
            assert not thread.is_alive()
        assert toucher._claims.fileno() == -1
        assert toucher.want(7) is Outcome.GONE
        toucher.close()


# ------------------------------------------------------------------------------------------ the host copies


@pytest.mark.parametrize("scheme", ["enturbo", "sgx"])
@pytest.mark.parametrize("workers", [0, 2])
def test_where_the_host_copies_wanted_pieces_come_next(
    make_image: Any, scheme: Any, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told after the first piece: theirs are the second and third, and each is copied once. All pages below
    the front are VALID whenever somebody might look."""
    image = make_image(2000, heap=100)
    image = EnclaveImage(image.regions, size=image.size)
    expected = image.measure(scheme) if scheme == "sgx" else image.measure(domains=4, block=4)
    order: list[int] = []
    fronts: list[int] = []
    copy = Start.copy

    def noting(start: Start, piece: Piece) -> None:
        memory, place = start.host.memory, start.place
        order.append(piece.index)
        copy(start, piece)
        front = int(memory.launches.copy_front[place.slot])
        fronts.append(front)
        valid = memory.epcm.valid_mask(place.first_page, 2100, place.generation)
        missing = np.flatnonzero(~valid)
        assert front == (int(missing[0]) if len(missing) else 2100)
        if len(order) == 1:
            toucher = start.toucher()
            for page in (1999, 700, 701, 1999, 3, -1 % 2**32, 5000):
                # VALID already, or left to the host's thread
                assert toucher.want(page) is (
                    Outcome.WORKED if page == 3 or page >= 2100 else Outcome.WAITING
                )
            toucher.close()
            start.want(-1)
            start.want(2100)

    monkeypatch.setattr(Start, "copy", noting)
    with Runtime(epc="16MiB", workers=workers) as runtime:
        assert runtime.wait_workers(WAIT)
        with runtime.launch(image, expected=expected) as enclave:
            assert enclave.wait_verified(WAIT) == expected.digest
    step = COPY_PIECE
    assert order[:3] == [0, 7 * step, 2 * step]
    assert sorted(order) == [*range(0, 2000, step), 2000]
    assert order[3:] == [step, 3 * step, 4 * step, 5 * step, 6 * step, 2000]
    assert fronts == [step, step, step, 3 * step, 4 * step, 5 * step, 6 * step, 2000, 2100]


def test_wants_of_all_kinds_in_a_host_copied_start(make_image: Any) -> None:
    """Random pages are wanted by two threads while the host copies, workers measure behind it."""
    image = make_image(6000)
    expected = image.measure()
    with Runtime(epc="32MiB", workers=2) as runtime:
        assert runtime.warm(WAIT)
        for _ in range(6):
            over = threading.Event()
            with runtime.launch(image, expected=expected) as enclave:
                toucher = enclave._start.toucher()

                def hammer(seed: int, toucher: Toucher = toucher, over: Any = over) -> None:
                    chance = random.Random(seed)
                    while not over.is_set():
                        toucher.want(chance.randrange(6000))

                threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(2)]
                for thread in threads:
                    thread.start()
                try:
                    assert enclave.wait_verified(WAIT) == expected.digest
                finally:
                    over.set()
                    for thread in threads:
                        thread.join(WAIT)
                    toucher.close()
