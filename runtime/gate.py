"""The gates of the EPCM as the enclave's own process applies them, and the mapping of its pages.

Every access to enclave memory goes through a :class:`Gate`: a read waits until its pages are VALID, a write
also until their WRLOCK is off (the measurer has released them). This one is *cooperative*: the code that
runs in the enclave asks before it touches, so it orders honest programs and stops nobody who takes addresses
into their own hands. Nothing outside this module knows how a gate waits or where pages are mapped, so one
enforced by the kernel can take its place.

What does not depend on honesty: pages without W are mapped privately from a descriptor that was opened
read-only, so no store of this process ever reaches them; the EPCM is mapped from such a descriptor too; and
no descriptor of either stays open. Standard library only; the zygote imports this module.
"""

from __future__ import annotations

import contextlib
import errno
import mmap as _mmap
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Final, Literal

from ..shm import libc
from ..shm.errors import EnturboError, GateTimeout
from ..shm.layout import EPCM_ENTRY, PAGE_SIZE
from ..shm.mapping import HUGE_PAGE, reserve

SECINFO_R: Final = 1
SECINFO_W: Final = 2
SECINFO_X: Final = 4

SPIN: Final = 50e-6  # seconds of looking again at once, before sleeping
SLEEP_MAX: Final = 1e-3  # the longest sleep between two looks, seconds

_WORDS: Final = EPCM_ENTRY.size // 4
_CHUNKS_SHIFT: Final = 8 * EPCM_ENTRY.offset("chunks")  # within word 0, which flags and chunks share
_GENERATION: Final = EPCM_ENTRY.offset("generation") // 4
_VALID: Final = EPCM_ENTRY.offset("valid") // 4
_RELEASED: Final = EPCM_ENTRY.offset("released") // 4
_LOOK: Final = 4096  # entries looked at together

GateMode = Literal["write", "execute"]


@dataclass(frozen=True, order=True, slots=True)
class Run:
    """Pages that follow each other in the enclave and in its extent, with one set of SECINFO flags.

    ``linear`` and ``index`` are the first page's number from SECS.BASEADDR and in the extent; ``dynamic``
    pages are EAUG'd, not added; ``chunks`` is the mask of measured chunks.
    """

    linear: int
    index: int
    count: int
    flags: int
    dynamic: bool
    chunks: int


@dataclass(frozen=True)
class EnclaveSpec:
    """What the enclave's process must know to map its pages. Times are seconds, the rest counts pages.

    ``first_page`` is the extent's first page in the EPC; ``page_count`` includes dynamic pages, which stand
    behind the ``stream_pages`` of the record stream. ``gate_timeout`` is what one access waits at most.
    """

    generation: int
    first_page: int
    page_count: int
    stream_pages: int
    runs: tuple[Run, ...]
    gate: GateMode = "write"
    gate_timeout: float = 30.0

    def to_message(self) -> list[Any]:
        """As plain lists, for a message."""
        return list(astuple(self))

    @classmethod
    def from_message(cls, message: list[Any]) -> EnclaveSpec:
        """The inverse of :meth:`to_message`."""
        generation, first, count, stream, runs, gate, timeout = message
        return cls(generation, first, count, stream, tuple(Run(*run) for run in runs), gate, timeout)


class Gate:
    """An enclave's memory, gated. Offsets and sizes are bytes from the enclave's base.

    ``memory`` spans the enclave from ``first_linear`` on, ``entries`` holds the EPCM entries of its extent.
    Raises ValueError for what is not in the enclave, PermissionError for pages whose flags forbid the
    access, GateTimeout past ``spec.gate_timeout``.
    """

    def __init__(self, spec: EnclaveSpec, memory: memoryview, entries: memoryview, first_linear: int) -> None:
        self._generation = spec.generation
        self._timeout = spec.gate_timeout
        self._execute = spec.gate == "execute"
        self._memory = memory
        self._base = first_linear * PAGE_SIZE
        self._words = entries.cast("B").cast("I")
        self._mine = memoryview(array("I", [spec.generation]) * _LOOK)
        self._runs = sorted(spec.runs)
        self._starts = [run.linear for run in self._runs]
        # What was seen open once stays open for this generation: one byte a page of the extent.
        self._valid = bytearray(spec.page_count)
        self._released = bytearray(spec.page_count)
        self._dynamic = [run for run in self._runs if run.dynamic]

    def readable(self, offset: int, size: int) -> None:
        """Wait until ``size`` bytes at ``offset`` may be read."""
        seen = self._released if self._execute else self._valid
        for first, end in self._spans(offset, size, SECINFO_R):
            self._wait(seen, first, end, "read")

    def writable(self, offset: int, size: int) -> None:
        """Wait until ``size`` bytes at ``offset`` may be written."""
        for first, end in self._spans(offset, size, SECINFO_W):
            self._wait(self._released, first, end, "write")

    def read_view(self, offset: int, size: int) -> memoryview:
        """A read-only view of ``size`` bytes, once they may be read."""
        self.readable(offset, size)
        return self._slice(offset, size).toreadonly()

    def write_view(self, offset: int, size: int) -> memoryview:
        """A writable view of ``size`` bytes, once they may be written."""
        self.writable(offset, size)
        return self._slice(offset, size)

    @property
    def eaug(self) -> int:
        """Dynamic pages that this process has touched so far: each was EAUG'd at its first touch.

        Counted in the page table (proc(5), pagemap), so it does not matter how they were touched; a read may
        map neighbours with it. 0 where the kernel does not tell.
        """
        touched = 0
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                for run in self._dynamic:
                    page = (libc.address_of(self._memory) - self._base) // PAGE_SIZE + run.linear
                    pagemap.seek(8 * page)
                    for start in range(0, run.count, 1 << 16):
                        top = pagemap.read(8 * min(run.count - start, 1 << 16))[7::8]
                        touched += len(top) - top.translate(_PRESENT).count(0)
        except OSError:
            return 0
        return touched

    def _slice(self, offset: int, size: int) -> memoryview:
        start = offset - self._base
        return self._memory[start : start + size] if size else self._memory[:0]

    def _spans(self, offset: int, size: int, needed: int) -> Iterator[tuple[int, int]]:
        """The pages of the access as (first, end) in the extent, one pair a run."""
        if offset < 0 or size < 0:
            raise ValueError(f"offset {offset} and size {size} must not be negative")
        page, last = offset // PAGE_SIZE, (offset + size - 1) // PAGE_SIZE
        while page <= last:
            at = bisect_right(self._starts, page) - 1
            run = self._runs[at] if at >= 0 else None
            if run is None or page >= run.linear + run.count:
                raise ValueError(f"no page of the enclave at offset {page * PAGE_SIZE:#x}")
            if not run.flags & needed:
                kind = "read" if needed == SECINFO_R else "written"
                raise PermissionError(
                    errno.EACCES, f"the page at enclave offset {page * PAGE_SIZE:#x} may not be {kind}"
                )
            first = run.index + page - run.linear
            end = min(run.index + run.count, first + last - page + 1)
            yield first, end
            page += end - first

    def _wait(self, seen: bytearray, first: int, end: int, access: str) -> None:
        """Return when every page of [first, end) is marked in ``seen``; pages are looked at in order."""
        page = seen.find(0, first, end)
        if page < 0:
            return
        began = stuck = time.monotonic()
        pause = SPIN
        while page >= 0:
            if self._look(seen, page, min(end, page + _LOOK)):
                page = seen.find(0, page, end)
                stuck, pause = 0.0, SPIN
                continue
            now = time.monotonic()
            if now - began > self._timeout:
                raise self._late(page, access)
            stuck = stuck or now
            if now - stuck > SPIN:
                time.sleep(pause)
                pause = min(2 * pause, SLEEP_MAX)

    def _look(self, seen: bytearray, first: int, end: int) -> bool:
        """Mark open pages from ``first`` on; False if not even that one is open.

        An open page never closes within its generation. VALID is read before the bytes are: the copier
        stores it after them, and x86-64 keeps both orders.
        """
        released = seen is self._released
        if not self._open(released, first, first + 1):
            return False
        # Whole spans are compared at once; one that is open in part is tried by halves.
        count = end - first
        while not self._open(released, first, first + count):
            count //= 2
        for marks in (self._valid, self._released) if released else (self._valid,):
            marks[first : first + count] = b"\1" * count
        return True

    def _open(self, released: bool, first: int, end: int) -> bool:
        mine = self._mine[: end - first]
        if self._field(_VALID, first, end) != mine or self._field(_GENERATION, first, end) != mine:
            return False
        if not released or self._field(_RELEASED, first, end) == mine:
            return True
        # Unmeasured pages have no WRLOCK. Pages of one run that share their first word share its mask.
        head = self._words[first * _WORDS]
        if head >> _CHUNKS_SHIFT:
            return False
        return end - first == 1 or self._field(0, first, end) == memoryview(
            array("I", [head]) * (end - first)
        )

    def _field(self, word: int, first: int, end: int) -> memoryview:
        return self._words[first * _WORDS + word : end * _WORDS : _WORDS]

    def _late(self, page: int, access: str) -> GateTimeout:
        words = self._words[page * _WORDS : (page + 1) * _WORDS].tolist()
        run = next(run for run in self._runs if run.index <= page < run.index + run.count)
        offset = (run.linear + page - run.index) * PAGE_SIZE
        missing = "released" if words[_VALID] == self._generation else "VALID"
        return GateTimeout(
            f"{access} at enclave offset {offset:#x}: its page was not {missing} after {self._timeout} s "
            f"(generation {self._generation}, entry has generation {words[_GENERATION]}, "
            f"valid {words[_VALID]}, released {words[_RELEASED]})"
        )


# Bits 63 and 62 of a pagemap entry: present, swapped out.
_PRESENT: Final = bytes(1 if top & 0xC0 else 0 for top in range(256))


def map_enclave(spec: EnclaveSpec, epc_rw: int, epc_ro: int, epcm_ro: int) -> Gate:
    """Map an enclave's pages and EPCM entries; the caller closes the three descriptors directly after.

    The linear range is reserved first and each run placed into it, so page offsets are what the image says.
    Its largest run stands at an address that allows huge pages, where the EPC has them: that run then costs a
    fault for two MiB. Children do not inherit the pages. Raises OSError, or EnturboError where pages are not
    4 KiB.
    """
    if _mmap.PAGESIZE != PAGE_SIZE:
        raise EnturboError(
            f"enclaves need a kernel with {PAGE_SIZE}-byte pages, this one has {_mmap.PAGESIZE}"
        )
    first = min(run.linear for run in spec.runs)
    span = (max(run.linear + run.count for run in spec.runs) - first) * PAGE_SIZE
    largest = max(spec.runs, key=lambda run: 0 if run.dynamic else run.count)
    shift = spec.first_page + largest.index - (largest.linear - first)
    base = reserve(span, shift * PAGE_SIZE % HUGE_PAGE)
    for run in spec.runs:
        if run.count and run.flags & (SECINFO_R | SECINFO_W):
            address = base + (run.linear - first) * PAGE_SIZE
            _map_run(run, address, (spec.first_page + run.index) * PAGE_SIZE, epc_rw, epc_ro)
            if run.dynamic:
                # First touches are counted by page (EAUG).
                with contextlib.suppress(OSError):
                    libc.madvise(address, run.count * PAGE_SIZE, libc.MADV_NOHUGEPAGE)
    libc.madvise(base, span, libc.MADV_DONTFORK)
    return Gate(spec, libc.memory(base, span), _map_entries(spec, epcm_ro), first)


def _map_run(run: Run, address: int, offset: int, epc_rw: int, epc_ro: int) -> None:
    """A page without W is never writable through the segment: private, and from a read-only descriptor,
    because mprotect may add WRITE to a shared mapping of a read-write one."""
    protection = libc.PROT_READ
    fd, flags = epc_ro, libc.MAP_PRIVATE
    if run.flags & SECINFO_W:
        protection |= libc.PROT_WRITE
        fd, flags = epc_rw, libc.MAP_SHARED
    executable = libc.PROT_EXEC if run.flags & SECINFO_X else 0
    size = run.count * PAGE_SIZE
    try:
        libc.mmap(address, size, protection | executable, flags | libc.MAP_FIXED, fd, offset)
    except PermissionError:
        # /dev/shm is often mounted noexec in containers. Python code needs no PROT_EXEC.
        if not executable:
            raise
        libc.mmap(address, size, protection, flags | libc.MAP_FIXED, fd, offset)


def _map_entries(spec: EnclaveSpec, epcm_ro: int) -> memoryview:
    start = spec.first_page * EPCM_ENTRY.size
    size = spec.page_count * EPCM_ENTRY.size
    offset = start - start % PAGE_SIZE
    length = -(-(start + size - offset) // PAGE_SIZE) * PAGE_SIZE
    address = libc.mmap(None, length, libc.PROT_READ, libc.MAP_SHARED, epcm_ro, offset)
    libc.madvise(address, length, libc.MADV_DONTFORK)
    return libc.memory(address + start - offset, size).toreadonly()
