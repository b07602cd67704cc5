"""What enforcement costs: the same starts with and without it, and functions that meet gates at work.

Three runtimes beside each other: ``cooperative``; ``wait`` (the kernel enforces, and a store to a page that
is not measured waits); ``shadow`` (it goes to a private copy instead). A round takes all starts of all three.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from enturbo import Enclave, EnclaveImage, Runtime, SigningKey
from enturbo.runtime.broker import Broker
from enturbo.runtime.guard import Guard
from enturbo.runtime.processes import EnclaveProcess
from enturbo.runtime.seccomp import Notification

from .handlers import function, tasks, writing_image
from .material import (
    HANDLER,
    MIB,
    PAGE_SIZE,
    SECONDS,
    Clocks,
    Signed,
    content,
    cpu_seconds,
    drain,
    warm_runtime,
)
from .rounds import Group, Say, Step, summarise, take
from .sizes import Sizes

COOPERATIVE, WAIT, SHADOW = MODES = ("cooperative", "wait", "shadow")
CHOICES: Mapping[str, Mapping[str, Any]] = {
    COOPERATIVE: {"enforcement": "cooperative"},
    WAIT: {"enforcement": "auto", "require_enforcement": True, "wrlock": "wait"},
    SHADOW: {"enforcement": "auto", "require_enforcement": True, "wrlock": "shadow"},
}
PREFERENCES = ("verified", "start")
WRITES = ("all", "some", "read", "one")  # events of a writing image
SMALL, MEDIUM = 64 << 10, 16 * MIB
REPEATS = {"small": 15, "medium": 5}  # starts a round, of which the median counts

Takeovers = dict[int, tuple[int, int]]  # by generation: begin and end, ns


def measure_enforcement(sizes: Sizes, say: Say) -> Group:
    """Seconds after ``launch()`` by start and runtime, and what gates did meanwhile; see the steps below."""
    say("enforcement: images and signatures")
    key = SigningKey.generate()

    def signed(image: EnclaveImage) -> Signed:
        return Signed(image, key.sign(image))

    size, source = sizes.image * MIB, HANDLER.decode()
    # By name; whether pages that have W are measured, so that the two ways to write differ.
    images = {
        "data": (signed(function(source, data=content(size))), MODES),
        "files": (signed(function(source, files={"data.bin": content(size)})), MODES[:2]),
        "medium": (signed(function(source, data=content(MEDIUM))), MODES),
        "small": (signed(function(source, data=content(SMALL))), MODES),
    }
    works = {name: signed(task.image()) for name, task in tasks().items()}
    writing = signed(writing_image(sizes.written * MIB))
    most = max(each.image.page_count for each in (*works.values(), *(image for image, _ in images.values())))
    with contextlib.ExitStack() as stack:
        # Private copies are counted against the EPC, and nothing waits for pages of the start before.
        runtimes = {
            mode: stack.enter_context(warm_runtime((2 * most + 64) * PAGE_SIZE, key.mrsigner, **choices))
            for mode, choices in CHOICES.items()
        }
        held = stack.enter_context(counting_held_calls())
        taken = stack.enter_context(timing_takeovers())
        steps: list[Step] = []
        for name, (image, modes) in images.items():
            for preference in PREFERENCES if name in ("data", "files") else ("start",):
                steps += [
                    _start(
                        f"{name}:{preference}:{mode}",
                        runtimes[mode],
                        image,
                        preference,
                        REPEATS.get(name, 1),
                        taken,
                    )
                    for mode in modes
                ]
        for name, task in tasks().items():
            steps += [
                _work(f"{name}:{mode}", runtimes[mode], works[name], task.event, task.is_right, held)
                for mode in (MODES if task.writes else MODES[:2])
            ]
        for event in WRITES:
            steps += [_write(f"{event}:{mode}", runtimes[mode], writing, event) for mode in MODES]
        steps += [_late(f"late:{mode}", runtimes[mode], writing) for mode in MODES]
        series = take("enforcement", steps, sizes.enforcement_rounds, say)
        facts = {
            "mebibytes": sizes.image,
            "written": sizes.written,
            "level": runtimes[WAIT].enforcement.level,
            "small_bytes": SMALL,
            "medium_mebibytes": MEDIUM // MIB,
            "repeats": REPEATS,
        }
    return Group(facts, series)


# ------------------------------------------------------------------------------------------------ steps


def _start(name: str, runtime: Runtime, signed: Signed, prefer: str, repeats: int, taken: Takeovers) -> Step:
    """Launch and call a function that returns its event; medians of ``repeats`` starts.

    Besides the milestones: CPU time of workers and host until VERIFIED, of zygote and enclave until the
    result; ``name``_forked, ``_taken``: when the host had the process, and had taken its gate over.
    """

    def once() -> dict[str, float]:
        clocks, zygote = Clocks(runtime), cpu_seconds(runtime._zygote.pid)
        with runtime.launch(*signed, prefer=prefer) as enclave:  # type: ignore[arg-type]
            answer = enclave.submit({"a": 1})
            enclave.wait_verified(SECONDS)
            found = clocks.so_far(name)
            if answer.result(SECONDS) != {"a": 1}:
                raise RuntimeError("the handler did not return its event")
            found |= _milestones(name, enclave)
            found[f"{name}_zygote"] = cpu_seconds(runtime._zygote.pid) - zygote
            found[f"{name}_enclave"] = cpu_seconds(_pid(enclave))
            for key, moment in zip(("forked", "taken"), taken.pop(enclave.generation), strict=True):
                found[f"{name}_{key}"] = (moment - enclave.timeline.launched) / 1e9
        drain(runtime)
        return found

    def step() -> dict[str, float]:
        found = [once() for _ in range(repeats)]
        return {key: summarise([each[key] for each in found]).median for key in found[0]}

    return step


def _work(
    name: str,
    runtime: Runtime,
    signed: Signed,
    event: Any,
    is_right: Callable[[Any], bool],
    held: Counter[int],
) -> Step:
    """Launch and call a function that does some work: when it began and ended, and how long gates held it.

    ``name``_window: from its first instruction to its result or VERIFIED, whichever is first; ``_blocked``:
    the part of it in which it slept at gates; ``_waits``; ``_held``: system calls that the host answered.
    """

    def step() -> dict[str, float]:
        with runtime.launch(*signed) as enclave:
            answer = enclave.submit(event)
            if not is_right(answer.result(SECONDS)):
                raise RuntimeError(f"{name}: the function gave another result")
            found = _milestones(name, enclave)
            found |= {f"{name}_{key}": value for key, value in blocked(enclave).items()}
            found[f"{name}_held"] = held[_pid(enclave)]
        drain(runtime)
        return found

    return step


def _write(name: str, runtime: Runtime, signed: Signed, event: str) -> Step:
    """Launch and call a function that writes at once; the EPC pages that it has, and its private copies."""

    def step() -> dict[str, float]:
        with runtime.launch(*signed) as enclave:
            if not enclave.submit(event).result(SECONDS):
                raise RuntimeError(f"{name}: nothing was written")
            found = _milestones(name, enclave)
            found |= {f"{name}_{key}": value for key, value in blocked(enclave).items()}
            found[f"{name}_copies"] = enclave.timeline.shadow_pages
            found[f"{name}_reserved"] = enclave._start.place.page_count
        drain(runtime)
        return found

    return step


def _late(name: str, runtime: Runtime, signed: Signed) -> Step:
    """Write to all pages when the enclave is VERIFIED: seconds of the call, the first time and the second."""

    def step() -> dict[str, float]:
        found = {}
        with runtime.launch(*signed) as enclave:
            enclave.submit("nothing").result(SECONDS)
            for turn in ("first", "again"):
                before = len(enclave.timeline.spans)
                enclave.submit("all").result(SECONDS)
                calls = [span for span in enclave.timeline.spans if span.name == "execute"]
                assert len(enclave.timeline.spans) > before
                found[f"{name}_{turn}"] = calls[-1].duration / 1e9
        drain(runtime)
        return found

    return step


# ---------------------------------------------------------------------------------------- what is looked at


def _milestones(name: str, enclave: Enclave) -> dict[str, float]:
    """Seconds after the launch: ``_first`` (instruction), ``_end`` of the first call, ``_verified``,
    ``_result`` delivered."""
    timeline = enclave.timeline
    (call, *_) = (span for span in timeline.spans if span.name == "execute")
    moments = {
        "first": timeline.first_instruction,
        "end": call.end,
        "verified": timeline.verified,
        "result": timeline.result,
    }
    found = {}
    for key, moment in moments.items():
        seconds = timeline.since_launch(moment)
        assert seconds is not None
        found[f"{name}_{key}"] = seconds
    return found


def _pid(enclave: Enclave) -> int:
    assert enclave._session is not None
    assert enclave._session.process is not None
    return enclave._session.process.pid


def blocked(enclave: Enclave) -> dict[str, float]:
    """Of the first call: seconds of ``window`` and ``blocked`` inside, and the number of ``waits`` in it.

    A wait counts from when the pager learned of it to when it had let it through. Waits of several threads at
    one time count once.
    """
    timeline = enclave.timeline
    spans = timeline.spans
    (call, *_) = (span for span in spans if span.name == "execute")
    assert timeline.verified is not None
    begin, end = call.start, min(call.end, timeline.verified)
    waits = [
        (max(begin, span.start), min(end, span.end))
        for span in spans
        if span.name == "gate" and span.end > begin and span.start < end
    ]
    total = until = 0
    for start, stop in sorted(waits):
        total += max(0, stop - max(start, until))
        until = max(until, stop)
    return {"window": max(0, end - begin) / 1e9, "blocked": total / 1e9, "waits": len(waits)}


@contextlib.contextmanager
def counting_held_calls() -> Iterator[Counter[int]]:
    """How many held calls were answered, by the enclave's main process, before and after VERIFIED.

    A held call waits for the host's answer, so one that nobody has answered has held its enclave until it
    was: none answered, none held.
    """
    counts: Counter[int] = Counter()
    lock = threading.Lock()
    answer = Broker._answer

    def counted(broker: Broker, call: Notification) -> None:
        with lock:
            counts[broker._pid] += 1
        answer(broker, call)

    with mock.patch.object(Broker, "_answer", counted):
        yield counts


@contextlib.contextmanager
def timing_takeovers() -> Iterator[Takeovers]:
    """When the host had an enclave's process, and when it had taken over what stands between it and the
    world: the call is sent then. Generations of several runtimes may be equal: take each out directly."""
    moments: Takeovers = {}
    attach = Guard.attach

    def timed(guard: Guard, process: EnclaveProcess) -> None:
        begin = time.monotonic_ns()
        attach(guard, process)
        moments[guard._spec.generation] = begin, time.monotonic_ns()

    with mock.patch.object(Guard, "attach", timed):
        yield moments
