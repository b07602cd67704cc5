"""R1 and R2 by the kernel: plain accesses, which ask nobody, before, during and after measurement."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from enturbo import EnclaveDestroyed, EnclaveImage, Region, Runtime
from enturbo.runtime.spec import WrlockMode
from enturbo.runtime.startup import Piece, Start
from enturbo.shm.layout import PAGE_SIZE
from enturbo.workers.measure import Measurer
from enturbo.workers.view import Outcome

WAIT = float(os.environ.get("ENTURBO_TEST_WAIT", "30"))  # seconds; a bound, never a measure
Raw = Callable[..., EnclaveImage]

MARKS = 4  # page of the heap in which each access that came back leaves a mark
# Each event is done on a thread of its own, and says when it came back (CLOCK_MONOTONIC, ns).
TOUCH = """
def handler(event, context):
    event, plain = event
    data = data_address(context)
    heap = address(context.heap.view())
    came_back, found = {}, {}

    def touch(index, name, what, at, value):
        if what == "load":
            found[name] = load(at)
        else:
            store(at, value)
        came_back[name] = time.monotonic_ns()
        store(heap + MARKS * 4096 + index, 1)

    threads = []
    for index, (name, what, region, page, value) in enumerate(event):
        at = {"data": data, "heap": heap, "plain": data + plain}[region] + page * 4096 + 7
        thread = threading.Thread(target=touch, args=(index, name, what, at, value))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return came_back, found, bytes(context.data.read()[7::4096])
"""


@dataclass
class Steps:
    """A start whose host copies and measures alone, in steps that the test lets go on."""

    copy: threading.Event = field(default_factory=threading.Event)
    measure: threading.Event = field(default_factory=threading.Event)
    copied: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Data pages are copied when ``copy`` is set, and nothing is measured before ``measure`` is."""
    steps = Steps()
    copy, step = Start.copy, Measurer.step

    def slow_copy(start: Start, piece: Piece) -> None:
        if piece.region.flags & 2 and piece.region.content is not None:
            assert steps.copy.wait(WAIT)
        copy(start, piece)
        if piece.region.flags & 2:
            steps.copied.set()

    def slow_step(measurer: Measurer, slot: int, generation: int, *more: object) -> Outcome:
        assert steps.measure.wait(WAIT)
        return step(measurer, slot, generation, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Start, "copy", slow_copy)
    monkeypatch.setattr(Measurer, "step", slow_step)
    yield steps
    steps.copy.set()
    steps.measure.set()


@pytest.fixture(scope="module")
def alone(wrlock: WrlockMode) -> Iterator[Runtime]:
    """The host copies and measures alone, on threads that the test can hold."""
    with Runtime(
        epc="64MiB", workers=0, wrlock=wrlock, require_enforcement=True, progress_timeout=WAIT
    ) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def executing() -> Iterator[Runtime]:
    """The same under the gate that lets nobody read before the measurement either."""
    with Runtime(
        epc="64MiB", workers=0, gate="execute", require_enforcement=True, progress_timeout=WAIT
    ) as runtime:
        yield runtime


DATA_PAGES = 8
PLAIN = 0x40_0000  # enclave offset of pages that are filled, and not measured


@dataclass
class Seen:
    """When each access came back (ns), and what it found; the moments between which it can be told."""

    came_back: dict[str, int]
    found: dict[str, int]
    data: bytes
    before_copy: int
    before_release: int

    def when(self, name: str) -> str:
        """In which part of the start the access came back."""
        at = self.came_back[name]
        if at < self.before_copy:
            return "at once"
        return "when copied" if at < self.before_release else "when measured"


def touch(
    runtime: Runtime,
    raw: Raw,
    steps: Steps,
    touches: list[tuple[str, str, str, int, int]],
    at_once: tuple[str, ...] = (),
    copied: tuple[str, ...] = (),
) -> Seen:
    """Start an image whose data, and a region that is not measured, become VALID late; measure it later."""
    built = raw(TOUCH.replace("MARKS", str(MARKS)), data=bytes(range(1, 65)) * 64 * DATA_PAGES, heap="64KiB")
    plain = Region(PLAIN, 2, 0x203, bytes([9]) * 2 * PAGE_SIZE, measured=False)
    image = EnclaveImage([*built.regions, plain], size=1 << 23)
    expected = image.measure()
    with runtime.launch(image, expected=expected) as enclave:
        future = enclave.submit([touches, PLAIN - data_offset(image)])
        heap = next(number for number, region in enumerate(image.regions) if region.content is None)
        page = enclave._start.place.first_page + sum(each.page_count for each in image.regions[:heap]) + MARKS

        def until_back(names: tuple[str, ...]) -> None:
            """Wait for those that nothing holds back: how long they take is the machine's business."""
            deadline = time.monotonic() + WAIT
            marks = runtime.memory.epc.pages(page, 1)
            while not all(marks[index] for index, (name, *_) in enumerate(touches) if name in names):
                assert time.monotonic() < deadline, names
                time.sleep(1e-3)

        until_back(at_once)
        time.sleep(0.3)  # long enough to have got through, were there no gate
        before_copy = time.monotonic_ns()
        steps.copy.set()
        assert steps.copied.wait(WAIT)
        until_back(copied)
        time.sleep(0.3)
        before_release = time.monotonic_ns()
        steps.measure.set()
        came_back, found, data = future.result(WAIT)
        assert enclave.mrenclave == expected.digest
        assert enclave.timeline.gate_waits > 0
    return Seen(came_back, found, data, before_copy, before_release)


def data_offset(image: EnclaveImage) -> int:
    return next(region.offset for region in image.regions if region.flags & 2 and region.chunks)


# Name, what, where, page, value.
TOUCHES = [
    ("load", "load", "data", 0, 0),
    ("store", "store", "data", 3, 200),
    ("load plain", "load", "plain", 0, 0),
    ("store plain", "store", "plain", 1, 5),
    ("load heap", "load", "heap", 0, 0),
    ("store heap", "store", "heap", 1, 5),
]


def test_each_access_waits_for_its_own_page_alone(
    alone: Runtime, wrlock: WrlockMode, raw: Raw, steps: Steps
) -> None:
    """R1: a read waits until its page is there, and for no more. R2: a write until the page is measured."""
    copied = ("load", "load plain", "store plain", *(("store",) if wrlock == "shadow" else ()))
    seen = touch(alone, raw, steps, TOUCHES, ("load heap", "store heap"), copied)
    assert {name: seen.when(name) for name, *_ in TOUCHES} == {
        "load": "when copied",
        # A private copy waits for the bytes that it is made of, and for no more.
        "store": "when measured" if wrlock == "wait" else "when copied",
        # What is not measured has no WRLOCK; what has no bytes either has nothing to wait for.
        "load plain": "when copied",
        "store plain": "when copied",
        "load heap": "at once",
        "store heap": "at once",
    }
    assert seen.found == {"load": 8, "load plain": 9, "load heap": 0}
    assert seen.data[3] == 200


def test_nothing_that_is_measured_is_read_before_it_is(executing: Runtime, raw: Raw, steps: Steps) -> None:
    """The gate "execute": the handler's own code too, so it begins only then."""
    seen = touch(executing, raw, steps, TOUCHES)
    assert seen.when("load") == seen.when("store") == "when measured"
    assert seen.found["load"] == 8
    assert seen.data[3] == 200


def test_a_page_without_w_is_never_written(alone: Runtime, raw: Raw) -> None:
    """Neither before the verdict nor after it: the store is the process's end."""
    image = raw(
        "def handler(event, context):\n    at = data_address(context)\n    store(at - event, 1)\n",
        data=PAGE_SIZE,
    )
    with (
        alone.launch(image, expected=image.measure()) as enclave,
        pytest.raises(EnclaveDestroyed, match="SIGSEGV"),
    ):
        enclave.call(data_offset(image), timeout=WAIT)
