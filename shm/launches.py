"""The launch table: one slot a starting or running enclave, its claims, and how a slot opens and closes.

A *claim* gives its holder one pair of hash domains of one launch, or a few neighbouring pairs where each is
too little to be worth a claim (``group``). It is an open-file-description lock (``F_OFD_SETLK``) on a byte a
pair, so the kernel takes it back when its holder dies, at whatever instruction. Locks exclude each other only
between different descriptions: every role that claims opens its own (each worker, each host thread that
measures, each closer).

    open   range held: header, SMC reset, fault 0 -> generation (the launch exists) -> range given back
    claim  lock one byte -> look at the generation again -> work -> unlock
    close  generation 0 -> wake all -> take the whole range -> now nobody is between a check and a store
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import weakref
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np

from .dtypes import LAUNCH_DTYPE, SMC_PROGRESS_DTYPE
from .layout import (
    LAUNCH,
    LAUNCH_SLOT_SIZE,
    MAX_DOMAINS,
    MAX_PAIRS,
    PAGE_SIZE,
    SMC_PROGRESS,
    SMC_PROGRESS_AT,
)
from .segment import reopen
from .smc import Smc

CLAIM_BYTES: Final = 64  # lock bytes of one slot; pairs use the first MAX_PAIRS of them
_FLOCK = struct.Struct("hhqqi4x")


_NOTHING: Final[Mapping[int, bytes]] = MappingProxyType({})


class Launch(NamedTuple):
    """What a measurer needs to know of a launch. Pages and sizes as in :data:`enturbo.shm.layout.LAUNCH`."""

    generation: int
    scheme: int
    domains: int
    block: int
    first_page: int
    page_count: int
    size: int
    ssa_frame_size: int
    copy_mode: int
    group: int = 1  # pairs that one claim covers; a power of two

    @property
    def pairs(self) -> int:
        """Pairs of hash domains; one domain alone counts as a pair."""
        return (self.domains + 1) // 2

    @property
    def claims(self) -> int:
        """Claims of this launch."""
        return self.pairs // self.group

    @property
    def claim_domains(self) -> int:
        """Hash domains that one claim covers."""
        return min(2 * self.group, self.domains)


class LaunchTable:
    """All slots of a runtime, as one process sees them."""

    def __init__(self, buffer: memoryview, slots: int) -> None:
        self.slots = slots
        self._rows = np.ndarray((slots,), LAUNCH_DTYPE, buffer, 0, (LAUNCH_SLOT_SIZE,))
        self.generations: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["generation"]
        self.domains: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["domains"]
        self.measurers: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["measurers"]
        self.copy_aborted: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["copy_aborted"]
        self.copy_front: np.ndarray[Any, np.dtype[np.uint64]] = self._rows["copy_front"]
        self.fault: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["fault"]
        self.fault_reason: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["fault_reason"]
        self.copy_mode: np.ndarray[Any, np.dtype[np.uint32]] = self._rows["copy_mode"]
        # Rows that the holders of each claim have copied, slot by claim: a hint that spares looking at the
        # EPCM.
        self.copied: np.ndarray[Any, np.dtype[np.uint32]] = np.ndarray(
            (slots, MAX_PAIRS), "<u4", buffer, LAUNCH.offset("copied"), (LAUNCH_SLOT_SIZE, 4)
        )
        at = PAGE_SIZE + SMC_PROGRESS_AT
        self._progress = np.ndarray(
            (slots, MAX_DOMAINS), SMC_PROGRESS_DTYPE, buffer, at, (LAUNCH_SLOT_SIZE, SMC_PROGRESS.size)
        )
        self._smcs = [
            Smc(buffer[slot * LAUNCH_SLOT_SIZE + PAGE_SIZE : (slot + 1) * LAUNCH_SLOT_SIZE])
            for slot in range(slots)
        ]

    def smc(self, slot: int) -> Smc:
        """The slot's Shadow Measurement Cache."""
        return self._smcs[slot]

    def read(self, slot: int) -> Launch:
        """The slot's launch; its fields do not change while its generation stays the same."""
        row = self._rows[slot]
        return Launch(*(int(row[name]) for name in Launch._fields))

    def open_slots(self, worker: int = -1) -> list[tuple[int, int]]:
        """(generation, slot) of the open launches, oldest first; with ``worker`` those it may claim."""
        generations = self.generations.copy()
        slots = np.flatnonzero((generations != 0) & (self.measurers > worker))
        return sorted((int(generations[slot]), int(slot)) for slot in slots)

    def open_launch(
        self, slot: int, launch: Launch, claims: Claims, settled: Mapping[int, bytes] = _NOTHING
    ) -> None:
        """Host: make ``launch`` exist. ``claims`` must hold the slot's whole range.

        ``settled``: the digests of the domains that have no pages; nobody needs to claim them.
        The generation is stored last: a measurer that reads it finds all the rest in place. A host that
        dies before that store leaves a closed slot.
        """
        if int(self.generations[slot]) != 0:
            raise ValueError(f"slot {slot} is open")
        if not claims.holds_range(slot):
            raise ValueError(f"slot {slot} is opened without its range")
        row = self._rows[slot]
        for name in Launch._fields[1:]:
            row[name] = getattr(launch, name)
        row["measurers"] = 0
        row["copy_aborted"] = 0
        row["copy_front"] = 0
        row["fault"] = 0
        row["fault_reason"] = 0
        self.copied[slot] = 0
        self._smcs[slot].reset(
            scheme=launch.scheme,
            domains=launch.domains,
            block=launch.block,
            page_count=launch.page_count,
            generation=launch.generation,
        )
        self._smcs[slot].settle(settled, launch.generation)
        self.generations[slot] = launch.generation

    def close_launch(self, slot: int) -> None:
        """Host: no new claim is worked on from here. Then ring all and take the range."""
        self.generations[slot] = 0

    def total_progress(self) -> int:
        """Blocks released and hashed and rows copied in all slots: it changes while anybody works at all."""
        hashed, released = self._progress["blocks_hashed"], self._progress["blocks_released"]
        return sum(int(each.sum(dtype=np.int64)) for each in (hashed, released, self.copied))

    def report_fault(self, slot: int, generation: int, reason: int) -> None:
        """Measurer, holding a claim: the launch must be rejected. The reason first: who reads ``fault``
        finds it; two measurers at once may swap reasons, either of which is one."""
        self.fault_reason[slot] = reason
        self.fault[slot] = generation

    def drop(self) -> None:
        """Drop the views, so that the mapping can go."""
        self._smcs.clear()
        self._rows = np.empty(0, LAUNCH_DTYPE)
        self._progress = np.empty(0, SMC_PROGRESS_DTYPE)
        for name in _VIEWS:
            setattr(self, name, np.empty(0, np.uint32))


_VIEWS: Final = (
    *(
        "generations",
        "domains",
        "measurers",
        "copy_aborted",
        "copy_front",
        "fault",
        "fault_reason",
        "copy_mode",
    ),
    "copied",
)


class Claims:
    """Claims of one role, on an open file description of its own.

    The description dies with the process (or with :meth:`close`) and its locks with it. It must not cross a
    fork: a forked child would keep a dead holder's claim.
    """

    def __init__(self, fd: int) -> None:
        """``fd``: any descriptor of the control segment; it is reopened, not kept."""
        self._fd = reopen(fd, os.O_RDWR)
        self._ranges: set[int] = set()
        _descriptions.add(self)

    def claim(self, slot: int, number: int, group: int = 1) -> bool:
        """Take the claim ``number``, which covers ``group`` pairs; False when another description holds any
        of them."""
        return self._lock(fcntl.F_WRLCK, slot * CLAIM_BYTES + number * group, group)

    def give_back(self, slot: int, number: int, group: int = 1) -> None:
        """Give one claim back. The next holder sees all stores made before this."""
        self._lock(fcntl.F_UNLCK, slot * CLAIM_BYTES + number * group, group)

    def take_range(self, slot: int) -> bool:
        """Take all claims of the slot at once; False when anybody else holds one of them."""
        taken = self._lock(fcntl.F_WRLCK, slot * CLAIM_BYTES, MAX_PAIRS)
        if taken:
            self._ranges.add(slot)
        return taken

    def give_range(self, slot: int) -> None:
        """Give the slot's range back."""
        self._ranges.discard(slot)
        self._lock(fcntl.F_UNLCK, slot * CLAIM_BYTES, MAX_PAIRS)

    def holds_range(self, slot: int) -> bool:
        """Whether this role took the slot's range."""
        return slot in self._ranges

    def _lock(self, kind: int, start: int, length: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def fileno(self) -> int:
        """The description's descriptor, -1 when closed."""
        return self._fd

    def close(self) -> None:
        """Close the description; the kernel gives its claims back."""
        fd, self._fd = self._fd, -1
        self._ranges.clear()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_descriptions: weakref.WeakSet[Claims] = weakref.WeakSet()


def forget_claims() -> None:
    """In a forked child: close the copies of all descriptions. A lock stays as long as any copy is open, so
    the child would keep the claims of a parent that died."""
    for claims in list(_descriptions):
        claims.close()


def holds_claim(pid: int, slot: int) -> bool:
    """Whether process ``pid`` holds a claim of ``slot`` (read from its ``/proc/PID/fdinfo``).

    The kernel tells no pid for such locks, so the descriptors of known workers are asked instead.
    """
    first, last = slot * CLAIM_BYTES, slot * CLAIM_BYTES + MAX_PAIRS - 1
    base = f"/proc/{pid}/fdinfo"
    try:
        names = os.listdir(base)
    except OSError:
        return False
    for name in names:
        try:
            with open(f"{base}/{name}", encoding="ascii") as file:
                lines = file.readlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[:1] != ["lock:"] or "OFDLCK" not in words:
                continue
            start = int(words[-2])
            end = start if words[-1] == "EOF" else int(words[-1])
            if start <= last and end >= first:
                return True
    return False
