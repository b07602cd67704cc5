"""Measuring images without any EPC: with one and with two hashing threads, and several images at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from enturbo import EnclaveImage, Region
from enturbo.runtime.measuring import MeasureJob, measure_images

Timed = Callable[[Callable[[], Any], int], Any]

MEBIBYTES = 64


@pytest.mark.benchmark(group=f"measure {MEBIBYTES} MiB")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("scheme", ["sgx", "enturbo"])
def test_measure(timed: Timed, image: Callable[[int], EnclaveImage], scheme: str, workers: int) -> None:
    """Scheme sgx is one chain: a second thread is of no use to it."""
    subject = image(MEBIBYTES)
    found = timed(lambda: subject.measure(scheme, workers=workers), 7)
    assert found == subject.measure(scheme)


@cache
def different(number: int) -> EnclaveImage:
    """Images of one size that share no memory, so that none finds in the cache what another one has read."""
    content = bytes((value + number) % 251 for value in range(251 << 12))
    size = MEBIBYTES << 20
    return EnclaveImage(
        [Region(0, size // 4096, 0x203, (content * (size // len(content) + 1))[:size])], size=size
    )


@pytest.mark.benchmark(group=f"several images of {MEBIBYTES} MiB, scheme sgx, one thread")
@pytest.mark.parametrize("way", ["one after another", "paired"])
@pytest.mark.parametrize("count", [2, 4])
def test_several_images(timed: Timed, count: int, way: str) -> None:
    """Chains of two images fill both lanes of the native hasher; a chain of its own fills one."""
    subjects = [different(number) for number in range(count)]

    def work() -> list[Any]:
        if way == "paired":
            return measure_images([MeasureJob(subject, "sgx") for subject in subjects], workers=1)
        return [subject.measure("sgx", workers=1) for subject in subjects]

    assert timed(work, 7) == [subject.measure("sgx") for subject in subjects]
