"""The program of an enclave that is attacked by another one."""

from __future__ import annotations

import ctypes
from typing import Any

from . import kit
from .kit import note


def here(to: dict[str, Any]) -> None:
    """Put a word into the heap, and say where it is."""
    assert kit._heap is not None
    kit._heap[to["at"] : to["at"] + len(to["word"])] = to["word"]
    note(f"at {ctypes.addressof(ctypes.c_char.from_buffer(kit._heap)) + to['at']}")
