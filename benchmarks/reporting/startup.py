"""What is paid once: imports, a runtime's first launch, a fresh arena; and what small and idle cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from enturbo import Runtime, SigningKey
from enturbo.shm.segment import Segment
from enturbo.workers.copying import copy_into

from .material import (
    MIB,
    SECONDS,
    WORKERS,
    Signed,
    cpu_seconds,
    drain,
    plain_image,
    start_plain,
    warm_runtime,
)
from .rounds import Group, Say, summarise, take
from .sizes import Sizes

IMPORTS = {"package": "import enturbo", "names": "from enturbo import EnclaveImage, Runtime, SigningKey"}
FIRST_BYTES = MIB
SMALL_BYTES = 64 << 10
# What follows on another in a small launch, which the host does alone; together it is the whole.
STAGES = {
    "check": "checking the signature",
    "open": "taking a place, handing over to the start's thread, describing the pages and opening the launch",
    "copy": "copying",
    "hash": "hashing with claims, results and releases",
    "settle": "noticing that all is measured",
    "merge": "the merge",
    "verdict": "the verdict",
}


def measure_fresh(sizes: Sizes, say: Say) -> Group:
    """Seconds of imports and of the first launch, each in an interpreter of its own."""
    script = Path(__file__).with_name("first_launch.py")

    def imports() -> dict[str, float]:
        found = {}
        for name, statement in IMPORTS.items():
            code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
            found[name] = float(_python("-c", code))
        return found

    def first() -> Mapping[str, float]:
        found: dict[str, float] = json.loads(_python("-P", str(script), str(FIRST_BYTES), str(WORKERS)))
        return found

    series = take("fresh interpreters", [imports, first], sizes.fresh_rounds, say)
    return Group({"first_bytes": FIRST_BYTES, "import_times": _import_times()}, series)


def _python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return done.stdout


def _import_times(count: int = 5) -> list[tuple[str, float]]:
    """The modules that take longest by themselves in ``import enturbo``: name, seconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", IMPORTS["package"]],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    found: list[tuple[str, float]] = []
    for line in done.stderr.splitlines():
        own, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
        if own.isdigit():
            found.append((name, int(own) / 1e6))
    return sorted(found, key=lambda each: -each[1])[:count]


def measure_arena(sizes: Sizes, say: Say) -> Group:
    """Copying an image into memory that nobody has touched yet: seconds from asking for it to the last byte.

    ``plain``: a new SharedMemory and one copy into it. ``segment``: the same by the library's own means.
    ``runtime``: a new Runtime of that size and its first launch, until the last page has been copied;
    meanwhile workers boot and measure.
    """
    size = sizes.image * MIB
    say("fresh arena: image and signature")
    key = SigningKey.generate()
    image = plain_image(size)
    signed = Signed(image, key.sign(image))
    source = image.regions[0].content
    assert isinstance(source, memoryview)

    def plain() -> dict[str, float]:
        begin = time.perf_counter()
        memory = SharedMemory(create=True, size=size)
        assert memory.buf is not None
        try:
            target = np.frombuffer(memory.buf, np.uint8, size)
            target[:] = np.frombuffer(source, np.uint8)
            seconds = time.perf_counter() - begin
            del target
        finally:
            memory.close()
            memory.unlink()
        return {"plain": seconds}

    def segment() -> dict[str, float]:
        begin = time.perf_counter()
        memory = Segment.create(size)
        try:
            copy_into(memory.view, source)
            seconds = time.perf_counter() - begin
        finally:
            memory.close()
        return {"segment": seconds}

    def runtime() -> dict[str, float]:
        begin = time.monotonic()
        with Runtime(epc=size, workers=WORKERS, signers=[key.mrsigner]) as fresh:
            made = time.monotonic()
            found = start_plain("launch", fresh, signed)
        return {"runtime": made - begin + found["launch_copied"], "made": made - begin}

    series = take("fresh arena", [plain, segment, runtime], sizes.fresh_rounds, say)
    return Group({"mebibytes": sizes.image}, series)


def measure_small(sizes: Sizes, say: Say) -> Group:
    """Launches of 64 KiB one after another; by round the medians of seconds to VERIFIED and of its stages."""
    key = SigningKey.generate()
    image = plain_image(SMALL_BYTES)
    signed = Signed(image, key.sign(image))
    with warm_runtime(16 * MIB, key.mrsigner) as runtime:

        def launches() -> dict[str, float]:
            samples = [_small_launch(runtime, signed) for _ in range(sizes.small_launches)]
            found = {name: summarise([sample[name] for sample in samples]).median for name in samples[0]}
            found["most"] = max(sample["verified"] for sample in samples)
            return found

        series = take("64 KiB", [launches], sizes.small_rounds, say)
    return Group({"bytes": SMALL_BYTES, "launches": sizes.small_launches}, series)


def _small_launch(runtime: Runtime, signed: Signed) -> dict[str, float]:
    with runtime.launch(*signed) as enclave:
        enclave.wait_verified(SECONDS)
        timeline = enclave.timeline
        spans, verified = timeline.spans, timeline.verified
        assert verified is not None
        ends = {span.name: span.end for span in reversed(spans)}  # the first of each name stays
        merge = next(span for span in spans if span.name == "merge")
        copied = next(span.start for span in spans if span.name == "copy")
        hashed = max(span.end for span in spans if span.name == "measure")
        moments = (timeline.launched, ends["verify"], copied, ends["copy"], hashed, *merge[2:4], verified)
        found = {
            name: (end - begin) / 1e9 for name, (begin, end) in zip(STAGES, pairwise(moments), strict=True)
        }
        found["verified"] = (verified - timeline.launched) / 1e9
    drain(runtime)
    return found


def measure_idle(sizes: Sizes, say: Say) -> Group:
    """CPU time that a runtime takes while nothing happens, as a share of one core, by who takes it."""
    key = SigningKey.generate()
    image = plain_image(16 * MIB)
    with warm_runtime(64 * MIB, key.mrsigner) as runtime:
        start_plain("once", runtime, Signed(image, key.sign(image)))
        pids = {"workers": list(runtime._pool.pids().values()), "zygote": [runtime._zygote.pid]}
        say(f"idle pool: {sizes.idle_seconds} s")
        begin, before = time.monotonic(), _cpu(pids)
        time.sleep(sizes.idle_seconds)
        seconds, after = time.monotonic() - begin, _cpu(pids)
    series = {name: [(after[name] - before[name]) / seconds] for name in after}
    series["all"] = [sum(shares[0] for shares in series.values())]
    return Group({"seconds": sizes.idle_seconds}, series)


def _cpu(pids: Mapping[str, list[int]]) -> dict[str, float]:
    return {
        "host": time.process_time(),
        **{name: sum(map(cpu_seconds, numbers)) for name, numbers in pids.items()},
    }
