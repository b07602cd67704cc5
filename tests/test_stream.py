"""Images measured without an EPC: any regions, any D, B and number of threads give the reference's value."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage
from enturbo.runtime.measurement import SchemeError
from enturbo.runtime.measuring import MeasureJob, measure_images
from enturbo.workers import chains, crew, records
from enturbo.workers.parts import StreamRegion
from enturbo.workers.sha256 import Chain, EaddSpan, Hasher, Span, available, get_hasher
from enturbo.workers.stream import StreamJob, domain_digests, measure_stream, measure_streams

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BYTES = random.Random(3).randbytes(300 * 4096)
SIZE = 1 << 40


@dataclass(frozen=True)
class Region:
    """All that measuring asks of a region."""

    offset: int
    page_count: int
    flags: int = 0x203
    chunks: int = 0xFFFF
    content: ReadableBuffer | None = None
    fill: int = 0


def reference(regions: Sequence[StreamRegion], scheme: str, domains: int, block: int) -> bytes:
    """The value by the encoder and hashlib, page by page."""
    chain = hashlib.sha256(records.ecreate(1, SIZE))
    parts = [hashlib.sha256(records.hashdom(d, domains, block)) for d in range(domains)]
    number = 0
    for region in regions:
        content = None if region.content is None else bytes(region.content)
        for page in range(region.page_count):
            if content is None:
                data = region.fill.to_bytes(4, "little") * 1024
            else:
                data = content[page * 4096 : (page + 1) * 4096].ljust(4096, b"\0")
            encoded = records.page_records(region.offset // 4096 + page, region.flags, region.chunks, data)
            chain.update(encoded)
            parts[records.hash_dom(number, domains, block)].update(encoded)
            number += 1
    if scheme == "sgx":
        return chain.digest()
    return records.merge(records.ecreate(1, SIZE), number, domains, block, [part.digest() for part in parts])


@st.composite
def images(draw: st.DrawFn) -> tuple[list[Region], int, int]:
    """(regions, D, B) with sizes at block and domain boundaries, one page more and one less."""
    domains, block = draw(st.sampled_from([1, 2, 4, 8, 32])), draw(st.sampled_from([1, 2, 4, 16, 64, 1024]))
    edges = sorted({1, 2, 64, 65, block, min(domains * block, 130), 128})
    regions, linear = [], 0
    for _ in range(draw(st.integers(0, 6))):
        count = max(0, min(150, draw(st.sampled_from(edges)) + draw(st.integers(-1, 1))))
        linear += draw(st.sampled_from([0, 0, 1, 1000]))  # gaps
        kind = draw(st.sampled_from(["content", "fill", "eadd"]))
        chunks = draw(st.sampled_from([0xFFFF, 0xFFFF, 1, 0x8000, 0x0FF0])) if kind != "eadd" else 0
        content = None
        if kind == "content" or (kind == "eadd" and draw(st.booleans())):
            length = max(0, count * 4096 - draw(st.sampled_from([0, 0, 1, 4095, 4096, 9000])))
            at = draw(st.integers(0, 100))
            content = memoryview(BYTES)[at : at + length]
        fill = draw(st.sampled_from([0, 0xDEADBEEF]))
        flags = draw(st.sampled_from([0x201, 0x203, 0x205]))
        regions.append(Region(linear * 4096, count, flags, chunks, content, fill))
        linear += count
    return regions, domains, block


@pytest.mark.parametrize("hasher", available())
@pytest.mark.parametrize("scheme", ["sgx", "enturbo"])
@settings(max_examples=30, deadline=None)
@given(image=images(), workers=st.sampled_from([0, 1, 2, 3, 8]))
def test_random_images(hasher: str, scheme: str, image: tuple[list[Region], int, int], workers: int) -> None:
    regions, domains, block = image
    found = measure_stream(
        1, SIZE, regions, scheme=scheme, domains=domains, block=block, workers=workers, hasher=hasher
    )
    assert found == reference(regions, scheme, domains, block)


@pytest.mark.parametrize("hasher", available())
@pytest.mark.parametrize(("domains", "block"), [(32, 16), (2, 1024), (8, 1), (1, 1)])
def test_threads_and_windows(hasher: str, domains: int, block: int) -> None:
    """Large enough for threads, several fill batches and a window boundary inside a region."""
    regions = [
        Region(0, 3000, 0x203, 0),
        Region(3000 * 4096, 300, 0x205, 0xFFFF, BYTES),
        Region(3300 * 4096, 900, 0x203, 0x0101, None, 7),
        *(Region((5000 + i) * 4096, 1, 0x201, 0x0001, BYTES[i : i + 300]) for i in range(600)),
        Region(9000 * 4096, 100, 0x205, 0x8001, memoryview(BYTES)[: 99 * 4096 + 1]),
    ]
    wanted = reference(regions, "enturbo", domains, block)
    for workers in (1, 2, 3, 64):
        assert (
            measure_stream(1, SIZE, regions, domains=domains, block=block, workers=workers, hasher=hasher)
            == wanted
        )


def test_content_kinds() -> None:
    """Any buffer serves: bytes, mmap, wider items, and a strided view, which is copied piece by piece."""
    plain = Region(0, 100, content=BYTES[: 100 * 4096])
    wanted = reference([plain], "enturbo", 32, 16)
    with mmap.mmap(-1, 100 * 4096) as mapped:
        mapped[:] = BYTES[: 100 * 4096]
        assert measure_stream(1, SIZE, [Region(0, 100, content=mapped)]) == wanted
    wide = memoryview(bytearray(BYTES[: 100 * 4096])).cast("Q")
    assert measure_stream(1, SIZE, [Region(0, 100, content=wide)]) == wanted
    doubled = bytearray(200 * 4096)
    doubled[::2] = BYTES[: 100 * 4096]
    assert measure_stream(1, SIZE, [Region(0, 100, content=memoryview(doubled)[::2])]) == wanted


def test_domain_digests() -> None:
    digests = domain_digests([Region(0, 3, content=BYTES[:5000])], 4, 1, workers=1)
    data = BYTES[:5000].ljust(3 * 4096, b"\0")
    assert digests == [
        hashlib.sha256(
            records.hashdom(d, 4, 1)
            + (records.page_records(d, 0x203, 0xFFFF, data[d * 4096 : (d + 1) * 4096]) if d < 3 else b"")
        ).digest()
        for d in range(4)
    ]


@pytest.mark.parametrize("hasher", [name for name in available() if name != "reference"])
def test_memory_stays_bounded(hasher: str) -> None:
    """Two million EADD-only pages and 32 MiB of fill need a few MiB."""
    regions = [Region(0, 2_000_000, 0x203, 0), Region(1 << 35, 8192, 0x203, 0x0001, None, 9)]
    tracemalloc.start()
    try:
        measure_stream(1, SIZE, regions, workers=2, hasher=hasher)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


# ------------------------------------------------------------------------------------------- several images

PAGE_RECORDS = 64 + 16 * 320  # bytes of the records of a measured page


class Call(NamedTuple):
    """One call of a hasher: which chains it took, by their number, and how much each of them grew."""

    chains: tuple[int, ...]
    pages: tuple[int, ...]
    sizes: tuple[int, ...]  # bytes of records
    eadd: bool
    thread: int


class Recording:
    """A hasher that says it has two lanes, and notes what it is called for."""

    midstates = False

    def __init__(self, inner: Hasher, lanes: int = 2, seconds: float = 0) -> None:
        self.inner, self.lanes, self.seconds, self.name = inner, lanes, seconds, inner.name
        self.calls: list[Call] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Chain] = []  # so that no chain takes another one's id

    def start(self) -> Chain:
        chain = self.inner.start()
        self._kept.append(chain)
        self._numbers[id(chain)] = len(self._numbers)
        return chain

    def resume(self, midstate: bytes, length: int) -> Chain:
        raise NotImplementedError

    def extend(self, chains: Sequence[Chain], spans: Sequence[Span]) -> None:
        self._note(chains, spans, False, lambda: self.inner.extend(chains, spans))

    def extend_eadd(self, chains: Sequence[Chain], spans: Sequence[EaddSpan]) -> None:
        self._note(chains, spans, True, lambda: self.inner.extend_eadd(chains, spans))

    def _note(
        self, chains: Sequence[Chain], spans: Sequence[Span | EaddSpan], eadd: bool, work: Callable[[], None]
    ) -> None:
        before = [chain.length for chain in chains]
        work()
        time.sleep(self.seconds)
        numbers = tuple(self._numbers[id(chain)] for chain in chains)
        pages = tuple(span.end - span.first for span in spans)
        sizes = tuple(chain.length - length for chain, length in zip(chains, before, strict=True))
        self.calls.append(Call(numbers, pages, sizes, eadd, threading.get_ident()))

    def hashed(self, *, alone: bool) -> int:
        """Bytes of records that were appended by calls for one chain, or for several."""
        return sum(sum(call.sizes) for call in self.calls if (len(call.chains) == 1) == alone)

    def size(self, chain: int) -> int:
        """Bytes of records of a chain."""
        return sum(call.sizes[call.chains.index(chain)] for call in self.calls if chain in call.chains)

    def order(self) -> list[tuple[int, ...]]:
        """Which chains went together, one after another."""
        return [chains for chains, _ in itertools.groupby(call.chains for call in self.calls)]


@pytest.fixture
def recording() -> Recording:
    """Of the fastest hasher there is."""
    return Recording(get_hasher())


def chain_of(*regions: Region) -> StreamJob:
    return StreamJob(1, SIZE, regions, "sgx")


def data(pages: int) -> StreamJob:
    """An image of measured pages in one region."""
    return chain_of(Region(0, pages, content=mmap.mmap(-1, pages * 4096)))


def heap(pages: int) -> StreamJob:
    """An image of pages of which only the EADD is measured."""
    return chain_of(Region(0, pages, chunks=0))


@pytest.mark.parametrize("hasher", available())
@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(st.tuples(images(), st.sampled_from(["sgx", "sgx", "enturbo"])), min_size=1, max_size=5),
    workers=st.sampled_from([1, 2, 3]),
    lanes=st.sampled_from([None, 1, 2, 3]),
    piece=st.sampled_from([1, 16, 512]),
)
def test_random_images_at_once(
    hasher: str,
    drawn: list[tuple[tuple[list[Region], int, int], str]],
    workers: int,
    lanes: int | None,
    piece: int,
) -> None:
    """With small pieces, chains are cut everywhere; with threads for the smallest image, all of them meet."""
    jobs = [
        StreamJob(1, SIZE, regions, scheme, domains, block) for (regions, domains, block), scheme in drawn
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "ALONE", 0)
        patch.setattr(crew, "SCATTERED", 0)
        patch.setattr(chains, "PIECE", piece)
        patch.setattr(chains, "EADD_PIECE", 3 * piece)
        used = get_hasher(hasher) if lanes is None else Recording(get_hasher(hasher), lanes)
        found = measure_streams(jobs, workers=workers, hasher=used)
    assert found == [reference(job.regions, job.scheme, job.domains, job.block) for job in jobs]


@pytest.mark.parametrize("hasher", available())
def test_large_images_at_once(hasher: str) -> None:
    """Several pieces of each kind, so that every kind meets every other one."""
    jobs = [
        chain_of(Region(0, 700, 0x205, 0xFFFF, BYTES), Region(4096 * 4096, 40_000, 0x201, 0)),
        chain_of(Region(0, 20_000, 0x203, 0), Region(1 << 30, 1100, 0x203, 0x0101, None, 7)),
        chain_of(*(Region(i * 8192, 1, 0x201, i, BYTES[i : i + 4000]) for i in range(900))),
        StreamJob(1, SIZE, [Region(0, 900, 0x203, 0xFFFF, None, 3)], "enturbo", 8, 4),
        StreamJob(1, SIZE, [Region(0, 300, 0x203, 0x8000, BYTES), Region(1 << 30, 300)], "enturbo", 1, 16),
    ]
    wanted = [reference(job.regions, job.scheme, job.domains, job.block) for job in jobs]
    for workers in (1, 2, 4):
        assert measure_streams(jobs, workers=workers, hasher=Recording(get_hasher(hasher))) == wanted
        assert measure_streams(jobs, workers=workers, hasher=hasher) == wanted


def test_two_images_go_in_lockstep(recording: Recording) -> None:
    """Whatever meets: both lanes have as much to do as whole pages allow, until one image has ended."""
    mixed = chain_of(
        Region(0, 100, content=BYTES[: 100 * 4096]),
        Region(1 << 30, 50_000, chunks=0),
        *(Region((1 << 32) + i * 8192, 1, chunks=0x0003 << i % 15) for i in range(300)),
        Region(1 << 36, 1500, content=mmap.mmap(-1, 1500 * 4096)),
    )
    measure_streams([mixed, data(1800)], workers=1, hasher=recording)
    together = [call for call in recording.calls if len(call.chains) == 2]
    assert max(abs(call.sizes[0] - call.sizes[1]) for call in together) <= PAGE_RECORDS
    apart = abs(recording.size(0) - recording.size(1))
    assert recording.hashed(alone=True) <= apart + PAGE_RECORDS * len(together)
    # The heap met measured pages, so it was given as pages, too.
    assert {call.eadd for call in together} == {False}


def test_heaps_go_as_numbers(recording: Recording) -> None:
    measure_streams([heap(90_000), heap(90_001)], workers=1, hasher=recording)
    assert {call.eadd for call in recording.calls} == {True}
    assert recording.order() == [(0, 1), (0,)]


@pytest.mark.parametrize("workers", [2, 3])
def test_as_many_threads_as_images(recording: Recording, workers: int) -> None:
    """Two lanes on two cores do more than two lanes on one: nothing is paired."""
    measure_streams([data(600), heap(90_000)], workers=workers, hasher=recording)
    assert recording.hashed(alone=False) == 0
    assert len({call.chains for call in recording.calls}) == 2


def test_the_largest_image_is_left_alone(recording: Recording) -> None:
    """Three images, two threads: the two smaller ones share a thread."""
    measure_streams([data(500), data(900), data(600)], workers=2, hasher=recording)
    together = [sorted(map(recording.size, call.chains)) for call in recording.calls if len(call.chains) > 1]
    assert together
    # Their chains are opened by 64 bytes that no call of the hasher appends.
    assert all(sizes == [500 * PAGE_RECORDS, 600 * PAGE_RECORDS] for sizes in together)
    threads = [{call.thread for call in recording.calls if number in call.chains} for number in range(3)]
    assert [len(each) for each in threads] == [1, 1, 1]


def test_images_too_small_for_threads(recording: Recording) -> None:
    measure_streams([data(200), data(200)], workers=2, hasher=recording)
    assert recording.order() == [(0, 1)]


def test_a_hasher_of_one_lane_gets_one_chain_at_a_time() -> None:
    recording = Recording(get_hasher(), lanes=1)
    measure_streams([data(300), data(301), data(1)], workers=1, hasher=recording)
    assert recording.order() == [(0,), (1,), (2,)]


def test_lanes_stay_full(recording: Recording) -> None:
    """The largest two begin; whoever ends hands its lane on; only the last one left is ever alone."""
    measure_streams([data(pages) for pages in (100, 700, 300, 600, 200)], workers=1, hasher=recording)
    # Chains 0 to 4 are of 700, 600, 300, 200 and 100 pages.
    assert recording.order() == [(0, 1), (0, 2), (2, 3), (4,)]
    assert recording.hashed(alone=True) == 100 * PAGE_RECORDS


def test_calls_are_bounded(recording: Recording) -> None:
    fills = chain_of(
        Region(0, 3000, chunks=1, fill=5), Region(1 << 32, 3000, content=mmap.mmap(-1, 3000 * 4096))
    )
    measure_streams([fills, heap(200_000), data(3000)], workers=1, hasher=recording)
    assert max(max(call.sizes) for call in recording.calls) <= 512 * PAGE_RECORDS
    assert max(max(call.pages) for call in recording.calls) <= 1 << 14


@pytest.mark.parametrize("hasher", [name for name in available() if name != "reference"])
def test_memory_stays_bounded_for_many_images(hasher: str) -> None:
    """Sixty images of a heap, 2 MiB of fill and a page need no more than two of them."""
    jobs = [
        chain_of(
            Region(0, 40_000 + i, chunks=0), Region(1 << 35, 512, chunks=0x0001, fill=i), Region(1 << 36, 1)
        )
        for i in range(60)
    ]
    tracemalloc.start()
    try:
        measure_streams(jobs, workers=1, hasher=Recording(get_hasher(hasher)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_images_of_small_regions_are_not_cut() -> None:
    """To walk many regions takes the GIL, and each share would walk all of them."""
    openings = [records.hashdom(domain, 32, 16) for domain in range(32)]
    large = [Region(0, 1000)]
    small = [Region(i * 4096, 1) for i in range(1000)]
    assert [len(crew.Stream(regions, openings, 16).shares(2, 2)) for regions in (large, small)] == [2, 1]
    assert len(crew.Stream([Region(0, 511)], openings, 16).shares(2, 2)) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_done_is_told_each_image_once(recording: Recording, workers: int) -> None:
    told: list[int] = []
    jobs = [data(600), heap(3), StreamJob(1, SIZE, [Region(0, 2000)]), heap(1), chain_of()]
    measure_streams(jobs, workers=workers, hasher=recording, done=told.append)
    assert sorted(told) == [0, 1, 2, 3, 4]
    if workers == 1:
        assert told == [1, 3, 4, 0, 2]


def test_no_images() -> None:
    assert measure_streams([]) == []


def test_an_impossible_image_ends_the_others() -> None:
    """The error comes to the caller without waiting for what other threads would have done."""
    recording = Recording(get_hasher(), seconds=0.01)
    with pytest.raises(ValueError, match="offset 0x1"):
        measure_streams([heap(1 << 24), chain_of(Region(1, 600))], workers=2, hasher=recording)
    assert len(recording.calls) < 500  # of 1024


def test_what_done_raises_ends_the_measuring() -> None:
    def done(_: int) -> None:
        raise KeyError("from the caller")

    with pytest.raises(KeyError, match="from the caller"):
        measure_streams([heap(10_000), heap(10_001)], workers=2, done=done)


def test_images_of_the_runtime(make_image: Callable[..., EnclaveImage]) -> None:
    """Each value is that of ``measure()``; an image may come twice."""
    first, second = make_image(40), make_image(900)
    jobs = [
        MeasureJob(first, "sgx"),
        MeasureJob(second, "enturbo", 4, 8),
        MeasureJob(second, "sgx"),
        MeasureJob(first),
    ]
    told: list[int] = []
    found = measure_images(jobs, workers=2, done=told.append)
    assert found == [job.image.measure(job.scheme, domains=job.domains, block=job.block) for job in jobs]
    assert sorted(told) == [0, 1, 2, 3]
    with pytest.raises(SchemeError, match="domains"):
        measure_images([*jobs, MeasureJob(first, "enturbo", 3)], done=told.append)
    assert len(told) == 4


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("region", "what"),
    [
        (Region(1, 1), "offset 0x1"),
        (Region(-4096, 1), "offset -0x1000"),
        (Region(0, -1), "-1 pages"),
        (Region(0, 1, chunks=0x10000), "chunks 0x10000"),
        (Region(0, 1, content=bytes(4097)), "4097 bytes of content in 1 pages"),
    ],
)
def test_odd_regions(region: Region, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        measure_stream(1, SIZE, [region])


def test_odd_parameters() -> None:
    with pytest.raises(ValueError, match="'sgx2'"):
        measure_stream(1, SIZE, [], scheme="sgx2")
    with pytest.raises(ValueError, match="domains must be a power of two"):
        measure_stream(1, SIZE, [], domains=3)
    with pytest.raises(ValueError, match="workers must not be negative"):
        measure_stream(1, SIZE, [], workers=-1)
