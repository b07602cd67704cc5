"""Where an Open Enclave image's pages go, and what is written into them before they are measured.

::

    0             the segments, each from the page of its address to the page of its end      measured
    image_size    relocations                                                                 measured
                  heap                                                                        EADD alone
    per TCS:      guard . stack (0xCC) . guard . TCS . 2 x SSA . guard . TLS and thread data  measured

Guards are holes. A zero-base enclave has all of it from its start address on, and what counts from the base
of the enclave grows by that. Source: openenclave/openenclave, host/sgx/create.c and loadelf.c.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final

from ...shm.layout import PAGE_SIZE
from ..region import EXECUTE, MAX_PAGES, READ, TYPE_REG, TYPE_TCS, WRITE, Region, check_flags
from .elf import PF_R, PF_W, PF_X, Elf, Segment

SSA_FRAMES: Final = 2
CONTROL_PAGES: Final = 4  # TCS, two SSA frames, guard
THREAD_DATA_PAGES: Final = 1
GUARDS: Final = 2  # before and behind a stack
STACK_FILL: Final = 0xCCCCCCCC
MAX_TCS: Final = 1 << 12
MAX_SEGMENTS: Final = 1 << 10
_RW: Final = TYPE_REG | READ | WRITE

# State, flags, OSSA, CSSA, NSSA, OENTRY, AEP, OFSBASE, OGSBASE, FSLIMIT, GSLIMIT (Intel SDM Vol. 3D, "TCS").
_TCS: Final = struct.Struct("<QQQIIQQQQII")
_NO_LIMIT: Final = 0xFFFF_FFFF


def page_end(offset: int) -> int:
    """``offset`` up to a whole page."""
    return -(-offset // PAGE_SIZE) * PAGE_SIZE


def page_start(offset: int) -> int:
    """``offset`` down to a whole page."""
    return offset // PAGE_SIZE * PAGE_SIZE


class FlatImage:
    """The segments in one address space from 0 on, zeros between them, with patches over it.

    It is never one buffer: a segment without patches stays a view of the file, one with patches is copied
    as far as the file has bytes for it, and of the zeros behind that only pages with a patch exist.
    """

    def __init__(self, elf: Elf) -> None:
        self._elf = elf
        self.segments: Final = elf.loads
        self._check()
        self.size: Final = page_end(self.segments[-1].vaddr + self.segments[-1].memsz)
        self._patches: list[tuple[int, bytes]] = []

    def _check(self) -> None:
        """As the loader does: from address 0 on, rising, no two on one page, each with permissions."""
        elf, segments = self._elf, self.segments
        if not 1 <= len(segments) <= MAX_SEGMENTS:
            raise elf.error("PT_LOAD segments", elf.header("phoff"), f"1..{MAX_SEGMENTS}", len(segments))
        if segments[0].vaddr:
            raise elf.error("lowest p_vaddr", segments[0].offset, 0, hex(segments[0].vaddr))
        end = 0
        for segment in segments:
            what, at = f"segment {segment.number}'s", segment.offset
            if segment.filesz > segment.memsz:
                raise elf.error(f"{what} p_filesz", at, f"at most {segment.memsz:#x}", hex(segment.filesz))
            if page_start(segment.vaddr) < end:
                raise elf.error(f"{what} p_vaddr", at, f"a page from {end:#x} on", hex(segment.vaddr))
            end = segment.vaddr + segment.memsz
            if end > MAX_PAGES * PAGE_SIZE:
                raise elf.error(f"{what} end", at, f"at most {MAX_PAGES} pages", hex(end))
            if not segment.flags & (PF_R | PF_W | PF_X):
                raise elf.error(f"{what} p_flags", at, "R, W or X", segment.flags)
            check_flags(_flags(segment), at)
        if not end:
            raise elf.error("PT_LOAD segments", elf.header("phoff"), "at least a byte of memory", 0)
        # Patched segments are copied, so bytes of the file must not be in more than one of them.
        if (total := sum(segment.filesz for segment in segments)) > len(elf.data):
            raise elf.error("PT_LOAD segments", elf.header("phoff"), f"at most {len(elf.data)} bytes", total)

    def file_offset(self, rva: int, size: int) -> int | None:
        """Where ``size`` bytes at ``rva`` stand in the file; None if no segment has them from there."""
        for segment in self.segments:
            if segment.vaddr <= rva and rva + size <= segment.vaddr + segment.filesz:
                return segment.offset + rva - segment.vaddr
        return None

    def patch(self, rva: int, data: bytes) -> None:
        """Write ``data`` over the image. Later patches win, where they meet. Raises ImageFormatError."""
        if rva + len(data) > self.size:
            raise self._elf.error("patched variable's address", None, f"below {self.size:#x}", hex(rva))
        self._patches.append((rva, data))

    def regions(self, base: int) -> Iterator[Region]:
        """The segments' pages, ``base`` added to their offsets."""
        for segment in self.segments:
            for start, pages, content in self._runs(segment):
                yield Region(base + start, pages, _flags(segment), content, label=_label(segment))

    def _runs(self, segment: Segment) -> Iterator[tuple[int, int, memoryview | None]]:
        """(rva, pages, content) of a segment: what the file has, then zeros and patched pages in turn."""
        start, end = page_start(segment.vaddr), page_end(segment.vaddr + segment.memsz)
        filled = page_end(segment.vaddr + segment.filesz) if segment.filesz else start
        if filled > start:
            content = self._elf.segment_bytes(segment)
            if segment.vaddr > start or self._patched(start, filled):
                head = bytes(segment.vaddr - start)
                content = self._with_patches(start, bytearray().join((head, content)), filled)
            yield start, (filled - start) // PAGE_SIZE, content
        at = filled
        for page in sorted({page for rva, data in self._patches for page in _pages(rva, data)}):
            if not filled <= page < end:
                continue
            if page > at:
                yield at, (page - at) // PAGE_SIZE, None
            yield page, 1, self._with_patches(page, bytearray(), page + PAGE_SIZE)
            at = page + PAGE_SIZE
        if at < end:
            yield at, (end - at) // PAGE_SIZE, None

    def _patched(self, start: int, end: int) -> bool:
        return any(rva < end and start < rva + len(data) for rva, data in self._patches)

    def _with_patches(self, start: int, content: bytearray, end: int) -> memoryview:
        """``content``, which begins at ``start``, with the patches up to ``end`` in it."""
        content.extend(bytes(end - start - len(content)))
        for rva, data in self._patches:
            first, last = max(rva, start), min(rva + len(data), end)
            if first < last:
                content[first - start : last - start] = data[first - rva : last - rva]
        return memoryview(content).toreadonly()


def _pages(rva: int, data: bytes) -> range:
    """The pages that a patch touches."""
    return range(page_start(rva), page_end(rva + len(data)), PAGE_SIZE)


def _flags(segment: Segment) -> int:
    bits = ((PF_R, READ), (PF_W, WRITE), (PF_X, EXECUTE))
    return TYPE_REG | sum(bit for flag, bit in bits if segment.flags & flag)


def _label(segment: Segment) -> str:
    letters = " ".join(name for name, bit in (("R", PF_R), ("W", PF_W), ("X", PF_X)) if segment.flags & bit)
    return f"PT_LOAD {segment.number} ({letters})"


@dataclass(frozen=True)
class Layout:
    """What the pages are made of. ``start``: of the image in the enclave, 0 unless it is a zero-base one."""

    flat: FlatImage
    relocations: bytes  # whole pages
    heap_pages: int
    stack_pages: int
    tcs_count: int
    tls_pages: int
    entry: int
    start: int = 0

    @property
    def thread_data(self) -> int:
        """Pages from a TCS to its thread data, behind the thread-local variables."""
        return self.tls_pages + CONTROL_PAGES

    @property
    def end(self) -> int:
        """Behind the last page, guards included, without ``start``; bytes."""
        thread = GUARDS + self.stack_pages + self.thread_data + THREAD_DATA_PAGES
        return (
            self.flat.size + len(self.relocations) + (self.heap_pages + self.tcs_count * thread) * PAGE_SIZE
        )

    @property
    def enclave_size(self) -> int:
        """What ``.oeinfo`` is told; SECS.SIZE, too, unless it is a zero-base enclave."""
        return _power_of_two(self.end)

    @property
    def size(self) -> int:
        """SECS.SIZE."""
        return _power_of_two(self.start + self.end)

    def regions(self) -> Iterator[Region]:
        """All pages in EADD order. Raises ImageFormatError for counts that no enclave can have."""
        yield from self.flat.regions(self.start)
        at = self.start + self.flat.size
        if self.relocations:
            yield Region(
                at,
                len(self.relocations) // PAGE_SIZE,
                TYPE_REG | READ,
                self.relocations,
                label="relocations",
            )
            at += len(self.relocations)
        if self.heap_pages:
            yield Region(at, self.heap_pages, _RW, measured=False, label="heap")
            at += self.heap_pages * PAGE_SIZE
        for number in range(self.tcs_count):
            at = yield from self._thread(number, at)

    def _thread(self, number: int, at: int) -> Generator[Region, None, int]:
        """The pages of one thread from ``at`` on; returns where the next one begins."""
        at += PAGE_SIZE  # guard
        if self.stack_pages:
            yield Region(at, self.stack_pages, _RW, fill=STACK_FILL, label=f"stack {number}")
        at += self.stack_pages * PAGE_SIZE + PAGE_SIZE  # guard
        yield Region(at, 1, TYPE_TCS, self._tcs(at), label=f"TCS {number}")
        yield Region(at + PAGE_SIZE, SSA_FRAMES, _RW, label=f"SSA {number}")
        at += CONTROL_PAGES * PAGE_SIZE  # the last of which is a guard
        pages = self.tls_pages + THREAD_DATA_PAGES
        yield Region(at, pages, _RW, label=f"TLS and thread data {number}")
        return at + pages * PAGE_SIZE

    def _tcs(self, at: int) -> bytes:
        """A TCS; its addresses count from the base of the enclave, and so does ``at``."""
        thread_data = at + self.thread_data * PAGE_SIZE
        entry = (self.start + self.entry) % (1 << 64)
        return _TCS.pack(
            *(0, 0, at + PAGE_SIZE, 0, SSA_FRAMES, entry, 0, thread_data, thread_data, _NO_LIMIT, _NO_LIMIT)
        )


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
