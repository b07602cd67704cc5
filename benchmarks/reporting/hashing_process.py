"""A process that does one half of what two workers do, with everything in place: the ceiling's.

Run with a descriptor of the image's memfd, its size, and the half's first and last byte + 1. It answers each
line of standard input, ``hash`` or ``copy``, with three numbers: start and end (ns, CLOCK_MONOTONIC) and
CPU seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from enturbo.shm.dtypes import EPCM_DTYPE
from enturbo.shm.layout import ALL_CHUNKS, PAGE_SIZE
from enturbo.shm.mapping import map_shared
from enturbo.shm.segment import Segment
from enturbo.workers.copying import copy_into
from enturbo.workers.sha256 import Pages, Span, get_hasher

FLAGS = 0x201
BLOCK = 16  # pages; the two chains take turns of so many, as the two domains of a pair do


def main(fd: int, size: int, begin: int, end: int) -> None:
    """Serve until standard input ends."""
    source = map_shared(fd, size, writable=False)[begin:end]
    count = len(source) // PAGE_SIZE
    entries = np.zeros(count, EPCM_DTYPE)
    entries["flags"], entries["chunks"] = FLAGS, ALL_CHUNKS
    entries["linear"] = np.arange(begin // PAGE_SIZE, end // PAGE_SIZE)
    pages, hasher = Pages(entries.data, source), get_hasher()
    turns = -(-count // (2 * BLOCK))
    spans = [Span(pages, first, BLOCK, 2 * BLOCK, turns, count) for first in (0, BLOCK)]
    target = Segment.create(len(source))

    def hash_once() -> None:
        hasher.extend([hasher.start(), hasher.start()], spans)

    def copy_once() -> None:
        copy_into(target.view, source)

    works: dict[str, Callable[[], None]] = {"hash": hash_once, "copy": copy_once}
    try:
        for line in sys.stdin:
            work = works[line.strip()]
            cpu, start = time.process_time(), time.monotonic_ns()
            work()
            stop = time.monotonic_ns()
            print(start, stop, time.process_time() - cpu, flush=True)
    finally:
        target.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
