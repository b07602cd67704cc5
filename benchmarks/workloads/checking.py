"""Run a workload's calls in an enclave, and compare the answers with those that are expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from catalogue import Workload

from enturbo import Runtime
from enturbo.runtime.compare import COMBINATIONS, Candidate, Combination
from enturbo.runtime.spec import GateMode, WrlockMode

FOUR: tuple[Combination, ...] = COMBINATIONS[:4]
CALL_SECONDS = 120.0


class Gating(NamedTuple):
    """What holds accesses back, as ``Runtime`` takes it."""

    name: str
    enforcement: Literal["kernel", "cooperative"]
    gate: GateMode
    wrlock: WrlockMode


GATINGS = (
    Gating("kernel", "kernel", "write", "wait"),
    Gating("kernel, execute", "kernel", "execute", "wait"),
    Gating("kernel, shadow", "kernel", "write", "shadow"),
    Gating("cooperative", "cooperative", "write", "wait"),
    Gating("cooperative, execute", "cooperative", "execute", "wait"),
)


class Run(NamedTuple):
    """One enclave's life. Times in seconds after ``launch()``; ``handler``: of the first call."""

    first: float
    verified: float
    result: float
    handler: float
    wrong: tuple[str, ...]  # answers that are not the expected ones


def run(runtime: Runtime, candidate: Candidate, workload: Workload) -> Run:
    """Start it, make all its calls in one enclave, end it. Raises what the launch or the handler raises."""
    wrong = []
    with runtime.launch(
        candidate.image, candidate.sigstruct, startup=candidate.combination.startup
    ) as enclave:
        for number, call in enumerate(workload.calls, 1):
            answer = enclave.submit(call.event).result(CALL_SECONDS)
            if plain(answer) != plain(call.expected):
                wrong.append(f"call {number}: expected {call.expected!r}, found {answer!r}")
        enclave.wait_verified(CALL_SECONDS)
        timeline = enclave.timeline
        spans = _executions(enclave)
        times = [
            timeline.since_launch(at)
            for at in (timeline.first_instruction, timeline.verified, timeline.result)
        ]
    first, verified, result = (float("nan") if at is None else at for at in times)
    return Run(first, verified, result, spans[0], tuple(wrong))


def _executions(enclave: Any) -> Sequence[float]:
    return [span.duration / 1e9 for span in enclave.timeline.spans if span.name == "execute"]


def plain(value: Any) -> Any:
    """As a message gives it back: tuples are lists."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value
