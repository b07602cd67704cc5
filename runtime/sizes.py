"""Sizes as people write them: ``"64MiB"``, ``"1.5 GiB"``, ``4096``."""

from __future__ import annotations

import re
from typing import Final

from ..shm.errors import EnturboError
from ..shm.layout import PAGE_SIZE

_UNITS: Final = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_FORM: Final = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,6})?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"64MiB"``, ``"10 kB"``, ``"4096"`` or ``4096``; a part of a byte is dropped.

    Raises :class:`~enturbo.shm.errors.EnturboError` for anything else.
    """
    if isinstance(size, str):
        match = _FORM.fullmatch(size)
        if match and (unit := _UNITS.get(match[2].lower())) is not None:
            whole, _, fraction = match[1].partition(".")
            return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
    elif not isinstance(size, bool) and size >= 0:
        return size
    raise EnturboError(f"not a size: expected bytes or a text like '64MiB', found {size!r}")


def pages_of(size: int) -> int:
    """Pages that ``size`` bytes need."""
    return -(-size // PAGE_SIZE)
