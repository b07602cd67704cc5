"""A bench for the enclave's side alone: segments that the test fills itself, as copier and measurer."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest

from enturbo.runtime.messages import Stream
from enturbo.runtime.processes import EnclaveProcess, EnclaveSpec, Run, Zygote
from enturbo.runtime.program import Program, encode
from enturbo.shm.layout import EPCM_ENTRY, PAGE_SIZE

PAGES = 256
R, RW = 0x201, 0x203
WAIT = 20.0  # seconds; a bound, never a measure


class Enclave:
    """One enclave process on the bench, its pages, and the host's ends to it."""

    def __init__(self, bench: Bench, contents: list[tuple[bytes, int, int]], options: dict[str, Any]) -> None:
        self.bench = bench
        self.generation = bench.next_generation()
        self.first = bench.take(sum(-(-len(data) // PAGE_SIZE) for data, _, _ in contents))
        self.runs: list[Run] = []
        linear = index = 0
        for data, flags, chunks in contents:
            count = -(-len(data) // PAGE_SIZE)
            dynamic = bool(options.get("dynamic")) and chunks == 0
            self.runs.append(Run(linear, index, count, flags, dynamic, chunks))
            start = (self.first + index) * PAGE_SIZE
            bench.pages[start : start + len(data)] = data
            for page in range(count):
                self.field(index + page, "flags", flags)
                self.field(index + page, "chunks", chunks)
                self.field(index + page, "linear", linear + page)
                self.field(index + page, "generation", self.generation)
            index += count
            linear += count + 1  # a guard page
        self.pages = index
        if options.get("valid", True):
            self.set_all("valid")
        if options.get("released", True):
            self.set_all("released")
        self.spec = EnclaveSpec(
            generation=self.generation,
            first_page=self.first,
            page_count=self.pages,
            stream_pages=self.pages,
            runs=tuple(self.runs),
            gate=options.get("gate", "write"),
            gate_timeout=options.get("gate_timeout", WAIT),
        )
        self.calls = 0
        self.ready = False
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        bench = self.bench
        try:
            self.process: EnclaveProcess = bench.zygote.spawn(
                self.spec, bench.epc_rw, bench.epc_ro, bench.epcm_ro, theirs, stdout, stderr, WAIT
            )
        finally:
            theirs.close()
            os.close(stdout)
            os.close(stderr)
        self.stream = Stream(ours)

    def field(self, index: int, name: str, value: int) -> None:
        """Store one field of the EPCM entry of the extent's page ``index``."""
        at = (self.first + index) * EPCM_ENTRY.size + EPCM_ENTRY.offset(name)
        EPCM_ENTRY.struct(name).pack_into(self.bench.entries, at, value)

    def set_all(self, name: str) -> None:
        for index in range(self.pages):
            self.field(index, name, self.generation)

    def page(self, index: int) -> memoryview:
        start = (self.first + index) * PAGE_SIZE
        return self.bench.pages[start : start + PAGE_SIZE]

    def index(self, linear: int) -> int:
        run = next(run for run in self.runs if run.linear <= linear < run.linear + run.count)
        return run.index + linear - run.linear

    def send(self, event: Any) -> None:
        self.calls += 1
        self.stream.send({"call": self.calls, "event": event}, WAIT)

    def recv(self, timeout: float = WAIT) -> Any:
        if not self.ready:
            assert self.stream.recv(timeout)["ready"] > 0
            self.ready = True
        return self.stream.recv(timeout)

    def reply(self, event: Any = None) -> dict[str, Any]:
        self.send(event)
        reply: dict[str, Any] = self.recv()
        return reply

    def call(self, event: Any = None) -> Any:
        reply = self.reply(event)
        assert "result" in reply, reply.get("traceback")
        assert reply["result"] == self.calls
        assert 0 < reply["first"] <= reply["end"] <= time.monotonic_ns()
        return reply["value"]

    def end(self) -> bool:
        return self.bench.zygote.end(self.process, WAIT)

    def close(self) -> None:
        assert self.end()
        self.process.close()
        self.stream.close()
        os.close(self.stdout)
        os.close(self.stderr)


class Bench:
    """An EPC and an EPCM, a zygote, and enclaves made from source text."""

    def __init__(self) -> None:
        self.zygote = Zygote()
        self.zygote.start()
        self.epc = SharedMemory(create=True, size=PAGES * PAGE_SIZE)
        self.epcm = SharedMemory(create=True, size=PAGES * EPCM_ENTRY.size)
        self.epc.unlink()
        self.epcm.unlink()
        self.epc_rw = os.open(f"/proc/self/fd/{_fd(self.epc)}", os.O_RDWR)
        self.epc_ro = os.open(f"/proc/self/fd/{_fd(self.epc)}", os.O_RDONLY)
        self.epcm_ro = os.open(f"/proc/self/fd/{_fd(self.epcm)}", os.O_RDONLY)
        self._generation = 0
        self._taken = 3  # not at the start, and not at a host page's worth of entries
        self._stack = ExitStack()

    @property
    def pages(self) -> memoryview:
        return _buffer(self.epc)

    @property
    def entries(self) -> memoryview:
        return _buffer(self.epcm)

    def next_generation(self) -> int:
        self._generation += 1
        return self._generation

    def take(self, count: int) -> int:
        first = self._taken
        self._taken += count
        assert self._taken <= PAGES
        return first

    def enclave(
        self,
        source: str = "",
        *,
        modules: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        data: bytes = b"",
        heap: int = 0,
        **options: Any,
    ) -> Enclave:
        """Start an enclave; pages 0 and 1 hold the manifest, ``handler.py`` begins at page 3."""
        sources = {"handler.py": source, **(modules or {})}
        blobs = {file: text.encode() for file, text in sources.items()} | dict(files or {})
        offset = 3 * PAGE_SIZE
        extents: dict[str, tuple[int, int]] = {}
        body = bytearray()
        for name, blob in blobs.items():
            extents[name] = (offset + len(body), len(blob))
            body += blob + bytes(-len(blob) % PAGE_SIZE)
        end = offset + len(body) + PAGE_SIZE
        contents = [(bytes(body), R, 0xFFFF)]
        extent: dict[str, tuple[int, int] | None] = {"data": None, "heap": None}
        for name, content, chunks in (("data", data, 0xFFFF), ("heap", bytes(heap), 0)):
            if content:
                extent[name] = (end, len(content))
                contents.append((content + bytes(-len(content) % PAGE_SIZE), RW, chunks))
                end += len(contents[-1][0]) + PAGE_SIZE
        manifest = encode(Program("handler:handler", extents, data=extent["data"], heap=extent["heap"]))
        contents.insert(0, (manifest + bytes(2 * PAGE_SIZE - len(manifest)), R, 0xFFFF))
        enclave = Enclave(self, contents, options)
        self._stack.callback(enclave.close)
        return enclave

    def reset(self) -> None:
        """End all enclaves and free all pages."""
        self._stack.close()
        self._taken = 3
        for segment in (self.epc, self.epcm):
            _buffer(segment)[:] = bytes(segment.size)

    def close(self) -> None:
        assert self.zygote.close(WAIT)
        for fd in (self.epc_rw, self.epc_ro, self.epcm_ro):
            os.close(fd)
        self.epc.close()
        self.epcm.close()


def _buffer(segment: SharedMemory) -> memoryview:
    buffer = segment.buf
    assert buffer is not None
    return buffer


def _fd(segment: SharedMemory) -> int:
    fd: int = segment._fd  # type: ignore[attr-defined]
    return fd


@pytest.fixture(scope="module")
def module_bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    """The module's bench; its enclaves end with the test."""
    yield module_bench
    module_bench.reset()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition holds, or fail."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < end, "the condition did not come true in time"
            time.sleep(0.005)

    return wait
