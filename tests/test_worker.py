"""The worker's choice of what to do next, on a worker that lives in this process and is moved by hand.

Its launches stand in a small memory of their own; real worker processes are in test_filling.py and elsewhere.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from enturbo import EnclaveImage, Region, Runtime
from enturbo.runtime.backing import pack
from enturbo.shm.launches import Claims, Launch
from enturbo.shm.layout import (
    COPY_BY_HOST,
    COPY_FUSED,
    HOST_WORKER,
    PAGE_SIZE,
    SCHEME_ENTURBO,
    SCHEME_SGX,
    SCRUB,
)
from enturbo.shm.memory import Memory
from enturbo.workers import worker
from enturbo.workers.measure import settled
from enturbo.workers.protocol import BLIND, COPIED, NEWS_SIZE, READY, SCRUBBED, SPAN, WARM, News, decode
from enturbo.workers.sha256 import get_hasher
from enturbo.workers.view import Outcome
from enturbo.workers.worker import Worker

WAIT = 30.0
PAGES = 64


class Bench:
    """A worker, its memory, and the host's end of its doorbell."""

    def __init__(self, slots: int = 8) -> None:
        self.memory = Memory.create(PAGES * slots, slots)
        while self.memory.allocate_step():
            pass
        self.bell, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pidfd = os.pidfd_open(os.getpid())
        self.worker = Worker(theirs, os.getpid(), self.pidfd, self.memory, "native", 0, 1)
        self.images: list[EnclaveImage] = []

    def open(self, mode: int = COPY_FUSED, *, sgx: bool = False, measurers: int = 1) -> int:
        """A launch of 64 pages in the next slot; its generation is the slot's number plus one."""
        slot = len(self.images)
        packed, backing = pack([Region(0, PAGES, 0x203, bytes([slot + 1]) * (PAGES * PAGE_SIZE))])
        assert backing is not None
        image = EnclaveImage(packed, size=1 << 18, backing=backing)
        self.images.append(image)
        scheme, domains = (SCHEME_SGX, 1) if sgx else (SCHEME_ENTURBO, 4)
        first = slot * PAGES
        launch = Launch(slot + 1, scheme, domains, 4, first, PAGES, image.size, 1, mode)
        epcm = self.memory.epcm
        epcm.describe(first, PAGES, flags=0x203, chunks=0xFFFF, linear=0, generation=slot + 1)
        epcm.set_file_source(first, PAGES, backing.fd, 0)
        if mode == COPY_BY_HOST:
            self.memory.epc.pages(first, PAGES)[:] = bytes([slot + 1]) * (PAGES * PAGE_SIZE)
            epcm.set_valid(first, PAGES, slot + 1)
        with Claims(self.memory.control_segment.fd) as claims:
            assert claims.take_range(slot)
            self.memory.launches.open_launch(slot, launch, claims, settled(launch))
        self.memory.launches.measurers[slot] = measurers
        return slot

    def finished(self, slot: int) -> bool:
        first = slot * PAGES
        return bool((self.memory.epcm.entries["released"][first : first + PAGES] == slot + 1).all())

    def news(self) -> list[News]:
        """What the worker has told so far."""
        found: list[News] = []
        self.bell.setblocking(False)
        while True:
            try:
                news = decode(self.bell.recv(NEWS_SIZE))
            except BlockingIOError:
                return found
            assert news is not None
            found.append(news)

    def close(self) -> None:
        self.worker.measurer.claims.close()
        self.worker.measurer.forget()
        self.worker.bell.close()
        self.bell.close()
        os.close(self.pidfd)
        self.memory.close()
        for image in self.images:
            image.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


def short_stripes(bench: Bench) -> None:
    """One block a claim, so that a launch takes many rounds."""
    for slot in range(len(bench.images)):
        view = bench.worker.measurer._view(slot, slot + 1)
        if view is not None:
            view.stripe = 1


def test_launches_are_served_first_in_first_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older launch that has work is always worked on before a younger one, so none starves."""
    monkeypatch.setattr(worker, "CHECK_EVERY", 1)
    for _ in range(5):
        bench.open()
    short_stripes(bench)
    ended: list[int] = []
    while bench.worker._round() is Outcome.WORKED:
        for slot in range(5):
            begun = int(bench.memory.launches.smc(slot).released.sum()) > 0
            if begun:
                assert all(bench.finished(older) for older in range(slot))
            if bench.finished(slot) and slot not in ended:
                ended.append(slot)
    assert ended == [0, 1, 2, 3, 4]


def test_a_launch_whose_pages_are_missing_does_not_hold_the_others_up(bench: Bench) -> None:
    slow = bench.open(COPY_BY_HOST)
    bench.memory.epcm.entries["valid"][:PAGES] = 0
    other = bench.open()
    while bench.worker._round() is Outcome.WORKED:
        pass
    assert not bench.finished(slow)
    assert bench.finished(other)
    bench.memory.epcm.set_valid(0, PAGES, 1)
    while bench.worker._round() is Outcome.WORKED:
        pass
    assert bench.finished(slow)


def test_a_launch_that_is_not_for_this_worker_is_left_alone(bench: Bench) -> None:
    """Small ones (no worker may claim them), and those that are measured (the host takes the number back)."""
    bench.open(measurers=0)
    assert bench.worker._round() is Outcome.FINISHED
    assert not bench.finished(0)


def test_chains_pair_up_where_there_are_more_of_them_than_workers(bench: Bench) -> None:
    calls: list[int] = []

    class Counting:
        midstates, lanes, name = True, 2, "native"
        real = get_hasher("native")

        def extend(self, chains: Any, spans: Any) -> None:
            calls.append(len(chains))
            self.real.extend(chains, spans)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    bench.worker.measurer.hasher = Counting()
    for _ in range(3):
        bench.open(COPY_BY_HOST, sgx=True)
    while bench.worker._round() is Outcome.WORKED:
        pass
    assert all(bench.finished(slot) for slot in range(3))
    assert calls == [2] * calls.count(2) + [1] * calls.count(1)
    assert calls.count(2) >= 1
    assert calls.count(1) >= 1
    # With a worker for each chain, a lane for each is faster than two in turns.
    calls.clear()
    for _ in range(3):
        bench.open(COPY_BY_HOST, sgx=True, measurers=8)
    while bench.worker._round() is Outcome.WORKED:
        pass
    assert set(calls) == {1}


def test_scrubbing_waits_until_nothing_starts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CHECK_EVERY", 1)
    dirty = bench.open(SCRUB)
    bench.memory.epc.pages(0, PAGES)[:] = b"\xaa" * (PAGES * PAGE_SIZE)
    launch = bench.open()
    short_stripes(bench)
    while not bench.finished(launch):
        assert bench.worker._round() is Outcome.WORKED
        assert not bench.memory.launches.copied[dirty].any()
    while bench.worker._round() is Outcome.WORKED:
        pass
    assert not any(bench.memory.epc.pages(0, PAGES))
    assert [news.slot for news in bench.news() if news.kind == SCRUBBED] == [dirty]


def test_who_may_not_see_the_hosts_files_says_so(bench: Bench) -> None:
    bench.worker.measurer.sources._host = 0  # there is no /proc/0
    slot = bench.open()
    assert bench.worker._round() in (Outcome.WORKED, Outcome.WAITING)
    assert bench.worker._round() is Outcome.WAITING
    bench.worker._flush()
    assert BLIND in [news.kind for news in bench.news()]
    assert not bench.finished(slot)


def test_blind_workers_leave_copying_to_the_host(
    make_image: Callable[..., EnclaveImage], all_copy: Callable[[EnclaveImage], EnclaveImage]
) -> None:
    image = all_copy(make_image(400))
    with Runtime(epc="4MiB", workers=1) as runtime:
        assert runtime.wait_workers(WAIT)
        runtime._on_news(0, News(BLIND, 0, 0, 0, 0, 0, 0))
        with runtime.launch(image, expected=image.measure()) as enclave:
            enclave.wait_verified(WAIT)
            slot = enclave._start.place.slot
            assert int(runtime.memory.launches.copy_mode[slot]) == COPY_BY_HOST


def test_news_of_a_launch_are_merged(bench: Bench) -> None:
    """One message for what was copied and one for what was measured, however many stripes that took."""
    bench.open()
    short_stripes(bench)
    while bench.worker._round() is Outcome.WORKED:
        pass
    bench.worker._flush()
    news = [each for each in bench.news() if each.kind in (SPAN, COPIED)]
    assert sorted((each.kind, each.pages) for each in news) == [(SPAN, PAGES), (COPIED, PAGES)]


def test_the_epc_is_mapped_in_idle_time(bench: Bench) -> None:
    while bench.worker._map_more():
        pass
    assert bench.memory.epc.mapped == bench.memory.epc_segment.size
    assert [news.kind for news in bench.news()] == [WARM]


@pytest.mark.slow
def test_idle_processes_sleep(make_image: Callable[..., EnclaveImage]) -> None:
    """Once the files of ended launches are closed nobody wakes up any more: workers, zygote, host threads."""
    image = make_image(300)
    with Runtime(epc="4MiB", workers=2) as runtime:
        assert runtime.warm(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            enclave.wait_verified(WAIT)
        assert runtime.wait_scrubbed(WAIT)
        ours = [psutil.Process(pid) for pid in (*runtime._pool.pids().values(), runtime._zygote.pid)]
        time.sleep(6.0)  # workers close what nobody has used for five seconds, once
        before = [process.num_ctx_switches().voluntary for process in ours]
        time.sleep(1.0)
        after = [process.num_ctx_switches().voluntary for process in ours]
    assert [now - then for now, then in zip(after, before, strict=True)] == [0, 0, 0]


def test_the_numbers_of_the_messages_are_different() -> None:
    assert len({READY, SPAN, COPIED, WARM, SCRUBBED, BLIND}) == 6
    assert HOST_WORKER == 0xFFFFFFFF
