"""What ``enturbo demo`` shows, computed: nothing is printed here.

The example is a function that finds the nearest city in a SQLite database of the world's cities. The
database is part of the image, so each of its pages is copied into the EPC and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..shm.errors import EnturboError
from .compare import WORKER_SECONDS, Candidate, epc_size, measurers
from .image import EnclaveImage
from .keys import SigningKey
from .measurement import Measurement

if TYPE_CHECKING:
    from .enclave import Enclave
    from .host import Runtime
    from .region import Region
    from .sigstruct import Sigstruct

DATABASE: Final = "cities.db"
WORKER_COUNTS: Final = (1, 2, 3, 8)
PLACES: Final = ((48.85, 2.35), (-33.87, 151.21), (35.69, 139.69), (-1.28, 36.82))
ANSWER_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Answer:
    """What the handler said about a place. ``calls`` is its count in the measured writable data."""

    lat: float
    lon: float
    city: str
    country: str
    distance_km: float
    calls: int


@dataclass(frozen=True)
class ReadBack:
    """MRENCLAVE as merged from the SMC after ``workers`` processes, and maybe the host, had measured."""

    workers: int
    mrenclave: bytes
    agrees: bool
    measured_pages: dict[str, int]  # by who measured


@dataclass(frozen=True)
class Refusal:
    """An attempt that must fail: how it did, and what got out (nothing)."""

    attempt: str
    error: str  # the class; "none": it was not refused
    message: str
    state: str  # of the enclave; "never created"
    delivered: bool  # a result came out
    output: int  # bytes of stdout and stderr that came out

    @property
    def refused(self) -> bool:
        """It failed, and nothing was released."""
        return self.error != "none" and not self.delivered and not self.output


def example_event(place: tuple[float, float] = PLACES[0]) -> dict[str, float]:
    """The event that asks for the city nearest to (lat, lon)."""
    return {"lat": place[0], "lon": place[1]}


def ask(
    runtime: Runtime, candidate: Candidate, places: Sequence[tuple[float, float]] = PLACES
) -> list[Answer]:
    """Start one enclave and ask it about all ``places``."""
    with runtime.launch(
        candidate.image, candidate.sigstruct, startup=candidate.combination.startup
    ) as enclave:
        futures = [enclave.submit(example_event(place)) for place in places]
        return [
            to_answer(place, future.result(ANSWER_SECONDS))
            for place, future in zip(places, futures, strict=True)
        ]


def to_answer(place: tuple[float, float], result: Any) -> Answer:
    """The handler's result. Raises EnturboError if it is none."""
    try:
        return Answer(
            *place,
            str(result["name"]),
            str(result["country"]),
            float(result["distance_km"]),
            int(result["calls"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EnturboError(f"the example's handler gave no city: {type(error).__name__}: {error}") from None


def read_back(
    image: EnclaveImage, sigstruct: Sigstruct, counts: Sequence[int] = WORKER_COUNTS
) -> Iterator[ReadBack]:
    """Start ``image`` once for each number of workers and read MRENCLAVE back from the SMC."""
    from .host import Runtime

    expected = image.measure().digest
    for count in counts:
        with Runtime(epc=epc_size(image), workers=count, signers=[sigstruct.mrsigner]) as runtime:
            runtime.wait_workers(WORKER_SECONDS)
            with runtime.launch(image, sigstruct) as enclave:
                mrenclave = enclave.wait_verified(ANSWER_SECONDS)
                pages = measurers(enclave, image.page_count)
        yield ReadBack(count, mrenclave, mrenclave == expected, pages)


def refusals(runtime: Runtime, candidate: Candidate) -> Iterator[Refusal]:
    """A tampered image, a foreign signer, a wrong measurement. ``runtime`` trusts the candidate's signer."""
    image, sigstruct = candidate.image, candidate.sigstruct
    yield attempt(
        "one byte of the database flipped", lambda: runtime.launch(tampered(image, DATABASE), sigstruct)
    )
    foreign = SigningKey.generate().sign(sigstruct.measurement)
    yield attempt("signed by somebody else", lambda: runtime.launch(image, foreign))
    other = Measurement(bytes(reversed(sigstruct.enclavehash)))
    yield attempt("another measurement expected", lambda: runtime.launch(image, expected=other))


def attempt(title: str, launch: Callable[[], Enclave]) -> Refusal:
    """Launch, call, and tell how that was refused."""
    try:
        enclave = launch()
    except EnturboError as error:
        return Refusal(title, type(error).__name__, str(error), "never created", False, 0)
    with enclave:
        failure = _outcome(enclave)
        return Refusal(
            title,
            "none" if failure is None else type(failure).__name__,
            "" if failure is None else str(failure),
            str(enclave.state),
            failure is None,
            len(enclave.stdout) + len(enclave.stderr),
        )


def _outcome(enclave: Enclave) -> BaseException | None:
    """What a call fails with; None: it gives a result."""
    return enclave.submit(example_event()).exception(ANSWER_SECONDS)


def tampered(image: EnclaveImage, file: str) -> EnclaveImage:
    """A copy of ``image`` in which one bit in the middle of ``file`` differs."""
    program = image.program
    if program is None or file not in program.files:
        raise EnturboError(f"the image has no file {file!r}")
    start, size = program.files[file]
    place = start + size // 2

    def changed(region: Region) -> Region:
        if region.content is None or not region.offset <= place < region.end:
            return region
        content = bytearray(region.content)
        content[place - region.offset] ^= 1
        return replace(region, content=content)

    return EnclaveImage(
        (changed(region) for region in image.regions),
        size=image.size,
        ssa_frame_size=image.ssa_frame_size,
        dynamic=image.dynamic,
    )


def agreed(answers: Sequence[Any]) -> bool:
    """Whether results are equal, the handler's own count of calls aside."""
    rest = [{key: value for key, value in answer.items() if key != "calls"} for answer in answers]
    return all(answer == rest[0] for answer in rest)
