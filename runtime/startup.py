"""Startup: who copies and measures, and when.

A :class:`Start` is one launch as its own host thread sees it: primitives for describing, copying, measuring
and judging. A *strategy* puts them in order; another order is another small class in :data:`STARTUPS`, and
nothing else changes. What is measured is never a strategy's business: scheme, D and B come from what is
trusted.

    serial     copy and measure in turns on one thread, judge, and only then let the enclave run
    enturbo    the enclave runs at once; workers and host copy and measure, as follows; judge

    who copies                            chosen when
    holders of claims, everything first   prefer="start", and every process can read the image
    holders of claims, stripe by stripe   prefer="verified", likewise
    the host; workers measure behind it   the image's pages are in the host's memory alone, or one chain
                                          (scheme sgx) is all there is: one claim, so one copier at a time
    the host, and it measures alone       up to 256 KiB
"""

from __future__ import annotations

import hmac
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np

from ..shm.errors import (
    EnclaveDestroyed,
    EnturboError,
    ImageFormatError,
    LaunchTimeout,
    MeasurementMismatch,
    WorkerLost,
)
from ..shm.launches import Claims, Launch
from ..shm.layout import (
    COPY_BY_HOST,
    COPY_FIRST,
    COPY_FUSED,
    FAULT_SOURCE,
    MAX_SOURCE_FD,
    PAGE_SIZE,
    SCHEME_ENTURBO,
    SCHEME_SGX,
)
from ..shm.smc import Smc
from ..workers import records
from ..workers.measure import Measurer, settled
from ..workers.protocol import COPIED
from ..workers.view import Outcome, filled_rows
from .arena import Place
from .measurement import Measurement
from .region import Region
from .touching import Toucher

if TYPE_CHECKING:
    from .backing import Backing
    from .host import Runtime
    from .image import EnclaveImage
    from .trace import Timeline

SERIAL_PIECE: Final = 1024  # pages copied before they are measured: 4 MiB stay in the cache in between,
SERIAL_ROWS: Final = 8  # or so many blocks of every domain, so that each lane has a long stretch
COPY_PIECE: Final = 256  # pages a copy step of `enturbo`: published together
WANTED: Final = 256  # pages wanted between two of these; more are forgotten, and wanted again
SGX_BLOCK: Final = 16  # pages released together when there is one chain; no part of the value
ALONE_PAGES: Final = 64  # up to 256 KiB the host is done before a worker has woken up
GROUP_PAGES: Final = 512  # 1 ms of a measurer
HELP_NAP: Final = 0.002  # seconds between looks while others hold all that is left
LOOK_NAP: Final = 0.05  # the same while workers do it all; they wake the host when they are through
IDLE_LOOKS: Final = 2  # looks in a row at which nothing has moved in any launch
MAX_STALLS: Final = 3  # progress deadlines in a row before the launch is given up

Preference = Literal["start", "verified"]
PREFERENCES: Final[tuple[Preference, ...]] = ("start", "verified")


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages to copy: ``count`` from the ``index``-th page of the image on, ``skip`` pages into ``region``."""

    index: int
    count: int
    region: Region
    skip: int


class Start:
    """One launch while it starts. Used by one thread, except for :meth:`cancel`, :meth:`want`,
    :meth:`toucher` and :attr:`changed`."""

    def __init__(
        self,
        host: Runtime,
        image: EnclaveImage,
        expected: Measurement | None,
        place: Place,
        timeline: Timeline,
        prefer: Preference = "start",
    ) -> None:
        self.host, self.image, self.expected, self.place = host, image, expected, place
        self.timeline, self.prefer = timeline, prefer
        self.measurement = expected if expected is not None else Measurement(bytes(32))
        self.changed = threading.Event()  # set by the pool: news, a death
        self._cancelled = threading.Event()
        self._deaths_before = host.pool_deaths
        # Ours: entries name them to workers, and the image may be closed meanwhile.
        self._backing = image.backing
        self._sources = {file: file.lend() for file in map(self._file_of, image.regions) if file is not None}
        self._claims = Claims(host.memory.control_segment.fd)
        self._measurer = Measurer(
            host.memory, self._claims, host.hasher, on_span=self._on_span, locks=host.locks
        )
        self.page_count = image.page_count
        self.shared = False  # workers may have claimed something
        self.on_copied: Callable[[], None] = lambda: None
        self._wanted: deque[int] = deque(maxlen=WANTED)  # pages; any thread appends, who copies takes
        self._front = 0  # all pages below are copied
        self._ahead: dict[int, int] = {}  # pieces beyond it that are: first page -> end

    # ------------------------------------------------------------------------------------------- opening

    @cached_property
    def launch(self) -> Launch:
        """The launch table's row as it is opened: what is measured comes from the trusted measurement."""
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

    @property
    def is_readable(self) -> bool:
        """Whether any process can copy the image: from its files, or because there are no bytes to copy."""
        return all(
            region.content is None or self._is_seen(self._file_of(region)) for region in self.image.regions
        )

    def _is_seen(self, file: Backing | None) -> bool:
        source = None if file is None else self._sources.get(file)
        return source is not None and source.fd <= MAX_SOURCE_FD and self.host.workers_see_files

    def _file_of(self, region: Region) -> Backing | None:
        """The file that holds the region's content; None: no content, or in this process's memory alone."""
        if region.content is None or region.file_page is None:
            return None
        return self._backing if region.layer is None else region.layer

    def open(self, measurers: int, copy_mode: int = COPY_BY_HOST) -> None:
        """Describe all pages in the EPCM, then make the launch exist; workers below ``measurers`` may claim.

        EAUG pages are zero (every free page is) and belong to no record: VALID at once.
        """
        epcm, place = self.host.memory.epcm, self.place
        self.shared = measurers > 0
        self.launch = self.launch._replace(copy_mode=copy_mode)
        if measurers and self.host.starting > self.host.workers:
            # Workers have launches enough to share out: larger claims of each cost less.
            self.launch = self.launch._replace(group=group_of(self.launch))
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
            if copy_mode != COPY_BY_HOST:
                self._describe_source(index, region)
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

    def _describe_source(self, index: int, region: Region) -> None:
        epcm, file = self.host.memory.epcm, self._file_of(region)
        if file is not None:
            assert region.content is not None
            assert region.file_page is not None
            with memoryview(region.content) as content:
                pages = -(-content.nbytes // PAGE_SIZE)
            epcm.set_file_source(index, pages, self._sources[file].fd, region.file_page)
        elif region.fill:
            epcm.set_fill_source(index, region.page_count, region.fill)

    def allow(self, measurers: int) -> None:
        """Let workers below ``measurers`` claim, and wake them."""
        self.shared = self.shared or measurers > 0
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
            memory.epc.map_now(first, piece.count)
            with memoryview(region.content) as raw, raw.cast("B") as content:
                start = piece.skip * PAGE_SIZE
                part = content[start : start + piece.count * PAGE_SIZE]
                self.host.copy_bytes(memory.epc.pages(first, piece.count)[: len(part)], part)
                part.release()
        elif region.fill:
            memory.epc.fill(first, piece.count, region.fill)
        # A host that dies here leaves pages that are not VALID: nobody reads them.
        memory.epcm.set_valid(first, piece.count, place.generation)
        # All pages below the front are VALID: a piece that came early counts when those before it are there.
        self._ahead[piece.index] = piece.index + piece.count
        while self._front in self._ahead:
            self._front = self._ahead.pop(self._front)
        memory.launches.copy_front[place.slot] = self._front

    def copy_all(self) -> None:
        """Copy the whole image ahead of all measuring (one span on the timeline): pieces that somebody wants
        (:meth:`want`) next, the others in ascending order."""
        begin = time.monotonic_ns()
        pieces = list(self.pieces(COPY_PIECE))
        starts = [piece.index for piece in pieces]
        copied = bytearray(len(pieces))
        for turn in range(len(pieces)):
            for number in chain(self._take_wanted(starts), (turn,)):
                if not copied[number]:
                    copied[number] = 1
                    self.copy(pieces[number])
        self.timeline.copied = time.monotonic_ns()
        self.timeline.add("copy", "host", begin, self.timeline.copied, self.page_count)
        self.on_copied()

    def want(self, page: int) -> None:
        """Any thread: somebody waits for the image's page ``page``. Where the host copies, the piece with it
        comes next; to be told again until it is VALID. Elsewhere nobody looks: see :meth:`toucher`."""
        self._wanted.append(page)

    def toucher(self) -> Toucher:
        """For the thread that learns which pages the enclave waits for, whoever copies; that closes it."""
        host, place = self.host, self.place
        return Toucher(host.memory, host.hasher, place.slot, place.generation, self.timeline, self.want)

    def _take_wanted(self, starts: Sequence[int]) -> Iterator[int]:
        """Numbers of the pieces, which begin at ``starts``, with the pages that were wanted so far."""
        while self._wanted:
            page = self._wanted.popleft()
            if 0 <= page < self.page_count:
                yield bisect_right(starts, page) - 1

    # ----------------------------------------------------------------------------------------- measuring

    def measure_available(self) -> Outcome:
        """Measure on this thread until the next pages are not VALID, or others hold what is left."""
        while True:
            outcome = self._measurer.step(self.place.slot, self.place.generation)
            if outcome is not Outcome.WORKED:
                return outcome

    def await_measured(self) -> None:
        """Wait until the last page is released, and help where that is of use.

        The host measures while cores are idle (workers that have not reported yet, or fewer of them). Beside
        as many workers as cores it would only take turns with them, and a claim whose holder waits for a core
        is what the others wait for in the end. It helps all the same when nothing has moved for a while.

        Raises WorkerLost, LaunchTimeout, EnturboError (a fault word) or EnclaveDestroyed (cancelled).
        """
        table, place = self.host.memory.launches, self.place
        last, stalls, deadline = -1, 0, time.monotonic() + self.host.progress_timeout
        total, idle_looks = -1, 0
        while True:
            helping = not self.shared or self.host.has_idle_cores or idle_looks >= IDLE_LOOKS
            if helping:
                outcome = self.measure_available()
            else:
                outcome = self._measurer.look(place.slot, place.generation)
            self._note_copied()
            if outcome is Outcome.FINISHED:
                break
            self._check_measuring(outcome)
            smc, copied = self._smc(), table.copied[place.slot]
            progress = sum(int(each.sum(dtype=np.int64)) for each in (smc.released, smc.hashed, copied))
            before, total = total, table.total_progress()
            idle_looks = idle_looks + 1 if total == before else 0
            # Workers serve older launches first: while those go on, waiting for them is no stall.
            queued = total != before and not self.host.is_oldest(place.generation)
            if progress != last or queued:
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
                self.host.kill_holders(place.slot)
                deadline = time.monotonic() + self.host.progress_timeout
            self.changed.wait(HELP_NAP if helping else LOOK_NAP)
            self.changed.clear()
        # Nothing is left to claim; workers need not look at this slot again while the enclave lives.
        table.measurers[place.slot] = 0
        self.timeline.measured = time.monotonic_ns()

    def _note_copied(self) -> None:
        """Where holders of claims copy: the moment at which all is VALID."""
        launch = self.launch
        if self.timeline.copied is None:
            copied = self.host.memory.launches.copied[self.place.slot, : launch.claims].tolist()
            if all(done >= rows for done, rows in zip(copied, filled_rows(launch), strict=True)):
                self.timeline.copied = time.monotonic_ns()
                self.on_copied()

    def _check_measuring(self, outcome: Outcome) -> None:
        self._check_cancelled()
        table, place = self.host.memory.launches, self.place
        if outcome is Outcome.FAULT or int(table.fault[place.slot]) == place.generation:
            if int(table.fault_reason[place.slot]) == FAULT_SOURCE:
                raise ImageFormatError(
                    "the image's file or one of its layers",
                    expected=f"{self.page_count} pages to copy",
                    found="less, or it cannot be read: it was changed after it was loaded",
                )
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

    def _on_span(
        self, kind: int, slot: int, generation: int, pages: int, start: int, end: int, finished: bool
    ) -> None:
        if pages:
            self.timeline.add("copy" if kind == COPIED else "measure", "host", start, end, pages)

    # -------------------------------------------------------------------------------------------- verdict

    def merge(self) -> bytes:
        """The domains' digests, read back from the SMC in HASH_DOM order, merged to MRENCLAVE."""
        begin = time.monotonic_ns()
        launch, smc = self.launch, self._smc()
        digests = []
        for domain, digest in enumerate(smc.final_digests(launch.domains, self.place.generation)):
            if digest is None:
                raise EnturboError(
                    f"hash domain {domain} has no final digest in the Shadow Measurement Cache"
                )
            digests.append(digest)
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
        """Give this thread's claims and views back.

        Nobody copies from the image's files any more: all pages are VALID, or the claim range was taken.
        """
        self._measurer.forget()
        self._claims.close()
        self.forget()

    def forget(self) -> None:
        """Close the descriptors of the image's files; all that is to be done in a forked child of the host,
        too."""
        self._sources.clear()


def group_of(launch: Launch) -> int:
    """Pairs a claim must cover to be worth it: as many as come to :data:`GROUP_PAGES`, or all."""
    each, group = max(1, launch.page_count // launch.pairs), 1
    while group < launch.pairs and 2 * group * each <= GROUP_PAGES:
        group *= 2
    return group


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
    """Decoupled and parallel: the enclave already runs while all copy and measure."""

    early = True

    def run(self, start: Start) -> None:
        """See :class:`Strategy`."""
        if start.page_count <= ALONE_PAGES:
            start.open(measurers=0)
            start.copy_all()
        elif start.is_readable and start.launch.domains > 1:
            start.open(start.host.workers, COPY_FUSED if start.prefer == "verified" else COPY_FIRST)
            start.host.ring()
        else:
            self._host_copies(start)
        start.await_measured()

    @staticmethod
    def _host_copies(start: Start) -> None:
        """One core is the copier's; workers beyond the others only delay it, and so delay the enclave."""
        host = start.host
        while_copying = min(host.workers, max(0, host.cores - 1))
        start.open(while_copying)
        if while_copying:
            host.ring()
        start.copy_all()
        if host.workers > while_copying:
            start.allow(host.workers)


STARTUPS: Final[dict[str, Strategy]] = {"serial": SerialStartup(), "enturbo": EnturboStartup()}
