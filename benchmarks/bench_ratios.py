"""Ratios side by side from one run: every round starts each combination once and takes its ratios itself.

Machines slow down for minutes at a time; a ratio taken inside a round survives that, one between two runs
does not. Printed per size: median and range of each ratio, and launch to VERIFIED as a share of a ceiling
taken in the same round: raw two-lane hashing of the same records by as many threads as there are cores.
Combinations that run early are started in both ways: ``prefer="start"``, and ``prefer="verified"`` (``+v``).

The handler runs beside the workers here; ``report.py`` has the launches without one, and the targets.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo import Enclave, EnclaveImage, Runtime, SigningKey
from enturbo.runtime.compare import (
    COMBINATIONS,
    ENTURBO1,
    ENTURBO2,
    LANES,
    SGX1,
    SGX2,
    Candidate,
    Comparison,
    Ratio,
    Row,
    Sample,
    prepare,
    start_once,
)
from enturbo.shm.dtypes import EPCM_DTYPE
from enturbo.workers.sha256 import Pages, Span, get_hasher

Timed = Callable[[Callable[[], Any], int], Any]

ROUNDS = {1: 9, 16: 9, 64: 7, 256: 5}
# The same combinations, started for the verdict's sake: startup, scheme and heap are theirs.
VERIFIED = {each: each._replace(name=f"{each.name}+v") for each in (ENTURBO1, ENTURBO2)}


class Preferring:
    """A runtime that prefers to be VERIFIED soon."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def launch(self, *arguments: Any, **choices: Any) -> Enclave:
        return self._runtime.launch(*arguments, prefer="verified", **choices)


def _ceiling(pages: int) -> Callable[[], float]:
    """Seconds in which all cores hash the records of ``pages`` pages: no copy, no claims, no merge.

    The pages are two MiB over and over: a bound on hashing alone, with everything else for nothing.
    """
    hasher = get_hasher()
    batch = 512
    entries = np.zeros(batch, EPCM_DTYPE)
    entries["flags"], entries["chunks"], entries["linear"] = 0x201, 0xFFFF, np.arange(batch)
    held = Pages(entries.tobytes(), bytes(range(256)) * 16 * batch)
    spans = [Span(held, first, 16, 32, batch // 32, batch) for first in (0, 16)]
    threads = len(os.sched_getaffinity(0))
    turns = max(1, pages // batch // threads)

    def one() -> None:
        chains = [hasher.start(), hasher.start()]
        for _ in range(turns):
            hasher.extend(chains, spans)

    def seconds() -> float:
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda _: one(), range(threads)))
            taken = time.perf_counter() - begin
        # Small images are less than a turn of all threads.
        return taken * pages / (turns * batch * threads)

    return seconds


@pytest.mark.parametrize("mebibytes", ROUNDS)
def test_ratios(
    benchmark: BenchmarkFixture,
    timed: Timed,
    runtime: Runtime,
    key: SigningKey,
    image: Callable[[int], EnclaveImage],
    capsys: pytest.CaptureFixture[str],
    mebibytes: int,
) -> None:
    benchmark.group = "one interleaved round of all combinations"
    subject = image(mebibytes)
    candidates = _both_ways(prepare(subject, key))
    ceiling = _ceiling(subject.page_count)
    rows = [Row(each.combination, each.sigstruct.enclavehash) for each in candidates]
    ceilings: list[float] = []

    def one_round() -> None:
        ceilings.append(ceiling())
        for row, candidate in zip(rows, candidates, strict=True):
            how = Preferring(runtime) if candidate.combination in VERIFIED.values() else runtime
            row.samples.append(start_once(how, candidate, {"a": 1})[0])  # type: ignore[arg-type]
            drain(runtime)

    timed(one_round, ROUNDS[mebibytes])
    if len(ceilings) > 1:
        del ceilings[0]
        for row in rows:
            del row.samples[0]
    comparison = Comparison(tuple(rows))
    assert {row.combination for row in comparison.rows} == {*COMBINATIONS, *VERIFIED.values()}
    with capsys.disabled():
        print("\n" + "\n".join(_lines(mebibytes, comparison, ceilings)))
    benchmark.extra_info["rows"] = comparison.to_list()


def drain(runtime: Runtime) -> None:
    """Wait until the pages of the last launch are scrubbed: by workers, on the next one's cores."""
    while runtime.stats()["epc_pages_dirty"]:
        time.sleep(0.001)


def _both_ways(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [
        *candidates,
        *(
            candidate._replace(combination=VERIFIED[candidate.combination])
            for candidate in candidates
            if candidate.combination in VERIFIED
        ),
    ]


def _lines(mebibytes: int, comparison: Comparison, ceilings: Sequence[float]) -> list[str]:
    def verified(sample: Sample) -> float:
        return sample.verified

    def first(sample: Sample) -> float | None:
        return sample.first

    lines = [f"{mebibytes} MiB, {len(ceilings)} rounds; ms are medians, ratios are taken round by round"]
    for row in comparison.rows:
        share = [limit / sample.verified for limit, sample in zip(ceilings, row.samples, strict=True)]
        lines.append(
            f"  {row.combination.name:10} first {(row.first or 0) * 1e3:8.2f}"
            f"   VERIFIED {row.verified * 1e3:8.2f} ({statistics.median(share):.0%} of the ceiling)"
            f"   result {row.life * 1e3:8.2f}"
        )
    for combination, base in (
        (ENTURBO1, SGX1),
        (VERIFIED[ENTURBO1], SGX1),
        (ENTURBO2, SGX1),
        (ENTURBO2, SGX2),
        (VERIFIED[ENTURBO2], SGX2),
        (ENTURBO1, LANES),
        (LANES, SGX1),
    ):
        ours, theirs = comparison[combination], comparison[base]
        lines.append(
            f"  {combination.name + ' / ' + base.name:20} first {_text(ours.speed_up(theirs, first))}"
            f"   VERIFIED {_text(ours.speed_up(theirs, verified))}   life {_text(ours.speed_up(theirs))}"
        )
    lines.append(f"  ceiling {statistics.median(ceilings) * 1e3:.2f} ms: hashing alone, all cores")
    return lines


def _text(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:5.2f} x ({ratio.least:.2f} .. {ratio.most:.2f})"
