"""Runtimes whose gates the kernel enforces, and handlers that take addresses into their own hands."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from enturbo import EnclaveImage
from enturbo.runtime.spec import WrlockMode
from enturbo.workers.measure import Measurer

WAIT = float(os.environ.get("ENTURBO_TEST_WAIT", "30"))  # seconds; a bound, never a measure

# What handlers here begin with: an address of the enclave's memory, and accesses that ask nobody. ctypes
# gives the GIL back, so a thread that sleeps in the kernel stops no other.
RAW = """
import ctypes, threading, time

def address(view):
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))

def data_address(context):
    # By way of the heap, whose view waits for nothing.
    return address(context.heap.view(0, 1)) - context.heap._offset + context.data._offset

def load(at):
    out = ctypes.create_string_buffer(1)
    ctypes.memmove(out, at, 1)
    return out.raw[0]

def store(at, value):
    ctypes.memset(at, value, 1)

"""


@pytest.fixture
def raw(function: Callable[..., EnclaveImage]) -> Callable[..., EnclaveImage]:
    """The image of a handler that may use ``address``, ``load`` and ``store``."""

    def make(source: str, **options: Any) -> EnclaveImage:
        return function(RAW + source, **options)

    return make


@pytest.fixture(scope="module", params=["wait", "shadow"])
def wrlock(request: pytest.FixtureRequest) -> WrlockMode:
    """What a store to a page does that is not measured yet."""
    mode: WrlockMode = request.param
    return mode


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No thread of this process copies under a claim, or measures, before this is set."""
    event, step = threading.Event(), Measurer.step

    def wait(measurer: Measurer, *arguments: Any) -> Any:
        assert event.wait(WAIT)
        return step(measurer, *arguments)

    monkeypatch.setattr(Measurer, "step", wait)
    yield event
    event.set()
