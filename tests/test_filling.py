"""Copying and scrubbing by holders of claims, and launches that share lanes: measurers driven by hand.

As in test_measure.py "death" is an exception out of a fault point, after which only what the kernel would do
is done. The tests at the end have real workers.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo import Enclave, EnclaveImage, EnclaveState, ImageFormatError, Region, Runtime
from enturbo.runtime.backing import pack
from enturbo.runtime.startup import Preference
from enturbo.shm.launches import Claims, Launch, holds_claim
from enturbo.shm.layout import COPY_BY_HOST, COPY_FIRST, COPY_FUSED, PAGE_SIZE, SCHEME_ENTURBO, SCHEME_SGX
from enturbo.shm.memory import Memory
from enturbo.workers.faults import FILL_POINTS, POINTS
from enturbo.workers.filling import Source
from enturbo.workers.measure import Measurer, settled
from enturbo.workers.sha256 import get_hasher
from enturbo.workers.view import Outcome

WAIT = 30.0
PREFERENCES: tuple[Preference, ...] = ("start", "verified")
MODES = {"first": COPY_FIRST, "fused": COPY_FUSED}
Fault = Callable[[str], None]


class Died(BaseException):
    """A measurer dies here."""


def until(condition: Callable[[], object]) -> None:
    """Look again and again, for a bounded time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def mixed_image(pages: int, seed: int = 3) -> EnclaveImage:
    """Regions of every source: contents that end within a page, fills, zeros, an unmeasured heap; packed."""
    chance = random.Random(seed)
    regions: list[Region] = []
    page = 0
    while page < pages:
        count = min(chance.choice((1, 1, 2, 5, 17)), pages - page)
        kind = chance.choice(("bytes", "bytes", "fill", "zero", "heap"))
        options: dict[str, Any] = {}
        if kind == "bytes":
            options["content"] = chance.randbytes(count * PAGE_SIZE - chance.choice((0, 1, 5000)) % PAGE_SIZE)
        elif kind == "fill":
            options["fill"] = chance.randrange(1, 1 << 32)
        options["measured"] = kind != "heap" and chance.choice((True, True, 0x8421))
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


class Bench:
    """Launches in the slots of one small memory."""

    def __init__(self, pages: int, slots: int = 2) -> None:
        self.memory = Memory.create(max(1, pages), slots)
        while self.memory.allocate_step():
            pass
        self.launches: list[Launch] = []
        self.images: list[EnclaveImage] = []
        self.measurers: list[Measurer] = []

    def open(
        self, image: EnclaveImage, mode: int, *, domains: int = 4, block: int = 2, sgx: bool = False
    ) -> int:
        """A launch behind those that are there; its slot."""
        slot = len(self.launches)
        first = sum(launch.page_count for launch in self.launches)
        scheme, domains = (SCHEME_SGX, 1) if sgx else (SCHEME_ENTURBO, domains)
        launch = Launch(slot + 1, scheme, domains, block, first, image.page_count, image.size, 1, mode)
        page, epcm = first, self.memory.epcm
        for region in image.regions:
            epcm.describe(
                page,
                region.page_count,
                flags=region.flags,
                chunks=region.chunks,
                linear=region.offset // PAGE_SIZE,
                generation=launch.generation,
            )
            file = region.layer or image.backing
            if region.content is not None and region.file_page is not None and file is not None:
                content = memoryview(region.content)
                epcm.set_file_source(page, -(-content.nbytes // PAGE_SIZE), file.fd, region.file_page)
            elif region.fill:
                epcm.set_fill_source(page, region.page_count, region.fill)
            page += region.page_count
        with Claims(self.memory.control_segment.fd) as claims:
            assert claims.take_range(slot)
            self.memory.launches.open_launch(slot, launch, claims, settled(launch))
        self.launches.append(launch)
        self.images.append(image)
        return slot

    def copy(self, slot: int) -> None:
        """All of it, as a host does."""
        launch = self.launches[slot]
        self.memory.epc.pages(launch.first_page, launch.page_count)[:] = bytes_of(self.images[slot])
        self.memory.epcm.set_valid(launch.first_page, launch.page_count, launch.generation)

    def measurer(self, hasher: Any = "native", fault: Fault | None = None) -> Measurer:
        claims = Claims(self.memory.control_segment.fd)
        hasher = get_hasher(hasher) if isinstance(hasher, str) else hasher
        self.measurers.append(Measurer(self.memory, claims, hasher, fault=fault))
        return self.measurers[-1]

    def digest(self, slot: int) -> list[bytes]:
        """The final digests of all domains."""
        smc, launch = self.memory.launches.smc(slot), self.launches[slot]
        found = []
        for domain in range(launch.domains):
            newest = smc.newest(domain, launch.generation)
            assert newest is not None
            assert newest.final
            found.append(newest.state)
        return found

    def expected(self, slot: int) -> list[bytes]:
        """The same, from the image without any EPC, by the reference hasher."""
        from enturbo.workers import records
        from enturbo.workers.stream import domain_digests

        launch, image = self.launches[slot], self.images[slot]
        if launch.scheme == SCHEME_SGX:
            return [image.measure("sgx", hasher="reference").digest]
        assert records.domain_blocks(1, 0, launch.domains, launch.block) == 1
        return domain_digests(image.regions, launch.domains, launch.block, hasher="reference")

    def pages(self, slot: int) -> bytes:
        launch = self.launches[slot]
        return bytes(self.memory.epc.pages(launch.first_page, launch.page_count))

    def all_released(self, slot: int) -> bool:
        launch = self.launches[slot]
        end = launch.first_page + launch.page_count
        return bool((self.memory.epcm.entries["released"][launch.first_page : end] == slot + 1).all())

    def close(self) -> None:
        for measurer in self.measurers:
            measurer.claims.close()
            measurer.forget()
        self.memory.close()
        for image in self.images:
            image.close()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(pages: int, slots: int = 2) -> Bench:
        made.append(Bench(pages, slots))
        return made[-1]

    yield make
    while made:
        made.pop().close()


# ------------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hasher", ["native", "hashlib", "reference"])
@pytest.mark.parametrize("pages", [1, 2, 15, 16, 17, 300])
def test_one_measurer_copies_and_measures_all(
    bench: Callable[..., Bench], mode: str, hasher: str, pages: int
) -> None:
    it, image = bench(pages), mixed_image(pages, pages)
    slot = it.open(image, MODES[mode])
    measurer = it.measurer(hasher)
    while (outcome := measurer.step(slot, 1)) is Outcome.WORKED:
        pass
    assert outcome is Outcome.FINISHED
    assert it.pages(slot) == bytes_of(image)
    assert it.digest(slot) == it.expected(slot)
    assert it.all_released(slot)


def test_first_copies_everything_before_it_hashes(bench: Callable[..., Bench]) -> None:
    """With nobody else there, no page is released while another is still to be copied; fused is not so."""
    order: dict[str, list[str]] = {}
    for mode in MODES:
        it = bench(600)
        slot = it.open(mixed_image(600), MODES[mode], block=4)
        points: list[str] = []
        order[mode] = points
        measurer = it.measurer(fault=points.append)
        while measurer.step(slot, 1) is Outcome.WORKED:
            pass
    assert "filled" not in order["first"][order["first"].index("hashed") :]
    assert "filled" in order["fused"][order["fused"].index("hashed") :]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", [*FILL_POINTS, *POINTS])
def test_going_on_after_a_death_at_each_point(bench: Callable[..., Bench], mode: str, point: str) -> None:
    """A dead copier leaves no page that never becomes VALID, and nobody copies a VALID page again: by then
    an enclave may have written to it (heap), or the measurer of it may have released it."""
    regions = [
        Region(page * PAGE_SIZE, 1, 0x203, bytes([page]) * PAGE_SIZE, measured=page % 3 != 0)
        for page in range(96)
    ]
    packed, backing = pack(regions)
    it, image = bench(96), EnclaveImage(packed, size=1 << 19, backing=backing)
    slot = it.open(image, MODES[mode])
    reached = []

    def fault(name: str) -> None:
        reached.append(name)
        if name == point and reached.count(point) == 2:
            raise Died

    first = it.measurer(fault=fault)
    short_stripes(first, slot)

    def run() -> None:
        for _ in range(1000):
            first.step(slot, 1)

    with pytest.raises(Died):
        run()
    first.claims.close()
    # What an enclave may do now: it writes to every page that is VALID and under no lock.
    entries = it.memory.epcm.entries[:96]
    free = (entries["valid"] == 1) & ((entries["chunks"] == 0) | (entries["released"] == 1))
    for page in np.flatnonzero(free):
        it.memory.epc.pages(int(page), 1)[:] = b"\xee" * PAGE_SIZE
    second = it.measurer()
    while second.step(slot, 1) is Outcome.WORKED:
        pass
    assert second.step(slot, 1) is Outcome.FINISHED
    assert (entries["valid"] == 1).all()
    assert it.all_released(slot)
    assert it.digest(slot) == it.expected(slot)
    for page in np.flatnonzero(free):
        assert bytes(it.memory.epc.pages(int(page), 1)) == b"\xee" * PAGE_SIZE, page


def short_stripes(measurer: Measurer, slot: int) -> None:
    """One block a stripe, so that a small image takes several claims."""
    view = measurer._view(slot, slot + 1)
    assert view is not None
    view.stripe = 1


def test_a_row_whose_copier_died_in_the_middle_is_completed(bench: Callable[..., Bench]) -> None:
    """VALID of a few of its pages had been stored: those stay as they are."""
    it, image = bench(64), mixed_image(64, 5)
    slot = it.open(image, COPY_FUSED)
    content = bytes_of(image)
    it.memory.epc.pages(0, 3)[:] = content[: 3 * PAGE_SIZE]
    it.memory.epcm.set_valid(0, 3, 1)  # pages 0, 1 and 2 of the first row's 0 .. 3
    measurer = it.measurer()
    while measurer.step(slot, 1) is Outcome.WORKED:
        pass
    assert it.pages(slot) == content
    assert it.digest(slot) == it.expected(slot)


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(1, 90),
    domains=st.sampled_from([2, 4, 32]),
    block=st.sampled_from([1, 2, 16]),
    mode=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 1 << 32),
)
def test_any_interleaving_with_deaths(pages: int, domains: int, block: int, mode: str, seed: int) -> None:
    """Three measurers that copy and die at any point, in random order: always the reference's value."""
    chance = random.Random(seed)

    def fault(point: str) -> None:
        if chance.random() < 0.1:
            raise Died

    it = Bench(pages)
    try:
        image = mixed_image(pages, seed)
        slot = it.open(image, MODES[mode], domains=domains, block=block)
        measurers = [it.measurer(fault=fault) for _ in range(3)]
        outcome = Outcome.WORKED
        for _ in range(4000):
            number = chance.randrange(3)
            try:
                outcome = measurers[number].step(slot, 1)
            except Died:
                measurers[number].claims.close()
                measurers[number] = it.measurer(fault=fault)
                continue
            if outcome is Outcome.FINISHED:
                break
        assert outcome is Outcome.FINISHED
        assert it.pages(slot) == bytes_of(image)
        assert it.digest(slot) == it.expected(slot)
    finally:
        it.close()


def test_generation_is_looked_at_again_after_the_claim(bench: Callable[..., Bench]) -> None:
    """The launch closes between the look without a claim and the claim: nothing is copied."""
    it = bench(64)
    slot = it.open(mixed_image(64), COPY_FIRST)
    measurer = it.measurer()
    claim = measurer.claims.claim

    def claim_late(slot: int, pair: int, group: int = 1) -> bool:
        it.memory.launches.close_launch(slot)
        return claim(slot, pair, group)

    measurer.claims.claim = claim_late  # type: ignore[method-assign, assignment]
    assert measurer.step(slot, 1) is Outcome.GONE
    assert not it.memory.epc.bytes.any()
    assert not (it.memory.epcm.entries["valid"] == 1).any()


@pytest.mark.parametrize("mode", MODES)
def test_who_cannot_reach_the_file_measures_what_others_copied(
    bench: Callable[..., Bench], mode: str, tmp_path: Path
) -> None:
    """A process that may not open the host's descriptors takes part, and never stands in the way."""
    it, image = bench(64), mixed_image(64)
    slot = it.open(image, MODES[mode])
    outsider, insider = it.measurer(), it.measurer()
    outsider.sources._host = 0  # there is no /proc/0
    short_stripes(insider, slot)
    assert outsider.step(slot, 1) in (Outcome.WAITING, Outcome.WORKED)
    for _ in range(1000):
        assert outsider.step(slot, 1) is not Outcome.FAULT
        if insider.step(slot, 1) is Outcome.FINISHED:
            break
    assert it.digest(slot) == it.expected(slot)
    assert it.pages(slot) == bytes_of(image)


# -------------------------------------------------------------------------------------------------- sources


def test_source_reads_and_maps_the_same(tmp_path: Path) -> None:
    """A sealed memfd is mapped, a file is read; both give the same pages, by single runs and by rows."""
    content = random.Random(1).randbytes(64 * PAGE_SIZE)
    (tmp_path / "file").write_bytes(content)
    sealed = pack([Region(0, 64, 0x201, content)])[1]
    assert sealed is not None
    for fd in (os.dup(sealed.fd), os.open(tmp_path / "file", os.O_RDONLY)):
        source = Source(fd)
        target = bytearray(10 * PAGE_SIZE)
        source.copy(memoryview(target), 7)
        assert target == content[7 * PAGE_SIZE : 17 * PAGE_SIZE]
        rows = bytearray(64 * PAGE_SIZE)
        source.copy_rows(memoryview(rows), 3, 2 * PAGE_SIZE, 8 * PAGE_SIZE, 4)
        for row in range(4):
            at, came = row * 8 * PAGE_SIZE, (3 + 8 * row) * PAGE_SIZE
            assert rows[at : at + 2 * PAGE_SIZE] == content[came : came + 2 * PAGE_SIZE]
            assert not any(rows[at + 2 * PAGE_SIZE : at + 8 * PAGE_SIZE])


@pytest.mark.parametrize("mode", MODES)
def test_a_measurer_opens_each_file_once_a_launch(bench: Callable[..., Bench], mode: str) -> None:
    """Not once a stripe; and the numbers of one launch say nothing of another's."""
    it = bench(800)
    measurer, asked = it.measurer(), list[int]()
    get = measurer.sources.get

    def counted(number: int) -> Source:
        asked.append(number)
        return get(number)

    measurer.sources.get = counted  # type: ignore[method-assign]
    (layered,), layer = pack([Region(0, 40, 0x203, random.Random(9).randbytes(40 * PAGE_SIZE))])
    for seed in (1, 2):
        image = mixed_image(360, seed)
        other = replace(layered, offset=360 * PAGE_SIZE, layer=layer)
        slot = it.open(
            EnclaveImage((*image.regions, other), size=1 << 21, backing=image.backing), MODES[mode]
        )
        short_stripes(measurer, slot)
        while measurer.step(slot, slot + 1) is Outcome.WORKED:
            pass
        assert it.digest(slot) == it.expected(slot)
        assert it.pages(slot) == bytes_of(it.images[slot])
        assert image.backing is not None
        assert layer is not None
        assert sorted(asked) == sorted((image.backing.fd, layer.fd))
        asked.clear()


def test_packed_image_cannot_be_changed_by_anybody() -> None:
    packed, backing = pack([Region(0, 2, 0x201, b"abc"), Region(8192, 1, 0x203, measured=False)])
    assert backing is not None
    assert [region.file_page for region in packed] == [0, None]
    assert bytes(packed[0].content or b"") == b"abc"
    fd = os.open(f"/proc/self/fd/{backing.fd}", os.O_RDWR)
    for attempt in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, b"x", 0)):
        with pytest.raises(PermissionError):
            attempt()
    os.close(fd)


def test_a_file_that_was_cut_off_rejects_the_launch(tmp_path: Path, make_image: Any) -> None:
    """Loaded, then shortened by somebody: a clear error and no SIGBUS, in workers or in the host."""
    path = tmp_path / "image.enclave"
    make_image(700).save(path)
    image = EnclaveImage.load(path)
    expected = image.measure()
    for workers in (2, 0):
        for prefer in PREFERENCES:
            with Runtime(epc="8MiB", workers=workers) as runtime:
                assert runtime.wait_workers(WAIT)
                with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                    assert enclave.wait_verified(WAIT) == expected.digest
                size = path.stat().st_size
                os.truncate(path, size // 2)
                with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                    with pytest.raises(ImageFormatError, match="the image's file"):
                        enclave.wait_verified(WAIT)
                    assert enclave.state is EnclaveState.REJECTED
                assert runtime.stats()["worker_deaths"] == 0
            make_image(700).save(tmp_path / "again")
            path.write_bytes((tmp_path / "again").read_bytes())
    image.close()


# --------------------------------------------------------------------------------------------------- lanes


class Counting:
    """The native hasher, noting how many chains each call advanced."""

    midstates, lanes, name = True, 2, "native"

    def __init__(self, on_call: Callable[[int], None] = lambda count: None) -> None:
        self.hasher = get_hasher("native")
        self.calls: list[int] = []
        self.on_call = on_call

    def extend(self, chains: Any, spans: Any) -> None:
        self.calls.append(len(chains))
        self.on_call(len(chains))
        self.hasher.extend(chains, spans)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hasher, name)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 9), (5, 64)])
def test_two_launches_of_one_chain_share_the_lanes(
    bench: Callable[..., Bench], sizes: tuple[int, int]
) -> None:
    """While both have blocks every call advances two chains; each gives its own value."""
    it = bench(sum(sizes))
    images = [mixed_image(size, size) for size in sizes]
    somebody = Claims(it.memory.control_segment.fd)

    def both_are_held(count: int) -> None:
        if count == 2:
            assert not somebody.claim(0, 0)
            assert not somebody.claim(1, 0)

    hasher = Counting(both_are_held)
    measurer = it.measurer(hasher)
    for image in images:
        slot = it.open(image, COPY_BY_HOST, sgx=True, block=2)
        it.copy(slot)
        short_stripes(measurer, slot)
    with somebody:
        while measurer.step(0, 1, [(2, 1)]) is Outcome.WORKED:
            assert somebody.claim(0, 0)  # both claims were given back
            assert somebody.claim(1, 0)
            somebody.give_back(0, 0)
            somebody.give_back(1, 0)
    while measurer.step(1, 2, [(1, 0)]) is Outcome.WORKED:
        pass
    assert [it.digest(slot) for slot in (0, 1)] == [it.expected(slot) for slot in (0, 1)]
    # Pairs first, then what is left of the longer one. Blocks of two pages, one or two of them a call.
    paired = hasher.calls.count(2)
    assert hasher.calls == [2] * paired + [1] * (len(hasher.calls) - paired)
    assert paired >= min(sizes) // 4
    assert (paired == len(hasher.calls)) == (sizes[0] == sizes[1])


def test_a_partner_that_others_hold_is_left_to_them(bench: Callable[..., Bench]) -> None:
    it = bench(32)
    for seed in (1, 2):
        it.copy(it.open(mixed_image(16, seed), COPY_BY_HOST, sgx=True))
    hasher = Counting()
    measurer = it.measurer(hasher)
    with Claims(it.memory.control_segment.fd) as somebody:
        assert somebody.claim(1, 0)
        while measurer.step(0, 1, [(2, 1)]) is Outcome.WORKED:
            pass
    assert set(hasher.calls) == {1}
    assert it.digest(0) == it.expected(0)
    assert it.memory.launches.smc(1).newest(0, 2) is None


# ----------------------------------------------------------------------------------------- real workers


@pytest.mark.parametrize("prefer", ["start", "verified"])
@pytest.mark.parametrize("point", [*FILL_POINTS, *POINTS])
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_worker_that_dies_or_stops_at_each_point(
    make_image: Any,
    all_copy: Any,
    prefer: Any,
    point: str,
    action: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In both schedules the launch is VERIFIED all the same, and its pages are the image's."""
    path = tmp_path / "fault"
    monkeypatch.setenv("ENTURBO_FAULT", f"{point}={action}:{path}")
    image = all_copy(make_image(900, heap=100))
    expected = image.measure()
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
        if action == "kill":
            until(lambda: runtime.stats()["worker_deaths"] >= 1)
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]


def test_workers_copy_and_the_host_does_not(make_image: Any, all_copy: Any) -> None:
    """With as many workers as cores the host's thread only waits; both schedules, both kinds of pages."""
    image = all_copy(make_image(4000, heap=1000))
    expected = image.measure()
    with Runtime(epc="64MiB", workers=len(os.sched_getaffinity(0))) as runtime:
        assert runtime.warm(WAIT)
        for prefer in PREFERENCES:
            with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                enclave.wait_verified(WAIT)
                assert enclave.timeline.copied is not None

                deadline = time.monotonic() + WAIT  # the last news come after the verdict
                while min(pages(enclave, "copy"), pages(enclave, "measure")) < 5000:
                    assert time.monotonic() < deadline
                    time.sleep(1e-3)
                tracks = {span.track for span in enclave.timeline.spans if span.name in ("copy", "measure")}
                assert "host" not in tracks


def pages(enclave: Enclave, name: str) -> int:
    return sum(span.pages for span in enclave.timeline.spans if span.name == name)


def test_workers_scrub_what_a_launch_leaves(make_image: Any, all_copy: Any) -> None:
    """Pages of an ended launch are zeroed by workers, and only then free for the next."""
    image = all_copy(make_image(2000, seed=5))
    expected = image.measure()
    with Runtime(epc="16MiB", workers=2) as runtime:
        assert runtime.warm(WAIT)
        with runtime.launch(image, expected=expected) as enclave:
            enclave.wait_verified(WAIT)
            assert runtime.memory.epc.bytes.any()
        until(lambda: runtime.stats()["epc_pages_dirty"] == 0)
        assert not runtime.memory.epc.bytes.any()
        assert not runtime.memory.epcm.entries["generation"].any()
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]
        assert not runtime.memory.launches.generations.any()


def test_a_launch_that_needs_dirty_pages_helps_to_scrub_them(
    make_image: Any, all_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The EPC holds one launch at a time, and the workers are slow to scrub: the next one has zeros all the
    same, at once."""
    monkeypatch.setenv("ENTURBO_FAULT", "filling=nap:0.002")
    image = all_copy(make_image(1000, heap=1000))
    expected = image.measure()
    with Runtime(epc=2000 * PAGE_SIZE, slots=1, workers=2) as runtime:
        assert runtime.warm(WAIT)
        for _ in range(5):
            with runtime.launch(image, expected=expected) as enclave:
                assert enclave.wait_verified(WAIT) == expected.digest
                place = enclave._start.place
                assert not any(runtime.memory.epc.pages(place.first_page + 1000, 1000))
                runtime.memory.epc.pages(place.first_page, 2000)[:] = b"\xaa" * (2000 * PAGE_SIZE)


def test_a_late_scrubber_never_touches_a_later_launch(
    make_image: Any, all_copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stops with the claim of rows to scrub, before the first zero. Others would do its part, but
    pages are not free while it could go on: so it is killed, and never zeroes the next launch's pages."""
    path = tmp_path / "fault"
    image = make_image(1000)  # the host copies it: workers fill rows only to scrub
    expected = image.measure()
    monkeypatch.setenv("ENTURBO_FAULT", f"filling=stop:{path}")
    with Runtime(epc=1000 * PAGE_SIZE, slots=1, workers=1, progress_timeout=60) as runtime:
        assert runtime.warm(WAIT)
        (worker,) = runtime._pool.pids().values()
        pidfd = os.pidfd_open(worker)
        try:
            with runtime.launch(image, expected=expected) as enclave:
                enclave.wait_verified(WAIT)
            until(path.exists)
            until(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED)
            assert holds_claim(worker, 0)
            # As if the rows that it holds had been zeroed by another: only its claim is left to wait for.
            runtime.memory.epc.bytes[:] = 0
            runtime.memory.launches.copied[0] = 1 << 20
            with runtime.launch(image, expected=expected) as enclave:
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                except ProcessLookupError:
                    pass
                else:
                    time.sleep(0.1)
                assert enclave.wait_verified(WAIT) == expected.digest
                place = enclave._start.place
                found = bytes(runtime.memory.epc.pages(place.first_page, 1000))
                assert found == bytes(image.regions[0].content or b"")
            assert runtime.stats()["worker_deaths"] == 1
        finally:
            os.close(pidfd)


def test_host_copy_is_for_images_in_memory_alone(runtime: Runtime, make_image: Any, all_copy: Any) -> None:
    image = make_image(400)
    for candidate, mode in ((image, COPY_BY_HOST), (all_copy(image), COPY_FIRST)):
        with runtime.launch(candidate, expected=image.measure()) as enclave:
            enclave.wait_verified(WAIT)
            slot = enclave._start.place.slot
            assert int(runtime.memory.launches.copy_mode[slot]) == mode


def test_waiting_for_older_launches_is_no_stall(
    make_image: Any, all_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that takes many times the progress deadline: nobody is killed and nobody given up."""
    monkeypatch.setenv("ENTURBO_FAULT", "hashed=nap:0.03")
    image = all_copy(make_image(600))
    expected = image.measure()
    with Runtime(epc="64MiB", workers=1, progress_timeout=0.2) as runtime:
        assert runtime.warm(WAIT)
        runtime.cores = 1  # the host leaves it all to the worker
        began = time.monotonic()
        enclaves = [runtime.launch(image, expected=expected) for _ in range(24)]
        for enclave in enclaves:
            assert enclave.wait_verified(WAIT) == expected.digest
            enclave.close()
        assert time.monotonic() - began > 5 * 0.2  # longer than a launch may stall
        assert runtime.stats()["worker_deaths"] == 0
