"""The EPCM: one entry a page, and the order copy -> measure -> modify.

Each field has one writer at a time (the table stands in :mod:`enturbo.shm.layout`):

    copier    fields -> bytes -> valid          measurer   wait for valid -> hash -> SMC result -> released

``valid`` and ``released`` hold a *generation*, the number of the launch that owns the page. A page is VALID
when its entry's generation is not 0 and ``valid`` equals it; WRLOCK stands while the page has measured
chunks and ``released`` differs from it. A late writer of an earlier launch can only store an earlier
generation, which nobody takes for this one.

Store order: the copier's bytes must be visible before ``valid``, the SMC result before ``released``. On
x86-64 stores become visible in program order and each u32 here is one aligned store, so plain assignments
are enough; the pool and early execution are therefore switched on only there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dtypes import EPCM_DTYPE

U32Array = np.ndarray[Any, np.dtype[np.uint32]]


class Epcm:
    """The entries of all EPC pages, mapped read-write (host and workers)."""

    def __init__(self, buffer: memoryview, page_count: int) -> None:
        self.buffer = buffer
        self.entries = np.frombuffer(buffer, EPCM_DTYPE, page_count)
        self._generation: U32Array = self.entries["generation"]
        self._valid: U32Array = self.entries["valid"]
        self._released: U32Array = self.entries["released"]

    def describe(
        self, first: int, count: int, *, flags: int, chunks: int, linear: int, generation: int
    ) -> None:
        """Host, before VALID: what ``count`` pages are, the first at page ``linear`` of the enclave.

        A host that dies before VALID leaves pages that nobody reads.
        """
        entries = self.entries[first : first + count]
        entries["flags"] = flags
        entries["chunks"] = chunks
        entries["linear"] = np.arange(linear, linear + count, dtype=np.uint32)
        entries["generation"] = generation

    def set_hash_dom(self, first: int, count: int, domains: int, block: int) -> None:
        """Host, before VALID: HASH_DOM of the pages of one image, page 0 at EPC page ``first``."""
        pages = np.arange(count, dtype=np.uint32)
        self.entries["hash_dom"][first : first + count] = (pages // block) % domains

    def set_valid(self, first: int, count: int, generation: int) -> None:
        """Copier, after the bytes: publish ``count`` pages.

        Whoever reads ``valid = generation`` may read the bytes. A copier that dies before this store leaves
        the page not VALID, and nobody has looked at its bytes.
        """
        self._valid[first : first + count] = generation

    def release(self, first: int, count: int, generation: int) -> None:
        """Measurer, after the SMC result that covers them: clear WRLOCK of ``count`` pages.

        Ascending: the last page of a block is stored last, so "the last page is released" means all are.
        Dying half-way is harmless, whoever takes the domain over releases what the result covers again.
        """
        self._released[first : first + count] = generation

    def is_valid(self, page: int, generation: int) -> bool:
        """VALID for this launch: the page's bytes may be read."""
        return int(self._valid[page]) == generation and int(self._generation[page]) == generation

    def is_released(self, page: int, generation: int) -> bool:
        """The measurer is done with the page."""
        return int(self._released[page]) == generation

    def clear(self, first: int, count: int) -> None:
        """Host, launch closed and claim range held: the entries belong to nobody."""
        self.entries[first : first + count] = np.zeros(1, EPCM_DTYPE)

    def close(self) -> None:
        """Drop the views, so that the mapping can go."""
        empty = np.empty(0, np.uint32)
        self.entries = np.empty(0, EPCM_DTYPE)
        self._generation = self._valid = self._released = empty
        self.buffer = memoryview(b"")
