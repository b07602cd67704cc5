"""Startup: who copies and measures, and when.

A :class:`Start` is one launch as its own host thread sees it: primitives for describing, copying, measuring
and judging. A *strategy* puts them in order; another order is another small class in :data:`STARTUPS`, and
nothing else changes. What is measured is never a strategy's business: scheme, D and B come from what is
trusted.

    serial     copy and measure in turns on one thread, judge, and only then let the enclave run
    enturbo    the enclave runs at once; the host copies, workers measure behind it, the host helps, judge
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ..shm.errors import EnclaveDestroyed, EnturboError, LaunchTimeout, MeasurementMismatch, WorkerLost
from ..shm.launches import Claims, Launch
from ..shm.layout import COPY_BY_HOST, PAGE_SIZE, SCHEME_ENTURBO, SCHEME_SGX
from ..shm.smc import Smc
from ..workers import records
from ..workers.measure import Measurer, Outcome, settled
from .arena import Place
from .measurement import Measurement
from .region import Region

if TYPE_CHECKING:
    from .host import Runtime
    from .image import EnclaveImage
    from .trace import Timeline

SERIAL_PIECE: Final = 1024  # pages copied before they are measured: 4 MiB stay in the cache in between,
SERIAL_ROWS: Final = 8  # or so many blocks of every domain, so that each lane has a long stretch
COPY_PIECE: Final = 256  # pages a copy step of `enturbo`: published together
SGX_BLOCK: Final = 16  # pages released together when there is one chain; no part of the value
ALONE_PAGES: Final = 64  # up to 256 KiB the host is done before a worker has woken up
HELP_NAP: Final = 0.002  # seconds between looks while others hold all that is left
MAX_STALLS: Final = 3  # progress deadlines in a row before the launch is given up


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages to copy: ``count`` from the ``index``-th page of the image on, ``skip`` pages into ``region``."""

    index: int
    count: int
    region: Region
    skip: int


class Start:
    """One launch while it starts. Used by one thread, except for :meth:`cancel` and :attr:`changed`."""

    def __init__(
        self,
        host: Runtime,
        image: EnclaveImage,
        expected: Measurement | None,
        place: Place,
        timeline: Timeline,
    ) -> None:
        self.host, self.image, self.expected, self.place, self.timeline = (
            host,
            image,
            expected,
            place,
            timeline,
        )
        self.measurement = expected if expected is not None else Measurement(bytes(32))
        self.changed = threading.Event()  # set by the pool: news, a death
        self._cancelled = threading.Event()
        self._deaths_before = host.pool_deaths
        self._claims = Claims(host.memory.control_segment.fd)
        self._measurer = Measurer(host.memory, self._claims, host.hasher, on_span=self._on_span)
        self.page_count = image.page_count
        self.on_copied: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------------------------------- opening

    @property
    def launch(self) -> Launch:
        """The launch table's row: what is measured comes from the trusted measurement."""
        sgx = self.measurement.scheme == "sgx"
        return Launch(
            generation=self.place.generation,
            scheme=SCHEME_SGX if sgx else SCHEME_ENTURBO,
            domains=1 if sgx else self.measurement.domains,
            block=SGX_BLOCK if sgx else self.measurement.block,
            first_page=self.place.first_page,
            page_count=self.page_count,
            size=self.image.size,
            ssa_frame_size=self.image.ssa_frame_size,
            copy_mode=COPY_BY_HOST,
        )

    def open(self, measurers: int) -> None:
        """Describe all pages in the EPCM, then make the launch exist; workers below ``measurers`` may claim.

        EAUG pages are zero (every free page is) and belong to no record: VALID at once.
        """
        epcm, place = self.host.memory.epcm, self.place
        index = place.first_page
        for region in (*self.image.regions, *self.image.dynamic):
            epcm.describe(
                index,
                region.page_count,
                flags=region.flags,
                chunks=region.chunks,
                linear=region.offset // PAGE_SIZE,
                generation=place.generation,
            )
            index += region.page_count
        launch = self.launch
        epcm.set_hash_dom(place.first_page, self.page_count, launch.domains, launch.block)
        epcm.set_valid(
            place.first_page + self.page_count, place.page_count - self.page_count, place.generation
        )
        table = self.host.memory.launches
        self.host.arena.take_range(self._claims, place.slot)
        try:
            table.open_launch(place.slot, launch, self._claims, settled(launch))
            table.measurers[place.slot] = measurers
        finally:
            self._claims.give_range(place.slot)

    def allow(self, measurers: int) -> None:
        """Let workers below ``measurers`` claim, and wake them."""
        self.host.memory.launches.measurers[self.place.slot] = measurers
        self.host.ring()

    # ------------------------------------------------------------------------------------------- copying

    def pieces(self, pages: int) -> Iterator[Piece]:
        """The image in EADD order, at most ``pages`` pages a piece."""
        index = 0
        for region in self.image.regions:
            # Zero pages need no bytes moved: one piece, however long.
            most = pages if region.content is not None or region.fill else region.page_count
            for skip in range(0, region.page_count, most):
                count = min(most, region.page_count - skip)
                yield Piece(index, count, region, skip)
                index += count

    def copy(self, piece: Piece) -> None:
        """Bytes into the EPC, then VALID, then the copy front: whoever sees one may rely on those before."""
        self._check_cancelled()
        place, memory = self.place, self.host.memory
        first = place.first_page + piece.index
        region = piece.region
        if region.content is not None:
            with memoryview(region.content) as raw, raw.cast("B") as content:
                start = piece.skip * PAGE_SIZE
                part = content[start : start + piece.count * PAGE_SIZE]
                self.host.copy_bytes(memory.epc.pages(first, piece.count)[: len(part)], part)
                part.release()
        elif region.fill:
            memory.epc.fill(first, piece.count, region.fill)
        # A host that dies here leaves pages that are not VALID: nobody reads them.
        memory.epcm.set_valid(first, piece.count, place.generation)
        memory.launches.copy_front[place.slot] = piece.index + piece.count

    def copy_all(self) -> None:
        """Copy the whole image in ascending order, ahead of all measuring (one span on the timeline)."""
        begin = time.monotonic_ns()
        for piece in self.pieces(COPY_PIECE):
            self.copy(piece)
        self.timeline.copied = time.monotonic_ns()
        self.timeline.add("copy", "host", begin, self.timeline.copied, self.page_count)
        self.on_copied()

    # ----------------------------------------------------------------------------------------- measuring

    def measure_available(self) -> Outcome:
        """Measure on this thread until the next pages are not VALID, or others hold what is left."""
        while True:
            outcome = self._measurer.step(self.place.slot, self.place.generation)
            if outcome is not Outcome.WORKED:
                return outcome

    def await_measured(self) -> None:
        """Help measuring until the last page is released.

        Raises WorkerLost, LaunchTimeout, EnturboError (a fault word) or EnclaveDestroyed (cancelled).
        """
        last, stalls, deadline = -1, 0, time.monotonic() + self.host.progress_timeout
        while True:
            outcome = self.measure_available()
            if outcome is Outcome.FINISHED:
                break
            self._check_measuring(outcome)
            smc = self._smc()
            progress = int(smc.released.sum(dtype=np.int64) + smc.hashed.sum(dtype=np.int64))
            if progress != last:
                last, stalls, deadline = progress, 0, time.monotonic() + self.host.progress_timeout
            elif time.monotonic() > deadline:
                stalls += 1
                if stalls > MAX_STALLS:
                    raise LaunchTimeout(
                        f"{self.page_count} pages: no block was measured within "
                        f"{stalls} times {self.host.progress_timeout} s"
                    )
                # A stopped worker would keep its claim for ever; a dead one's is free at once.
                self.host.ring()
                self.host.kill_holders(self.place.slot)
                deadline = time.monotonic() + self.host.progress_timeout
            self.changed.wait(HELP_NAP)
            self.changed.clear()
        self.timeline.measured = time.monotonic_ns()

    def _check_measuring(self, outcome: Outcome) -> None:
        self._check_cancelled()
        table, place = self.host.memory.launches, self.place
        if outcome is Outcome.FAULT or int(table.fault[place.slot]) == place.generation:
            raise EnturboError(
                "the Shadow Measurement Cache is damaged: a result covers fewer blocks than were released"
            )
        if outcome is Outcome.GONE:
            raise EnturboError(f"launch {place.generation} was closed while it was being measured")
        deaths = self.host.pool_deaths - self._deaths_before
        if deaths > self.host.max_worker_deaths:
            raise WorkerLost(f"{deaths} workers died during one launch (limit {self.host.max_worker_deaths})")

    def _smc(self) -> Smc:
        return self.host.memory.launches.smc(self.place.slot)

    def _on_span(self, slot: int, generation: int, pages: int, start: int, end: int, finished: bool) -> None:
        if pages:
            self.timeline.add("measure", "host", start, end, pages)

    # -------------------------------------------------------------------------------------------- verdict

    def merge(self) -> bytes:
        """The domains' digests, read back from the SMC in HASH_DOM order, merged to MRENCLAVE."""
        begin = time.monotonic_ns()
        launch, smc = self.launch, self._smc()
        digests = []
        for domain in range(launch.domains):
            newest = smc.newest(domain, self.place.generation)
            if newest is None or not newest.final:
                raise EnturboError(
                    f"hash domain {domain} has no final digest in the Shadow Measurement Cache"
                )
            digests.append(newest.state)
        ecreate = records.ecreate(launch.ssa_frame_size, launch.size)
        if launch.scheme == SCHEME_SGX:
            mrenclave: bytes = digests[0]
        else:
            mrenclave = records.merge(ecreate, launch.page_count, launch.domains, launch.block, digests)
        self.timeline.add("merge", "host", begin, time.monotonic_ns())
        return mrenclave

    def verify(self, mrenclave: bytes) -> bool:
        """EINIT's comparison. False for an unsigned launch; raises MeasurementMismatch."""
        begin = time.monotonic_ns()
        if self.expected is None:
            return False
        if not hmac.compare_digest(mrenclave, self.expected.digest):
            raise MeasurementMismatch(self.expected.digest, mrenclave)
        self.timeline.verified = time.monotonic_ns()
        self.timeline.add("verify", "host", begin, self.timeline.verified)
        return True

    # ------------------------------------------------------------------------------------------- the end

    def abort_copy(self) -> None:
        """The copy failed: nobody waits for the rest of it."""
        table = self.host.memory.launches
        table.copy_aborted[self.place.slot] = self.place.generation
        self.host.ring()

    def cancel(self) -> None:
        """Any thread: end the start at its next look."""
        self._cancelled.set()
        self.changed.set()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise EnclaveDestroyed("the enclave was closed while it was starting")

    def close(self) -> None:
        """Give this thread's claims and views back."""
        self._measurer.forget()
        self._claims.close()


class Strategy(Protocol):
    """An order of a start's primitives. ``early``: the enclave runs from the beginning."""

    early: bool

    def run(self, start: Start) -> None:
        """Copy and measure all of it; return when the last page is released."""


class SerialStartup:
    """The baseline: one thread copies a piece and measures it while it is in the cache."""

    early = False

    def run(self, start: Start) -> None:
        """See :class:`Strategy`."""
        start.open(measurers=0)
        if not start.host.hasher.midstates:
            # Such a hasher keeps a domain until its digest, so it would wait for its own copy.
            start.copy_all()
        else:
            launch = start.launch
            pages = max(SERIAL_PIECE, SERIAL_ROWS * launch.block * launch.domains)
            for piece in start.pieces(pages):
                begin = time.monotonic_ns()
                start.copy(piece)
                start.timeline.copied = time.monotonic_ns()
                start.timeline.add("copy", "host", begin, start.timeline.copied, piece.count)
                start.measure_available()
            start.on_copied()
        start.await_measured()


class EnturboStartup:
    """Decoupled and parallel: workers follow the copy, all measure after it, the enclave already runs."""

    early = True

    def run(self, start: Start) -> None:
        """See :class:`Strategy`."""
        host = start.host
        alone = start.page_count <= ALONE_PAGES
        while_copying = 0 if alone else min(host.workers, max(0, host.cores - 1))
        start.open(while_copying)
        if while_copying:
            host.ring()
        start.copy_all()
        if not alone and host.workers > while_copying:
            start.allow(host.workers)
        start.await_measured()


STARTUPS: Final[dict[str, Strategy]] = {"serial": SerialStartup(), "enturbo": EnturboStartup()}
