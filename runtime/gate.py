"""The gates of the EPCM as the enclave's own process meets them, and the mapping of its pages.

Every access to enclave memory goes through a :class:`Gate`: a read waits until its pages are VALID, a write
also until their WRLOCK is off (the measurer has released them). There are two:

    Gate         cooperative: the code that runs in the enclave asks before it touches, so it orders honest
                 programs and stops nobody who takes addresses into their own hands
    KernelGate   enforced: the pages are under userfaultfd, and *any* access of this process sleeps in the
                 kernel until a process outside lets it through (:mod:`enturbo.runtime.pager`)

Nothing outside this module knows how a gate waits or where pages are mapped.

What depends on neither: pages without W are mapped privately from a descriptor that was opened read-only,
so no store of this process ever reaches them; the EPCM is mapped from such a descriptor too; and no
descriptor of either stays open. With ``wrlock="shadow"`` the measured pages that have W are mapped in that
way as well: a store makes a private copy, so nobody waits for the release and what is measured cannot change.
Standard library only; the zygote imports this module.
"""

from __future__ import annotations

import contextlib
import errno
import mmap as _mmap
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..shm import libc
from ..shm.errors import EnturboError, GateTimeout
from ..shm.layout import EPCM_ENTRY, PAGE_SIZE
from ..shm.mapping import HUGE_PAGE, reserve
from .spec import EXTENT_BASE, EXTENT_END, SECINFO_R, SECINFO_W, SECINFO_X, EnclaveSpec, Run

SPIN: Final = 50e-6  # seconds of looking again at once, before sleeping
SLEEP_MAX: Final = 1e-3  # the longest sleep between two looks, seconds

_WORDS: Final = EPCM_ENTRY.size // 4
_CHUNKS_SHIFT: Final = 8 * EPCM_ENTRY.offset("chunks")  # within word 0, which flags and chunks share
_GENERATION: Final = EPCM_ENTRY.offset("generation") // 4
_VALID: Final = EPCM_ENTRY.offset("valid") // 4
_RELEASED: Final = EPCM_ENTRY.offset("released") // 4
_LOOK: Final = 4096  # entries looked at together


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
        self._shadow = spec.wrlock == "shadow"
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
        self._shadowed = [run for run in self._runs if run.locked] if self._shadow else []
        self._pagemap = -1  # to be opened when it is needed

    def readable(self, offset: int, size: int) -> None:
        """Wait until ``size`` bytes at ``offset`` may be read."""
        seen = self._released if self._execute else self._valid
        for first, end in self._spans(offset, size, SECINFO_R):
            self._wait(seen, first, end, "read")

    def writable(self, offset: int, size: int) -> None:
        """Wait until ``size`` bytes at ``offset`` may be written."""
        # A private copy is made of the bytes that are there, so it needs them to be there; no more than that.
        seen = self._valid if self._shadow and not self._execute else self._released
        for first, end in self._spans(offset, size, SECINFO_W):
            self._wait(seen, first, end, "write")

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
        return sum(self._count(run, _PRESENT) for run in self._dynamic)

    @property
    def shadow(self) -> int:
        """Private copies that stores of this process have made so far (``wrlock="shadow"``), likewise."""
        return sum(self._count(run, _PRIVATE) for run in self._shadowed)

    def keep_pagemap(self, fd: int) -> None:
        """``fd`` is /proc/self/pagemap, which may be out of reach later; it stays the caller's."""
        self._pagemap = fd

    def _count(self, run: Run, kinds: bytes) -> int:
        """Pages of ``run`` whose pagemap entry has a top byte that ``kinds`` translates to 1."""
        page = (libc.address_of(self._memory) - self._base) // PAGE_SIZE + run.linear
        found = 0
        try:
            fd = self._pagemap if self._pagemap >= 0 else os.open("/proc/self/pagemap", os.O_RDONLY)
            try:
                for start in range(0, run.count, 1 << 16):
                    count = min(run.count - start, 1 << 16)
                    top = os.pread(fd, 8 * count, 8 * (page + start))[7::8]
                    found += top.translate(kinds).count(1)
            finally:
                if fd != self._pagemap:
                    os.close(fd)
        except OSError:
            return 0
        return found

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

    def _run_of(self, page: int) -> Run:
        """The run of a page of the extent."""
        return next(run for run in self._runs if run.index <= page < run.index + run.count)

    def _late(self, page: int, access: str) -> GateTimeout:
        words = self._words[page * _WORDS : (page + 1) * _WORDS].tolist()
        run = self._run_of(page)
        offset = (run.linear + page - run.index) * PAGE_SIZE
        missing = "released" if words[_VALID] == self._generation else "VALID"
        return GateTimeout(
            f"{access} at enclave offset {offset:#x}: its page was not {missing} after {self._timeout} s "
            f"(generation {self._generation}, entry has generation {words[_GENERATION]}, "
            f"valid {words[_VALID]}, released {words[_RELEASED]})"
        )


class KernelGate(Gate):
    """The same memory under userfaultfd: whoever touches a page that is not ready sleeps in the kernel.

    So there is nothing to wait for here. ``user_mode_only``: a system call on such a page fails with EFAULT
    where a plain access would sleep, so pages are touched before they are handed out.
    """

    def __init__(
        self,
        spec: EnclaveSpec,
        memory: memoryview,
        entries: memoryview,
        first_linear: int,
        *,
        user_mode_only: bool,
    ) -> None:
        super().__init__(spec, memory, entries, first_linear)
        self._touches = user_mode_only

    def readable(self, offset: int, size: int) -> None:
        """Only the flags are looked at."""
        for first, end in self._spans(offset, size, SECINFO_R):
            self._touch(first, end)

    def writable(self, offset: int, size: int) -> None:
        """Only the flags are looked at. ``user_mode_only``: the release is waited for as without a kernel."""
        for first, end in self._spans(offset, size, SECINFO_W):
            if self._touches and not self._shadow and self._run_of(first).locked:
                self._wait(self._released, first, end, "write")
            self._touch(first, end)

    def _touch(self, first: int, end: int) -> None:
        run = self._run_of(first)
        if self._touches and run.gated:
            start = (run.linear + first - run.index) * PAGE_SIZE - self._base
            bytes(self._memory[start : start + (end - first) * PAGE_SIZE : PAGE_SIZE])


# Bits 63, 62 and 61 of a pagemap entry: present, swapped out, a page of a file or of shared memory.
_PRESENT: Final = bytes(1 if top & 0xC0 else 0 for top in range(256))
_PRIVATE: Final = bytes(1 if top & 0xC0 and not top & 0x20 else 0 for top in range(256))


@dataclass(frozen=True)
class Mapped:
    """An enclave's pages as this process has them: address of page ``spec.first_linear``, and its entries."""

    address: int
    memory: memoryview
    entries: memoryview


def map_enclave(spec: EnclaveSpec, epc_rw: int, epc_ro: int, epcm_ro: int, *, fixed: bool) -> Mapped:
    """Map an enclave's pages and EPCM entries; the caller closes the three descriptors directly after.

    The linear range is reserved first and each run placed into it, so page offsets are what the image says.
    Its largest run stands at an address that allows huge pages, where the EPC has them: that run then costs a
    fault for two MiB. Children do not inherit the pages. ``fixed``: in the range from EXTENT_BASE on. Raises
    OSError, or EnturboError where pages are not 4 KiB.
    """
    if _mmap.PAGESIZE != PAGE_SIZE:
        raise EnturboError(
            f"enclaves need a kernel with {PAGE_SIZE}-byte pages, this one has {_mmap.PAGESIZE}"
        )
    first, span = spec.first_linear, spec.span
    largest = max(spec.runs, key=lambda run: 0 if run.dynamic else run.count)
    shift = spec.first_page + largest.index - (largest.linear - first)
    base = reserve(span, shift * PAGE_SIZE % HUGE_PAGE, EXTENT_BASE if fixed else None)
    if fixed and base + span > EXTENT_END:
        raise EnturboError(f"an enclave of {span} bytes is larger than what can be gated")
    for run in spec.runs:
        if run.count and run.flags & (SECINFO_R | SECINFO_W):
            address = base + (run.linear - first) * PAGE_SIZE
            shadow = spec.wrlock == "shadow" and run.locked
            _map_run(run, address, (spec.first_page + run.index) * PAGE_SIZE, epc_rw, epc_ro, shadow=shadow)
            if run.dynamic:
                # First touches are counted by page (EAUG).
                with contextlib.suppress(OSError):
                    libc.madvise(address, run.count * PAGE_SIZE, libc.MADV_NOHUGEPAGE)
    libc.madvise(base, span, libc.MADV_DONTFORK)
    return Mapped(base, libc.memory(base, span), _map_entries(spec, epcm_ro))


def _map_run(run: Run, address: int, offset: int, epc_rw: int, epc_ro: int, *, shadow: bool) -> None:
    """A page without W is never writable through the segment: private, and from a read-only descriptor,
    because mprotect may add WRITE to a shared mapping of a read-write one. Nor is a shadowed one: what this
    process stores goes to its own copy."""
    protection = libc.PROT_READ
    fd, flags = epc_ro, libc.MAP_PRIVATE
    if run.flags & SECINFO_W:
        protection |= libc.PROT_WRITE
        if not shadow:
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
