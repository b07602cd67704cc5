"""The worker process: sleep on the doorbell, look at the launch table, measure what is open.

A worker is persistent and serves all launches of a runtime, oldest first. It ends when its socket closes
(the pool's end is its lifeline) or when the host's pidfd becomes readable: a forked child of the host may
keep the socket open, but not the host alive.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from typing import Final

from ..shm.launches import Claims
from ..shm.memory import Memory, MemoryFds
from . import faults
from .measure import Measurer, Outcome
from .protocol import READY, SPAN, News
from .sha256 import get_hasher

SPIN_NS: Final = 60_000  # look again at once for this long before sleeping
NAP_MS: Final = 1  # while the copy is under way
BUSY_MS: Final = 50  # while others hold all that is left; the host rings when one of them dies
CHECK_EVERY: Final = 16  # stripes between looks at lifeline and doorbell


class Worker:
    """One worker's state: its memory, its measurer, its end of the doorbell."""

    def __init__(
        self, bell: socket.socket, host_pidfd: int, memory: Memory, hasher: str, index: int, incarnation: int
    ):
        self.bell, self.memory, self.index = bell, memory, index
        bell.setblocking(False)
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)
        self._poll.register(host_pidfd, select.POLLIN)
        self._bell_fd, self._pidfd = bell.fileno(), host_pidfd
        self.measurer = Measurer(
            memory,
            Claims(memory.control_segment.fd),
            get_hasher(hasher),
            worker=index,
            incarnation=incarnation,
            on_span=self._report,
            fault=faults.from_environment(),
        )
        self._span: News | None = None

    def run(self) -> None:
        """Until the host is gone."""
        self._send(News(READY, 0, 0, 0, 0, 0, 0))
        last_work = time.monotonic_ns()
        while True:
            outcome = self._round()
            if outcome is Outcome.WORKED:
                last_work = time.monotonic_ns()
                timeout: int | None = 0
            elif outcome is Outcome.WAITING:
                timeout = 0 if time.monotonic_ns() - last_work < SPIN_NS else NAP_MS
            elif outcome is Outcome.BUSY:
                timeout = BUSY_MS
            else:
                timeout = None
            if outcome is not Outcome.WORKED:
                self._flush()
            if not self._wait(timeout):
                return

    def _round(self) -> Outcome:
        """One look at all open launches; FINISHED when nothing is left to do anywhere."""
        state = Outcome.FINISHED
        table = self.memory.launches
        for generation, slot in table.open_slots():
            if self.index >= int(table.measurers[slot]):
                continue
            for _ in range(CHECK_EVERY):
                outcome = self.measurer.step(slot, generation)
                if outcome is not Outcome.WORKED:
                    break
            if outcome is Outcome.WORKED:
                return outcome
            if outcome is Outcome.WAITING or (outcome is Outcome.BUSY and state is Outcome.FINISHED):
                state = outcome
        return state

    def _wait(self, timeout: int | None) -> bool:
        """Wait for a ring, at most ``timeout`` ms; False when the host is gone."""
        for fd, _ in self._poll.poll(timeout):
            if fd == self._pidfd:
                return False
            try:
                if not self.bell.recv(4096):
                    return False
            except BlockingIOError:
                pass
            except ConnectionError:
                return False
        return True

    def _report(self, slot: int, generation: int, pages: int, start: int, end: int, finished: bool) -> None:
        """Merge stripes that follow one another into one span, send it when it ends or a pair is done."""
        span = self._span
        if span is not None and (span.generation != generation or start - span.end > 1_000_000):
            self._flush()
            span = None
        if span is not None:
            pages, start = span.pages + pages, span.start
        self._span = News(SPAN, slot, generation, pages, start, end, int(finished))
        if finished:
            self._flush()

    def _flush(self) -> None:
        span, self._span = self._span, None
        if span is not None:
            self._send(span)

    def _send(self, news: News) -> None:
        # A full or closed socket loses news, never work; a closed one ends us at the next wait.
        with contextlib.suppress(OSError):
            self.bell.send(news.encode())


def main(*arguments: str) -> None:
    """Entry point of the process: descriptors and sizes as decimal arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the host's to handle
    bell_fd, pidfd, index, incarnation, *fds = (int(text) for text in arguments[:-1])
    for fd in (bell_fd, pidfd, *fds[::2]):
        os.set_inheritable(fd, False)
    memory = Memory.attach(MemoryFds(*fds))
    with socket.socket(fileno=bell_fd) as bell:
        Worker(bell, pidfd, memory, arguments[-1], index, incarnation).run()
    # Nothing to clean up that the kernel does not: claims, mappings and descriptors die with the process.
    os._exit(0)
