"""Deaths and stops: workers, zygote, host, at chosen points and at random ones.

Workers stop or die at the points of :mod:`enturbo.workers.faults`. Where a test needs a worker to be the one
that measures, the host's own measuring waits for it: replacing a method here changes the host alone, workers
are other processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from enturbo import (
    EnclaveDestroyed,
    EnclaveImage,
    EnclaveState,
    EnturboError,
    LaunchTimeout,
    MeasurementMismatch,
    Region,
    Runtime,
    WorkerLost,
)
from enturbo.runtime import arena
from enturbo.shm.launches import Claims, holds_claim
from enturbo.shm.layout import PAGE_SIZE
from enturbo.workers.faults import POINTS
from enturbo.workers.measure import Measurer

WAIT = 30.0  # seconds; a bound on every wait here, never a measure
ECHO = "def handler(event, context):\n    return event\n"
Function = Callable[..., EnclaveImage]
MakeImage = Callable[..., EnclaveImage]


def until(condition: Callable[[], object], seconds: float = WAIT) -> None:
    """Look again and again, for a bounded time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def has_ended(process: psutil.Process) -> bool:
    """Gone, or dead and not reaped (whoever adopts the orphans of a killed host may not do that)."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pids(runtime: Runtime) -> list[int]:
    return list(runtime._pool.pids().values())


def tampered(image: EnclaveImage, page: int, byte: int = 0) -> EnclaveImage:
    """The same image but for one bit."""
    first = image.regions[0]
    content = bytearray(first.content or b"")
    content[page * PAGE_SIZE + byte] ^= 1
    changed = Region(first.offset, first.page_count, first.flags, bytes(content), measured=first.measured)
    return EnclaveImage([changed, *image.regions[1:]], size=image.size)


Fault = Callable[[str], Path]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fault:
    """``fault("hashed=stop")``: the first worker that is there stops, and the host leaves it that far alone.

    Gives the file that tells. Only runtimes made after this have such workers.
    """

    def arm(what: str) -> Path:
        path = tmp_path / "fault"
        monkeypatch.setenv("ENTURBO_FAULT", f"{what}:{path}")
        step = Measurer.step

        def after_the_worker(measurer: Measurer, slot: int, generation: int) -> Any:
            until(path.exists)
            return step(measurer, slot, generation)

        monkeypatch.setattr(Measurer, "step", after_the_worker)
        return path

    return arm


# -------------------------------------------------------------------------------------- stopped workers


@pytest.mark.parametrize("point", POINTS)
def test_a_stopped_worker_does_not_hold_a_launch_up(make_image: MakeImage, fault: Fault, point: str) -> None:
    """Past the progress deadline it is killed; its claim, and with it its pair, goes to somebody else."""
    fault(f"{point}=stop")
    image = make_image(500)
    with Runtime(epc="4MiB", workers=1, progress_timeout=0.2) as runtime:
        assert runtime.wait_workers(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest
        until(lambda: runtime.stats()["worker_deaths"] == 1)
        assert runtime.wait_workers(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_stale_worker_never_touches_a_later_launch(
    make_image: MakeImage, fault: Fault, point: str, resume: bool
) -> None:
    """A worker stops while it holds a claim; its launch is closed; pages and slot are used again.

    Closing waits until it has given its claim back (``resume``) or is dead. So the tampered image in the
    same pages and slot is never VERIFIED by what the worker had in hand, and a genuine one is not hurt.
    """
    path, image = fault(f"{point}=stop"), make_image(400)
    expected = image.measure()
    with Runtime(epc=400 * PAGE_SIZE, slots=1, workers=1, progress_timeout=60) as runtime:
        assert runtime.wait_workers(WAIT)
        (worker,) = pids(runtime)
        pidfd = os.pidfd_open(worker)
        try:
            enclave = runtime.launch(image, expected=expected)
            until(path.exists)
            until(lambda: is_stopped(worker))
            assert holds_claim(worker, 0)
            closer = threading.Thread(target=enclave.close)
            closer.start()
            until(lambda: int(runtime.memory.launches.generations[0]) == 0)
            if resume:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            closer.join(WAIT)
            assert not closer.is_alive()
            assert enclave.state is EnclaveState.DESTROYED
            between = is_stopped(worker) and holds_claim(worker, 0)
            with runtime.launch(tampered(image, 0), expected=expected) as other:
                assert other._start.place[2:] == enclave._start.place[2:]
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                with pytest.raises(MeasurementMismatch):
                    other.wait_verified(WAIT)
                assert other.state is EnclaveState.REJECTED
            for _ in range(3):
                with runtime.launch(image, expected=expected) as other:
                    assert other.wait_verified(WAIT) == expected.digest
            assert not between, "the launch was closed while somebody was between a check and a store"
        finally:
            os.close(pidfd)


def test_pages_stay_quarantined_while_a_measurer_cannot_be_excluded(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that nobody can take away: the launch ends, its pages and slot are not used again."""
    monkeypatch.setattr(arena, "RANGE_GIVE_UP", 0.1)
    image = make_image(100)
    with Runtime(epc=200 * PAGE_SIZE, slots=2, workers=0) as runtime:
        with Claims(runtime.memory.control_segment.fd) as somebody:
            first = runtime.launch(image, expected=image.measure())
            first.wait_verified(WAIT)
            assert somebody.claim(first._start.place.slot, 3)
            first.close()
        assert runtime.stats()["epc_pages_quarantined"] == 100
        assert runtime.stats()["epc_pages_free"] == 100
        with runtime.launch(image, expected=image.measure()) as second:
            assert second._start.place.first_page != first._start.place.first_page
            assert second._start.place.slot != first._start.place.slot
            second.wait_verified(WAIT)


def test_a_slow_measurer_that_works_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hasher without midstates releases nothing for long; its sign of life keeps the deadline away."""
    pages = 32_768
    image = EnclaveImage([Region(0, pages, 0x201, fill=0xCCCCCCCC)], size=pages * 4096)
    expected = image.measure("sgx")
    monkeypatch.setattr(Claims, "claim", lambda *_: False)  # the host leaves all of it to the worker
    with Runtime(epc="128MiB", workers=1, hasher="hashlib", progress_timeout=0.05) as runtime:
        assert runtime.wait_workers()
        with runtime.launch(image, expected=expected) as enclave:
            assert enclave.wait_verified(WAIT) == expected.digest
        assert runtime.stats()["worker_deaths"] == 0


def test_a_launch_that_makes_no_progress_is_given_up(make_image: MakeImage) -> None:
    """Somebody who is no worker keeps a claim: LaunchTimeout after a bounded number of deadlines."""
    image = make_image(100)
    with (
        Runtime(epc="1MiB", slots=1, workers=0, progress_timeout=0.05) as runtime,
        Claims(runtime.memory.control_segment.fd) as somebody,
    ):
        assert somebody.claim(0, 3)
        opened = arena.Arena.take_range

        def give_back_when_closing(self: arena.Arena, claims: Claims, slot: int) -> None:
            if enclave is not None and int(self.memory.launches.copy_aborted[slot]):
                somebody.give_back(0, 3)
            opened(self, claims, slot)

        enclave = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arena.Arena, "take_range", lambda *_: None)  # the claim stood there already
            patch.setattr(Claims, "holds_range", lambda *_: True)
            enclave = runtime.launch(image, expected=image.measure())
            until(lambda: int(runtime.memory.launches.generations[0]))
            patch.setattr(arena.Arena, "take_range", give_back_when_closing)
            with pytest.raises(LaunchTimeout, match="no block was measured within"):
                enclave.wait_verified(WAIT)
            assert enclave.state is EnclaveState.REJECTED
            enclave.close()
        assert runtime.stats()["epc_pages_free"] == 256


# ------------------------------------------------------------------------------------------ dead workers


@pytest.mark.parametrize("action", ["kill", "exit"])
@pytest.mark.parametrize("point", POINTS)
def test_a_worker_that_dies_at_a_point(make_image: MakeImage, fault: Fault, point: str, action: str) -> None:
    fault(f"{point}={action}")
    image = make_image(500)
    with Runtime(epc="4MiB", workers=1) as runtime:
        assert runtime.wait_workers(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest
        until(lambda: runtime.stats()["worker_deaths"] == 1)


def kill_and_launch(launches: int, seed: int) -> None:
    """One worker, any, is killed at a random moment of each launch: always the value, never an error."""
    chance = random.Random(seed)
    content = chance.randbytes(1000 * PAGE_SIZE)
    images = [
        EnclaveImage([Region(0, pages, 0x203, content[: pages * PAGE_SIZE])], size=1 << 22)
        for pages in (256, 500, 1000)
    ]
    expected = [image.measure() for image in images]
    killed: set[int] = set()

    def living() -> list[Any]:
        workers = runtime._pool._workers.copy().values()
        return [each for each in workers if each.ready and each.incarnation not in killed]

    with Runtime(epc="8MiB", workers=4, max_worker_deaths=8) as runtime:
        assert runtime.wait_workers(WAIT)
        for _ in range(launches):
            until(living)
            number = chance.randrange(len(images))
            with runtime.launch(images[number], expected=expected[number]) as enclave:
                time.sleep(chance.choice((0, chance.random() * 4e-3)))
                worker = chance.choice(living())
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
                killed.add(worker.incarnation)
                assert enclave.wait_verified(WAIT) == expected[number].digest
        assert len(killed) == launches
        until(lambda: runtime.stats()["worker_deaths"] == launches)
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]


def test_one_worker_killed_in_each_launch() -> None:
    kill_and_launch(30, 1)


@pytest.mark.slow
def test_one_worker_killed_in_each_of_many_launches() -> None:
    kill_and_launch(200, 2)


@pytest.mark.slow
def test_all_workers_killed_again_and_again(make_image: MakeImage) -> None:
    """At least 95 % of 100 launches or more do not end in WorkerLost, none in another value, none hangs."""
    image = make_image(3000)
    expected, stop = image.measure(), threading.Event()

    def kill() -> None:
        while not stop.wait(5e-3):
            for each in runtime._pool._workers.copy().values():
                with contextlib.suppress(OSError):
                    if each.ready:
                        signal.pidfd_send_signal(each.pidfd, signal.SIGKILL)

    lost = 0
    with Runtime(epc="32MiB", workers=3) as runtime:
        assert runtime.wait_workers(WAIT)
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            # A busy machine starts workers slowly: go on until enough of them were there to be killed.
            for number in itertools.count():
                if number >= 100 and runtime.stats()["worker_deaths"] > 20:
                    break
                assert number < 1000
                if number % 5 == 0:
                    until(lambda: runtime._pool.ready or runtime._pool.broken)
                with runtime.launch(image, expected=expected) as enclave:
                    try:
                        assert enclave.wait_verified(WAIT) == expected.digest
                    except WorkerLost:
                        lost += 1
        finally:
            stop.set()
            killer.join()
        assert lost <= number // 20


def test_too_many_deaths_are_an_error(make_image: MakeImage) -> None:
    """While a claim is kept from everybody the launch cannot finish; its workers die meanwhile."""
    image = make_image(500)
    with Runtime(epc="4MiB", workers=2, max_worker_deaths=1, slots=1) as runtime:
        assert runtime.wait_workers(WAIT)
        with Claims(runtime.memory.control_segment.fd) as somebody:
            step, gate = Measurer.step, threading.Event()

            def late(measurer: Measurer, slot: int, generation: int) -> Any:
                assert gate.wait(WAIT)
                return step(measurer, slot, generation)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Measurer, "step", late)
                # From the beginning of the launch on: no worker may take pair 3.
                patch.setattr(Runtime, "ring", lambda self: None)
                enclave = runtime.launch(image, expected=image.measure())
                until(lambda: int(runtime.memory.launches.generations[0]))
                until(lambda: somebody.claim(0, 15) or int(enclave.state is EnclaveState.MEASURING))
                somebody.claim(0, 15)
            for worker in pids(runtime):
                os.kill(worker, signal.SIGKILL)
            until(lambda: runtime.stats()["worker_deaths"] >= 2)
            gate.set()
            until(lambda: int(runtime.memory.launches.copy_aborted[0]))
        with pytest.raises(WorkerLost, match=r"workers died during one launch \(limit 1\)"):
            enclave.wait_verified(WAIT)
        assert enclave.state is EnclaveState.REJECTED
        enclave.close()
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest


def test_workers_are_of_no_matter_to_a_call(function: Function) -> None:
    image = function("import time\ndef handler(event, context):\n    time.sleep(0.2)\n    return event\n")
    with Runtime(epc="1MiB", workers=2) as runtime:
        assert runtime.wait_workers(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            enclave.wait_verified(WAIT)
            future = enclave.submit(5)
            for worker in pids(runtime):
                os.kill(worker, signal.SIGKILL)
            assert future.result(WAIT) == 5


def test_workers_that_cannot_boot(make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few of them no more are started, and the host measures alone."""
    monkeypatch.setenv("ENTURBO_FAULT", "nonsense")
    image = make_image(500)
    with Runtime(epc="4MiB", workers=2) as runtime:
        assert not runtime.wait_workers(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest
        assert 3 <= runtime.stats()["worker_deaths"] <= 5


# ------------------------------------------------------------------------------------------- the zygote


def test_a_killed_zygote_takes_its_enclaves_along_and_another_is_started(function: Function) -> None:
    image = function(ECHO)
    with Runtime(epc="2MiB", workers=0) as runtime:
        enclave = runtime.launch(image, expected=image.measure())
        assert enclave.call(1, timeout=WAIT) == 1
        process = psutil.Process(enclave._session.process.pid)  # type: ignore[union-attr]
        os.kill(runtime._zygote.pid, signal.SIGKILL)
        until(lambda: has_ended(process))
        with pytest.raises(EnclaveDestroyed):
            enclave.call(2, timeout=WAIT)
        enclave.close()
        with runtime.launch(image, expected=image.measure()) as other:
            assert other.call(3, timeout=WAIT) == 3
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]


def test_pages_are_not_free_before_the_copy_has_ended(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The enclave's process cannot be had while the host is copying: that ends first, then pages are free."""
    image, copying, go = function(ECHO), threading.Event(), threading.Event()
    with Runtime(epc="2MiB", workers=0) as runtime:
        copy = runtime.copy_bytes

        def held(target: memoryview, source: memoryview) -> None:
            copying.set()
            assert go.wait(WAIT)
            copy(target, source)

        def fail(*_: object) -> None:
            assert copying.wait(WAIT)
            raise EnturboError("fork: no more processes")

        monkeypatch.setattr(runtime, "copy_bytes", held)
        monkeypatch.setattr(runtime._zygote, "spawn", fail)
        enclave = runtime.launch(image, expected=image.measure())
        future = enclave.submit(1)
        assert copying.wait(WAIT)
        time.sleep(0.1)
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"] - image.epc_pages
        go.set()
        with pytest.raises(EnclaveDestroyed, match="no more processes"):
            future.result(WAIT)
        with pytest.raises(EnclaveDestroyed, match="no more processes"):
            enclave.wait_verified(WAIT)
        enclave.close()
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]
        assert not runtime.memory.epc.bytes.any()


# --------------------------------------------------------------------------------------------- the host


HOST = """
import os, subprocess, sys, threading, time
from enturbo import EnclaveImage, Runtime

# What it detaches may not leave its session otherwise.
runtime = Runtime(epc="8MiB", workers=2, enforcement="cooperative")
runtime.wait_workers(30)
image = EnclaveImage.from_function(sys.argv[1], heap="64KiB")
enclave = runtime.launch(image, expected=image.measure())
inside = enclave.call(None)
enclave.submit("hang")
children = [os.fork()]
if not children[0]:
    time.sleep(600)
children.append(subprocess.Popen(["sleep", "600"], close_fds=False).pid)
ours = [*runtime._pool.pids().values(), runtime._zygote.pid, enclave._session.process.pid, *inside]
print(*ours, "|", *children, flush=True)
time.sleep(600)
"""

DETACHED = """
import os, time
def handler(event, context):
    if event == "hang":
        time.sleep(600)
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(write, b"%d " % os.getpid())
        if os.fork() == 0:
            os.write(write, b"%d " % os.getpid())
        time.sleep(600)
    time.sleep(0.05)
    text = b""
    while text.count(b" ") < 2:
        text += os.read(read, 100)
    return [int(word) for word in text.split()]
"""


@pytest.fixture
def killed_host(tmp_path: Path) -> Iterator[Callable[[], tuple[list[psutil.Process], list[psutil.Process]]]]:
    """Run HOST, kill it, and give its runtime's processes and its own children."""
    (tmp_path / "handler.py").write_text(DETACHED)
    running: list[subprocess.Popen[str]] = []
    left: list[psutil.Process] = []

    def run() -> tuple[list[psutil.Process], list[psutil.Process]]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOST, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdout is not None
        ours, _, children = process.stdout.readline().partition("|")
        theirs = [psutil.Process(int(pid)) for pid in ours.split()]
        left.extend(psutil.Process(int(pid)) for pid in children.split())
        process.kill()
        return theirs, left

    yield run
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_nothing_outlives_a_killed_host(
    killed_host: Callable[[], tuple[list[psutil.Process], list[psutil.Process]]],
) -> None:
    """Workers, zygote, enclave and what it detached end, though a fork and a child of the host live on."""
    ours, children = killed_host()
    begin = time.monotonic()
    assert len(ours) == 6
    assert len(children) == 2
    until(lambda: all(has_ended(process) for process in ours), 5.0)
    print(f"all gone after {time.monotonic() - begin:.3f} s")
    assert not any(has_ended(child) for child in children)


def test_a_host_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """SIGINT goes to the whole group; the host unwinds, and its workers let it do so."""
    (tmp_path / "handler.py").write_text(ECHO)
    script = """
import os, sys, time
from enturbo import EnclaveImage, Runtime
image = EnclaveImage.from_function(sys.argv[1], heap=0)
with Runtime(epc="4MiB", workers=2) as runtime:
    runtime.wait_workers(30)
    with runtime.launch(image, expected=image.measure()) as enclave:
        enclave.call(1)
        print(*runtime._pool.pids().values(), runtime._zygote.pid, flush=True)
        time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        processes = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(processes) == 3
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr.read().strip().endswith("KeyboardInterrupt")
        assert process.wait(WAIT) == -signal.SIGINT
    until(lambda: all(has_ended(each) for each in processes))
