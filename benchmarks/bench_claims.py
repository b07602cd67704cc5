"""Claims: taking one and giving it back, for one pair and for a group, beside locks that no death gives back.

A claim is an open-file-description lock, which costs two system calls; it is taken once a stripe, of about a
millisecond. A measurer that finds a claim taken looks at another pair: that is the last row.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo.shm.launches import Claims
from enturbo.shm.layout import LAUNCH_SLOT_SIZE, MAX_PAIRS
from enturbo.shm.segment import Segment

Timed = Callable[[Callable[[], Any], int], Any]

TURNS = 1000  # in one round
GROUP = "take and give back, a thousand times"


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    segment = Segment.create(LAUNCH_SLOT_SIZE)
    yield segment
    segment.close()


def _run(benchmark: BenchmarkFixture, timed: Timed, take: Callable[[], Any], give: Callable[[], Any]) -> None:
    def work() -> None:
        for _ in range(TURNS):
            take()
            give()

    timed(work, 25)
    if benchmark.stats is not None:
        benchmark.extra_info["ns_a_turn"] = round(benchmark.stats.stats.median / TURNS * 1e9)


@pytest.mark.benchmark(group=GROUP)
@pytest.mark.parametrize("pairs", [1, 4, MAX_PAIRS])
def test_claim(benchmark: BenchmarkFixture, timed: Timed, segment: Segment, pairs: int) -> None:
    """One call covers a group, however many pairs it has."""
    with Claims(segment.fd) as claims:
        assert claims.claim(0, 0, pairs)
        claims.give_back(0, 0, pairs)
        _run(benchmark, timed, lambda: claims.claim(0, 0, pairs), lambda: claims.give_back(0, 0, pairs))


@pytest.mark.benchmark(group=GROUP)
def test_claim_beside_others(benchmark: BenchmarkFixture, timed: Timed, segment: Segment) -> None:
    """The kernel looks through the locks that the others hold: seven workers, a claim each."""
    others = [Claims(segment.fd) for _ in range(7)]
    with Claims(segment.fd) as claims:
        for number, other in enumerate(others, 1):
            assert other.claim(0, number)
        _run(benchmark, timed, lambda: claims.claim(0, 0), lambda: claims.give_back(0, 0))
    for other in others:
        other.close()


@pytest.mark.benchmark(group=GROUP)
def test_flock(benchmark: BenchmarkFixture, timed: Timed, segment: Segment) -> None:
    """``flock``: also given back by the kernel, but it is the whole file's."""
    fd = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDWR)
    try:
        _run(
            benchmark,
            timed,
            lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
            lambda: fcntl.flock(fd, fcntl.LOCK_UN),
        )
    finally:
        os.close(fd)


@pytest.mark.benchmark(group=GROUP)
def test_semaphore(benchmark: BenchmarkFixture, timed: Timed) -> None:
    """A lock between processes in shared memory: whose holder dies keeps it."""
    lock = multiprocessing.get_context("spawn").Lock()
    _run(benchmark, timed, lambda: lock.acquire(False), lock.release)


@pytest.mark.benchmark(group=GROUP)
def test_thread_lock(benchmark: BenchmarkFixture, timed: Timed) -> None:
    """No other process sees it: what the loop itself and a call cost."""
    lock = threading.Lock()
    _run(benchmark, timed, lambda: lock.acquire(False), lock.release)


@pytest.mark.benchmark(group="a claim that is taken, a thousand times")
def test_refused(benchmark: BenchmarkFixture, timed: Timed, segment: Segment) -> None:
    with Claims(segment.fd) as holder, Claims(segment.fd) as claims:
        assert holder.claim(0, 0)
        assert not claims.claim(0, 0)
        _run(benchmark, timed, lambda: claims.claim(0, 0), lambda: None)
