"""What the parts of enforcement cost: faults, mapping and opening pages, sealing, held calls, output.

A process beside this one has the gated pages, or is sealed (``reporting/gated_process.py``); this one is the
host. What whole starts cost, and functions at work, is in ``report.py``.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from enturbo import Enclave, EnclaveImage, Runtime, SigningKey
from enturbo.runtime.messages import Stream
from enturbo.runtime.pager import CHUNK, Gated, Pager
from enturbo.runtime.processes import EnclaveProcess
from enturbo.runtime.session import Channel
from enturbo.runtime.spawning import enclave_spec, spawn
from enturbo.runtime.spec import EXTENT_BASE, EnclaveSpec, Run, SealSpec
from enturbo.runtime.trace import Timeline
from enturbo.shm.epcm import Epcm
from enturbo.shm.layout import ALL_CHUNKS, EPCM_ENTRY, PAGE_SIZE
from enturbo.shm.segment import Segment
from enturbo.shm.uffd import Userfaultfd
from enturbo.workers.copying import zero

SIZE = 64 << 20
PAGES = SIZE // PAGE_SIZE
BLOCK = 16 * PAGE_SIZE
RUNS = (1, 8, 64)  # blocks mapped, or opened, by one call
LINES = 2000  # of 16 bytes: less than a pipe holds
CALLS = 500
SECONDS = 20.0
FLAGS = 0x203
ROUNDS = 12
HANDLER = """
import os, time

def handler(event, context):
    call = {"held": lambda: os.umask(0o22), "free": os.getppid}[event["call"]]
    begin = time.perf_counter()
    for _ in range(event["count"]):
        call()
    return time.perf_counter() - begin
"""


class Peer:
    """The other process, and what the host has of it."""

    def __init__(self) -> None:
        self.segment = Segment.create(SIZE)
        zero(self.segment.view)
        ours, theirs = socket.socketpair()
        self.pipe, writing = os.pipe()
        script = Path(__file__).with_name("reporting") / "gated_process.py"
        fds = (self.segment.fd, theirs.fileno(), writing)
        self._process = subprocess.Popen(
            # -P: this folder must not stand in for modules of others.
            [sys.executable, "-P", str(script), *map(str, (fds[0], SIZE, *fds[1:]))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            text=True,
            bufsize=1,
        )
        theirs.close()
        os.close(writing)
        ours.settimeout(SECONDS)
        with ours:
            _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        self.uffd = Userfaultfd(fd)
        os.set_blocking(fd, False)

    def begin(self, line: str) -> None:
        """Say what is to be done."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def done(self) -> float:
        """Wait until it is; seconds that it took there."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        assert ready, "the other process does not answer"
        return float(self._process.stdout.readline())

    def do(self, line: str) -> float:
        self.begin(line)
        return self.done()

    def close(self) -> None:
        self.uffd.close()
        self._process.kill()  # it may be sealed, and its exit held
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        os.close(self.pipe)
        self.segment.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def _timed(
    benchmark: BenchmarkFixture, work: Callable[[], Any], prepare: Callable[[], Any], rounds: int = ROUNDS
) -> None:
    """Time ``work`` once a round, each after a ``prepare`` that does not count."""

    def setup() -> None:
        prepare()

    benchmark.pedantic(work, setup=setup, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]


def _note(benchmark: BenchmarkFixture, name: str, count: int) -> None:
    """The median of a round over ``count``, in µs."""
    if benchmark.stats is not None:
        benchmark.extra_info[name] = round(benchmark.stats.stats.median / count * 1e6, 2)


# ---------------------------------------------------------------------------------------------- faults


def _gated(peer: Peer, epcm: Epcm, timeline: Timeline) -> Gated:
    spec = EnclaveSpec(1, 0, PAGES, PAGES, (Run(0, 0, PAGES, FLAGS, False, ALL_CHUNKS),))
    return Gated(epcm, spec, Userfaultfd(os.dup(peer.uffd.fd)), EXTENT_BASE, timeline, lambda page: None)


@pytest.mark.benchmark(group="all of 64 MiB touched, all VALID: faults that the pager answers")
@pytest.mark.parametrize("order", ["in order", "out of order"])
def test_fault_pager(benchmark: BenchmarkFixture, peer: Peer, order: str) -> None:
    """In order, one fault maps up to 8 MiB; out of order, 256 KiB."""
    step = CHUNK * PAGE_SIZE * (1 if order == "in order" else -1)
    table = Segment.create(PAGES * EPCM_ENTRY.size)
    epcm, pager, timelines = Epcm(table.view, PAGES), Pager(), [Timeline(0)]
    epcm.describe(0, PAGES, flags=FLAGS, chunks=ALL_CHUNKS, linear=0, generation=1)
    epcm.set_valid(0, PAGES, 1)
    gates: list[Gated] = []

    def retire() -> None:
        for gated in gates:
            pager.remove(gated)
            gated.close()
        gates.clear()

    def prepare() -> None:
        retire()
        peer.do("gate")
        timelines.append(Timeline(0))
        gates.append(_gated(peer, epcm, timelines[-1]))
        pager.add(gates[-1])

    _timed(benchmark, lambda: peer.do(f"touch {step}"), prepare)
    retire()  # the last one has been counted then
    faults = timelines[-1].gate_waits
    assert faults == PAGES // CHUNK if step < 0 else 0 < faults < PAGES // CHUNK // 2
    benchmark.extra_info["faults"] = faults
    _note(benchmark, "us_a_fault", faults)
    pager.close()
    epcm.close()
    table.close()


@pytest.mark.benchmark(group="all of 64 MiB touched, all VALID: faults that the pager answers")
@pytest.mark.parametrize("pages", [1, CHUNK])
def test_fault_bare(benchmark: BenchmarkFixture, peer: Peer, pages: int) -> None:
    """A bare loop that knows no EPCM answers as many faults: what the kernel and two wake-ups take."""

    def work() -> None:
        peer.begin(f"touch {-CHUNK * PAGE_SIZE}")
        left = PAGES // CHUNK
        while left:
            ready, _, _ = select.select([peer.uffd.fd], [], [], SECONDS)
            assert ready
            for fault in peer.uffd.faults():
                peer.uffd.map(fault.address - fault.address % PAGE_SIZE, pages * PAGE_SIZE, protect=True)
                left -= 1
        peer.done()

    _timed(benchmark, work, lambda: peer.do("gate"))
    _note(benchmark, "us_a_fault", PAGES // CHUNK)


# -------------------------------------------------------------------------------------- mapping, opening


def _runs(call: Callable[[int, int], object], blocks: int) -> Callable[[], None]:
    def work() -> None:
        for at in range(EXTENT_BASE, EXTENT_BASE + SIZE, blocks * BLOCK):
            call(at, blocks * BLOCK)

    return work


@pytest.mark.benchmark(group="64 MiB mapped write-protected (UFFDIO_CONTINUE), by blocks of 64 KiB a call")
@pytest.mark.parametrize("blocks", RUNS)
def test_map(benchmark: BenchmarkFixture, peer: Peer, blocks: int) -> None:
    work = _runs(lambda at, length: peer.uffd.map(at, length, protect=True), blocks)
    _timed(benchmark, work, lambda: peer.do("gate"))
    _note(benchmark, "us_a_block", SIZE // BLOCK)
    peer.do(f"touch {PAGE_SIZE}")  # nobody sleeps


@pytest.mark.benchmark(group="64 MiB opened for stores (UFFDIO_WRITEPROTECT), by blocks of 64 KiB a call")
@pytest.mark.parametrize("blocks", RUNS)
def test_open(benchmark: BenchmarkFixture, peer: Peer, blocks: int) -> None:
    def prepare() -> None:
        peer.do("gate")
        peer.uffd.map(EXTENT_BASE, SIZE, protect=True)

    _timed(benchmark, _runs(peer.uffd.allow_stores, blocks), prepare)
    _note(benchmark, "us_a_block", SIZE // BLOCK)
    peer.do(f"store {PAGE_SIZE}")


@pytest.mark.benchmark(group="64 MiB opened for stores (UFFDIO_WRITEPROTECT), by blocks of 64 KiB a call")
@pytest.mark.parametrize("blocks", RUNS)
def test_open_unmapped(benchmark: BenchmarkFixture, peer: Peer, blocks: int) -> None:
    """Nobody has touched them: what measurers do for most pages of an enclave."""
    _timed(benchmark, _runs(peer.uffd.allow_stores, blocks), lambda: peer.do("gate"))
    _note(benchmark, "us_a_block", SIZE // BLOCK)


@pytest.mark.benchmark(group="64 MiB no longer gated (UFFDIO_UNREGISTER)")
@pytest.mark.parametrize("mapped", [0, SIZE // 16, SIZE])
def test_lift(benchmark: BenchmarkFixture, peer: Peer, mapped: int) -> None:
    """By how many bytes were mapped."""

    def prepare() -> None:
        peer.do("gate")
        if mapped:
            peer.uffd.map(EXTENT_BASE, mapped, protect=True)

    _timed(benchmark, lambda: peer.uffd.unregister(EXTENT_BASE, SIZE), prepare)
    peer.do(f"store {PAGE_SIZE}")


# --------------------------------------------------------------------------------------------- the seal


@pytest.mark.benchmark(group="a process seals itself")
def test_seal(benchmark: BenchmarkFixture, peer: Peer) -> None:
    """With a fork and its end around it; ``seal_ms`` is the seal alone."""
    seconds: list[float] = []
    _timed(benchmark, lambda: seconds.append(peer.do("seal")), lambda: None)
    benchmark.extra_info["seal_ms"] = round(sorted(seconds)[len(seconds) // 2] * 1e3, 3)


@pytest.fixture(scope="module")
def enforced(key: SigningKey) -> Iterator[Runtime]:
    with Runtime(epc="128MiB", signers=[key.mrsigner], require_enforcement=True) as runtime:
        assert runtime.warm()
        yield runtime


@pytest.mark.benchmark(group="fork until the process takes calls, image of 16 MiB")
@pytest.mark.parametrize("kind", ["cooperative", "sealed", "sealed and gated"])
def test_spawn(
    benchmark: BenchmarkFixture, enforced: Runtime, image: Callable[[int], EnclaveImage], kind: str
) -> None:
    subject = image(16)
    place = enforced.arena.take(subject.epc_pages)
    spec = enclave_spec(subject, place, "write", SECONDS, "wait")
    level = enforced.enforcement
    seal = None
    if kind != "cooperative":
        seal = SealSpec(level.level == "kernel-user", level.features, gated=kind.endswith("gated"))
    living: list[tuple[EnclaveProcess, Channel]] = []

    def work() -> None:
        living.append(spawn(enforced._zygote, enforced.arena, spec, seal))
        assert Stream(living[-1][1].sock).recv(SECONDS)["ready"]

    def end() -> None:
        for process, channel in living:
            assert enforced.end_process(process)
            channel.close()
        living.clear()

    _timed(benchmark, work, end)
    end()
    enforced.arena.give_back(place)


# ------------------------------------------------------------------------------- held calls, and output


@pytest.fixture(scope="module")
def caller(key: SigningKey, enforced: Runtime) -> Iterator[Enclave]:
    """A VERIFIED enclave that makes system calls."""
    with TemporaryDirectory() as folder:
        Path(folder, "handler.py").write_text(HANDLER)
        image = EnclaveImage.from_function(folder, heap=0)
    with enforced.launch(image, key.sign(image)) as enclave:
        enclave.wait_verified(SECONDS)
        yield enclave


@pytest.mark.benchmark(group=f"{CALLS} system calls of a sealed process")
@pytest.mark.parametrize("kind", ["held", "free"])
def test_call(benchmark: BenchmarkFixture, caller: Enclave, kind: str) -> None:
    """A held one is answered by the broker, after VERIFIED: the kernel carries it out when that says so."""
    seconds: list[float] = []
    event = {"call": kind, "count": CALLS}
    _timed(benchmark, lambda: seconds.append(caller.call(event, timeout=SECONDS)), lambda: None)
    benchmark.extra_info["us_a_call"] = round(sorted(seconds)[len(seconds) // 2] / CALLS * 1e6, 2)


@pytest.mark.benchmark(group=f"{LINES} writes of 16 bytes to a pipe that nobody reads")
@pytest.mark.parametrize("sealed", [False, True], ids=["not sealed", "sealed"])
def test_write(benchmark: BenchmarkFixture, peer: Peer, sealed: bool) -> None:
    """Output before VERIFIED: it goes into the quarantine."""
    if sealed:
        peer.do("sealed")
    os.set_blocking(peer.pipe, False)

    def drain() -> None:
        try:
            while os.read(peer.pipe, 1 << 16):
                pass
        except BlockingIOError:
            return

    seconds: list[float] = []
    _timed(benchmark, lambda: seconds.append(peer.do(f"write {LINES}")), drain)
    assert len(os.read(peer.pipe, 1 << 16)) == 16 * LINES
    benchmark.extra_info["us_a_write"] = round(sorted(seconds)[len(seconds) // 2] / LINES * 1e6, 3)
