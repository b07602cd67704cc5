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

from typing import Any, NamedTuple

import numpy as np

from .dtypes import EPCM_DTYPE
from .layout import (
    EPCM_ENTRY,
    MAX_SOURCE_FD,
    MAX_SOURCE_PAGE,
    SOURCE_FD_SHIFT,
    SOURCE_FILE,
    SOURCE_FILL,
)

U32Array = np.ndarray[Any, np.dtype[np.uint32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Rows(NamedTuple):
    """Pages that recur: row r is [base + r * stride + column, + width), cut at ``end``. EPC pages.

    The blocks of a hash domain are such rows, and so are the two blocks of a pair, which are neighbours.
    ``whole``: rows of the table that lie before ``end`` with all their stride.
    """

    base: int
    stride: int
    column: int
    width: int
    whole: int
    end: int


class Epcm:
    """The entries of all EPC pages, mapped read-write (host and workers)."""

    def __init__(self, buffer: memoryview, page_count: int) -> None:
        self.buffer = buffer
        self.entries = np.frombuffer(buffer, EPCM_DTYPE, page_count)
        self._generation: U32Array = self.entries["generation"]
        self._valid: U32Array = self.entries["valid"]
        self._released: U32Array = self.entries["released"]
        self._source: np.ndarray[Any, np.dtype[np.uint64]] = self.entries["source"]

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
        hash_dom = self.entries["hash_dom"][first : first + count]
        numbers = np.arange(domains, dtype=np.uint8)
        whole = count - count % (domains * block)
        hash_dom[:whole].reshape(-1, domains, block)[:] = numbers[None, :, None]
        hash_dom[whole:] = np.repeat(numbers, block)[: count - whole]

    def set_file_source(self, first: int, count: int, fd: int, file_page: int) -> None:
        """Host, before the launch is opened: the bytes of ``count`` pages stand in the file that is its
        descriptor ``fd``, from page ``file_page`` on. Raises ValueError for what an entry cannot hold."""
        if not 0 <= fd <= MAX_SOURCE_FD:
            raise ValueError(f"descriptor {fd}: expected 0..{MAX_SOURCE_FD}")
        if not 0 <= file_page <= MAX_SOURCE_PAGE + 1 - count:
            raise ValueError(f"{count} pages from {file_page} on: expected 0..{MAX_SOURCE_PAGE}")
        begin = SOURCE_FILE | fd << SOURCE_FD_SHIFT | file_page
        self._source[first : first + count] = np.arange(begin, begin + count, dtype=np.uint64)

    def set_fill_source(self, first: int, count: int, word: int) -> None:
        """The same for pages that repeat a u32. Pages without a source stay zero."""
        self._source[first : first + count] = SOURCE_FILL | word

    def sources(self, first: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The sources of ``count`` pages (``enturbo.shm.layout.SOURCE_FILE``, ``SOURCE_FILL``, 0), copied."""
        return self._source[first : first + count].copy()

    def source_rows(
        self, first: int, rows: int, width: int, stride: int
    ) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The same for rows of ``width`` pages, ``stride`` pages apart."""
        at = first * EPCM_ENTRY.size + EPCM_ENTRY.offset("source")
        strides = (stride * EPCM_ENTRY.size, EPCM_ENTRY.size)
        return np.ndarray((rows, width), "<u8", self.buffer, at, strides).copy()

    def set_valid(self, first: int, count: int, generation: int) -> None:
        """Copier, after the bytes: publish ``count`` pages.

        Whoever reads ``valid = generation`` may read the bytes. A copier that dies before this store leaves
        the page not VALID, and nobody has looked at its bytes.
        """
        self._valid[first : first + count] = generation

    def set_valid_rows(self, rows: Rows, start: int, end: int, generation: int) -> None:
        """:meth:`set_valid` for the rows ``start`` .. ``end`` - 1 of pages that recur, in ascending order.

        A copier that dies half-way has made a prefix of them VALID, and the next one goes on behind it.
        """
        self._store(self._valid, EPCM_ENTRY.offset("valid"), rows, start, end, generation)

    def release_rows(self, rows: Rows, start: int, end: int, generation: int) -> None:
        """Measurer, after the SMC results that cover them: clear WRLOCK of the rows ``start`` .. ``end`` - 1.

        Ascending: the last page of a block is stored last, so "the last page is released" means all are.
        Dying half-way is harmless, whoever takes the domain over releases what the result covers again.
        """
        self._store(self._released, EPCM_ENTRY.offset("released"), rows, start, end, generation)

    def _store(
        self, values: U32Array, offset: int, rows: Rows, start: int, end: int, generation: int
    ) -> None:
        whole = min(end, rows.whole)
        if start < whole:
            # All whole rows by one assignment; numpy stores in the order of addresses.
            at = (rows.base + start * rows.stride + rows.column) * EPCM_ENTRY.size + offset
            strides = (rows.stride * EPCM_ENTRY.size, EPCM_ENTRY.size)
            shape = (whole - start, rows.width)
            np.ndarray(shape, "<u4", self.buffer, at, strides)[...] = generation
        if end > max(start, rows.whole):  # the last row, which may be short
            first = rows.base + (end - 1) * rows.stride + rows.column
            values[first : min(first + rows.width, rows.end)] = generation

    def is_valid(self, page: int, generation: int) -> bool:
        """VALID for this launch: the page's bytes may be read."""
        return int(self._valid[page]) == generation and int(self._generation[page]) == generation

    def first_not_valid(self, first: int, count: int, generation: int) -> int:
        """How many of ``count`` pages from ``first`` on are VALID before the first that is not."""
        missing = self._valid[first : first + count] != generation
        return int(missing.argmax()) if missing.any() else count

    def valid_mask(self, first: int, count: int, generation: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of ``count`` pages from ``first`` on are VALID for this launch."""
        mask: np.ndarray[Any, np.dtype[np.bool_]] = self._valid[first : first + count] == generation
        mask &= self._generation[first : first + count] == generation
        return mask

    def released_mask(self, first: int, count: int, generation: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Of which of these the measurer is done."""
        mask: np.ndarray[Any, np.dtype[np.bool_]] = self._released[first : first + count] == generation
        return mask

    def missing_rows(self, rows: Rows, start: int, end: int, generation: int) -> Mask:
        """Which pages of the rows ``start`` .. ``end`` - 1 are not VALID, a row of the answer each.

        What a short last row lacks is not missing. Only ``valid`` is compared: nobody stores a launch's
        generation (which is never 0) in it but a copier of that launch, and that after the bytes.
        """
        whole = max(0, min(end, rows.whole) - start)
        at = (rows.base + start * rows.stride + rows.column) * EPCM_ENTRY.size + EPCM_ENTRY.offset("valid")
        strides = (rows.stride * EPCM_ENTRY.size, EPCM_ENTRY.size)
        valid: U32Array = np.ndarray((whole, rows.width), "<u4", self.buffer, at if whole else 0, strides)
        missing: Mask = valid != generation
        if whole < end - start:  # the last row, which may be short
            first = rows.base + (end - 1) * rows.stride + rows.column
            last = self._valid[first : min(first + rows.width, rows.end)] != generation
            missing = np.concatenate((missing, np.zeros((1, rows.width), np.bool_)))
            missing[-1, : len(last)] = last
        return missing

    def count_valid_rows(self, rows: Rows, start: int, end: int, generation: int) -> int:
        """How many of these rows are VALID before the first of which any page is not."""
        missing = self.missing_rows(rows, start, end, generation)
        # Of three ways to ask whether there is any this is the one that takes the least time.
        return int(missing.any(axis=1).argmax()) if np.count_nonzero(missing) else end - start

    def is_released(self, page: int, generation: int) -> bool:
        """The measurer is done with the page."""
        return int(self._released[page]) == generation

    def all_released(self, pages: np.ndarray[Any, np.dtype[np.int64]], generation: int) -> bool:
        """The same for several pages at once."""
        return bool((self._released[pages] == generation).all())

    def clear(self, first: int, count: int) -> None:
        """Host, launch closed and claim range held: the entries belong to nobody."""
        # As plain words: assigning a record is thirty times slower.
        self.entries[first : first + count].view("<u8")[:] = 0

    def close(self) -> None:
        """Drop the views, so that the mapping can go."""
        empty = np.empty(0, np.uint32)
        self.entries = np.empty(0, EPCM_DTYPE)
        self._generation = self._valid = self._released = empty
        self._source = np.empty(0, np.uint64)
        self.buffer = memoryview(b"")
