"""Filling pages under a claim: copying a pair's rows from the image's files, or zeroing them.

Workers know no image formats. Each EPCM entry says where its page's bytes come from: a page of a file, a u32
to repeat, or nothing (the page is zero already). It names the host's descriptor of that file; a worker opens
it anew through /proc, so nothing has to be sent, and a worker that was started in the middle of a launch has
it too.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import groupby
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np

from ..shm.epcm import Mask
from ..shm.errors import EnturboError
from ..shm.launches import Claims
from ..shm.layout import (
    COPY_FIRST,
    COPY_FUSED,
    FAULT_SOURCE,
    MAX_SOURCE_FD,
    PAGE_SIZE,
    SCRUB,
    SOURCE_FD_SHIFT,
    SOURCE_FILE,
    SOURCE_FILL,
)
from ..shm.mapping import map_shared
from ..shm.memory import Memory
from .copying import copy_into, copy_rows, zero
from .protocol import BLIND, COPIED
from .view import OnSpan, Outcome, View

log = logging.getLogger("enturbo.workers")

FILL_ROWS: Final = 32  # rows copied or scrubbed in one claim: 4 MiB of an image with the usual B
# Files that stay open between launches. Those that are read: images share them, and cost a descriptor each.
# Those that are mapped belong to one image, and keep its memory when the image itself is gone.
KEPT_SOURCES: Final = 64
KEPT_MAPPINGS: Final = 4


class SourceError(EnturboError):
    """A file of the image is shorter than the image, or cannot be read."""


class Source:
    """A file that holds pages of images, to be copied from by pages.

    A file that is sealed against shrinking is mapped, and copied past the cache. Any other one is read:
    somebody might cut it off, and a mapping would then kill who touches it.
    """

    def __init__(self, fd: int, *, borrowed: bool = False) -> None:
        """Takes the descriptor (open for reading); ``borrowed``: it stays the caller's."""
        self.fd, self._borrowed = fd, borrowed
        self._view: memoryview | None = None
        size = os.fstat(fd).st_size
        if size and _seals(fd) & fcntl.F_SEAL_SHRINK:
            self._view = map_shared(fd, size, writable=False)

    @property
    def is_mapped(self) -> bool:
        """Whether it is copied from memory."""
        return self._view is not None

    def copy(self, target: memoryview, page: int) -> None:
        """Fill ``target`` from the file's page ``page`` on; all stores are visible on return.

        Raises SourceError.
        """
        at = page * PAGE_SIZE
        if self._view is not None:
            part = self._view[at : at + len(target)]
            if len(part) < len(target):
                raise SourceError(f"a file of the image ends at {len(self._view)}, expected page {page}")
            copy_into(target, part)
            return
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fd, [target[done:]], at + done)
            except OSError as error:
                raise SourceError(f"a file of the image cannot be read at {at + done}: {error}") from error
            if count == 0:
                raise SourceError(
                    f"a file of the image ends at {at + done}, expected {at + len(target)} bytes or more"
                )
            done += count

    def copy_rows(self, target: memoryview, page: int, width: int, stride: int, rows: int) -> None:
        """The same for ``rows`` pieces of ``width`` bytes, ``stride`` bytes apart in the file and in
        ``target``.

        Raises SourceError.
        """
        at, length = page * PAGE_SIZE, (rows - 1) * stride + width
        if self._view is not None and at + length <= len(self._view):
            copy_rows(target[:length], self._view[at : at + length], width, stride, rows)
            return
        for begin in range(0, length, stride):
            self.copy(target[begin : begin + width], page + begin // PAGE_SIZE)

    def __del__(self) -> None:
        # Launches share a source, and whoever drops it last closes it; a mapping goes with its last view.
        if not self._borrowed:
            os.close(self.fd)


Opener = Callable[[int], Source]  # of a descriptor of the host


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memfd
        return 0


class Sources:
    """The files of the launches that one measurer copies for, opened once each, however many use one."""

    def __init__(self, host: int | None = None) -> None:
        """``host``: the process whose descriptor numbers entries name; None: this one."""
        self._host = host
        self._open: WeakValueDictionary[tuple[int, int], Source] = WeakValueDictionary()
        # The ones that were used last, by whether they are mapped.
        self._kept: dict[bool, OrderedDict[Source, None]] = {True: OrderedDict(), False: OrderedDict()}

    def get(self, number: int) -> Source:
        """The file that is the host's descriptor ``number``. Raises OSError if it is out of reach.

        The caller holds a claim of a launch, has found its generation after that, and has a page to fill that
        is not VALID and whose entry names the number. The host closes a launch's descriptors when all its
        pages are VALID or when it holds the claim range, so the number means this file: now, and whenever the
        same holds for the same launch again. Of another launch it says nothing.
        """
        if self._host is None:
            return Source(number, borrowed=True)  # open as long as it is used; many starts need no more
        fd = os.open(f"/proc/{self._host}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino  # no other file's while one holds it open
        source = self._open.get(key)
        if source is None:
            source = self._open[key] = Source(fd)
        else:
            os.close(fd)
        kept = self._kept[source.is_mapped]
        kept[source] = None
        kept.move_to_end(source)
        while len(kept) > (KEPT_MAPPINGS if source.is_mapped else KEPT_SOURCES):
            kept.popitem(last=False)
        return source

    def forget(self) -> None:
        """Close the files that no launch uses now."""
        for kept in self._kept.values():
            kept.clear()


class Filler:
    """Copies, or scrubs, for one measurer: under the same claims as it measures under.

    Rows of a pair become VALID in ascending order, except for those that somebody waits for
    (:meth:`fill_touched`): VALID of one page says nothing of another. Whoever fills a pair looks at VALID of
    each page that it is about to fill, and never copies a VALID one: an enclave may have written to it, or a
    measurer hashed it. All of that is under the pair's claim, so no page has two copiers.

    Beside the EPCM a launch publishes of each pair how many rows, from the first on, are VALID. Who dies
    after VALID and before that leaves rows that the next holder finds VALID and passes over: the number may
    be too low. It is never too high, and measurers rely on that.
    """

    def __init__(
        self,
        memory: Memory,
        claims: Claims,
        sources: Sources,
        point: Callable[[str], None],
        on_span: OnSpan | None,
    ) -> None:
        self.memory, self.claims, self.sources = memory, claims, sources
        self._point, self._on_span = point, on_span

    def step(self, view: View) -> Outcome:
        """Fill some rows of the pair with the fewest. FINISHED: all are; WAITING: no file to be had."""
        pairs = view.unfilled()
        if not pairs:
            view.filled = True
            view.sources.clear()
            if self._on_span is not None and view.launch.copy_mode != SCRUB:
                now = time.monotonic_ns()
                self._on_span(COPIED, view.slot, view.generation, 0, now, now, True)
            return Outcome.FINISHED
        if not view.can_fill:
            return Outcome.WAITING
        for pair in pairs:
            if not self.claims.claim(view.slot, pair, view.launch.group):
                continue
            try:
                # Only a generation that is read after the claim counts; see enturbo.shm.launches.
                if not is_open(self.memory, view):
                    return Outcome.GONE
                return self.fill(view, pair, int(view.copied[pair]) + FILL_ROWS)
            finally:
                self.claims.give_back(view.slot, pair, view.launch.group)
        return Outcome.BUSY

    def fill(self, view: View, pair: int, until: int) -> Outcome:
        """Fill the rows of ``pair`` up to row ``until``. The claim is held, the generation was looked at.

        WORKED, FAULT (a file is too short) or WAITING (one is out of reach).
        """
        until = min(until, view.pair_rows[pair])
        start = int(view.copied[pair])
        if start >= until:
            return Outcome.WORKED
        if view.launch.copy_mode == SCRUB:
            # Doing it twice is harmless until the range is taken, and then nobody does it.
            self._point("filling")
            zero_rows(self.memory, view, pair, start, until)
            self._point("filled")
            view.copied[pair] = until
            return Outcome.WORKED
        outcome = self._copy(view, pair, start, until)
        if outcome is Outcome.WORKED:
            view.copied[pair] = until
        return outcome

    def fill_touched(self, view: View, page: int) -> Outcome:
        """Copy the row with the image's page ``page`` now, ahead of its turn: somebody waits for that page.

        WORKED: the page is VALID. BUSY: another holds its claim, and may be copying it; try again. WAITING:
        it is not to be copied here: the host copies, or a file is out of reach. GONE, FAULT: the launch
        will not have it. Pages behind the image (EAUG) are VALID from the beginning. Raises ValueError below
        page 0.

        Who dies in it leaves pages that are not VALID, or VALID and complete, as in any row. Nothing but
        VALID tells of them, so whoever comes to that row looks.
        """
        launch, epcm, fault = view.launch, self.memory.epcm, self.memory.launches.fault
        if page < 0:
            raise ValueError(f"page {page}: expected 0 or more")
        if int(fault[view.slot]) == view.generation:
            return Outcome.FAULT
        if page >= launch.page_count or epcm.is_valid(launch.first_page + page, view.generation):
            return Outcome.WORKED
        if launch.copy_mode not in (COPY_FIRST, COPY_FUSED) or not view.can_fill:
            return Outcome.WAITING
        pair, row = view.row_with(page)
        if not self.claims.claim(view.slot, pair, launch.group):
            return Outcome.BUSY
        try:
            # Closing takes the range, so what is open after the claim stays open until it is given back.
            if not is_open(self.memory, view):
                return Outcome.GONE
            return self._copy(view, pair, row, row + 1)
        finally:
            self.claims.give_back(view.slot, pair, launch.group)

    def _copy(self, view: View, pair: int, start: int, end: int) -> Outcome:
        """Copy what is not VALID of the rows ``start`` .. ``end`` - 1, and make it VALID."""
        begin = time.monotonic_ns()
        try:
            pages = self._copy_missing(view, pair, start, end)
        except SourceError as error:
            log.warning("launch %d: %s", view.generation, error)
            self.memory.launches.report_fault(view.slot, view.generation, FAULT_SOURCE)
            return Outcome.FAULT
        except OSError as error:
            # The host can always copy, so the launch goes on; this measurer takes part when pages are VALID.
            log.info("launch %d: a file is out of this process's reach: %s", view.generation, error)
            view.can_fill = False
            if self._on_span is not None:
                self._on_span(BLIND, view.slot, view.generation, 0, begin, begin, False)
            return Outcome.WAITING
        if pages and self._on_span is not None:
            self._on_span(COPIED, view.slot, view.generation, pages, begin, time.monotonic_ns(), False)
        return Outcome.WORKED

    def _copy_missing(self, view: View, pair: int, start: int, end: int) -> int:
        """How many pages were copied. Ascending; rows of which no page is VALID together."""
        rows = view.rows(pair * view.width, view.width)
        missing = self.memory.epcm.missing_rows(rows, start, end, view.generation)
        if missing.all():
            self._copy_rows(view, pair, start, end)
            return missing.size
        counts = missing.sum(axis=1).tolist()
        untouched = [count == view.row_of(pair, row)[1] for row, count in enumerate(counts, start)]
        for together, group in groupby(range(start, end), lambda row: untouched[row - start]):
            same = list(group)
            if together:
                self._copy_rows(view, pair, same[0], same[-1] + 1)
                continue
            for row in same:
                if counts[row - start]:  # the one who copied it died while it made it VALID
                    self._copy_part(view, pair, row, missing[row - start])
        return sum(counts)

    def _copy_rows(self, view: View, pair: int, start: int, end: int) -> None:
        self._point("filling")
        fill_rows(self.memory, view, pair, start, end, self._opener(view))
        # A copier that dies here leaves rows that are not VALID: nobody has looked at their bytes.
        self._point("filled")
        rows = view.rows(pair * view.width, view.width)
        self.memory.epcm.set_valid_rows(rows, start, end, view.generation)
        self._point("valid")

    def _copy_part(self, view: View, pair: int, row: int, missing: Mask) -> None:
        base = view.launch.first_page + view.row_of(pair, row)[0]
        edges = np.flatnonzero(np.diff(missing, prepend=False, append=False)).tolist()
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            self._point("filling")
            fill_pages(self.memory, base + begin, end - begin, self._opener(view))
            self._point("filled")
            self.memory.epcm.set_valid(base + begin, end - begin, view.generation)
            self._point("valid")

    def _opener(self, view: View) -> Opener:
        def source(number: int) -> Source:
            known = view.sources.get(number)
            if known is None:
                known = view.sources[number] = self.sources.get(number)
            return known

        return source


def is_open(memory: Memory, view: View) -> bool:
    """Whether the launch is the one in its slot, and its copy goes on."""
    table = memory.launches
    return (
        int(table.generations[view.slot]) == view.generation
        and int(table.copy_aborted[view.slot]) != view.generation
    )


def fill_rows(memory: Memory, view: View, pair: int, start: int, end: int, source: Opener) -> None:
    """Copy the rows ``start`` .. ``end`` - 1 of ``pair``; the caller holds its claim and makes them VALID.

    Raises SourceError, and OSError if a file is out of reach.
    """
    whole = min(end, view.launch.page_count // view.stride)
    if whole > start and _fill_table(memory, view, pair, start, whole, source):
        start = whole
    for row in range(start, end):
        first, count = view.row_of(pair, row)
        fill_pages(memory, view.launch.first_page + first, count, source)


def _fill_table(memory: Memory, view: View, pair: int, start: int, end: int, source: Opener) -> bool:
    """All rows at once, where they stand in one file as they do in the image; else False, nothing done."""
    first, width = view.row_of(pair, start)
    rows, first = end - start, view.launch.first_page + first
    table = memory.epcm.source_rows(first, rows, width, view.stride)
    origin = int(table[0, 0])
    if origin == 0 and not table.any():
        return True  # heap: the pages are zero already
    if not origin & SOURCE_FILE:
        return False
    if not (table - table[0, 0] == _offsets(rows, width, view.stride)).all():
        return False
    number, page = _file_and_page(origin)
    file = source(number)
    for row in range(rows):
        memory.epc.map_now(first + row * view.stride, width)
    target = memory.epc.pages(first, (rows - 1) * view.stride + width)
    file.copy_rows(target, page, width * PAGE_SIZE, view.stride * PAGE_SIZE, rows)
    return True


@functools.lru_cache(maxsize=16)
def _offsets(rows: int, width: int, stride: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Page numbers of such a table, from its first page on."""
    down = np.arange(0, rows * stride, stride, dtype=np.uint64)
    return np.add.outer(down, np.arange(width, dtype=np.uint64))


def fill_pages(memory: Memory, first: int, count: int, source: Opener) -> None:
    """Copy ``count`` EPC pages from where their entries say, in runs as long as they go.

    Raises SourceError, and OSError if a file is out of reach.
    """
    words = memory.epcm.sources(first, count)
    for begin, end in _runs(words):
        word = int(words[begin])
        if word & SOURCE_FILE:
            number, page = _file_and_page(word)
            file = source(number)
            memory.epc.map_now(first + begin, end - begin)
            file.copy(memory.epc.pages(first + begin, end - begin), page)
        elif word & SOURCE_FILL:
            memory.epc.fill(first + begin, end - begin, word & 0xFFFF_FFFF)


def _file_and_page(word: int) -> tuple[int, int]:
    """What a source in a file says: the host's descriptor, and the page."""
    return word >> SOURCE_FD_SHIFT & MAX_SOURCE_FD, word & (1 << SOURCE_FD_SHIFT) - 1


def _runs(words: np.ndarray[Any, np.dtype[np.uint64]]) -> list[tuple[int, int]]:
    """Pages that follow each other in a file, or have the same fill, or none: (begin, end)."""
    step = np.diff(words)
    goes_on = np.where(words[:-1] & np.uint64(SOURCE_FILE), step == 1, step == 0)
    breaks = (np.flatnonzero(~goes_on) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(words)], strict=True))


def zero_rows(memory: Memory, view: View, pair: int, start: int, end: int) -> None:
    """Scrub the rows ``start`` .. ``end`` - 1 of ``pair``, under its claim."""
    for row in range(start, end):
        first, count = view.row_of(pair, row)
        zero(memory.epc.pages(view.launch.first_page + first, count))
