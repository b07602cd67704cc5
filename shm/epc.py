"""The EPC: one arena of pages, allocated once and reused, and the extents that enclaves get of it.

Invariant: a page that belongs to no extent is zero. The host scrubs an extent before it frees it, and the
kernel hands the arena out zeroed, so a heap page is zero before it is VALID whoever had it before.
"""

from __future__ import annotations

import bisect
import threading
from typing import Any

import numpy as np

from .errors import EPCExhausted
from .layout import PAGE_SIZE
from .mapping import populate
from .segment import Segment


class Extents:
    """First-fit allocation of page runs; neighbours coalesce when they are freed. Thread-safe."""

    def __init__(self, page_count: int) -> None:
        self.page_count = page_count
        self._lock = threading.Lock()
        self._starts: list[int] = [0] if page_count else []
        self._counts: dict[int, int] = {0: page_count} if page_count else {}

    def allocate(self, count: int) -> int:
        """First page of a run of ``count`` pages. Raises :class:`EPCExhausted`. Zero pages are at page 0."""
        if count == 0:
            return 0
        with self._lock:
            for position, start in enumerate(self._starts):
                free = self._counts[start]
                if free < count:
                    continue
                del self._starts[position], self._counts[start]
                if free > count:
                    self._insert(start + count, free - count)
                return start
            raise EPCExhausted(count, sum(self._counts.values()), max(self._counts.values(), default=0))

    def free(self, start: int, count: int) -> None:
        """Give ``count`` pages at ``start`` back. Raises ValueError when any of them is free already."""
        if count == 0:
            return
        with self._lock:
            position = bisect.bisect_left(self._starts, start)
            after = self._starts[position] if position < len(self._starts) else self.page_count
            before = self._starts[position - 1] if position else 0
            before_end = before + self._counts[before] if position else 0
            if start < before_end or start + count > after:
                raise ValueError(f"pages {start}..{start + count} are not all in use")
            if after == start + count and after in self._counts:
                count += self._counts.pop(after)
                del self._starts[position]
            if position and before_end == start:
                self._counts[before] += count
            else:
                self._insert(start, count)

    def _insert(self, start: int, count: int) -> None:
        bisect.insort(self._starts, start)
        self._counts[start] = count

    def free_pages(self) -> int:
        """Pages that no extent holds."""
        with self._lock:
            return sum(self._counts.values())


class Epc:
    """The arena's bytes as seen by one process."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.page_count = segment.size // PAGE_SIZE
        self.bytes: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(segment.view, np.uint8)
        self.mapped = 0  # bytes from the start that are known to be in this process's page tables

    def pages(self, first: int, count: int) -> memoryview:
        """The bytes of ``count`` pages, writable."""
        return self.segment.view[first * PAGE_SIZE : (first + count) * PAGE_SIZE]

    def map_more(self, allocated: int, step: int) -> bool:
        """Take the next ``step`` bytes that are allocated into the page tables; False: nothing is left.

        One thread of a process does this, ahead of all launches.
        """
        length = min(step, allocated - self.mapped)
        if length <= 0:
            return False
        done = populate(self.segment.view[self.mapped : self.mapped + length])
        # Where the kernel does not do it pages come as they are touched.
        self.mapped = self.mapped + length if done else self.segment.size
        return True

    def map_now(self, first: int, count: int) -> None:
        """The same for pages that are about to be written: at once costs half of what single faults do."""
        if (first + count) * PAGE_SIZE > self.mapped:
            populate(self.pages(first, count))

    def fill(self, first: int, count: int, word: int) -> None:
        """Fill pages with a repeated little-endian u32."""
        stretch = self.bytes[first * PAGE_SIZE : (first + count) * PAGE_SIZE]
        stretch.view("<u4")[:] = word

    def close(self) -> None:
        """Drop the views, then the mapping."""
        self.bytes = np.empty(0, np.uint8)
        self.segment.close()
