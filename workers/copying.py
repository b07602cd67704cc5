"""Moving bytes in and out of the EPC: past the cache where the C extension is there, plainly elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

try:
    from ._sha256 import copy_nt, copy_rows_nt, zero_nt
except ImportError:  # built without a compiler
    copy_nt = copy_rows_nt = zero_nt = None  # type: ignore[assignment]

LONG: Final = 64 << 10  # bytes from which a copy past the cache pays

_copy: Callable[[memoryview, memoryview], None] | None = copy_nt
_copy_rows: Callable[[memoryview, memoryview, int, int, int], None] | None = copy_rows_nt
_zero: Callable[[memoryview], None] | None = zero_nt


def copy_into(target: memoryview, source: memoryview) -> None:
    """Copy ``source`` to the beginning of ``target``; every store is visible to other processes before
    any store that the caller makes after it."""
    if len(source) >= LONG and _copy is not None:
        _copy(target[: len(source)], source)  # ends with a store fence
    else:
        np.frombuffer(target, np.uint8)[: len(source)] = np.frombuffer(source, np.uint8)


def copy_rows(target: memoryview, source: memoryview, width: int, stride: int, rows: int) -> None:
    """Copy ``rows`` pieces of ``width`` bytes, ``stride`` bytes apart in both; else as :func:`copy_into`.

    Source and target begin with the first piece and hold the last one. Raises ValueError if they do not.
    """
    if _copy_rows is not None:
        _copy_rows(target, source, width, stride, rows)
        return
    to, taken = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    if rows and min(len(to), len(taken)) < (rows - 1) * stride + width:
        raise ValueError(f"{rows} pieces of {width} bytes, {stride} apart, do not lie in {len(taken)} bytes")
    for at in range(0, rows * stride, stride):
        to[at : at + width] = taken[at : at + width]


def zero(target: memoryview) -> None:
    """Zero ``target``."""
    if _zero is not None and len(target):
        _zero(target)
    else:
        np.frombuffer(target, np.uint8)[:] = 0
