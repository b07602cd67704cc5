"""WRLOCK as the kernel enforces it: a measurer opens the pages that it has released for the enclave's stores.

An enclave under userfaultfd has its measured writable pages write-protected. Who measures holds a descriptor
of that userfaultfd and takes the protection off after the release:

    SMC result ─► blocks released ─► EPCM released ─► UFFDIO_WRITEPROTECT off (wakes who sleeps)

A measurer that dies before the last step, or was never given the descriptor (it started later, its socket was
full), leaves pages that are released in the EPCM and protected in the enclave. The host's pager looks at the
EPCM for everybody who still sleeps (:mod:`enturbo.runtime.pager`), so such a store is late, never lost. The
other way round nothing can go wrong: the EPCM is written first, and a page that is opened twice stays open.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

from ..shm.epcm import Rows
from ..shm.layout import PAGE_SIZE
from ..shm.uffd import Userfaultfd

# What messages begin with; a doorbell is b"\0".
_HAND: Final = b"G"  # a descriptor comes with it
_DROP: Final = b"D"
_HEAD = struct.Struct("<cI")
_RANGE = struct.Struct("<QQQ")
MAX_MESSAGE: Final = 1 << 15
MAX_RANGES: Final = 1024  # more than these are left to the pager: a message has a size


class Range(NamedTuple):
    """``pages`` EPC pages from ``first`` on, which the enclave has at ``address``."""

    first: int
    pages: int
    address: int


class WriteLocks:
    """The write-protected pages of one launch's enclave. Takes the userfaultfd."""

    def __init__(self, generation: int, uffd: Userfaultfd, ranges: Sequence[Range]) -> None:
        self.generation = generation
        self._uffd = uffd
        self._ranges = sorted(ranges)
        self._firsts = [each.first for each in self._ranges]

    def encode(self) -> bytes:
        """The message that goes with a copy of the descriptor."""
        return _HEAD.pack(_HAND, self.generation) + b"".join(_RANGE.pack(*each) for each in self._ranges)

    @property
    def fd(self) -> int:
        """The userfaultfd."""
        return self._uffd.fd

    def open_rows(self, rows: Rows, start: int, end: int) -> None:
        """Measurer, after it released these rows: stores to them are let through."""
        for row in range(start, end):
            first = rows.base + row * rows.stride + rows.column
            self.open_pages(first, min(first + rows.width, rows.end))

    def open_pages(self, first: int, end: int) -> None:
        """The EPC pages ``first`` .. ``end`` - 1, as far as they are locked ones."""
        at = max(0, bisect_right(self._firsts, first) - 1)
        for each in self._ranges[at:]:
            if each.first >= end:
                return
            begin, until = max(first, each.first), min(end, each.first + each.pages)
            if begin < until:
                address = each.address + (begin - each.first) * PAGE_SIZE
                self._uffd.allow_stores(address, (until - begin) * PAGE_SIZE)

    def close(self) -> None:
        """Let go of the descriptor. May be called again."""
        self._uffd.close()


def dropping(generation: int) -> bytes:
    """The message that says: let go of these locks."""
    return _HEAD.pack(_DROP, generation)


def take(locks: dict[int, WriteLocks], message: bytes, fds: Sequence[int]) -> None:
    """Worker: a message came over its socket. Anything that is none of these messages changes nothing."""
    tag = message[:1]
    if tag == _HAND and len(fds) == 1:
        _, generation = _HEAD.unpack_from(message)
        ranges = [Range(*values) for values in _RANGE.iter_unpack(message[_HEAD.size :])]
        old = locks.get(generation)
        locks[generation] = WriteLocks(generation, Userfaultfd(fds[0]), ranges)
    elif tag == _DROP:
        old = locks.pop(_HEAD.unpack_from(message)[1], None)
    else:
        return
    if old is not None:
        old.close()
