"""Reading an SGXS stream: which pages its records make, and whether each record is sound.

A run is a number of consecutive pages with the same flags and the same chunks. Their records differ in
nothing but offsets and data, so numpy compares thousands of them at once; only a run's first page is read
record by record. The file is never in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...shm.errors import ImageFormatError
from ...shm.layout import CHUNK_SIZE, CHUNKS_PER_PAGE, PAGE_SIZE
from ...workers.records import EEXTEND_SIZE, HEADER_SIZE
from ..region import MAX_PAGES, check_flags

ECREATE: Final = b"ECREATE\0"
UNSIZED: Final = b"UNSIZED\0"
EADD: Final = b"EADD\0\0\0\0"
EEXTEND: Final = b"EEXTEND\0"
UNMEASRD: Final = b"UNMEASRD"

MAX_RUNS: Final = 1 << 14  # as many regions as an .enclave file holds
MAX_PAGE: Final = HEADER_SIZE + CHUNKS_PER_PAGE * EEXTEND_SIZE  # the records of one page
BATCH: Final = 4 << 20  # bytes of the stream that are looked at together


class Run(NamedTuple):
    """Pages that follow one another with equal flags and chunks; ``at``: where the first EADD stands."""

    at: int
    offset: int
    pages: int
    flags: int
    measured: int  # mask of the chunks with EEXTEND
    unmeasured: int  # mask of the chunks with UNMEASRD

    @property
    def chunks(self) -> list[int]:
        """The chunks that have data, ascending, as they stand in the stream."""
        return [chunk for chunk in range(CHUNKS_PER_PAGE) if (self.measured | self.unmeasured) >> chunk & 1]

    @property
    def page_bytes(self) -> int:
        """Bytes of the stream for each page."""
        return HEADER_SIZE + len(self.chunks) * EEXTEND_SIZE

    @property
    def end(self) -> int:
        """Where the run ends in the stream."""
        return self.at + self.pages * self.page_bytes


class Stream:
    """The file, read where it is asked for and never mapped: memory stays as small as a batch."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self.size = os.fstat(fd).st_size

    def _odd(self, what: str, at: int, expected: object, found: object) -> NoReturn:
        raise ImageFormatError(what, file=self._name, offset=at, expected=expected, found=found)

    def read(self, at: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``at`` on, or ImageFormatError."""
        data = os.pread(self._fd, length, at)
        if len(data) != length:
            self._odd("truncated stream", at, f"{length} bytes", len(data))
        return data

    def ecreate(self) -> tuple[int, int]:
        """(SSAFRAMESIZE, SECS.SIZE) of the first record."""
        header = self.read(0, HEADER_SIZE)
        if header.startswith(UNSIZED):
            self._odd(
                "SGXS stream",
                0,
                "a sized stream (ECREATE)",
                "an unsized one (UNSIZED): it has no SECS.SIZE yet, so it cannot be measured",
            )
        if not header.startswith(ECREATE):
            self._odd("first record", 0, repr(ECREATE), repr(header[:8]))
        self._check_zeros("ECREATE", header, 0, 20)
        ssa_frame_size, size = _u32(header, 8), _u64(header, 12)
        if not ssa_frame_size:
            self._odd("ECREATE's SSAFRAMESIZE", 8, "at least one page", 0)
        if size & (size - 1) or not PAGE_SIZE <= size <= 1 << 63:
            self._odd("ECREATE's SIZE", 12, "a power of two, a page or more", hex(size))
        return ssa_frame_size, size

    def runs(self, size: int) -> Iterator[Run]:
        """The pages of the stream, whose offsets must stay below ``size`` and rise."""
        at, lowest = HEADER_SIZE, 0
        limit = min(size, MAX_PAGES * PAGE_SIZE)
        for _ in range(MAX_RUNS):
            if at >= self.size:
                return
            run = self._first_page(at, lowest, limit)
            run = run._replace(pages=self._count(run, limit))
            yield run
            at, lowest = run.end, run.offset + run.pages * PAGE_SIZE
        if at < self.size:
            self._odd("SGXS stream", at, f"at most {MAX_RUNS} runs of like pages", "more")

    def _first_page(self, at: int, lowest: int, limit: int) -> Run:
        """The page whose EADD stands at ``at``, with its chunks."""
        data = self.read(at, min(MAX_PAGE + HEADER_SIZE, self.size - at))
        self._check_header(data, at)
        if data[:8] != EADD:
            self._odd("record", at, repr(EADD), repr(data[:8]))
        self._check_zeros("EADD", data, at, 24)
        offset, flags = _u64(data, 8), _u64(data, 16)
        if offset % PAGE_SIZE or not lowest <= offset < limit:
            self._odd("EADD's offset", at, f"a page from {lowest:#x} on, below {limit:#x}", hex(offset))
        try:
            check_flags(flags, at)
        except ImageFormatError as error:
            self._odd(error.what, at, error.expected, error.found)
        masks = {EEXTEND: 0, UNMEASRD: 0}
        next_chunk, here = 0, HEADER_SIZE
        while here < len(data):
            tag = data[here : here + 8]
            if tag == EADD:
                break
            self._check_header(data[here : here + HEADER_SIZE], at + here)
            if tag not in masks:
                expected = [repr(known) for known in (EADD, EEXTEND, UNMEASRD)]
                self._odd("record", at + here, " or ".join(expected), repr(tag))
            chunk = self._chunk(data[here : here + HEADER_SIZE], at + here, offset, next_chunk)
            if here + EEXTEND_SIZE > len(data):
                self._odd("truncated record", at + here, f"{EEXTEND_SIZE} bytes", len(data) - here)
            masks[tag] |= 1 << chunk
            next_chunk = chunk + 1
            here += EEXTEND_SIZE
        return Run(at, offset, 1, flags, masks[EEXTEND], masks[UNMEASRD])

    def _chunk(self, header: bytes, at: int, page: int, lowest: int) -> int:
        """The number of a chunk. Each at most once, ascending: that is how an image's pages are measured."""
        tag = header[:8].rstrip(b"\0").decode()
        self._check_zeros(tag, header, at, 16)
        offset = _u64(header, 8)
        first, end = page + lowest * CHUNK_SIZE, page + PAGE_SIZE
        if offset % CHUNK_SIZE or not first <= offset < end:
            self._odd(f"{tag}'s offset", at, f"a chunk from {first:#x} on, below {end:#x}", hex(offset))
        return (offset - page) // CHUNK_SIZE

    def _check_header(self, header: bytes, at: int) -> None:
        if len(header) < HEADER_SIZE:
            self._odd("truncated record", at, f"{HEADER_SIZE} bytes", len(header))

    def _check_zeros(self, tag: str, header: bytes, at: int, used: int) -> None:
        """Behind its fields a header is zero. Other bytes there are hashed, and no image could give them."""
        padding = header[used:HEADER_SIZE]
        if any(padding):
            self._odd(f"{tag}'s padding", at + used, f"{len(padding)} zeros", padding.hex())

    def _count(self, run: Run, limit: int) -> int:
        """How many pages from the first page of ``run`` on have records like its own, at the next offsets."""
        most = min((self.size - run.at) // run.page_bytes, (limit - run.offset) // PAGE_SIZE)
        done, batch = 1, 1  # growing batches: a stream of short runs is not read again and again
        while done < most:
            count = min(batch, most - done)
            same = self._same(run, done, count)
            done += same
            if same < count:
                break
            batch = min(2 * batch, BATCH // run.page_bytes)
        # The last page may go on with chunks that the run's pages have not: then it is not one of them.
        end = run.at + done * run.page_bytes
        if done > 1 and end < self.size and self.read(end, min(8, self.size - end)) != EADD:
            done -= 1
        return done

    def _same(self, run: Run, first: int, count: int) -> int:
        """How many of ``count`` pages from page ``first`` on continue ``run``; headers alone are compared."""
        data = self.read(run.at + first * run.page_bytes, count * run.page_bytes)
        words = np.frombuffer(data, "<u8").reshape(count, -1)
        offsets = np.arange(count, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        offsets += np.uint64(run.offset + first * PAGE_SIZE)
        fits = _matches(words, 0, EADD, offsets) & (words[:, 2] == run.flags) & ~words[:, 3:8].any(axis=1)
        for number, chunk in enumerate(run.chunks):
            column = (HEADER_SIZE + number * EEXTEND_SIZE) // 8
            tag = EEXTEND if run.measured >> chunk & 1 else UNMEASRD
            fits &= _matches(words, column, tag, offsets + np.uint64(chunk * CHUNK_SIZE))
            fits &= ~words[:, column + 2 : column + 8].any(axis=1)
        return count if fits.all() else int(fits.argmin())


def _matches(words: NDArray[Any], column: int, tag: bytes, offsets: NDArray[Any]) -> NDArray[Any]:
    """Per page: has the header at ``column`` this tag, and the offset that the run goes on with?"""
    same: NDArray[Any] = (words[:, column] == _u64(tag, 0)) & (words[:, column + 1] == offsets)
    return same


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
