"""Releasing pages: all blocks of a pair by one store into the EPCM, or one call a block, or a page.

A pair of an image of 256 MiB has 128 rows of 32 pages, one row in every 512 pages (D = 32, B = 16). A stripe
ends with the release of 16 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo.shm.epcm import Epcm, Rows
from enturbo.shm.layout import EPCM_ENTRY
from enturbo.shm.segment import Segment

Timed = Callable[[Callable[[], Any], int], Any]
Release = Callable[[Epcm, Rows, int], None]

PAGES = 65536
WIDTH, STRIDE = 32, 512
ALL = PAGES // STRIDE
STRIPE = 16
REPEAT = 20  # in one round


@pytest.fixture(scope="module")
def epcm() -> Iterator[Epcm]:
    segment = Segment.create(PAGES * EPCM_ENTRY.size)
    epcm = Epcm(segment.view, PAGES)
    yield epcm
    epcm.close()
    segment.close()


def _all_at_once(epcm: Epcm, rows: Rows, generation: int) -> None:
    epcm.release_rows(rows, 0, ALL, generation)


def _by_stripes(epcm: Epcm, rows: Rows, generation: int) -> None:
    for start in range(0, ALL, STRIPE):
        epcm.release_rows(rows, start, start + STRIPE, generation)


def _by_blocks(epcm: Epcm, rows: Rows, generation: int) -> None:
    for row in range(ALL):
        epcm.release_rows(rows, row, row + 1, generation)


def _by_pages(epcm: Epcm, rows: Rows, generation: int) -> None:
    released = epcm.entries["released"]
    for row in range(ALL):
        first = rows.base + row * rows.stride + rows.column
        for page in range(first, first + rows.width):
            released[page] = generation


WAYS: dict[str, Release] = {
    "one call": _all_at_once,
    "a call a stripe": _by_stripes,
    "a call a block": _by_blocks,
    "a store a page": _by_pages,
}


@pytest.mark.benchmark(group=f"release a pair's {ALL * WIDTH} pages, {REPEAT} times")
@pytest.mark.parametrize("way", WAYS)
def test_release(benchmark: BenchmarkFixture, timed: Timed, epcm: Epcm, way: str) -> None:
    rows = Rows(base=0, stride=STRIDE, column=WIDTH, width=WIDTH, whole=ALL, end=PAGES)
    release, generations = WAYS[way], count(1)

    def work() -> int:
        for _ in range(REPEAT):
            generation = next(generations)
            release(epcm, rows, generation)
        return generation

    last = timed(work, 25)
    whole = epcm.entries["released"].reshape(ALL, STRIDE)
    assert (whole[:, WIDTH : 2 * WIDTH] == last).all()
    assert (whole[:, :WIDTH] == 0).all()
    assert (whole[:, 2 * WIDTH :] == 0).all()
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / REPEAT
        benchmark.extra_info["us_a_pair"] = round(seconds * 1e6, 2)
        benchmark.extra_info["ns_a_page"] = round(seconds / (ALL * WIDTH) * 1e9, 2)
