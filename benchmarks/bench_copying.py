"""Copying pages: past the cache, plainly, and into memory that nobody has touched yet.

``MB_per_s`` counts the bytes that were copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo.shm.layout import PAGE_SIZE
from enturbo.shm.segment import Segment
from enturbo.workers.copying import copy_into, copy_rows, zero

Timed = Callable[[Callable[[], Any], int], Any]

SIZE = 64 << 20
WIDTH, STRIDE = 32 * PAGE_SIZE, 512 * PAGE_SIZE  # a pair's blocks with D = 32, B = 16


@pytest.fixture(scope="module")
def source() -> memoryview:
    return memoryview(bytes(value % 251 for value in range(251)) * (SIZE // 251 + 1))[:SIZE]


@pytest.fixture(scope="module")
def warm() -> Iterator[Segment]:
    """Shared memory as the EPC is made of it, touched before."""
    segment = Segment.create(SIZE)
    zero(segment.view)
    yield segment
    segment.close()


def _note(benchmark: BenchmarkFixture) -> None:
    if benchmark.stats is not None:
        benchmark.extra_info["MB_per_s"] = round(SIZE / benchmark.stats.stats.median / 1e6)


@pytest.mark.benchmark(group="copy into warm memory, 64 MiB")
@pytest.mark.parametrize("way", ["plain", "past the cache", "rows of a pair, one pair after another"])
def test_copy(benchmark: BenchmarkFixture, timed: Timed, source: memoryview, warm: Segment, way: str) -> None:
    def plain() -> None:
        np.frombuffer(warm.view, np.uint8)[:] = np.frombuffer(source, np.uint8)

    def past_the_cache() -> None:
        copy_into(warm.view, source)

    def by_pairs() -> None:
        for at in range(0, STRIDE, WIDTH):
            copy_rows(warm.view[at:], source[at:], WIDTH, STRIDE, SIZE // STRIDE)

    works = {"plain": plain, "past the cache": past_the_cache}
    timed(works.get(way, by_pairs), 15)
    _note(benchmark)
    assert warm.view == source


@pytest.mark.benchmark(group="scrub warm memory, 64 MiB")
@pytest.mark.parametrize("way", ["plain", "past the cache"])
def test_zero(benchmark: BenchmarkFixture, timed: Timed, warm: Segment, way: str) -> None:
    def plain() -> None:
        np.frombuffer(warm.view, np.uint8)[:] = 0

    timed(plain if way == "plain" else lambda: zero(warm.view), 15)
    _note(benchmark)


@pytest.mark.benchmark(group="copy into fresh memory, 64 MiB: allocation included")
@pytest.mark.parametrize("way", ["plain, SharedMemory", "a segment of the library"])
def test_copy_fresh(benchmark: BenchmarkFixture, timed: Timed, source: memoryview, way: str) -> None:
    """What a fresh arena has to beat: touching and copying, without allocating first."""

    def plain() -> None:
        memory = SharedMemory(create=True, size=SIZE)
        assert memory.buf is not None
        np.frombuffer(memory.buf, np.uint8)[:SIZE] = np.frombuffer(source, np.uint8)
        memory.close()
        memory.unlink()

    def segment() -> None:
        memory = Segment.create(SIZE)
        copy_into(memory.view, source)
        memory.close()

    timed(plain if way.startswith("plain") else segment, 9)
    _note(benchmark)
