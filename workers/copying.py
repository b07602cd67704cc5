"""Moving bytes in and out of the EPC: past the cache where the C extension is there, plainly elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

try:
    from ._sha256 import copy_nt, zero_nt
except ImportError:  # built without a compiler
    copy_nt = zero_nt = None  # type: ignore[assignment]

LONG: Final = 64 << 10  # bytes from which a copy past the cache pays

_copy: Callable[[memoryview, memoryview], None] | None = copy_nt
_zero: Callable[[memoryview], None] | None = zero_nt


def copy_into(target: memoryview, source: memoryview) -> None:
    """Copy ``source`` to the beginning of ``target``; every store is visible to other processes before
    any store that the caller makes after it."""
    if len(source) >= LONG and _copy is not None:
        _copy(target[: len(source)], source)  # ends with a store fence
    else:
        np.frombuffer(target, np.uint8)[: len(source)] = np.frombuffer(source, np.uint8)


def zero(target: memoryview) -> None:
    """Zero ``target``."""
    if _zero is not None and len(target):
        _zero(target)
    else:
        np.frombuffer(target, np.uint8)[:] = 0
