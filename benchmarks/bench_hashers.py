"""Hashers on the records of measured pages, against SHA-256 of the same bytes without any records.

``MB_per_s`` counts page bytes. A page is 4096 bytes and 5184 bytes of records, so even a hasher at the
limit of SHA-256 is at 79 % of the plain figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo.shm.dtypes import EPCM_DTYPE
from enturbo.workers.sha256 import Pages, Span, available, get_hasher

Timed = Callable[[Callable[[], Any], int], Any]

PAGES = 4096  # 16 MiB
REFERENCE_PAGES = 512  # the reference hasher is slow


def _pages(count: int) -> Pages:
    entries = np.zeros(count, EPCM_DTYPE)
    entries["flags"] = 0x201
    entries["chunks"] = 0xFFFF
    entries["linear"] = np.arange(count)
    data = np.arange(count * 4096, dtype=np.uint64).view(np.uint8)[: count * 4096]
    return Pages(entries.tobytes(), data.tobytes())


def _note(benchmark: BenchmarkFixture, pages: int) -> None:
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["MB_per_s"] = round(pages * 4096 / seconds / 1e6)
        benchmark.extra_info["us_per_page"] = round(seconds / pages * 1e6, 3)


@pytest.mark.benchmark(group="one chain")
def test_plain_sha256(benchmark: BenchmarkFixture, timed: Timed) -> None:
    data = _pages(PAGES).data
    assert data is not None
    timed(lambda: hashlib.sha256(data).digest(), 15)
    _note(benchmark, PAGES)


@pytest.mark.benchmark(group="one chain")
@pytest.mark.parametrize("name", available())
def test_one_chain(benchmark: BenchmarkFixture, timed: Timed, name: str) -> None:
    hasher = get_hasher(name)
    count = REFERENCE_PAGES if name == "reference" else PAGES
    pages = _pages(count)

    def work() -> bytes:
        chain = hasher.start()
        hasher.extend([chain], [Span(pages, 0, count, count, 1, count)])
        return chain.digest()

    timed(work, 15)
    _note(benchmark, count)


@pytest.mark.benchmark(group="two chains")
@pytest.mark.parametrize("name", [name for name in available() if name != "reference"])
def test_two_chains(benchmark: BenchmarkFixture, timed: Timed, name: str) -> None:
    """The pages in turns of 16 to two chains, which the native hasher advances in lockstep."""
    hasher = get_hasher(name)
    pages = _pages(PAGES)
    spans = [Span(pages, first, 16, 32, PAGES // 32, PAGES) for first in (0, 16)]

    def work() -> list[bytes]:
        chains = [hasher.start(), hasher.start()]
        hasher.extend(chains, spans)
        return [chain.digest() for chain in chains]

    timed(work, 15)
    _note(benchmark, PAGES)


@pytest.mark.benchmark(group="records of unmeasured pages")
@pytest.mark.parametrize("name", [name for name in available() if name != "reference"])
def test_unmeasured_pages(benchmark: BenchmarkFixture, timed: Timed, name: str) -> None:
    """A GiB of heap: 262,144 EADD records of 64 bytes."""
    hasher = get_hasher(name)
    count = 1 << 18

    def work() -> bytes:
        chain = hasher.start()
        chain.eadd_run(0, count, 0x203)
        return chain.digest()

    timed(work, 7)
    _note(benchmark, count)
