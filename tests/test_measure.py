"""The measuring step by itself: several measurers in one process, stopped and interleaved on purpose.

The same code runs in workers; here every interleaving is chosen by the test, and "death" is an exception
out of a fault point, after which only what the kernel would do is done (the claims are given back).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage, Region
from enturbo.shm.launches import Claims, Launch
from enturbo.shm.layout import COPY_BY_HOST, PAGE_SIZE, SCHEME_ENTURBO, SCHEME_SGX
from enturbo.shm.memory import Memory
from enturbo.workers import records
from enturbo.workers.faults import POINTS
from enturbo.workers.measure import Measurer, settled
from enturbo.workers.sha256 import get_hasher
from enturbo.workers.view import Outcome, block_totals

HASHERS = ("reference", "hashlib", "native")


class Died(BaseException):
    """A measurer dies here."""


class Bench:
    """One launch on a small memory, driven by hand."""

    def __init__(self, image: EnclaveImage, domains: int = 4, block: int = 2, *, sgx: bool = False) -> None:
        self.image = image
        self.pages = image.page_count
        self.memory = Memory.create(max(1, self.pages), 2)
        while self.memory.allocate_step():
            pass
        scheme, domains = (SCHEME_SGX, 1) if sgx else (SCHEME_ENTURBO, domains)
        self.launch = Launch(1, scheme, domains, block, 0, self.pages, image.size, 1, COPY_BY_HOST)
        self.copied = 0
        self.measurers: list[Measurer] = []
        self.open()

    def open(self, generation: int = 1) -> None:
        self.launch = self.launch._replace(generation=generation)
        self.copied = 0
        index = 0
        for region in self.image.regions:
            self.memory.epcm.describe(
                index,
                region.page_count,
                flags=region.flags,
                chunks=region.chunks,
                linear=region.offset // PAGE_SIZE,
                generation=generation,
            )
            index += region.page_count
        with Claims(self.memory.control_segment.fd) as claims:
            assert claims.take_range(0)
            self.memory.launches.open_launch(0, self.launch, claims, settled(self.launch))

    def bytes_of(self) -> bytes:
        out = bytearray()
        for region in self.image.regions:
            content = bytes(region.content or b"") or region.fill.to_bytes(4, "little") * (region.size // 4)
            out += content.ljust(region.size, b"\0")
        return bytes(out)

    def copy(self, count: int) -> None:
        """The next ``count`` pages become VALID."""
        first, end = self.copied, min(self.copied + count, self.pages)
        data = self.bytes_of()[first * PAGE_SIZE : end * PAGE_SIZE]
        self.memory.epc.pages(first, end - first)[:] = data
        self.memory.epcm.set_valid(first, end - first, self.launch.generation)
        self.copied = end

    def measurer(self, hasher: str = "native", fault: Callable[[str], None] | None = None) -> Measurer:
        claims = Claims(self.memory.control_segment.fd)
        self.measurers.append(Measurer(self.memory, claims, get_hasher(hasher), fault=fault))
        return self.measurers[-1]

    def digest(self) -> bytes:
        smc, digests = self.memory.launches.smc(0), []
        for domain in range(self.launch.domains):
            newest = smc.newest(domain, self.launch.generation)
            assert newest is not None
            assert newest.final
            digests.append(newest.state)
        if self.launch.scheme == SCHEME_SGX:
            return digests[0]
        ecreate = records.ecreate(1, self.image.size)
        return records.merge(ecreate, self.pages, self.launch.domains, self.launch.block, digests)

    def expected(self) -> bytes:
        if self.launch.scheme == SCHEME_SGX:
            return self.image.measure("sgx", hasher="reference").digest
        launch = self.launch
        return self.image.measure(domains=launch.domains, block=launch.block, hasher="reference").digest

    def released(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.asarray(self.memory.epcm.entries["released"][: self.pages] == self.launch.generation)

    def close(self) -> None:
        for measurer in self.measurers:
            measurer.claims.close()
            measurer.forget()
        self.memory.close()


def image(pages: int, *, seed: int = 3, holes: int = 0) -> EnclaveImage:
    """Different bytes a page; ``holes`` = k: every k-th page is unmeasured, the next measured in part."""
    regions = []
    for page in range(pages):
        content = bytes((seed + 7 * page + byte) % 251 for byte in range(PAGE_SIZE))
        chunks = 0xFFFF if not holes or page % holes > 1 else (0, 0x8421)[page % holes]
        regions.append(Region(page * PAGE_SIZE, 1, (0x205, 0x201, 0x203)[page % 3], content, measured=chunks))
    size = 4096
    while size < pages * PAGE_SIZE:
        size *= 2
    return EnclaveImage(regions, size=size)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: object, **options: object) -> Bench:
        made.append(Bench(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


@given(pages=st.integers(0, 200), domains=st.sampled_from([1, 2, 8, 32]), block=st.sampled_from([1, 4, 16]))
def test_block_totals_and_settled_domains(pages: int, domains: int, block: int) -> None:
    launch = Launch(1, SCHEME_ENTURBO, domains, block, 0, pages, 1 << 30, 1, COPY_BY_HOST)
    expected = [records.domain_blocks(pages, domain, domains, block) for domain in range(domains)]
    assert block_totals(launch) == expected
    assert sorted(settled(launch)) == [domain for domain in range(domains) if expected[domain] == 0]


@pytest.mark.parametrize("hasher", HASHERS)
@pytest.mark.parametrize("sgx", [False, True])
@pytest.mark.parametrize("pages", [0, 1, 2, 7, 8, 9, 33])
def test_one_measurer_gives_the_reference_value(
    bench: Callable[..., Bench], hasher: str, sgx: bool, pages: int
) -> None:
    it = bench(image(pages, holes=5), sgx=sgx)
    it.copy(pages)
    measurer = it.measurer(hasher)
    while (outcome := measurer.step(0, 1)) is Outcome.WORKED:
        pass
    assert outcome is Outcome.FINISHED
    assert it.released().all()
    assert it.digest() == it.expected()
    assert measurer.step(0, 1) is Outcome.FINISHED


def test_nothing_is_hashed_or_released_before_it_is_valid(bench: Callable[..., Bench]) -> None:
    """R1: pages that are not VALID are left alone, though their bytes would be readable."""
    it = bench(image(16), domains=2, block=2)
    measurer = it.measurer()
    assert measurer.step(0, 1) is Outcome.WAITING
    it.copy(3)  # the second page of domain 1's first block is missing
    while measurer.step(0, 1) is Outcome.WORKED:
        pass
    assert list(np.flatnonzero(it.released())) == [0, 1]
    it.copy(16)
    while measurer.step(0, 1) is Outcome.WORKED:
        pass
    assert it.digest() == it.expected()


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(0, 70),
    domains=st.sampled_from([1, 2, 4, 8, 32]),
    block=st.sampled_from([1, 2, 4, 16]),
    holes=st.integers(0, 5),
    seed=st.integers(0, 1 << 32),
)
def test_any_interleaving_of_copier_and_measurers(
    pages: int, domains: int, block: int, holes: int, seed: int
) -> None:
    """Copy, three measurers and deaths at any point, in random order: always the reference's value."""
    chance = random.Random(seed)

    def fault(point: str) -> None:
        if chance.random() < 0.15:
            raise Died

    it = Bench(image(pages, holes=holes), domains, block)
    try:
        measurers = [it.measurer(fault=fault) for _ in range(3)]
        for _ in range(4000):
            number = chance.randrange(4)
            if number == 3:
                it.copy(chance.randrange(1, 6))
                continue
            try:
                if measurers[number].step(0, 1) is Outcome.FINISHED:
                    break
            except Died:
                measurers[number].claims.close()
                measurers[number] = it.measurer(fault=fault)
        assert measurers[number].step(0, 1) is Outcome.FINISHED
        assert it.copied == pages
        assert it.released().all()
        assert it.digest() == it.expected()
    finally:
        it.close()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("hasher", ["native", "hashlib"])
def test_taking_over_after_a_death_at_each_point(
    bench: Callable[..., Bench], point: str, hasher: str
) -> None:
    """R2 through a death: pages whose release had begun are never read again, the rest is not lost."""
    it = bench(image(32), domains=2, block=2)
    it.copy(32)
    times = itertools.count()

    def fault(name: str) -> None:
        if name == point and next(times) == (1 if hasher == "native" else 0):
            raise Died

    first = it.measurer(hasher, fault)
    first_view_stripe(first)

    def run() -> None:
        while True:
            first.step(0, 1)

    with pytest.raises(Died):
        run()
    smc = it.memory.launches.smc(0)
    newest = [smc.newest(domain, 1) for domain in (0, 1)]
    covered = [result.blocks if result is not None else 0 for result in newest]
    # A page that is released may have been changed since: whoever takes over must not look at it.
    for page in np.flatnonzero(it.released()):
        it.memory.epc.pages(int(page), 1)[:] = b"\xee" * PAGE_SIZE
    for domain in (0, 1):
        assert smc.blocks_released(domain) <= covered[domain]
    second = it.measurer(hasher)
    while second.step(0, 1) is Outcome.WORKED:
        pass
    assert second.step(0, 1) is Outcome.FINISHED
    assert it.released().all()
    assert it.digest() == it.expected()


def first_view_stripe(measurer: Measurer) -> None:
    """One block a stripe, so that a small image takes several claims."""
    view = measurer._view(0, 1)
    assert view is not None
    view.stripe = 1


def test_a_result_that_covers_less_than_was_released_is_a_fault(bench: Callable[..., Bench]) -> None:
    it = bench(image(16), domains=2, block=2)
    it.copy(16)
    it.memory.launches.smc(0).raise_released(1, 2, 0, 1)
    assert it.measurer().step(0, 1) is Outcome.FAULT
    assert int(it.memory.launches.fault[0]) == 1


def test_a_closed_launch_is_not_worked_on(bench: Callable[..., Bench]) -> None:
    it = bench(image(16))
    it.copy(16)
    measurer = it.measurer()
    first_view_stripe(measurer)
    assert measurer.step(0, 1) is Outcome.WORKED
    it.memory.launches.close_launch(0)
    assert measurer.step(0, 1) is Outcome.GONE
    it.open(generation=2)
    assert measurer.step(0, 1) is Outcome.GONE
    assert not it.released().any()


def test_generation_is_looked_at_again_after_the_claim(bench: Callable[..., Bench]) -> None:
    """The launch closes between the look without a claim and the claim: nothing may be stored.

    A close that takes the whole range cannot happen while a claim is held, but just before it can.
    """
    it = bench(image(16))
    it.copy(16)
    measurer = it.measurer()
    claim = measurer.claims.claim

    def claim_late(slot: int, pair: int, group: int = 1) -> bool:
        it.memory.launches.close_launch(0)
        with Claims(it.memory.control_segment.fd) as closer:
            assert closer.take_range(0)
        before.append(bytes(it.memory.control_segment.view[PAGE_SIZE : 2 * PAGE_SIZE]))
        return claim(slot, pair, group)

    before: list[bytes] = []
    measurer.claims.claim = claim_late  # type: ignore[method-assign, assignment]
    assert measurer.step(0, 1) is Outcome.GONE
    assert bytes(it.memory.control_segment.view[PAGE_SIZE : 2 * PAGE_SIZE]) == before[0]
    assert not it.released().any()


def test_helping_and_closing_in_one_process_exclude_each_other(bench: Callable[..., Bench]) -> None:
    """Two threads of the host lock on descriptions of their own: the closer waits for the helper."""
    it = bench(image(16))
    it.copy(16)
    seen: list[bool] = []

    def fault(point: str) -> None:
        with Claims(it.memory.control_segment.fd) as closer:
            seen.append(closer.take_range(0))

    measurer = it.measurer(fault=fault)
    assert measurer.step(0, 1) is Outcome.WORKED
    assert seen
    assert not any(seen)
    with Claims(it.memory.control_segment.fd) as closer:
        assert closer.take_range(0)


@pytest.mark.parametrize("sgx", [False, True])
def test_merge_in_every_completion_order(bench: Callable[..., Bench], sgx: bool) -> None:
    """Which domain is done first never shows: all orders of four domains give one value."""
    it = bench(image(23), domains=8, block=2, sgx=sgx)
    values = set()
    for generation, order in enumerate(itertools.permutations(range(it.launch.pairs)), 1):
        with Claims(it.memory.control_segment.fd) as claims:
            it.memory.launches.close_launch(0)
            assert claims.take_range(0)
        it.open(generation)
        it.copy(23)
        for pair in order:
            measurer = it.measurer()
            view = measurer._view(0, generation)
            assert view is not None
            others = [other for other in range(it.launch.pairs) if other != pair]
            with Claims(it.memory.control_segment.fd) as blocker:
                for other in others:
                    assert blocker.claim(0, other)
                while measurer.step(0, generation) is Outcome.WORKED:
                    pass
            measurer.claims.close()
        values.add(it.digest())
    assert values == {it.expected()}
