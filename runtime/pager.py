"""The pager: lets accesses of gated enclaves through, as the EPCM says that they may.

    enclave                     kernel                        pager (a thread of the host)
    touches a page         ──►  not mapped: sleeps, fault ──► VALID? map it and its neighbours, protected
                                                              where WRLOCK stands; else look again soon,
                                                              and have that page copied next
    stores to a page       ──►  protected: sleeps, fault  ──► released? take the protection off; else a
                                                              measurer will (enturbo.workers.wrlock), or
                                                              a later look

Pages are mapped when they are touched, and ahead of accesses that go on in order: to map all of them as the
copy advances costs a start more than it gives (a function touches a part of its image), while an access waits
for one look in either case. When the launch is VERIFIED the gate is lifted from all of it at once.

Who may rely on what:

- A page is mapped only after its VALID was read from the EPCM, which the copier stored after the bytes.
- A page with WRLOCK is mapped write-protected. Its release may come between that and the look at
  ``released`` before it, so ``released`` is read once more *after* mapping; a measurer stores it *before* it
  takes the protection off. Whichever comes second sees the other, so no store sleeps for ever.
- A measurer that dies between the two leaves that to us: everybody who sleeps is looked at again, every half
  millisecond, until the EPCM lets it through.
- The userfaultfd is held by the host and by the zygote from before the first instruction of the handler (the
  call is sent after both have it) until the enclave's processes are gone. When the last holder closes it the
  kernel lets everything through, so: host dead -> the zygote holds it, kills the enclave, reaps it, and only
  then exits; zygote dead -> the host holds it, and the kernel kills the enclave (PR_SET_PDEATHSIG). Workers
  hold it too while they measure.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..shm.epcm import Epcm
from ..shm.layout import PAGE_SIZE
from ..shm.uffd import Userfaultfd
from ..workers.wrlock import MAX_RANGES, Range, WriteLocks
from .spec import SECINFO_W, EnclaveSpec, Run
from .trace import Timeline

log = logging.getLogger("enturbo.pager")

WHOLE: Final = 256  # pages; a run of at most so many is mapped whole (25 µs)
CHUNK: Final = 64  # pages mapped for an access out of order, aligned
AHEAD: Final = 2048  # at most so many for accesses that go on in order; 170 µs
NAP: Final = 0.0005  # seconds between looks while somebody sleeps

Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class _Wait:
    """Somebody sleeps on the page ``at`` of ``run``; ``protected``: it is mapped, and a store was tried."""

    run: int
    at: int
    protected: bool
    since: int


class Gated:
    """The gated pages of one enclave, as the host holds them. Thread-safe. Takes ``uffd``.

    ``address``: where the enclave has page ``spec.first_linear``. ``want`` is told pages of the image that
    somebody waits for and that are not VALID, again and again until they are.
    """

    def __init__(
        self,
        epcm: Epcm,
        spec: EnclaveSpec,
        uffd: Userfaultfd,
        address: int,
        timeline: Timeline,
        want: Callable[[int], object],
    ) -> None:
        self._spec, self.uffd, self._timeline, self._want = spec, uffd, timeline, want
        self._lock = threading.Lock()
        self._runs = sorted(run for run in spec.runs if run.gated)
        self._starts = [run.linear for run in self._runs]
        self._addresses = [address + (run.linear - spec.first_linear) * PAGE_SIZE for run in self._runs]
        self._base = address - spec.first_linear * PAGE_SIZE
        self._tables = [_Table(epcm, spec, run) for run in self._runs]
        self._mapped = [np.zeros(run.count, np.bool_) for run in self._runs]
        self._next = [(0, 0)] * len(self._runs)  # what was mapped last: an access in order is at either end,
        self._window = [CHUNK] * len(self._runs)  # and how many pages were
        self._waits: list[_Wait] = []
        self._over = False  # lifted, poisoned or closed

    def write_locks(self) -> WriteLocks | None:
        """What a measurer needs to open released pages; None where there are none, or too many ranges.

        It has a descriptor of its own, to be closed by whoever takes it.
        """
        ranges: list[Range] = []
        for run, address in zip(self._runs, self._addresses, strict=True):
            if _is_protected(self._spec, run):
                first = self._spec.first_page + run.index
                last = ranges[-1] if ranges else None
                goes_on = last is not None and (first, address) == (
                    last.first + last.pages,
                    last.address + last.pages * PAGE_SIZE,
                )
                if last is not None and goes_on:
                    ranges[-1] = last._replace(pages=last.pages + run.count)
                else:
                    ranges.append(Range(first, run.count, address))
        if not ranges or len(ranges) > MAX_RANGES:
            return None
        with self._lock:
            if self._over:
                return None
            return WriteLocks(self._spec.generation, Userfaultfd(os.dup(self.uffd.fd)), ranges)

    def prime(self) -> None:
        """Map what is VALID of the short runs, code for instance, before anybody asks for it."""
        with self._lock:
            for number, run in enumerate(self._runs):
                if run.count <= WHOLE and not self._over:
                    self._map(number, 0, run.count)

    def serve(self) -> bool:
        """Take the faults that are there and look at everybody who sleeps. True: somebody still does."""
        with self._lock:
            if self._over:
                return False
            now = time.monotonic_ns()
            for fault in self.uffd.faults():
                page = (fault.address - self._base) // PAGE_SIZE
                number = bisect_right(self._starts, page) - 1
                if number < 0 or page >= self._starts[number] + self._runs[number].count:
                    log.error("launch %d: a fault outside of its pages", self._spec.generation)
                    continue
                self._waits.append(_Wait(number, page - self._starts[number], fault.protected, now))
            waits, self._waits = self._waits, []
            for wait in waits:
                if self._let_through(wait):
                    self._timeline.add_wait(wait.since, time.monotonic_ns())
                else:
                    self._waits.append(wait)
            return bool(self._waits)

    def lift(self) -> None:
        """VERIFIED: nothing is gated any more. Whoever sleeps goes on."""
        with self._lock:
            if not self._over:
                self._over = True
                for run, address in zip(self._runs, self._addresses, strict=True):
                    self.uffd.unregister(address, run.count * PAGE_SIZE)
                self._note_waits()

    def poison(self) -> None:
        """REJECTED: what is not mapped yet will never be; who sleeps on it gets SIGBUS."""
        with self._lock:
            if not self._over:
                self._over = True
                for run, address, mapped in zip(self._runs, self._addresses, self._mapped, strict=True):
                    del run
                    for begin, end in _stretches(~mapped):
                        self.uffd.poison(address + begin * PAGE_SIZE, (end - begin) * PAGE_SIZE)
                self._note_waits()

    def end(self) -> None:
        """Serve nobody any more. Who sleeps goes on sleeping, as long as the descriptor is open."""
        with self._lock:
            self._over = True

    def close(self) -> None:
        """The enclave's processes are gone, or the gate was lifted: let go of the descriptor."""
        with self._lock:
            self._over = True
            self.uffd.close()

    def _note_waits(self) -> None:
        now = time.monotonic_ns()
        for wait in self._waits:
            self._timeline.add_wait(wait.since, now)
        self._waits.clear()

    # ------------------------------------------------------------------------------------ the lock is held

    def _let_through(self, wait: _Wait) -> bool:
        table, at = self._tables[wait.run], wait.at
        if wait.protected:
            if not table.released(at, at + 1).all():
                return False
            begin = at - at % CHUNK
            self._open(wait.run, begin, min(begin + AHEAD, self._runs[wait.run].count))
            return True
        if not table.ready(at, at + 1).all():
            self._want(self._runs[wait.run].index + at)
            return False
        self._mapped[wait.run][at] = False  # it was reclaimed, if we had mapped it
        self._map(wait.run, *self._around(wait.run, at))
        return True

    def _around(self, number: int, at: int) -> tuple[int, int]:
        """The pages to map when ``at`` is touched."""
        count = self._runs[number].count
        if count <= WHOLE:
            return 0, count
        begin, window = at - at % CHUNK, self._window[number]
        end = begin + CHUNK
        forward, backward = begin == self._next[number][1], end == self._next[number][0]
        self._window[number] = window = min(2 * window, AHEAD) if forward or backward else CHUNK
        if backward:  # large copies of the C library go from the end to the beginning
            begin = max(0, end - window)
        else:
            end = begin + window
        end = min(end, count)
        self._next[number] = begin, end
        return begin, end

    def _map(self, number: int, begin: int, end: int) -> None:
        """Map what is ready of these pages and not mapped."""
        table, mapped, address = self._tables[number], self._mapped[number], self._addresses[number]
        run = self._runs[number]
        # A page without W stays protected as long as it is gated, whatever the mapping allows.
        protect = not run.flags & SECINFO_W or _is_protected(self._spec, run)
        wanted = table.ready(begin, end) & ~mapped[begin:end]
        for first, last in _stretches(wanted):
            self.uffd.map(address + (begin + first) * PAGE_SIZE, (last - first) * PAGE_SIZE, protect=protect)
        mapped[begin:end] |= wanted
        if _is_protected(self._spec, run):
            self._open(number, begin, end)

    def _open(self, number: int, begin: int, end: int) -> None:
        """Take the protection off what is released of these pages."""
        address = self._addresses[number]
        for first, last in _stretches(self._tables[number].released(begin, end)):
            self.uffd.allow_stores(address + (begin + first) * PAGE_SIZE, (last - first) * PAGE_SIZE)


class _Table:
    """The EPCM entries of one run. Page numbers count from the run's first."""

    def __init__(self, epcm: Epcm, spec: EnclaveSpec, run: Run) -> None:
        self._epcm, self._first, self._generation = epcm, spec.first_page + run.index, spec.generation
        self._execute = spec.gate == "execute" and run.chunks != 0

    def ready(self, begin: int, end: int) -> Mask:
        """Which pages may be read: those that are VALID, under the gate "execute" those that are released."""
        if self._execute:
            return self.released(begin, end)
        return self._epcm.valid_mask(self._first + begin, end - begin, self._generation)

    def released(self, begin: int, end: int) -> Mask:
        """Which pages the measurer is done with."""
        return self._epcm.released_mask(self._first + begin, end - begin, self._generation)


def _is_protected(spec: EnclaveSpec, run: Run) -> bool:
    """Whether stores to the run sleep until its release."""
    return run.locked and spec.wrlock == "wait" and spec.gate == "write"


def _stretches(mask: Mask) -> Iterator[tuple[int, int]]:
    """(begin, end) of each stretch of true values."""
    if mask.all():
        if len(mask):
            yield 0, len(mask)
        return
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


class Pager:
    """The thread that serves all gated enclaves of a runtime. It is started with the first one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gated: dict[int, Gated] = {}  # by descriptor
        self._asleep: set[Gated] = set()
        self._epoll = select.epoll(2, select.EPOLL_CLOEXEC)
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._wake_r, select.EPOLLIN)
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, gated: Gated) -> None:
        """Serve ``gated`` from now on."""
        with self._lock:
            if self._closing:
                return
            fd = gated.uffd.fd
            self._gated[fd] = gated
            self._epoll.register(fd, select.EPOLLIN)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="enturbo-pager", daemon=True)
                self._thread.start()

    def remove(self, gated: Gated) -> None:
        """Serve it no more; its descriptor is still open. May be called again."""
        with self._lock:
            fd = gated.uffd.fd
            if self._gated.get(fd) is gated:
                del self._gated[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except OSError as error:
            if error.errno != errno.EBADF:  # closed in a forked child
                log.exception("the pager ended: enclaves that wait for pages now wait for their verdict")

    def _turn(self) -> None:
        if self._asleep:
            # Shorter than poll's millisecond. Faults are seen at the next turn.
            time.sleep(NAP)
            ready = self._epoll.poll(0)
        else:
            ready = self._epoll.poll(None)
        with self._lock:
            served = {self._gated[fd] for fd, _ in ready if fd in self._gated}
            served |= self._asleep & set(self._gated.values())
        if any(fd == self._wake_r for fd, _ in ready):
            os.read(self._wake_r, 4096)
        self._asleep = {gated for gated in served if gated.serve()}

    def close(self) -> None:
        """End the thread. Twice is fine."""
        if self._closing:
            return
        self._closing = True
        os.write(self._wake_w, b"\0")
        if self._thread is not None:
            self._thread.join()
        self._close_all()

    def forget(self) -> None:
        """In a forked child of the host: close the copies of all descriptors."""
        self._closing = True
        for gated in self._gated.values():
            gated.uffd.close()
        self._close_all()

    def _close_all(self) -> None:
        self._epoll.close()
        for fd in (self._wake_r, self._wake_w):
            os.close(fd)
