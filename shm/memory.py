"""The shared memory of one runtime as one process maps it: EPC, EPCM and the launch table with its SMCs."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Self

import numpy as np

from .epc import Epc
from .epcm import Epcm
from .launches import LaunchTable
from .layout import ARENA, EPCM_ENTRY, LAUNCH_SLOT_SIZE, PAGE_SIZE
from .segment import Segment

DEFAULT_SLOTS: Final = 128


class MemoryFds(NamedTuple):
    """Descriptors and sizes (bytes) that let another process map the same memory."""

    epc: int
    epc_size: int
    epcm: int
    epcm_size: int
    control: int
    control_size: int


class Memory:
    """Three segments: ``epc`` pages, ``epcm`` entries, ``launches`` (launch table and SMCs)."""

    def __init__(self, epc: Segment, epcm: Segment, control: Segment) -> None:
        self.epc_segment, self.epcm_segment, self.control_segment = epc, epcm, control
        self.epc = Epc(epc)
        self.epcm = Epcm(epcm.view, self.epc.page_count)
        slots = control.size // LAUNCH_SLOT_SIZE  # the page behind them is less than one
        self.launches = LaunchTable(control.view, slots)
        at = slots * LAUNCH_SLOT_SIZE + ARENA.offset("allocated")
        self._allocated: np.ndarray[Any, np.dtype[np.uint64]] = np.frombuffer(control.view, "<u8", 1, at)

    @property
    def epc_allocated(self) -> int:
        """Bytes of the EPC, from its start, that any process may touch."""
        return int(self._allocated[0])

    def allocate_step(self) -> bool:
        """The arena's owner: allocate the next stretch of the EPC and tell everybody; False when all is.

        The number is stored after the pages are there, so whoever reads it may touch them. An owner that
        dies in between leaves pages that nobody touches. Raises SharedMemoryFull.
        """
        more = self.epc_segment.allocate_step()
        self._allocated[0] = self.epc_segment.allocated
        return more

    @classmethod
    def create(cls, epc_pages: int, slots: int = DEFAULT_SLOTS) -> Self:
        """New segments. EPCM and launch table are allocated here, the arena in steps by its owner.

        Raises :class:`~enturbo.shm.errors.SharedMemoryFull`.
        """
        made: list[Segment] = []
        try:
            for size, whole in (
                (epc_pages * PAGE_SIZE, False),
                (epc_pages * EPCM_ENTRY.size, True),
                (slots * LAUNCH_SLOT_SIZE + ARENA.size, True),
            ):
                made.append(Segment.create(size, allocate=whole))
            return cls(*made)
        except BaseException:
            for segment in made:
                segment.close()
            raise

    @classmethod
    def attach(cls, fds: MemoryFds) -> Self:
        """Map the memory that another process created; takes the descriptors."""
        return cls(
            Segment.attach(fds.epc, fds.epc_size),
            Segment.attach(fds.epcm, fds.epcm_size),
            Segment.attach(fds.control, fds.control_size),
        )

    def fds(self) -> MemoryFds:
        """What :meth:`attach` needs; the descriptors stay this object's."""
        return MemoryFds(
            self.epc_segment.fd,
            self.epc_segment.size,
            self.epcm_segment.fd,
            self.epcm_segment.size,
            self.control_segment.fd,
            self.control_segment.size,
        )

    def close(self) -> None:
        """Drop all views, then the mappings and descriptors."""
        self._allocated = np.empty(0, np.uint64)
        self.launches.drop()
        self.epcm.close()
        self.epc.close()
        self.epcm_segment.close()
        self.control_segment.close()
