"""launch() to the first handler instruction, to VERIFIED and to the result: four combinations, four sizes.

The benchmark's own figure is the whole life (launch to result); the milestones are in ``extra_info``. For
ratios between combinations see ``bench_ratios.py``, which interleaves them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo import EnclaveImage, Runtime, SigningKey
from enturbo.runtime.compare import COMBINATIONS, LANES, Combination, Sample, prepare, start_once

Timed = Callable[[Callable[[], Any], int], Any]

ROUNDS = {1: 10, 16: 8, 64: 6, 256: 4}
FOUR = [each for each in COMBINATIONS if each is not LANES]


@pytest.mark.parametrize("mebibytes", ROUNDS)
@pytest.mark.parametrize("combination", FOUR, ids=lambda each: each.name)
def test_launch(
    benchmark: BenchmarkFixture,
    timed: Timed,
    runtime: Runtime,
    key: SigningKey,
    image: Callable[[int], EnclaveImage],
    combination: Combination,
    mebibytes: int,
) -> None:
    benchmark.group = f"launch {mebibytes} MiB"
    (candidate,) = prepare(image(mebibytes), key, [combination])
    samples: list[Sample] = []

    def work() -> None:
        sample, (answer, _) = start_once(runtime, candidate, {"a": 1})
        assert answer == {"a": 1}
        samples.append(sample)

    timed(work, ROUNDS[mebibytes])
    counted = samples[1:] or samples
    for name in ("first", "verified", "life"):
        median = statistics.median(getattr(sample, name) for sample in counted)
        benchmark.extra_info[f"{name}_ms"] = round(median * 1e3, 2)
