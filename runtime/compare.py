"""The combinations of startup and scheme, side by side on one image.

    sgx1       serial   + scheme sgx      the heap is EADDed         enturbo1   enturbo + scheme enturbo
    sgx2       serial   + scheme sgx      the heap comes by EAUG     enturbo2   enturbo + scheme enturbo
    serial*    serial   + scheme enturbo: what lanes give, apart from processes and overlap

Rounds are interleaved: a machine that slows down for a while slows all combinations down, and ratios are
taken inside a round. Times are wall clock of real processes; only the SGX hardware is simulated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..shm.errors import EnturboError
from .image import EnclaveImage
from .sigstruct import Sigstruct

if TYPE_CHECKING:
    from .enclave import Enclave
    from .host import Runtime
    from .keys import SigningKey
    from .spec import WrlockMode

VERDICT_SECONDS: Final = 120.0
WORKER_SECONDS: Final = 10.0
NEWS_SECONDS: Final = 0.5


class Combination(NamedTuple):
    """A startup, a scheme, and whether the heap comes by EAUG (SGXv2)."""

    name: str
    startup: str
    scheme: str
    edmm: bool


SGX1: Final = Combination("sgx1", "serial", "sgx", False)
SGX2: Final = Combination("sgx2", "serial", "sgx", True)
ENTURBO1: Final = Combination("enturbo1", "enturbo", "enturbo", False)
ENTURBO2: Final = Combination("enturbo2", "enturbo", "enturbo", True)
LANES: Final = Combination("serial*", "serial", "enturbo", False)
COMBINATIONS: Final = (SGX1, SGX2, ENTURBO1, ENTURBO2, LANES)


class Candidate(NamedTuple):
    """A combination ready to launch."""

    combination: Combination
    image: EnclaveImage
    sigstruct: Sigstruct


class Sample(NamedTuple):
    """One start, in seconds after ``launch()``; ``handler`` is the same call's time in the warm enclave.

    Without a handler ``first`` and ``handler`` are None, and ``life`` ends with VERIFIED.
    """

    first: float | None
    verified: float
    life: float
    handler: float | None

    @property
    def startup_share(self) -> float | None:
        """The part of the life that is not the handler's own work."""
        return None if self.handler is None else 1 - self.handler / self.life


@dataclass
class Row:
    """A combination's samples, one a round, and the answers of its last enclave's first and second call."""

    combination: Combination
    mrenclave: bytes
    samples: list[Sample] = field(default_factory=list)
    answers: tuple[Any, ...] = ()

    @property
    def first(self) -> float | None:
        """Median time to the first handler instruction, seconds."""
        return _median(sample.first for sample in self.samples)

    @property
    def verified(self) -> float:
        """Median time to VERIFIED, seconds."""
        return statistics.median(sample.verified for sample in self.samples)

    @property
    def life(self) -> float:
        """Median time to the result, seconds."""
        return statistics.median(sample.life for sample in self.samples)

    @property
    def startup_share(self) -> float | None:
        """Median startup share."""
        return _median(sample.startup_share for sample in self.samples)

    def speed_up(self, baseline: Row, of: Callable[[Sample], float | None] | None = None) -> Ratio | None:
        """How many times sooner than ``baseline``, round by round; ``of`` picks the time (the life)."""
        pick = of or _life
        pairs = [
            (pick(theirs), pick(ours)) for theirs, ours in zip(baseline.samples, self.samples, strict=True)
        ]
        ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


class Ratio(NamedTuple):
    """The median of ratios that were each taken in one round, and their range."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of :data:`COMBINATIONS`."""

    rows: tuple[Row, ...]

    def __getitem__(self, combination: Combination) -> Row:
        return next(row for row in self.rows if row.combination == combination)

    def speed_up(self, row: Row) -> Ratio | None:
        """Of the life, against sgx1."""
        return row.speed_up(self[SGX1])

    def speed_up_sgx2(self, row: Row) -> Ratio | None:
        """Of the life, against sgx2, for the combinations whose heap comes by EAUG."""
        return row.speed_up(self[SGX2]) if row.combination.edmm else None

    def to_list(self) -> list[dict[str, Any]]:
        """The rows as plain objects; times in seconds."""
        return [
            {
                "combination": row.combination.name,
                "startup": row.combination.startup,
                "scheme": row.combination.scheme,
                "edmm": row.combination.edmm,
                "mrenclave": row.mrenclave.hex(),
                "first_instruction": row.first,
                "verified": row.verified,
                "life": row.life,
                "startup_share": row.startup_share,
                "speed_up": _median_of(self.speed_up(row)),
                "speed_up_sgx2": _median_of(self.speed_up_sgx2(row)),
                "rounds": len(row.samples),
            }
            for row in self.rows
        ]


def prepare(
    image: EnclaveImage, key: SigningKey, combinations: Sequence[Combination] = COMBINATIONS
) -> list[Candidate]:
    """Sign ``image``, and the same with the heap by EAUG, for each combination.

    Each pair of image and scheme is measured once: the startup is no part of the value.
    """
    images = {False: image, True: image.as_edmm()}
    signed: dict[tuple[bool, str], Sigstruct] = {}
    for combination in combinations:
        pair = (combination.edmm, combination.scheme)
        if pair not in signed:
            signed[pair] = key.sign(images[combination.edmm], combination.scheme)
    return [Candidate(each, images[each.edmm], signed[each.edmm, each.scheme]) for each in combinations]


def start_once(runtime: Runtime, candidate: Candidate, event: Any) -> tuple[Sample, tuple[Any, ...]]:
    """Start an enclave, call it twice, end it: the times of the start, and both answers.

    The runtime must trust the signer. Raises what the launch or the handler raises.
    """
    with runtime.launch(
        candidate.image, candidate.sigstruct, startup=candidate.combination.startup
    ) as enclave:
        answers: tuple[Any, ...] = ()
        if candidate.image.handler is None:
            enclave.wait_verified(VERDICT_SECONDS)
        else:
            # The second call finds the enclave verified and warm: its time is the handler's own work.
            answers = (enclave.call(event), enclave.call(event))
        return _sample(enclave), answers


def compare(
    runtime: Runtime,
    candidates: Sequence[Candidate],
    event: Any,
    *,
    rounds: int = 5,
    warm_up: bool = True,
    on_start: Callable[[], None] = lambda: None,
) -> Comparison:
    """Start each candidate once a round, ``rounds`` times. ``on_start`` is told of every start that ended.

    The first start of each, which also touches fresh memory, is not counted if ``warm_up``.
    """
    runtime.wait_workers(WORKER_SECONDS)
    rows = [Row(each.combination, each.sigstruct.enclavehash) for each in candidates]
    for number in range(-1 if warm_up else 0, rounds):
        for row, candidate in zip(rows, candidates, strict=True):
            runtime.wait_scrubbed()  # what the last one left is no part of this one's start
            sample, answers = start_once(runtime, candidate, event)
            if number >= 0:
                row.samples.append(sample)
                row.answers = answers
            on_start()
    return Comparison(tuple(rows))


def measurers(enclave: Enclave, pages: int) -> dict[str, int]:
    """Who measured how many of the enclave's ``pages``, by track of its timeline.

    Workers tell the host what they did after they did it, so the last spans may come after the verdict: they
    are waited for, briefly (a worker that was killed tells nothing).
    """
    deadline = time.monotonic() + NEWS_SECONDS
    while True:
        found: dict[str, int] = {}
        for span in enclave.timeline.spans:
            if span.name == "measure":
                found[span.track] = found.get(span.track, 0) + span.pages
        if sum(found.values()) >= pages or time.monotonic() > deadline:
            return found
        time.sleep(0.002)


def epc_size(image: EnclaveImage, wrlock: WrlockMode = "wait") -> int:
    """Bytes of an EPC that holds one launch of ``image``, and its private copies."""
    from ..shm.layout import PAGE_SIZE
    from .spawning import shadow_pages

    return max(1, image.epc_pages + shadow_pages(image, wrlock)) * PAGE_SIZE


def _sample(enclave: Enclave) -> Sample:
    timeline = enclave.timeline
    verified = timeline.since_launch(timeline.verified)
    if verified is None:
        raise EnturboError(f"enclave {enclave.generation} is {enclave.state}, expected VERIFIED")
    calls = [span.duration / 1e9 for span in timeline.spans if span.name == "execute"]
    life = timeline.since_launch(timeline.result)
    if life is None or not calls:
        return Sample(None, verified, verified, None)
    return Sample(timeline.since_launch(timeline.first_instruction), verified, life, calls[-1])


def _life(sample: Sample) -> float | None:
    return sample.life


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_of(ratio: Ratio | None) -> float | None:
    return None if ratio is None else ratio.median
