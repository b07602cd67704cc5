"""A handler that stores to every writable page from four threads, from its first instruction on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from enturbo import EnclaveImage, MeasurementMismatch, Runtime
from enturbo.runtime.guard import Guard
from enturbo.runtime.processes import EnclaveProcess
from enturbo.runtime.startup import Start
from enturbo.shm.layout import COPY_BY_HOST

WAIT = float(os.environ.get("ENTURBO_TEST_WAIT", "60"))  # seconds; a bound, never a measure
DATA = 8 << 20
PASSES = 20  # over all pages, a thread: enough to outlast the measurement
CONTROLS = 100  # launches without a gate, of which one is enough that measures something else
Raw = Callable[..., EnclaveImage]

HAMMER = """
def handler(event, context):
    data, size = data_address(context), len(context.data)
    heap = address(context.heap.view())
    together = threading.Barrier(4)

    def hammer(number):
        for value in range(event["passes"]):
            # One store a page first, so that no page is spared for long; then all of its bytes.
            for at in range(data + 4096 * number, data + size, 4 * 4096):
                store(at, value)
            ctypes.memset(heap, value, len(context.heap))
        together.wait()
        ctypes.memset(data + number * (size // 4), number + 1, size // 4)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quarters = [context.data.read(number * (size // 4), size // 4) for number in range(4)]
    return [quarter.count(number + 1) for number, quarter in enumerate(quarters)]
"""


@pytest.fixture(scope="module")
def content() -> bytes:
    return bytes(range(256)) * (DATA // 256)


@pytest.fixture(autouse=True)
def measured_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that begins when its enclave process is there, so that the two overlap for all of its time."""
    attached: dict[int, threading.Event] = {}
    attach, open_launch = Guard.attach, Start.open

    def note(guard: Guard, process: EnclaveProcess) -> None:
        attach(guard, process)
        attached.setdefault(guard._spec.generation, threading.Event()).set()

    def wait(start: Start, measurers: int, copy_mode: int = COPY_BY_HOST) -> None:
        assert attached.setdefault(start.place.generation, threading.Event()).wait(WAIT)
        open_launch(start, measurers, copy_mode)

    monkeypatch.setattr(Guard, "attach", note)
    monkeypatch.setattr(Start, "open", wait)


def runtime_of(**options: Any) -> Runtime:
    # No 2 MiB claims, nothing scrubbed ahead: pages are reused at once, so a late store would be seen too.
    return Runtime(epc="96MiB", workers=2, **options)


GATES: dict[str, dict[str, Any]] = {
    "write": {"require_enforcement": True},
    "execute": {"require_enforcement": True, "gate": "execute"},
    "shadow": {"require_enforcement": True, "wrlock": "shadow"},
}


@pytest.fixture(params=list(GATES))
def gated(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with runtime_of(**GATES[request.param]) as runtime:
        assert runtime.wait_workers()
        yield runtime


def hammer(runtime: Runtime, image: EnclaveImage, launches: int, passes: int) -> int:
    """Launches that came out as they should; raises for a wrong result, counts wrong measurements."""
    expected, right = image.measure(), 0
    for number in range(launches):
        with runtime.launch(image, expected=expected, prefer=("start", "verified")[number % 2]) as enclave:
            future = enclave.submit({"passes": passes})
            try:
                assert enclave.wait_verified(WAIT) == expected.digest
            except MeasurementMismatch:
                continue
            assert future.result(WAIT) == [DATA // 4] * 4
            right += 1
    return right


def test_the_value_is_that_of_the_image(gated: Runtime, raw: Raw, content: bytes) -> None:
    assert hammer(gated, raw(HAMMER, data=content, heap="64KiB"), 12, 1) == 12


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_value_is_that_of_the_image_500_times(gated: Runtime, raw: Raw, content: bytes) -> None:
    assert hammer(gated, raw(HAMMER, data=content, heap="64KiB"), 500, 1) == 500


def test_without_a_gate_it_is_not(raw: Raw, content: bytes) -> None:
    """The control: the same handler, where nothing but the handler's own good will stands in its way."""
    with runtime_of(enforcement="cooperative") as runtime:
        assert runtime.wait_workers()
        image = raw(
            HAMMER,
            data=content,
            heap="64KiB",
        )
        assert any(hammer(runtime, image, 1, PASSES) == 0 for _ in range(CONTROLS))
