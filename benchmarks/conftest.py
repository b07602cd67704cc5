"""What the benchmarks share: images of a size, a key, a runtime with a warm EPC.

Times are wall clock on a shared machine: compare only what one run has measured side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo import EnclaveImage, Runtime, SigningKey

MIB = 1 << 20
HANDLER = b"def handler(event, context):\n    return event\n"


@cache
def image_of(mebibytes: int) -> EnclaveImage:
    """A function's image with so many MiB of measured data and no heap."""
    cycle = bytes(value % 251 for value in range(251 * 4096))
    size = mebibytes * MIB
    data = (cycle * (size // len(cycle) + 1))[:size]
    with TemporaryDirectory() as folder:
        Path(folder, "handler.py").write_bytes(HANDLER)
        return EnclaveImage.from_function(folder, heap=0, files={"data.bin": data})


@pytest.fixture(scope="session")
def image() -> Callable[[int], EnclaveImage]:
    """Images by MiB, each made once."""
    return image_of


@pytest.fixture(scope="session")
def key() -> SigningKey:
    """One key for all."""
    return SigningKey.generate()


@pytest.fixture(scope="session")
def runtime(key: SigningKey) -> Iterator[Runtime]:
    """As many workers as cores (at most 8), and room for two of the largest image.

    So no launch waits until the pages of the one before it have been scrubbed.
    """
    with Runtime(epc="544MiB", signers=[key.mrsigner]) as runtime:
        # The first touch of shared memory costs as much as hashing it: have it behind us.
        assert runtime.warm()
        yield runtime


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Callable[[Callable[[], Any], int], Any]:
    """``timed(work, rounds)``: time ``work`` once a round, after one that does not count; what it gave."""

    def run(work: Callable[[], Any], rounds: int) -> Any:
        return benchmark.pedantic(work, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]

    return run
