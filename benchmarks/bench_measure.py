"""Measuring an image without any EPC, with one and with two hashing threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from enturbo import EnclaveImage

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
