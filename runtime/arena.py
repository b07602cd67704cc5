"""The EPC arena as the host administers it: places for launches, from allocation to scrubbing.

A *place* is a launch slot, a generation and an extent of EPC pages. It is taken before a launch exists and
given back when nobody can touch it any more: its processes gone, its slot closed, its claim range held, its
pages zero. A place that cannot be brought to that point is never reused.

    taken ─► launch ─► closed, range held, entries cleared ─┬─► scrubbed by the host ────────────► free
                                                            └─► dirty: a scrubbing in its slot,
                                                                claimed by workers in their idle time ─► free

A scrubbing is a launch with a generation of its own and no enclave: same slot, same claims, closed by the
same rule. Nobody waits for it unless pages run out; then whoever needs them helps.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from ..shm.epc import Extents
from ..shm.errors import EnturboError, EPCExhausted, LaunchTimeout, SharedMemoryFull
from ..shm.launches import Claims, Launch
from ..shm.layout import PAGE_SIZE, SCHEME_ENTURBO, SCRUB
from ..shm.memory import Memory
from ..workers.copying import zero
from ..workers.measure import Measurer
from ..workers.sha256 import Hasher
from ..workers.view import Outcome, filled_rows

log = logging.getLogger("enturbo.arena")

RANGE_SECONDS: Final = 0.5  # for measurers to leave a closed launch before their workers are killed
RANGE_GIVE_UP: Final = 5.0
ALLOCATE_SECONDS: Final = 60.0
DIRECT_PAGES: Final = 256  # up to 1 MiB are zeroed at once: 50 µs, less than waking a worker
SCRUB_DOMAINS: Final = 32  # how a scrubbing's pages are shared out: 16 claims,
SCRUB_BLOCK: Final = 16  # 128 KiB each in turn
ALL_WORKERS: Final = 0xFFFF_FFFF
HELP_NAP: Final = 0.001
POPULATE_STEP: Final = 64 << 20
GENERATION_LIMIT: Final = 0xFFFF_FFFF


class LaunchTableFull(EnturboError):
    """Every launch slot of the runtime is in use."""


class Place(NamedTuple):
    """Where a launch lives: its slot and generation, and its extent in EPC pages."""

    slot: int
    generation: int
    first_page: int
    page_count: int


class Arena:
    """The shared memory of a runtime and who has which part of it. Thread-safe.

    ``ring`` wakes all workers; ``kill_holders`` kills those that hold a claim of a slot; ``has_workers``
    tells whether there are any to scrub. The EPC's pages are allocated by a thread in the background.
    """

    def __init__(
        self,
        epc_pages: int,
        slots: int,
        hasher: Hasher,
        *,
        ring: Callable[[], None],
        kill_holders: Callable[[int], object],
        has_workers: Callable[[], bool],
    ) -> None:
        self._ring, self._kill_holders, self._has_workers = ring, kill_holders, has_workers
        self._hasher = hasher
        self.memory = Memory.create(epc_pages, slots)
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._extents = Extents(epc_pages)
        self._free_slots = list(range(slots - 1, -1, -1))
        self.generation = 0  # of the newest launch or scrubbing
        self.launches = 0
        self._dirty: dict[int, Place] = {}  # scrubbings by generation, oldest first
        self._freeing: dict[int, Place] = {}  # those that somebody has found complete and is about to free
        self.quarantined = 0  # pages that will never be free again
        self.epc_read_only = self.memory.epc_segment.read_only()
        self.epcm_read_only = self.memory.epcm_segment.read_only()
        self._allocated = threading.Condition()
        self._allocation_error: SharedMemoryFull | None = None
        self.mapped = False
        self._stop = threading.Event()
        self._allocator = threading.Thread(target=self._allocate, name="enturbo-arena", daemon=True)

    def start(self) -> None:
        """Begin to allocate the EPC's pages; ``ring`` may be called from now on."""
        self._allocator.start()

    @property
    def free_pages(self) -> int:
        """EPC pages that no launch has; those that are still to be scrubbed among them."""
        self.collect()
        with self._lock:
            return self._extents.free_pages() + self._unscrubbed()

    @property
    def dirty_pages(self) -> int:
        """Pages of ended launches that are still to be scrubbed."""
        with self._lock:
            return self._unscrubbed()

    def _unscrubbed(self) -> int:
        return sum(place.page_count for place in (*self._dirty.values(), *self._freeing.values()))

    def take(self, pages: int) -> Place:
        """A place of ``pages`` EPC pages with a new generation. Raises EPCExhausted, LaunchTableFull.

        Waits for scrubbing, and helps, only where nothing else is left.
        """
        while True:
            try:
                return self._take(pages)
            except (EPCExhausted, LaunchTableFull):
                if not self._scrub_oldest():
                    raise

    def _take(self, pages: int) -> Place:
        with self._lock:
            if not self._free_slots:
                raise LaunchTableFull("every launch slot is in use; close an enclave first")
            generation = self._new_generation()
            first = self._extents.allocate(pages)
            self.launches += 1
            return Place(self._free_slots.pop(), generation, first, pages)

    def _new_generation(self) -> int:
        if self.generation + 1 >= GENERATION_LIMIT:
            raise EnturboError("this runtime has used up its launch numbers; start another")
        self.generation += 1
        return self.generation

    def give_back(self, place: Place) -> None:
        """The place is nobody's, its pages are zero."""
        with self._lock:
            self._free(place)

    def _free(self, place: Place) -> None:
        self._extents.free(place.first_page, place.page_count)
        self._free_slots.append(place.slot)

    def wait_allocated(self, place: Place) -> None:
        """Wait until the background allocation has covered ``place``. Raises SharedMemoryFull."""
        end = (place.first_page + place.page_count) * PAGE_SIZE
        segment = self.memory.epc_segment
        with self._allocated:
            ready = self._allocated.wait_for(
                lambda: segment.allocated >= end or self._allocation_error is not None, ALLOCATE_SECONDS
            )
            if self._allocation_error is not None and segment.allocated < end:
                raise self._allocation_error
            if not ready:
                raise LaunchTimeout(f"the EPC was not allocated within {ALLOCATE_SECONDS} s")

    def take_range(self, claims: Claims, slot: int) -> None:
        """Take all claims of a closed slot. When it is held, no measurer is between a check and a store.

        Waits for measurers to leave, then kills the workers that do not. Raises LaunchTimeout.
        """
        begin = time.monotonic()
        pause, kill_at = 20e-6, begin + RANGE_SECONDS
        while not claims.take_range(slot):
            now = time.monotonic()
            if now > begin + RANGE_GIVE_UP:
                raise LaunchTimeout(
                    f"the claims of launch slot {slot} were not given back in {RANGE_GIVE_UP} s"
                )
            if now > kill_at:
                self._kill_holders(slot)
                kill_at = now + RANGE_SECONDS
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)

    def reclaim(self, place: Place, gone: bool, *, shared: bool = True) -> None:
        """Close a launch and get its place back: generation 0, ring, range, scrub, free.

        When its processes are not ``gone``, or a measurer cannot be excluded, the pages stay quarantined:
        somebody might still write into them. ``shared``: workers may know of the launch.
        """
        memory = self.memory
        memory.launches.close_launch(place.slot)
        if shared:
            self._ring()
        try:
            with Claims(memory.control_segment.fd) as claims:
                self.take_range(claims, place.slot)
                if gone:
                    memory.epcm.clear(place.first_page, place.page_count)
                    if place.page_count > DIRECT_PAGES and self._has_workers():
                        self._scrub_later(claims, place)
                        return
                    zero(memory.epc.pages(place.first_page, place.page_count))
        except LaunchTimeout:
            gone = False
        with self._lock:
            if gone:
                self._free(place)
            else:
                self._quarantine(place)

    def _quarantine(self, place: Place) -> None:
        log.error("launch %d did not end: its %d pages stay quarantined", place.generation, place.page_count)
        self.quarantined += place.page_count

    # ---------------------------------------------------------------------------------------- scrubbing

    def _scrub_later(self, claims: Claims, place: Place) -> None:
        """Open a scrubbing of ``place`` in its slot, whose range is held, and wake who may claim it."""
        with self._lock:
            scrubbing = place._replace(generation=self._new_generation())
            self._dirty[scrubbing.generation] = scrubbing
        table = self.memory.launches
        table.open_launch(place.slot, self._scrubbing(scrubbing), claims)
        table.measurers[place.slot] = ALL_WORKERS
        claims.give_range(place.slot)
        self._ring()

    def collect(self) -> None:
        """Free the places that have been scrubbed. Any thread; whoever takes one out frees it."""
        with self._lock:
            done = [place for place in self._dirty.values() if self._is_scrubbed(place)]
            for place in done:
                self._freeing[place.generation] = self._dirty.pop(place.generation)
        for place in done:
            self.memory.launches.close_launch(place.slot)
            gone = True
            try:
                with Claims(self.memory.control_segment.fd) as claims:
                    # A worker may be about to zero rows that another has zeroed already: not after this.
                    self.take_range(claims, place.slot)
            except LaunchTimeout:
                gone = False
            with self._freed:
                del self._freeing[place.generation]
                if gone:
                    self._free(place)
                else:
                    self._quarantine(place)
                self._freed.notify_all()

    def wait_scrubbed(self, timeout: float) -> bool:
        """Wait until nothing is dirty; False past ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self.collect()
        with self._freed:
            while self._dirty or self._freeing:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._freed.wait(left)
        return True

    def _is_scrubbed(self, place: Place) -> bool:
        launch = self._scrubbing(place)
        return bool((self.memory.launches.copied[place.slot, : launch.claims] >= filled_rows(launch)).all())

    @staticmethod
    def _scrubbing(place: Place) -> Launch:
        size = place.page_count * PAGE_SIZE
        return Launch(
            *(place.generation, SCHEME_ENTURBO, SCRUB_DOMAINS, SCRUB_BLOCK),
            *(place.first_page, place.page_count, size, 1, SCRUB),
        )

    def _scrub_oldest(self) -> bool:
        """Scrub what was closed first to its end, with whoever is at it; False when nothing is dirty.

        Raises LaunchTimeout if a worker keeps its claim although it was killed.
        """
        with self._freed:
            place = next(iter(self._dirty.values()), None)
            if place is None:
                return bool(self._freeing) and self._freed.wait(2 * RANGE_GIVE_UP)
        began = time.monotonic()
        kill_at = began + RANGE_SECONDS
        with Claims(self.memory.control_segment.fd) as claims:
            measurer = Measurer(self.memory, claims, self._hasher)
            while (outcome := measurer.step(place.slot, place.generation)) in (Outcome.WORKED, Outcome.BUSY):
                if outcome is Outcome.WORKED:
                    continue
                now = time.monotonic()
                if now > began + RANGE_GIVE_UP:
                    raise LaunchTimeout(f"pages of launch slot {place.slot} were not scrubbed in time")
                if now > kill_at:
                    self._kill_holders(place.slot)
                    kill_at = now + RANGE_SECONDS
                time.sleep(HELP_NAP)
            measurer.forget()
        self.collect()
        return True

    # --------------------------------------------------------------------------------------- allocating

    def _allocate(self) -> None:
        more = True
        while more and not self._stop.is_set():
            try:
                more = self.memory.allocate_step()
            except SharedMemoryFull as error:
                log.error("%s", error)  # the launch that needs the pages raises it
                self._allocation_error, more = error, False
            with self._allocated:
                self._allocated.notify_all()
        self._ring()  # workers map what is there
        while not self._stop.is_set() and self.memory.epc.map_more(self.memory.epc_allocated, POPULATE_STEP):
            pass
        with self._allocated:
            self.mapped = True
            self._allocated.notify_all()

    def wait_mapped(self, timeout: float) -> bool:
        """Wait until the EPC is allocated and in this process's page tables; False past ``timeout`` s.

        Raises SharedMemoryFull.
        """
        with self._allocated:
            done = self._allocated.wait_for(lambda: self.mapped, timeout)
        if self._allocation_error is not None:
            raise self._allocation_error
        return done

    def close(self) -> None:
        """Give all shared memory back."""
        self._stop.set()
        if self._allocator.ident is not None:
            self._allocator.join()
        self.forget()

    def forget(self) -> None:
        """Close every descriptor; in a forked child of the host, where the allocating thread is not."""
        os.close(self.epc_read_only)
        os.close(self.epcm_read_only)
        self.memory.close()
