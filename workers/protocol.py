"""The messages between the pool and its workers: fixed-size records on one socket pair a worker.

Host to worker: one byte, "look at the launch table". It carries no work, so losing it loses nothing. Worker
to host: ``READY`` once, ``WARM`` once, ``SPAN`` after measuring, ``COPIED`` after copying, ``SCRUBBED`` when
it finds a scrubbing complete. They are news for timelines and wake-ups; what counts stands in shared memory.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

READY: Final = 1
SPAN: Final = 2
COPIED: Final = 3
WARM: Final = 4  # the worker has the whole EPC in its page tables
SCRUBBED: Final = 5
DONE: Final = 7  # the worker finds a launch finished: its start may go on
BLIND: Final = 6  # the worker may not open the host's descriptors, so it cannot copy
_NEWS = struct.Struct("<IIIIQQI4x")


class News(NamedTuple):
    """One message of a worker. Times are CLOCK_MONOTONIC ns; ``pages`` measured; ``finished``: a pair is."""

    kind: int
    slot: int
    generation: int
    pages: int
    start: int
    end: int
    finished: int

    def encode(self) -> bytes:
        """The record's bytes."""
        return _NEWS.pack(*self)


NEWS_SIZE: Final = _NEWS.size


def decode(message: bytes) -> News | None:
    """A worker's message, or None when it is not one."""
    return News(*_NEWS.unpack(message)) if len(message) == NEWS_SIZE else None
