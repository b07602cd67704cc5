"""The worker process: sleep on the doorbell, look at the launch table, measure what is open.

A worker is persistent and serves all launches of a runtime, oldest first. What it does when none has work for
it, in this order: scrub pages of launches that have ended, map the rest of the EPC, sleep. It ends when its
socket closes (the pool's end is its lifeline) or when the host's pidfd becomes readable: a forked child of
the host may keep the socket open, but not the host alive. The kernel kills it with the host besides, for the
case that it cannot look.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from typing import Final

from ..shm import libc
from ..shm.launches import Claims
from ..shm.layout import SCRUB
from ..shm.memory import Memory, MemoryFds
from . import faults
from .measure import Measurer, Partners
from .protocol import COPIED, DONE, READY, SCRUBBED, WARM, News
from .sha256 import get_hasher
from .view import Outcome
from .wrlock import MAX_MESSAGE, WriteLocks, take

SPIN_NS: Final = 60_000  # look again at once for this long before sleeping
NAP_MS: Final = 1  # while the copy is under way
BUSY_MS: Final = 50  # while others hold all that is left; the host rings when one of them dies
CHECK_EVERY: Final = 16  # stripes between looks at lifeline and doorbell
IDLE_MS: Final = 5_000  # then files that no launch uses any more are closed, once
MERGE_NS: Final = 5_000_000  # stripes that are nearer than this are one span
POPULATE_STEP: Final = 8 << 20  # bytes of the EPC mapped between looks; 2 ms at 4 KiB a page


class Worker:
    """One worker's state: its memory, its measurer, its end of the doorbell."""

    def __init__(
        self,
        bell: socket.socket,
        host: int,
        host_pidfd: int,
        memory: Memory,
        hasher: str,
        index: int,
        incarnation: int,
    ):
        self.bell, self.memory, self.index = bell, memory, index
        bell.setblocking(False)
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)
        self._poll.register(host_pidfd, select.POLLIN)
        self._pidfd = host_pidfd
        self._locks: dict[int, WriteLocks] = {}
        self.measurer = Measurer(
            memory,
            Claims(memory.control_segment.fd),
            get_hasher(hasher),
            worker=index,
            incarnation=incarnation,
            host=host,
            on_span=self._report,
            fault=faults.from_environment(),
            locks=self._locks,
        )
        self._spans: dict[tuple[int, int], News] = {}  # not sent yet, by kind and generation
        self._told = 0  # the launch that was last told to be finished
        self._trimmed = True

    def run(self) -> None:
        """Until the host is gone."""
        self._send(News(READY, 0, 0, 0, 0, 0, 0))
        last_work = time.monotonic_ns()
        while True:
            outcome = self._round()
            if outcome is Outcome.WORKED:
                last_work = time.monotonic_ns()
                timeout: int | None = 0
                self._trimmed = False
            elif outcome is Outcome.WAITING:
                timeout = 0 if time.monotonic_ns() - last_work < SPIN_NS else NAP_MS
            elif self._map_more():
                timeout = 0
            elif outcome is Outcome.BUSY:
                timeout = BUSY_MS
            else:
                timeout = None if self._trimmed else IDLE_MS
            if outcome is not Outcome.WORKED:
                self._flush()
            if not self._wait(timeout):
                return

    def _round(self) -> Outcome:
        """One look at all open launches; FINISHED when nothing is left to do anywhere."""
        table = self.memory.launches
        launches = table.open_slots(self.index)
        scrubs = [each for each in launches if int(table.copy_mode[each[1]]) == SCRUB]
        state = Outcome.FINISHED
        if len(scrubs) < len(launches):
            state = self._serve([each for each in launches if each not in scrubs])
        # Scrubbing is for when nothing waits for its start; who needs the pages sooner scrubs them itself.
        if state in (Outcome.FINISHED, Outcome.BUSY):
            for generation, slot in scrubs:
                outcome = self.measurer.step(slot, generation)
                if outcome is Outcome.WORKED:
                    return outcome
                if outcome is Outcome.FINISHED:
                    self._send(News(SCRUBBED, slot, generation, 0, 0, 0, 1))
        return state

    def _serve(self, launches: Partners) -> Outcome:
        """Work on the oldest launch that has work; what that came to, or the most hopeful of all."""
        state = Outcome.FINISHED
        for position, (generation, slot) in enumerate(launches):
            partners = self._partners(launches, position)
            for _ in range(CHECK_EVERY):
                outcome = self.measurer.step(slot, generation, partners)
                # 2 µs a stripe, so that write locks that come during a launch are of use to it.
                if outcome is not Outcome.WORKED or self._poll.poll(0):
                    break
            if outcome is Outcome.WORKED:
                return outcome
            if outcome is Outcome.FINISHED and generation != self._told:
                # Its start waits for that: tell it now, not when all launches are done.
                self._told = generation
                self._flush()
                self._send(News(DONE, slot, generation, 0, 0, 0, 1))
            if outcome is Outcome.WAITING or (outcome is Outcome.BUSY and state is Outcome.FINISHED):
                state = outcome
        return state

    def _partners(self, launches: Partners, position: int) -> Partners:
        """Younger launches of one chain each, where there are more of these than workers: a chain alone on a
        core is faster than two in lanes, but two in lanes are faster than two in turn."""
        table = self.memory.launches
        slot = launches[position][1]
        if int(table.domains[slot]) > 1 or len(launches) - position < 2:
            return ()
        chains = [each for each in launches if int(table.domains[each[1]]) == 1]
        if len(chains) <= int(table.measurers[slot]):
            return ()
        return [each for each in launches[position + 1 :] if each in chains]

    def _map_more(self) -> bool:
        """Have a further piece of the EPC in the page tables, so that no launch waits for that."""
        epc = self.memory.epc
        if not epc.map_more(self.memory.epc_allocated, POPULATE_STEP):
            return False
        if epc.mapped == epc.segment.size:
            self._send(News(WARM, 0, 0, 0, 0, 0, 0))
        return True

    def _wait(self, timeout: int | None) -> bool:
        """Wait for a ring, at most ``timeout`` ms; False when the host is gone."""
        ready = self._poll.poll(timeout)
        if not ready and timeout == IDLE_MS:
            self.measurer.forget()
            self._trimmed = True
        for fd, _ in ready:
            if fd == self._pidfd:
                return False
            if not self._listen():
                return False
        return True

    def _listen(self) -> bool:
        """Take one message; False when the host is gone."""
        try:
            message, fds, _, _ = socket.recv_fds(self.bell, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        take(self._locks, message, fds)
        return bool(message)

    def _report(
        self, kind: int, slot: int, generation: int, pages: int, start: int, end: int, finished: bool
    ) -> None:
        """Merge stripes of a launch that follow one another into one span a kind.

        It is told when it ends: with the launch, or where this worker turns to another one. Each message
        wakes the host, which costs a measurer on the same core a twentieth of a stripe.
        """
        key = kind, generation
        span = self._spans.get(key)
        if span is not None and start - span.end > MERGE_NS:
            self._send(self._spans.pop(key))
            span = None
        if span is not None:
            pages, start = span.pages + pages, span.start
            finished = finished or bool(span.finished)
        self._spans[key] = News(kind, slot, generation, pages, start, end, int(finished))
        if kind == COPIED and finished:
            self._send(self._spans.pop(key))  # the host notes the moment at which all was VALID

    def _flush(self) -> None:
        spans, self._spans = self._spans, {}
        for span in spans.values():
            self._send(span)

    def _send(self, news: News) -> None:
        # A full or closed socket loses news, never work; a closed one ends us at the next wait.
        with contextlib.suppress(OSError):
            self.bell.send(news.encode())


def main(*arguments: str) -> None:
    """Entry point of the process: numbers as decimal arguments, then the hasher's name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the host's to handle
    bell_fd, host, pidfd, index, incarnation, *fds = (int(text) for text in arguments[:-1])
    # Even one that somebody has stopped ends with its host. The signal comes when the *thread* ends that
    # started us, which is the pool's: at close, when nothing is left to do, or with the host.
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(0)
    for fd in (bell_fd, pidfd, *fds[::2]):
        os.set_inheritable(fd, False)
    memory = Memory.attach(MemoryFds(*fds))
    with socket.socket(fileno=bell_fd) as bell:
        Worker(bell, host, pidfd, memory, arguments[-1], index, incarnation).run()
    # Nothing to clean up that the kernel does not: claims, mappings and descriptors die with the process.
    os._exit(0)
