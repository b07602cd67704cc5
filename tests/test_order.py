"""The order per page: copied, then read (R1); measured, then written (R2); and that starts really overlap.

Most of these hold a start up at a chosen page and look at what the handler could do meanwhile. A handler is
an ordinary process and tells about itself through files; that is no way out of a real enclave.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage, EnclaveState, Region, Runtime, Timeline
from enturbo.runtime.arena import Place
from enturbo.runtime.startup import PREFERENCES, Piece, Start
from enturbo.shm.epcm import Epcm, Rows
from enturbo.shm.layout import PAGE_SIZE
from enturbo.shm.smc import Smc
from enturbo.workers import filling
from enturbo.workers.copying import copy_into
from enturbo.workers.measure import Measurer

WAIT = 30.0  # seconds; a bound on every wait here, never a measure
Function = Callable[..., EnclaveImage]
Rework = Callable[[EnclaveImage], EnclaveImage]
Slow = Callable[[random.Random], None]


def until(condition: Callable[[], object]) -> None:
    """Look again and again, for a bounded time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def noise(pages: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


# ------------------------------------------------------------------------------------------------- overlap


def overlaps(timeline: Timeline) -> tuple[bool, bool]:
    """(the handler ran before the measuring ended, two tracks measured at the same time)."""
    spans = [span for span in timeline.spans if span.name == "measure"]
    assert spans
    assert timeline.first_instruction is not None
    early = timeline.first_instruction < max(span.end for span in spans)
    beside = any(
        one.track != two.track and one.start < two.end and two.start < one.end
        for one in spans
        for two in spans
    )
    return early, beside


def test_execution_and_measuring_overlap_and_a_serial_start_does_not_pass_for_it(function: Function) -> None:
    """The first handler instruction lies before the last measuring span's end, and measurers overlap.

    96 MiB are measured in some 50 to 500 ms, far longer than a fork and an import take; the handler waits
    for nothing but the pages of its own code.
    """
    image = function("def handler(event, context):\n    return event\n", data=96 << 20)
    expected = image.measure()
    with Runtime(epc="100MiB", workers=2, enforcement="cooperative") as runtime:
        assert runtime.wait_workers(WAIT)

        def launch(startup: str) -> tuple[bool, bool]:
            with runtime.launch(image, expected=expected, startup=startup) as enclave:
                assert enclave.call(1, timeout=WAIT) == 1
                assert enclave.mrenclave == expected.digest
                return overlaps(enclave.timeline)

        # A busy machine may let the measurers take turns: one launch where they overlap is enough.
        assert any(launch("enturbo") == (True, True) for _ in range(20))
        assert launch("serial") == (False, False)


def test_the_handler_runs_while_nothing_is_measured(
    runtime: Runtime, function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any clock: measuring does not begin before the handler has ended, and the result waits."""
    image = function("def handler(event, context):\n    open(event, 'w').close()\n    return 1\n")
    done = tmp_path / "done"
    step, looked = Measurer.step, []
    made: list[Future[Any]] = []

    def late(measurer: Measurer, slot: int, generation: int) -> Any:
        until(lambda: done.exists() and made)
        looked.append(made[0].done())
        return step(measurer, slot, generation)

    monkeypatch.setattr(Measurer, "step", late)  # the image is small: no worker may claim
    with runtime.launch(image, expected=image.measure()) as enclave:
        made.append(enclave.submit(str(done)))
        assert made[0].result(WAIT) == 1
    assert looked
    assert not any(looked)


# -------------------------------------------------------------------------------------- R1: reads wait


READER = """
import hashlib
def handler(event, context):
    digest = hashlib.sha256()
    for offset, n in event:
        digest.update(context.data.read(offset, n))
    return digest.hexdigest()
"""


def spots(chance: random.Random, size: int) -> list[tuple[int, int]]:
    """Stretches anywhere in ``size`` bytes, short and long."""
    found = []
    for _ in range(chance.randrange(1, 30)):
        offset = chance.randrange(size)
        found.append((offset, chance.randrange(min(size - offset, chance.choice((8, 5000, size))) + 1)))
    return found


@pytest.fixture(name="runtime")
def _cooperative_runtime(cooperative: Runtime) -> Runtime:
    """The order that the cooperative gate keeps; handlers here tell by files how far they are, before the
    verdict. That of the kernel's gates is tested in tests/gates."""
    return cooperative


@pytest.fixture(params=["host", "start", "verified"])
def slow_copier(
    request: pytest.FixtureRequest, host_copies: Rework, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Runtime, Rework, Any, Slow]]:
    """A runtime whose host copies all pages, in each of three ways, by a function that can be slowed.

    (the runtime, what to do to an image, the preference to launch with, slow(chance)).
    """
    alone = request.param == "host"

    def slow(chance: random.Random) -> None:
        def halves(target: memoryview, source: memoryview) -> None:
            # In two halves with a pause: a page that is VALID too early is seen half-copied.
            if chance.random() < 0.5:
                half = len(source) // 2
                copy_into(target, source[:half])
                time.sleep(chance.choice((0, 1e-3, 3e-3)))
                copy_into(target[half:], source[half:])
            else:
                copy_into(target, source)

        def rows(target: memoryview, source: memoryview, width: int, stride: int, count: int) -> None:
            for at in range(0, count * stride, stride):
                halves(target[at : at + width], source[at : at + width])

        monkeypatch.setattr(runtime, "copy_bytes", halves)
        monkeypatch.setattr(filling, "copy_into", halves)
        monkeypatch.setattr(filling, "copy_rows", rows)

    with Runtime(epc="24MiB", workers=2 if alone else 0, enforcement="cooperative") as runtime:
        prefer = "start" if alone else request.param
        yield runtime, host_copies if alone else lambda image: image, prefer, slow


def test_early_reads_see_the_images_bytes(
    slow_copier: tuple[Runtime, Rework, Any, Slow], function: Function
) -> None:
    """The copy is slowed down at random pages while the handler reads at random: never a byte too early."""
    runtime, rework, prefer, slow = slow_copier
    chance = random.Random(7)
    slow(chance)
    for number in range(12):
        content = noise(chance.choice((1, 30, 300, 900)), number)
        image = rework(function(READER, data=content))
        expected = image.measure(domains=8, block=4)
        with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
            for _ in range(3):
                event = spots(chance, len(content))
                wanted = hashlib.sha256(b"".join(content[at : at + n] for at, n in event)).hexdigest()
                assert enclave.call(event, timeout=WAIT) == wanted
            assert enclave.wait_verified(WAIT) == expected.digest


@pytest.mark.parametrize("prefer", ["start", "verified"])
def test_early_reads_see_what_workers_copied(
    function: Function, prefer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with two workers that copy, and rest before each stretch of bytes."""
    monkeypatch.setenv("ENTURBO_FAULT", "filling=nap:0.001")
    chance = random.Random(9)
    with Runtime(epc="24MiB", workers=2, enforcement="cooperative") as runtime:
        assert runtime.wait_workers(WAIT)
        for number in range(8):
            content = noise(chance.choice((300, 900, 1500)), number)
            image = function(READER, data=content)
            expected = image.measure(domains=8, block=4)
            with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                for _ in range(2):
                    event = spots(chance, len(content))
                    wanted = hashlib.sha256(b"".join(content[at : at + n] for at, n in event)).hexdigest()
                    assert enclave.call(event, timeout=WAIT) == wanted
                assert enclave.wait_verified(WAIT) == expected.digest
                tracks = {span.track for span in enclave.timeline.spans if span.name == "copy"}
                assert tracks & {"worker 0", "worker 1"}


def test_reads_wait_for_their_own_page_alone(
    runtime: Runtime,
    function: Function,
    host_copies: Rework,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy stands still before the last MiB: the pages before it can be read, those of it cannot."""
    content = noise(1024, 3)
    image = function(
        """
def handler(event, context):
    at, mark, late = event
    first = context.data.read(0, 4096)
    open(mark, "w").close()
    last = context.data.read(at, 4096)
    open(late, "w").close()
    return [first, last]
""",
        data=content,
    )
    image = host_copies(image)
    mark, late = tmp_path / "mark", tmp_path / "late"
    copy, held = Start.copy, []

    def wait_at_the_end(start: Start, piece: Piece) -> None:
        if piece.region.content == content and piece.skip + piece.count == 1024:
            until(mark.exists)
            time.sleep(0.05)
            held.append(late.exists())
        copy(start, piece)

    monkeypatch.setattr(Start, "copy", wait_at_the_end)
    at = 1023 * PAGE_SIZE
    with runtime.launch(image, expected=image.measure()) as enclave:
        assert enclave.call([at, str(mark), str(late)], timeout=WAIT) == [content[:4096], content[at:]]
    assert held == [False]


def test_pages_become_valid_after_their_bytes(
    runtime: Runtime, make_image: Callable[..., EnclaveImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment VALID is stored the bytes of all those pages are there, and the front not further."""
    image = make_image(600)
    content = bytes(image.regions[0].content or b"")
    set_valid = Epcm.set_valid
    seen: list[bool] = []
    places: list[Place] = []

    def looking(epcm: Epcm, first: int, count: int, generation: int) -> None:
        if count and epcm is runtime.memory.epcm:
            place = places[-1]
            index = first - place.first_page
            there = bytes(runtime.memory.epc.pages(first, count))
            seen.append(there == content[index * PAGE_SIZE : (index + count) * PAGE_SIZE])
            assert int(runtime.memory.launches.copy_front[place.slot]) <= index
        set_valid(epcm, first, count, generation)

    monkeypatch.setattr(Epcm, "set_valid", looking)
    note_places(monkeypatch, places)
    for startup in ("serial", "enturbo"):
        with runtime.launch(image, expected=image.measure(), startup=startup) as enclave:
            enclave.wait_verified(WAIT)
    assert len(seen) >= 4
    assert all(seen)


@pytest.mark.parametrize("prefer", ["start", "verified"])
def test_rows_become_valid_after_their_bytes_and_are_copied_once(
    make_image: Callable[..., EnclaveImage], all_copy: Rework, prefer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where holders of claims copy: every page once, in ascending order within its pair."""
    image = all_copy(make_image(610))
    content = bytes(image.regions[0].content or b"")
    set_valid_rows = Epcm.set_valid_rows
    places: list[Place] = []
    copied: list[int] = []

    def looking(epcm: Epcm, rows: Rows, start: int, end: int, generation: int) -> None:
        for row in range(start, end):
            first = rows.base + row * rows.stride + rows.column
            pages = range(first, min(first + rows.width, rows.end))
            for page in pages:
                index = page - places[-1].first_page
                there = bytes(epcm_runtime.memory.epc.pages(page, 1))
                assert there == content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE], index
                assert not epcm.is_valid(page, generation), index
                copied.append(index)
        set_valid_rows(epcm, rows, start, end, generation)

    monkeypatch.setattr(Epcm, "set_valid_rows", looking)
    note_places(monkeypatch, places)
    with Runtime(epc="4MiB", workers=0, enforcement="cooperative") as epcm_runtime:
        expected = image.measure(domains=4, block=4)
        with epcm_runtime.launch(image, expected=expected, prefer=prefer) as enclave:
            assert enclave.wait_verified(WAIT) == expected.digest
    assert sorted(copied) == list(range(610))
    for pair in (0, 1):
        of_pair = [index for index in copied if index // 8 % 2 == pair]
        assert of_pair == sorted(of_pair)


def note_places(monkeypatch: pytest.MonkeyPatch, places: list[Place]) -> None:
    """Where each launch stands, as it is opened."""
    opened = Start.open

    def noting(start: Start, *args: Any, **options: Any) -> None:
        places.append(start.place)
        opened(start, *args, **options)

    monkeypatch.setattr(Start, "open", noting)


# ------------------------------------------------------------------------------------- R2: writes wait


WRITER = """
def handler(event, context):
    seed, step, mark = event
    open(mark, "w").close()
    data = context.data
    for offset in range(0, len(data), step):
        view = data.view(offset, min(step, len(data) - offset))
        view[:] = bytes([(seed + offset) % 255 + 1]) * len(view)
    return data.read(0, 1)
"""


class SlowCopy:
    """Copies that wait for the handler to begin, and then pause at random: they, the workers behind them and
    the handler's writes behind those go on side by side."""

    def __init__(self, copy: Callable[[memoryview, memoryview], None], chance: random.Random) -> None:
        self.copy, self.chance = copy, chance
        self.mark: Path | None = None

    def __call__(self, target: memoryview, source: memoryview) -> None:
        if self.mark is not None and len(source) > PAGE_SIZE:  # not the handler's own code
            until(self.mark.exists)
        self.copy(target, source)
        time.sleep(self.chance.choice((0, 0, 1e-3, 3e-3)))


@pytest.mark.parametrize("gate", ["write", "execute"])
def test_early_writes_never_change_the_value(
    function: Function, host_copies: Rework, gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler overwrites all of its measured data as early as its gate lets it: always the same value.

    Sizes, D, B, schemes, strides, copiers and pauses differ. A page that is written before it is measured is
    hashed with what was written.
    """
    chance = random.Random(11)
    images = [function(WRITER, data=noise(pages, pages)) for pages in (2, 17, 100, 400, 1500)]
    with Runtime(epc="24MiB", workers=2, gate=gate, enforcement="cooperative") as runtime:
        assert runtime.wait_workers(WAIT)
        slow = SlowCopy(runtime.copy_bytes, chance)
        monkeypatch.setattr(runtime, "copy_bytes", slow)
        for number in range(60 if gate == "write" else 15):
            image = chance.choice(images)
            if by_host := chance.random() < 0.5:
                image = host_copies(image)
            scheme = chance.choice(("enturbo", "enturbo", "sgx"))
            domains, block = chance.choice((1, 2, 8, 32)), chance.choice((1, 4, 16))
            expected = image.measure(scheme, domains=domains, block=block)
            mark = tmp_path / f"mark{number}"
            # Otherwise the handler waits for pages that are measured with its data.
            slow.mark = mark if gate == "write" and by_host else None
            prefer = chance.choice(PREFERENCES)
            with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
                future = enclave.submit([number, chance.choice((512, 4096, 5000, 1 << 16)), str(mark)])
                assert enclave.wait_verified(WAIT) == expected.digest
                assert future.result(WAIT) == bytes([number % 255 + 1])
                assert enclave.state is EnclaveState.VERIFIED


@pytest.mark.parametrize("hasher", ["native", "hashlib"])
def test_result_then_blocks_released_then_pages(
    make_image: Callable[..., EnclaveImage], monkeypatch: pytest.MonkeyPatch, hasher: str
) -> None:
    """A measurer may die between any two stores. So no page is released that no stored result covers:
    its bytes may be another's by the time that somebody else has to go on."""
    image = make_image(300)
    order: list[str] = []
    places: list[Place] = []
    publish, raise_released, release = Smc.publish, Smc.raise_released, Epcm.release_rows

    def released(domain: int, blocks: range) -> bool:
        """Is a page of these blocks released?"""
        pages = ((block * 8 + domain) * 4 for block in blocks)
        first, generation = places[-1].first_page, places[-1].generation
        return any(runtime.memory.epcm.is_released(first + page, generation) for page in pages)

    def publishing(smc: Smc, domain: int, generation: int, *args: Any, blocks: int, final: bool) -> Any:
        assert not released(domain, range(smc.blocks_released(domain), blocks))
        order.append("result")
        return publish(smc, domain, generation, *args, blocks=blocks, final=final)

    def raising(smc: Smc, domain: int, blocks: int, *args: int) -> None:
        newest = smc.newest(domain, places[-1].generation)
        assert newest is not None
        assert newest.blocks >= blocks
        assert not released(domain, range(smc.blocks_released(domain), blocks))
        order.append("blocks")
        raise_released(smc, domain, blocks, *args)

    def releasing(epcm: Epcm, rows: Rows, start: int, end: int, generation: int) -> None:
        assert rows.base == places[-1].first_page
        smc = runtime.memory.launches.smc(places[-1].slot)
        for domain in range(rows.column // 4, (rows.column + rows.width) // 4):
            assert smc.blocks_released(domain) >= end
        order.append("pages")
        release(epcm, rows, start, end, generation)

    note_places(monkeypatch, places)

    with Runtime(epc="2MiB", workers=0, hasher=hasher) as runtime:
        for target, name, function in (
            (Smc, "publish", publishing),
            (Smc, "raise_released", raising),
            (Epcm, "release_rows", releasing),
        ):
            monkeypatch.setattr(target, name, function)
        for startup in ("serial", "enturbo"):
            expected = image.measure(domains=8, block=4)
            with runtime.launch(image, expected=expected, startup=startup) as enclave:
                assert enclave.wait_verified(WAIT) == expected.digest
    assert {"result", "blocks", "pages"} == set(order)


def test_a_write_waits_until_its_page_is_measured(
    runtime: Runtime, function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is copied and nothing is measured: the handler reads its data at once, and cannot write it."""
    image = function(
        """
def handler(event, context):
    before, after = event
    first = context.data.read(0, 1)
    open(before, "w").close()
    context.data.view(0, 1)[0] = 9
    open(after, "w").close()
    return [first, context.data.read(0, 1)]
""",
        data=b"\5" * PAGE_SIZE,
    )
    before, after = tmp_path / "before", tmp_path / "after"
    step = Measurer.step
    early: list[bool] = []

    def late(measurer: Measurer, slot: int, generation: int) -> Any:
        until(before.exists)
        if not early:
            time.sleep(0.05)
            early.append(after.exists())
        return step(measurer, slot, generation)

    monkeypatch.setattr(Measurer, "step", late)
    with runtime.launch(image, expected=image.measure()) as enclave:
        assert enclave.call([str(before), str(after)], timeout=WAIT) == [b"\5", b"\x09"]
        assert enclave.wait_verified(WAIT) == image.measure().digest
    assert early == [False]


def test_unmeasured_pages_can_be_written_at_once(
    runtime: Runtime, function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heap is under no measurement: a write to it waits for VALID alone."""
    image = function(
        "def handler(event, context):\n    context.heap.write(0, b'heap')\n    open(event, 'w').close()\n"
    )
    written, step = tmp_path / "written", Measurer.step

    def late(measurer: Measurer, slot: int, generation: int) -> Any:
        until(written.exists)
        return step(measurer, slot, generation)

    monkeypatch.setattr(Measurer, "step", late)
    with runtime.launch(image, expected=image.measure()) as enclave:
        assert enclave.call(str(written), timeout=WAIT) is None


# ---------------------------------------------------------------------------------------- gate="execute"


@pytest.fixture(scope="module")
def strict() -> Iterator[Runtime]:
    """A runtime in which a page is neither run nor read before it is measured."""
    with Runtime(epc="16MiB", workers=2, gate="execute", enforcement="cooperative") as runtime:
        assert runtime.wait_workers(WAIT)
        yield runtime


STAMPS = """
import time
IMPORTED = time.monotonic_ns()
def handler(event, context):
    stamps = {"import": IMPORTED}
    for name in event:
        context.open(name).read(1)
        stamps[name] = time.monotonic_ns()
    context.data.read(0, 1)
    stamps["data"] = time.monotonic_ns()
    return stamps
"""


def pages_of(image: EnclaveImage, offset: int, size: int) -> range:
    """Indices within the image of the pages that hold these bytes of the enclave."""
    index = 0
    for region in image.regions:
        if region.offset <= offset < region.end:
            first = index + (offset - region.offset) // PAGE_SIZE
            return range(first, first + -(-(offset % PAGE_SIZE + size) // PAGE_SIZE))
        index += region.page_count
    raise AssertionError(f"no page at {offset:#x}")


def test_execute_uses_no_byte_before_its_page_is_released(
    strict: Runtime, function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random pauses between blocks; each import and read is stamped and compared with its page's release.

    The host measures alone and notes the time *before* each release, so a stamp may never be earlier.
    """
    chance = random.Random(3)
    release = Epcm.release_rows
    released: dict[tuple[int, int], int] = {}

    def slow(epcm: Epcm, rows: Rows, start: int, end: int, generation: int) -> None:
        time.sleep(chance.choice((0, 0, 1e-3, 4e-3)))
        moment = time.monotonic_ns()
        for row in range(start, end):
            first = rows.base + row * rows.stride + rows.column
            for page in range(first, min(first + rows.width, rows.end)):
                released.setdefault((generation, page), moment)
        release(epcm, rows, start, end, generation)

    monkeypatch.setattr(Epcm, "release_rows", slow)
    monkeypatch.setattr(strict, "workers", 0)
    for number in range(10):
        names = [f"file{n}.bin" for n in range(chance.randrange(1, 6))]
        chance.shuffle(names)
        files = {name: noise(chance.choice((1, 3, 9)), number) for name in names}
        image = function(STAMPS, data=noise(chance.choice((1, 40)), 1), files=files)
        program = image.program
        assert program is not None
        assert program.data is not None
        with strict.launch(image, expected=image.measure(domains=8, block=2)) as enclave:
            stamps = enclave.call(names, timeout=WAIT)
            first = enclave._start.place.first_page
        used = {"import": program.files["handler.py"], "data": (program.data[0], 1)}
        used |= {name: (program.files[name][0], 1) for name in names}
        for name, (offset, size) in used.items():
            for page in pages_of(image, offset, size):
                assert released[enclave.generation, first + page] <= stamps[name], (name, page)


def test_execute_imports_nothing_while_nothing_is_measured(
    strict: Runtime, function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is copied, nothing measured: the module does not run. With gate="write" it does (see above)."""
    mark = tmp_path / "ran"
    image = function(f"open({str(mark)!r}, 'w').close()\ndef handler(event, context):\n    return 1\n")
    step = Measurer.step
    seen: list[bool] = []
    launched = threading.Event()

    def late(measurer: Measurer, slot: int, generation: int) -> Any:
        if not seen:
            # Long enough for the process to be there and to wait at the gate of its manifest.
            assert launched.wait(WAIT)
            until(lambda: enclave._session is not None and enclave._session.process is not None)
            time.sleep(0.1)
            seen.append(mark.exists())
        return step(measurer, slot, generation)

    monkeypatch.setattr(Measurer, "step", late)
    with strict.launch(image, expected=image.measure()) as enclave:
        launched.set()
        assert enclave.call(None, timeout=WAIT) == 1
    assert seen == [False]
    assert mark.exists()


# -------------------------------------------------------------------------------- pages that have no W


def test_pages_without_w_cannot_be_changed_by_the_enclave(runtime: Runtime, function: Function) -> None:
    """A handler writes over its own read-only file, past all gates, through /proc/self/mem and mprotect.

    Whatever it sees itself then, the EPC keeps what was copied, so what is measured is what ran.
    """
    image = function(
        """
import ctypes
def handler(event, context):
    view = context.view("secret.bin")
    class Buffer(ctypes.Structure):
        _fields_ = [("buf", ctypes.c_void_p), ("obj", ctypes.c_void_p), ("len", ctypes.c_ssize_t),
                    ("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("ndim", ctypes.c_int),
                    ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                    ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p)]
    buffer = Buffer()
    ctypes.pythonapi.PyObject_GetBuffer.argtypes = [ctypes.py_object, ctypes.POINTER(Buffer), ctypes.c_int]
    ctypes.pythonapi.PyObject_GetBuffer(view, ctypes.byref(buffer), 0)
    said = []
    try:
        with open("/proc/self/mem", "r+b", buffering=0) as mem:
            mem.seek(buffer.buf)
            mem.write(b"overwritten")
        said.append("mem")
    except OSError as error:
        said.append(type(error).__name__)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(buffer.buf & ~4095, 4096, 3) == 0:
        ctypes.memmove(buffer.buf, b"overwritten", 11)
        said.append("mprotect")
    return [said, bytes(view[:11])]
""",
        files={"secret.bin": b"the genuine bytes" + bytes(9000)},
    )
    with runtime.launch(image, expected=image.measure()) as enclave:
        said, seen = enclave.call(None, timeout=WAIT)
        assert said, "neither way could be tried"
        assert seen == b"overwritten"
        place, program = enclave._start.place, image.program
        assert program is not None
        offset, _ = program.files["secret.bin"]
        page = place.first_page + pages_of(image, offset, 1)[0]
        held = bytes(runtime.memory.epc.pages(page, 3))
        assert b"the genuine bytes" in held
        assert b"overwritten" not in held
        assert enclave.wait_verified(WAIT) == image.measure().digest


def test_images_with_unwritable_data_are_measured_as_they_are(runtime: Runtime) -> None:
    """Hand-made regions of all kinds: partly measured, unmeasured, filled, with gaps, out of order."""
    regions = [
        Region(8 * PAGE_SIZE, 3, 0x203, noise(3, 1), measured=0x00F1),
        Region(0, 2, 0x205, noise(1, 2)),
        Region(64 * PAGE_SIZE, 300, 0x201, fill=0xDEADBEEF),
        Region(4 * PAGE_SIZE, 1, 0x100, noise(1, 3)),
        Region(16 * PAGE_SIZE, 20, 0x203, measured=False),
    ]
    image = EnclaveImage(regions, size=1 << 21, ssa_frame_size=3)
    for scheme in ("enturbo", "sgx"):
        expected = image.measure(scheme, hasher="reference", domains=8, block=4)
        with runtime.launch(image, expected=expected) as enclave:
            assert enclave.wait_verified(WAIT) == expected.digest


def test_nothing_is_measured_twice_or_left_out(runtime: Runtime, function: Function) -> None:
    """The measuring spans of a launch add up to its pages, whoever measured."""
    image = function("def handler(event, context):\n    return 1\n", data=noise(2000, 9))
    with runtime.launch(image, expected=image.measure()) as enclave:
        enclave.wait_verified(WAIT)
        until(lambda: sum(span.pages for span in measure(enclave.timeline)) >= image.page_count)
        assert sum(span.pages for span in measure(enclave.timeline)) == image.page_count


def measure(timeline: Timeline) -> list[Any]:
    return [span for span in timeline.spans if span.name == "measure"]


@pytest.mark.slow
def test_early_writes_for_longer(function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with more workers than cores and several launches at once."""
    images = [function(WRITER, data=noise(pages, pages)) for pages in (2, 33, 700, 3000)]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for number in range(50):
                image = chance.choice(images)
                expected = image.measure(domains=chance.choice((2, 32)), block=chance.choice((1, 16)))
                with runtime.launch(image, expected=expected) as enclave:
                    mark = tmp_path / f"mark{seed}-{number}"
                    future = enclave.submit([number, chance.choice((512, 4096, 1 << 16)), str(mark)])
                    assert enclave.wait_verified(WAIT) == expected.digest
                    future.result(WAIT)
        except BaseException as error:  # noqa: BLE001  a thread's errors are the test's to raise
            errors.append(error)

    with Runtime(epc="64MiB", workers=2 * len(os.sched_getaffinity(0)), enforcement="cooperative") as runtime:
        monkeypatch.setattr(runtime, "copy_bytes", SlowCopy(runtime.copy_bytes, random.Random(23)))
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
