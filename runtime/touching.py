"""Pages that an enclave waits for are copied ahead of their turn.

Who learns of such a page (the thread that serves page faults) has a :class:`Toucher` for each launch, and
tells it the page again and again until it is VALID:

    holders of claims copy    the teller's own thread copies the page's row, under the claim of its pair
    the host's thread copies  it is told, and takes the piece with that page next (Start.want)
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..shm.launches import Claims
from ..shm.memory import Memory
from ..workers.measure import Measurer
from ..workers.protocol import COPIED
from ..workers.sha256 import Hasher
from ..workers.view import Outcome
from .trace import Timeline


class Toucher:
    """For one launch; claims of its own, so that it excludes the start's thread as it excludes workers.

    Thread-safe. ``want``: takes pages that the host's thread is to copy.
    """

    def __init__(
        self,
        memory: Memory,
        hasher: Hasher,
        slot: int,
        generation: int,
        timeline: Timeline,
        want: Callable[[int], object],
    ) -> None:
        self._slot, self._generation, self._timeline, self._want = slot, generation, timeline, want
        # A description excludes others, not threads; and closing it in the middle of a copy would give the
        # claim away.
        self._lock = threading.Lock()
        self._claims = Claims(memory.control_segment.fd)
        self._measurer = Measurer(memory, self._claims, hasher, on_span=self._on_span)
        self._closed = False

    def want(self, page: int) -> Outcome:
        """The image's page ``page`` is waited for. WORKED: it is VALID. BUSY, WAITING: tell it again, a
        little later. GONE: the launch is not open yet, or not any more. FAULT: it is rejected. Raises
        ValueError below page 0.

        Copies at most a row: 128 KiB where a claim covers one pair of domains with blocks of 16 pages.
        """
        with self._lock:
            if self._closed:
                return Outcome.GONE
            outcome = self._measurer.fill_touched(self._slot, self._generation, page)
        if outcome is Outcome.WAITING:
            self._want(page)
        return outcome

    def close(self) -> None:
        """Give claims and views back, after the copy that is under way. Before the memory is closed. May be
        called again."""
        with self._lock:
            self._closed = True
            self._measurer.forget()
            self._claims.close()

    def _on_span(
        self, kind: int, slot: int, generation: int, pages: int, start: int, end: int, finished: bool
    ) -> None:
        if kind == COPIED:
            self._timeline.add("copy", "pager", start, end, pages)
