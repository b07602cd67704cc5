"""What is measured: images of a size, runtimes with a warm EPC, and one launch with its times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from enturbo import Enclave, EnclaveImage, Region, Runtime, Sigstruct
from enturbo.runtime.backing import pack
from enturbo.runtime.compare import measurers

MIB = 1 << 20
PAGE_SIZE = 4096
PAGE_RECORDS = 64 + 16 * (64 + 256)  # bytes of EADD and sixteen EEXTENDs
FLAGS = 0x201  # a regular page, readable
WORKERS = 2
SECONDS = 120.0
HANDLER = b"def handler(event, context):\n    return event\n"


class Signed(NamedTuple):
    """An image and what was signed for it."""

    image: EnclaveImage
    sigstruct: Sigstruct


def content(size: int, number: int = 0) -> bytes:
    """``size`` bytes that repeat every 251, so that no two pages nearby are equal."""
    cycle = bytes((value + number) % 251 for value in range(251 * PAGE_SIZE))
    return (cycle * (size // len(cycle) + 1))[:size]


def plain_image(size: int, number: int = 0) -> EnclaveImage:
    """``size`` bytes of measured pages in one sealed memfd, and no handler: no process runs it."""
    regions, backing = pack([Region(0, size // PAGE_SIZE, FLAGS, content(size, number))])
    return EnclaveImage(regions, size=size, backing=backing)


def stretched_image(base: EnclaveImage, size: int) -> EnclaveImage:
    """``size`` bytes of measured pages that are all ``base``'s content, again and again.

    The file behind it is that of ``base``, which must be a :func:`plain_image`: an image of 4 GiB needs no
    more memory of its own than that.
    """
    source = base.regions[0].content
    assert source is not None
    with memoryview(source) as whole:
        view = whole[: min(size, whole.nbytes)]
    regions = [
        Region(at, view.nbytes // PAGE_SIZE, FLAGS, view, file_page=0) for at in range(0, size, view.nbytes)
    ]
    return EnclaveImage(regions, size=size, backing=base.backing)


def function_image(size: int, heap: int = 0) -> EnclaveImage:
    """A function that returns its event, with ``size`` bytes of measured data and ``heap`` bytes of heap."""
    with TemporaryDirectory() as folder:
        Path(folder, "handler.py").write_bytes(HANDLER)
        return EnclaveImage.from_function(folder, heap=heap, files={"data.bin": content(size)})


@contextlib.contextmanager
def warm_runtime(epc: int, signer: bytes, hasher: str | None = None, **choices: Any) -> Iterator[Runtime]:
    """Two workers, and an EPC of ``epc`` bytes that all have in their page tables."""
    with Runtime(epc=epc, workers=WORKERS, signers=[signer], hasher=hasher, **choices) as runtime:
        if not runtime.warm():
            raise RuntimeError("the EPC did not become warm")
        yield runtime
        if runtime.stats()["worker_deaths"]:
            raise RuntimeError("a worker died while it was being measured")


def drain(runtime: Runtime) -> None:
    """Wait until the pages of ended launches are scrubbed, so that the next launch has both cores."""
    deadline = time.monotonic() + SECONDS
    while runtime.stats()["epc_pages_dirty"]:
        if time.monotonic() > deadline:
            raise RuntimeError("the pages of ended launches were not scrubbed")
        time.sleep(0.001)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads, to the nanosecond: its clock, as ``clock_getcpuclockid`` names
    it."""
    return time.clock_gettime(~pid << 3 | 2)


class Clocks:
    """CPU time that workers and host take from now on."""

    def __init__(self, runtime: Runtime) -> None:
        self._pids = list(runtime._pool.pids().values())
        self._begin = self._now()

    def _now(self) -> tuple[float, float]:
        return sum(map(cpu_seconds, self._pids)), time.process_time()

    def so_far(self, name: str) -> dict[str, float]:
        """Seconds as ``name``_workers and ``name``_host."""
        workers, host = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return {f"{name}_workers": workers, f"{name}_host": host}


def start_plain(name: str, runtime: Runtime, signed: Signed, **choices: Any) -> dict[str, float]:
    """Launch an image without a handler, once.

    Seconds: ``name``_verified after launch; ``name``_measuring from the first stripe's start to the last
    one's end, as those who hashed them tell; after launch, the start of the first copy (``name``_begun), the
    end of the last one (``name``_copied) and that of the last stripe (``name``_hashed); CPU time of workers
    and host until VERIFIED. (The timeline's own ``copied`` is when the host noticed it.)
    """
    clocks = Clocks(runtime)
    with runtime.launch(*signed, **choices) as enclave:
        enclave.wait_verified(SECONDS)
        found = clocks.so_far(name)
        _await_spans(enclave, signed.image.page_count)
        launched, spans = enclave.timeline.launched, enclave.timeline.spans
        measured = [span for span in spans if span.name == "measure"]
        copied = [span for span in spans if span.name == "copy"]
        last = max(span.end for span in measured)
        found[f"{name}_measuring"] = (last - min(span.start for span in measured)) / 1e9
        found[f"{name}_begun"] = (min(span.start for span in copied) - launched) / 1e9
        found[f"{name}_copied"] = (max(span.end for span in copied) - launched) / 1e9
        found[f"{name}_hashed"] = (last - launched) / 1e9
        found[f"{name}_verified"] = _verified(enclave)
    drain(runtime)
    return found


def start_function(name: str, runtime: Runtime, signed: Signed, **choices: Any) -> dict[str, float]:
    """Launch an image with a handler and call it: ``name``_verified and ``name``_first (instruction)."""
    with runtime.launch(*signed, **choices) as enclave:
        answer = enclave.submit({"a": 1})
        enclave.wait_verified(SECONDS)
        if answer.result(SECONDS) != {"a": 1}:
            raise RuntimeError("the handler did not return its event")
        timeline = enclave.timeline
        first = timeline.since_launch(timeline.first_instruction)
        assert first is not None
        found = {f"{name}_verified": _verified(enclave), f"{name}_first": first}
    drain(runtime)
    return found


def start_many(name: str, runtime: Runtime, many: Sequence[Signed], **choices: Any) -> dict[str, float]:
    """Launch all at once: ``name``_verified from the first launch to the last VERIFIED, and CPU time."""
    clocks = Clocks(runtime)
    enclaves = [runtime.launch(*signed, **choices) for signed in many]
    try:
        for enclave in enclaves:
            enclave.wait_verified(SECONDS)
        found = clocks.so_far(name)
        begin = min(enclave.timeline.launched for enclave in enclaves)
        found[f"{name}_verified"] = max(enclave.timeline.verified or 0 for enclave in enclaves) / 1e9
        found[f"{name}_verified"] -= begin / 1e9
    finally:
        for enclave in enclaves:
            enclave.close()
    drain(runtime)
    return found


def _verified(enclave: Enclave) -> float:
    seconds = enclave.timeline.since_launch(enclave.timeline.verified)
    assert seconds is not None
    return seconds


def _await_spans(enclave: Enclave, pages: int) -> None:
    """Workers tell what they did after they did it, so the last spans may come after the verdict."""
    deadline = time.monotonic() + SECONDS / 10
    while sum(measurers(enclave, pages).values()) < pages:
        if time.monotonic() > deadline:
            raise RuntimeError(f"launch {enclave.generation}: workers did not tell of all that they measured")
