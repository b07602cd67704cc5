"""The EPC arena as the host administers it: places for launches, from allocation to scrubbing.

A *place* is a launch slot, a generation and an extent of EPC pages. It is taken before a launch exists and
given back when nobody can touch it any more: its processes gone, its slot closed, its claim range held, its
pages zero. A place that cannot be brought to that point is never reused.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from ..shm.epc import Extents
from ..shm.errors import EnturboError, LaunchTimeout, SharedMemoryFull
from ..shm.launches import Claims
from ..shm.layout import PAGE_SIZE
from ..shm.memory import Memory
from ..workers.copying import zero

log = logging.getLogger("enturbo.arena")

RANGE_SECONDS: Final = 0.5  # for measurers to leave a closed launch before their workers are killed
RANGE_GIVE_UP: Final = 5.0
ALLOCATE_SECONDS: Final = 60.0
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

    ``ring`` wakes all workers; ``kill_holders`` kills those that hold a claim of a slot. The EPC's pages are
    allocated by a thread in the background.
    """

    def __init__(
        self, epc_pages: int, slots: int, *, ring: Callable[[], None], kill_holders: Callable[[int], object]
    ) -> None:
        self._ring, self._kill_holders = ring, kill_holders
        self.memory = Memory.create(epc_pages, slots)
        self._lock = threading.Lock()
        self._extents = Extents(epc_pages)
        self._free_slots = list(range(slots - 1, -1, -1))
        self.generation = 0  # of the newest launch
        self.quarantined = 0  # pages that will never be free again
        self.epc_read_only = self.memory.epc_segment.read_only()
        self.epcm_read_only = self.memory.epcm_segment.read_only()
        self._allocated = threading.Condition()
        self._allocation_error: SharedMemoryFull | None = None
        self._stop = threading.Event()
        self._allocator = threading.Thread(target=self._allocate, name="enturbo-arena", daemon=True)
        self._allocator.start()

    @property
    def free_pages(self) -> int:
        """EPC pages that no launch has."""
        return self._extents.free_pages()

    def take(self, pages: int) -> Place:
        """A place of ``pages`` EPC pages with a new generation. Raises EPCExhausted, LaunchTableFull."""
        with self._lock:
            if self.generation + 1 >= GENERATION_LIMIT:
                raise EnturboError("this runtime has used up its launch numbers; start another")
            if not self._free_slots:
                raise LaunchTableFull("every launch slot is in use; close an enclave first")
            first = self._extents.allocate(pages)
            self.generation += 1
            return Place(self._free_slots.pop(), self.generation, first, pages)

    def give_back(self, place: Place) -> None:
        """The place is nobody's, its pages are zero."""
        self._extents.free(place.first_page, place.page_count)
        with self._lock:
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

    def reclaim(self, place: Place, gone: bool) -> None:
        """Close a launch and get its place back: generation 0, ring, range, scrub, free.

        When its processes are not ``gone``, or a measurer cannot be excluded, the pages stay quarantined:
        somebody might still write into them.
        """
        memory = self.memory
        memory.launches.close_launch(place.slot)
        self._ring()
        try:
            with Claims(memory.control_segment.fd) as claims:
                self.take_range(claims, place.slot)
                if gone:
                    scrub(memory, place)
        except LaunchTimeout:
            gone = False
        if gone:
            self.give_back(place)
        else:
            log.error(
                "launch %d did not end: its %d pages stay quarantined", place.generation, place.page_count
            )
            with self._lock:
                self.quarantined += place.page_count

    def _allocate(self) -> None:
        segment = self.memory.epc_segment
        more = True
        while more and not self._stop.is_set():
            try:
                more = segment.allocate_step()
            except SharedMemoryFull as error:
                log.error("%s", error)  # the launch that needs the pages raises it
                self._allocation_error, more = error, False
            with self._allocated:
                self._allocated.notify_all()

    def close(self) -> None:
        """Give all shared memory back."""
        self._stop.set()
        self._allocator.join()
        self.forget()

    def forget(self) -> None:
        """Close every descriptor; in a forked child of the host, where the allocating thread is not."""
        os.close(self.epc_read_only)
        os.close(self.epcm_read_only)
        self.memory.close()


def scrub(memory: Memory, place: Place) -> None:
    """Zero the pages and their EPCM entries. The claim range is held and the enclave is gone."""
    zero(memory.epc.pages(place.first_page, place.page_count))
    memory.epcm.clear(place.first_page, place.page_count)
