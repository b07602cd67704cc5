"""What must not get out of an enclave: output before the verdict, memory after the end, processes ever."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from enturbo import (
    Enclave,
    EnclaveDestroyed,
    EnclaveImage,
    EnclaveState,
    HandlerError,
    Measurement,
    MeasurementMismatch,
    Region,
    Runtime,
    SigningKey,
)
from enturbo.runtime.startup import Start
from enturbo.shm.layout import PAGE_SIZE
from enturbo.workers.measure import Measurer

WAIT = 30.0  # seconds; a bound on every wait here, never a measure
ECHO = "def handler(event, context):\n    return event\n"
Function = Callable[..., EnclaveImage]
MakeImage = Callable[..., EnclaveImage]


def until(condition: Callable[[], object]) -> None:
    """Look again and again, for a bounded time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def with_regions(image: EnclaveImage, regions: list[Region]) -> EnclaveImage:
    return EnclaveImage(regions, size=image.size, ssa_frame_size=image.ssa_frame_size)


def flipped(image: EnclaveImage, page: int, byte: int) -> EnclaveImage:
    """One bit of the ``page``-th page is another."""
    regions = list(image.regions)
    for number, region in enumerate(regions):
        if page < region.page_count:
            content = bytearray(bytes(region.content or b"").ljust(region.size, b"\0"))
            content[page * PAGE_SIZE + byte] ^= 1 << (byte % 8)
            chunks = region.chunks
            regions[number] = Region(
                region.offset, region.page_count, region.flags, bytes(content), measured=chunks
            )
            return with_regions(image, regions)
        page -= region.page_count
    raise AssertionError(page)


@pytest.fixture(autouse=True)
def all_pages_come_back_zero(runtime: Runtime) -> Iterator[None]:
    """Whatever a test did, the shared runtime's EPC is free and zero afterwards."""
    yield
    stats = runtime.stats()
    assert stats["epc_pages_free"] == stats["epc_pages"]
    assert stats["epc_pages_quarantined"] == 0
    assert not runtime.memory.epc.bytes.any()
    assert not any(runtime.memory.epcm.buffer)


# ------------------------------------------------------------------------------------------- REJECTED


def check_rejected(runtime: Runtime, image: EnclaveImage, expected: Measurement, startup: str) -> None:
    with runtime.launch(image, expected=expected, startup=startup) as enclave:
        place = enclave._start.place
        with pytest.raises(MeasurementMismatch) as caught:
            enclave.wait_verified(WAIT)
        # At that moment all of it is over: nothing was delivered, the pages are back and zero.
        assert enclave.state is EnclaveState.REJECTED
        assert caught.value.expected == expected.digest
        assert caught.value.actual == enclave.mrenclave != expected.digest
        assert caught.value.actual == image.measure(
            expected.scheme, domains=expected.domains, block=expected.block
        ).digest  # fmt: skip
        assert enclave.stdout == enclave.stderr == b""
        assert not any(runtime.memory.epc.pages(place.first_page, place.page_count))
        assert enclave.timeline.result is None
        assert enclave.timeline.first_instruction is None


def test_one_bit_of_any_page(runtime: Runtime, make_image: MakeImage) -> None:
    image, chance = make_image(70, heap=3), random.Random(1)
    expected = image.measure(domains=8, block=4)
    for number, page in enumerate(range(70)):
        changed = flipped(image, page, chance.choice((0, 255, 256, 4095, chance.randrange(4096))))
        check_rejected(runtime, changed, expected, ("enturbo", "serial")[number % 2])
    with runtime.launch(image, expected=expected) as enclave:
        assert enclave.wait_verified(WAIT) == expected.digest


@pytest.mark.parametrize("scheme", ["enturbo", "sgx"])
@pytest.mark.parametrize("startup", ["enturbo", "serial"])
def test_anything_else_that_is_measured(
    runtime: Runtime, key: SigningKey, make_image: MakeImage, scheme: str, startup: str
) -> None:
    """Flags, offsets, order, what is measured, SECS fields: each against the genuine image's value."""
    image = make_image(40, heap=2)
    data, heap = image.regions
    content = bytes(data.content or b"")
    pages = [
        Region(page * PAGE_SIZE, 1, 0x203, content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
        for page in range(40)
    ]
    assert with_regions(image, [*pages, heap]).measure(scheme) == image.measure(scheme)
    swapped = [*pages[:7], pages[8], pages[7], *pages[9:], heap]
    sources = [
        *pages[:7],
        Region(7 * PAGE_SIZE, 1, 0x203, pages[8].content),
        Region(8 * PAGE_SIZE, 1, 0x203, pages[7].content),
        *pages[9:],
        heap,
    ]
    changed = {
        "flags": with_regions(image, [*pages[:5], Region(5 * PAGE_SIZE, 1, 0x201, pages[5].content),
                                      *pages[6:], heap]),
        "flags of an unmeasured page": with_regions(
            image, [*pages, Region(heap.offset, 2, 0x201, measured=False)]),
        "offset": with_regions(image, [*pages, Region(heap.offset + PAGE_SIZE, 2, 0x203, measured=False)]),
        "order": with_regions(image, swapped),
        "contents swapped": with_regions(image, sources),
        "a page more": with_regions(image, [data, Region(heap.offset, 3, 0x203, measured=False)]),
        "a page less": with_regions(image, [data, Region(heap.offset, 1, 0x203, measured=False)]),
        "a chunk unmeasured": with_regions(
            image, [*pages[:39], Region(39 * PAGE_SIZE, 1, 0x203, pages[39].content, measured=0x7FFF), heap]),
        "the heap measured": with_regions(image, [data, Region(heap.offset, 2, 0x203)]),
        "SSAFRAMESIZE": EnclaveImage(image.regions, size=image.size, ssa_frame_size=2),
        "SIZE": EnclaveImage(image.regions, size=2 * image.size),
        "by EAUG": image.as_edmm(),
    }  # fmt: skip
    sigstruct = key.sign(image, scheme=scheme)
    for what, each in changed.items():
        with runtime.launch(each, sigstruct, startup=startup) as enclave:
            with pytest.raises(MeasurementMismatch):
                enclave.wait_verified(WAIT)
            assert enclave.state is EnclaveState.REJECTED, what


LOUD = """
import os, sys
def handler(event, context):
    print("secret on stdout", flush=True)
    print("secret on stderr", file=sys.stderr, flush=True)
    os.write(1, b"secret written")
    if event == "ocall":
        return context.ocall("leak", "secret by ocall")
    if event == "raise":
        raise ValueError("secret in an error")
    if event == "exit":
        os._exit(3)
    return "secret as a result"
"""


@pytest.mark.parametrize("event", ["return", "ocall", "raise", "exit"])
@pytest.mark.parametrize("startup", ["enturbo", "serial"])
def test_nothing_of_a_rejected_image_gets_out(
    runtime: Runtime,
    function: Function,
    monkeypatch: pytest.MonkeyPatch,
    event: str,
    startup: str,
) -> None:
    """The verdict comes long after the handler has said all it has to say: none of it is seen."""
    image = function(LOUD)
    expected = flipped(image, 0, 4000).measure()
    leaked: list[Any] = []
    merge = Start.merge

    def late(start: Start) -> bytes:
        if startup == "enturbo":
            time.sleep(0.15)  # no more than a chance for the handler to be done; nothing depends on it
        return merge(start)

    monkeypatch.setattr(Start, "merge", late)
    ocalls = {"leak": leaked.append}
    with runtime.launch(image, expected=expected, startup=startup, ocalls=ocalls) as enclave:
        with pytest.raises(MeasurementMismatch) as caught:
            enclave.submit(event).result(WAIT)  # either may raise: the verdict can be there already
        assert "secret" not in str(caught.value)
        assert enclave.state is EnclaveState.REJECTED
        assert enclave.stdout == enclave.stderr == b""
        assert leaked == []
        names = {span.name for span in enclave.timeline.spans}
        assert not names & {"execute", "hold"}
    with runtime.launch(image, expected=image.measure(), startup=startup, ocalls=ocalls) as enclave:
        if event == "ocall":
            assert enclave.call(event, timeout=WAIT) is None
            assert leaked == ["secret by ocall"]
        elif event == "return":
            assert enclave.call(event, timeout=WAIT) == "secret as a result"
        if event != "exit":
            until(lambda: (b"secret" in enclave.stdout and b"secret" in enclave.stderr) or event == "raise")


def test_output_is_held_until_the_verdict_and_then_complete(
    cooperative: Runtime, function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that writes more than a pipe takes waits there; nothing is read before VERIFIED."""
    image = function(
        """
import os, sys
def handler(event, context):
    first, second = event
    sys.stdout.write("x" * 1000)
    sys.stdout.flush()
    open(first, "w").close()
    sys.stdout.write("y" * 300_000)
    sys.stdout.flush()
    open(second, "w").close()
    return "done"
"""
    )
    first, second = tmp_path / "first", tmp_path / "second"
    merge = Start.merge
    seen: list[tuple[bytes, bool, bool]] = []
    made: list[tuple[Enclave, Future[Any]]] = []

    def late(start: Start) -> bytes:
        until(lambda: first.exists() and made)
        time.sleep(0.1)
        seen.append((made[0][0].stdout, second.exists(), made[0][1].done()))
        return merge(start)

    monkeypatch.setattr(Start, "merge", late)
    with cooperative.launch(image, expected=image.measure()) as enclave:
        future = enclave.submit([str(first), str(second)])
        made.append((enclave, future))
        assert future.result(WAIT) == "done"
        assert enclave.stdout == b"x" * 1000 + b"y" * 300_000
    assert seen == [(b"", False, False)]


def test_a_death_is_not_told_before_the_verdict(
    cooperative: Runtime, function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exit status is output, too."""
    image = function("import os\ndef handler(event, context):\n    os._exit(7)\n")
    merge = Start.merge
    seen: list[tuple[bool, str]] = []
    made: list[tuple[Enclave, Future[Any]]] = []

    def late(start: Start) -> bytes:
        until(lambda: made)
        enclave, future = made[0]
        session = enclave._session
        assert session is not None
        until(lambda: session.process is not None)
        assert session.process is not None
        process = psutil.Process(session.process.pid)
        until(lambda: has_ended(process))
        time.sleep(0.05)
        seen.append((future.done(), str(enclave.state)))
        return merge(start)

    monkeypatch.setattr(Start, "merge", late)
    with cooperative.launch(image, expected=image.measure()) as enclave:
        future = enclave.submit(None)
        made.append((enclave, future))
        with pytest.raises(EnclaveDestroyed, match="status 7"):
            future.result(WAIT)
        assert seen == [(False, "MEASURING")]
        assert enclave.wait_verified(WAIT) == image.measure().digest
        until(lambda: enclave.state is EnclaveState.DESTROYED)


def test_a_flood_of_output_ends_the_enclave(function: Function) -> None:
    image = function(
        "import sys\ndef handler(event, context):\n    sys.stdout.write('x' * event)\n    return event\n"
    )
    with Runtime(epc="1MiB", workers=0, output_limit=100_000) as runtime:
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.call(99_999, timeout=WAIT) == 99_999
            assert enclave.call(100_000, timeout=WAIT) == 100_000
            with pytest.raises(HandlerError, match="limit is 100000") as caught:
                enclave.call(10_000_000, timeout=WAIT)
            assert caught.value.kind == "output"
            assert len(enclave.stdout) <= 100_000
            until(lambda: enclave.state is EnclaveState.DESTROYED)
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]


# --------------------------------------------------------------------------------------------- secrets


HOARDER = """
import os, signal
def handler(event, context):
    word = event["word"].encode()
    for memory in (context.heap, context.data):
        for offset in range(0, len(memory) - len(word), 4096):
            memory.write(offset, word)
    if event["end"] == "exit":
        os._exit(0)
    if event["end"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return "written"
"""
SEARCHER = """
def handler(event, context):
    heap = context.heap.read()
    return [len(heap), heap.count(0), heap.find(event.encode())]
"""


@pytest.mark.parametrize("end", ["return", "exit", "kill"])
def test_a_secret_never_gets_into_another_enclave(function: Function, end: str) -> None:
    """The EPC fits one of them at a time, so the second gets the pages of the first."""
    word = "a secret of enclave A"
    first = function(HOARDER, heap="256KiB", data=128 << 10)
    second = function(SEARCHER, heap="448KiB")
    pages = max(first.epc_pages, second.epc_pages)
    with Runtime(epc=pages * PAGE_SIZE, workers=0) as runtime:
        for _ in range(3):
            with runtime.launch(first, expected=first.measure()) as enclave:
                future = enclave.submit({"word": word, "end": end})
                if end == "return":
                    assert future.result(WAIT) == "written"
                    assert word.encode() in runtime.memory.epc.bytes.tobytes()
                else:
                    with pytest.raises(EnclaveDestroyed):
                        future.result(WAIT)
                    until(lambda: enclave.state is EnclaveState.DESTROYED)
            assert not runtime.memory.epc.bytes.any()
            assert runtime.stats()["epc_pages_free"] == pages
            with runtime.launch(second, expected=second.measure()) as enclave:
                assert enclave.call(word, timeout=WAIT) == [448 << 10, 448 << 10, -1]


def test_a_heap_is_zero_as_long_as_launches_are_rejected(function: Function, make_image: MakeImage) -> None:
    """Rejected images leave nothing behind either, however early their handlers wrote."""
    first, second = function(HOARDER, heap="256KiB", data=4096), function(SEARCHER, heap="320KiB")
    pages = max(first.epc_pages, second.epc_pages)
    with Runtime(epc=pages * PAGE_SIZE, workers=0) as runtime:
        for _ in range(3):
            with runtime.launch(first, expected=make_image(1).measure()) as enclave:
                with pytest.raises(MeasurementMismatch):
                    enclave.submit({"word": "secret", "end": "return"}).result(WAIT)
                assert not runtime.memory.epc.bytes.any()
            with runtime.launch(second, expected=second.measure()) as enclave:
                assert enclave.call("secret", timeout=WAIT) == [320 << 10, 320 << 10, -1]


# ------------------------------------------------------------------------------------------- processes


DETACHING = """
import os, time
def say(pipe, name):
    os.write(pipe, f"{name} {os.getpid()}\\n".encode())
    time.sleep(600)
def handler(event, context):
    if event == "ping":
        return "pong"
    # The classic daemon: fork, new session, fork again; the middle one leaves, its child is an orphan.
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        orphan = os.fork()
        if orphan == 0:
            time.sleep(600)
        # It is killed on sight, perhaps before it could say anything itself.
        os.write(write, f"orphan {orphan}\\n".encode())
        os._exit(0)
    if os.fork() == 0:  # one that stays in the family
        say(write, "child")
    text = b""
    while text.count(b"\\n") < 2:
        text += os.read(read, 100)
    return {name: int(pid) for name, pid in (line.split() for line in text.decode().splitlines())}
"""


def test_each_enclave_is_ended_with_all_it_has_started_and_nobody_else(
    cooperative: Runtime, function: Function
) -> None:
    """Two enclaves double-fork and setsid; ending one leaves the other one alone."""
    image = function(DETACHING)
    enclaves = [cooperative.launch(image, expected=image.measure()) for _ in range(2)]
    try:
        started = [processes_of(enclave, enclave.call("spread", timeout=WAIT)) for enclave in enclaves]
        for number, enclave in enumerate(enclaves):
            enclave.close()
            assert all(has_ended(process) for process in started[number].values())
            for other in started[number + 1 :]:
                assert not has_ended(other["main"])
                assert not has_ended(other["child"])
                assert enclaves[number + 1].call("ping", timeout=WAIT) == "pong"
    finally:
        for enclave in enclaves:
            enclave.close()


def processes_of(enclave: Enclave, told: dict[str, int]) -> dict[str, psutil.Process]:
    """What an enclave has started, by name. The orphan may be gone already: it is killed on sight."""
    session = enclave._session
    assert session is not None
    assert session.process is not None
    found = {"main": psutil.Process(session.process.pid)}
    for name, pid in told.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[name] = psutil.Process(pid)
    assert found.keys() >= {"main", "child"}
    return found


def test_a_rejected_enclave_is_ended_with_all_it_has_started(
    cooperative: Runtime, function: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone before the verdict is told: a descendant could still write into pages that another gets."""
    image = function(
        """
import os, time
def handler(event, context):
    if os.fork() == 0:
        os.setsid()
        with open(event + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(event + ".part", event)
        time.sleep(600)
    time.sleep(600)
"""
    )
    mark, step = tmp_path / "child", Measurer.step
    children: list[psutil.Process] = []

    def late(measurer: Measurer, slot: int, generation: int) -> Any:
        until(mark.exists)
        if not children:
            children.append(psutil.Process(int(mark.read_text())))
        return step(measurer, slot, generation)

    monkeypatch.setattr(Measurer, "step", late)
    with cooperative.launch(image, expected=flipped(image, 0, 4000).measure()) as enclave:
        enclave.submit(str(mark))
        with pytest.raises(MeasurementMismatch):
            enclave.wait_verified(WAIT)
        (child,) = children
        assert has_ended(child)


def test_an_enclave_gets_no_descriptor_and_little_environment(
    runtime: Runtime, function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    image = function(
        """
import os
def handler(event, context):
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[name] = os.readlink("/proc/self/fd/" + name)
        except OSError:
            pass
    maps = [line for line in open("/proc/self/maps") if "/dev/shm" in line]
    writable = [line for line in maps if line.split()[1].startswith("rw")]
    return [links, len(maps), len(writable), sorted(os.environ)]
"""
    )
    with (
        Runtime(epc="1MiB", workers=0, enforcement="cooperative") as fresh,
        fresh.launch(image, expected=image.measure()) as enclave,
    ):
        links, maps, writable, environment = enclave.call(None, timeout=WAIT)
    opened = {number: link for number, link in links.items() if not link.startswith("/proc")}
    assert set(opened) == {"0", "1", "2", "3"}
    assert opened["0"] == "/dev/null"
    assert opened["1"].startswith("pipe:")
    assert opened["2"].startswith("pipe:")
    assert opened["3"].startswith("socket:")
    assert maps > writable >= 1
    assert "AWS_SECRET_ACCESS_KEY" not in environment


def test_threads_of_the_host_may_close_and_call_at_any_time(runtime: Runtime, function: Function) -> None:
    """Closing races with calls, starts and each other: every future ends, nothing is left."""
    image, chance = function(ECHO), random.Random(4)
    expected = image.measure()
    for _ in range(25):
        enclave = runtime.launch(image, expected=expected, startup=chance.choice(("serial", "enturbo")))
        futures = [enclave.submit(number) for number in range(3)]
        time.sleep(chance.random() * 0.03)
        threads = [threading.Thread(target=enclave.close) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        for number, future in enumerate(futures):
            try:
                assert future.result(WAIT) == number
            except EnclaveDestroyed:
                continue
        assert enclave.state is EnclaveState.DESTROYED


def test_a_child_that_the_handler_leaves_cannot_touch_the_pages(runtime: Runtime, function: Function) -> None:
    """A forked child does not inherit the EPC: touching it there is the child's death and nobody else's."""
    image = function(
        """
import os
def handler(event, context):
    view = context.heap.view(0, 8)
    child = os.fork()
    if child == 0:
        view[0] = 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return [os.WIFSIGNALED(status), bytes(view)]
"""
    )
    with runtime.launch(image, expected=image.measure()) as enclave:
        assert enclave.call(None, timeout=WAIT) == [True, bytes(8)]


def test_stdout_of_the_host_stays_the_hosts(
    cooperative: Runtime, function: Function, capfd: pytest.CaptureFixture[str]
) -> None:
    image = function("import os\ndef handler(event, context):\n    os.system('echo from a child')\n")
    with cooperative.launch(image, expected=image.measure()) as enclave:
        enclave.call(None, timeout=WAIT)
        until(lambda: b"from a child" in enclave.stdout)
    os.write(1, b"")
    assert capfd.readouterr().out == ""
