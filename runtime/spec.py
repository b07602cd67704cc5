"""What an enclave's process must know of its enclave: where its pages stand, and how accesses are gated.

Standard library only; the zygote imports this module.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, Final, Literal

from ..shm.layout import PAGE_SIZE

SECINFO_R: Final = 1
SECINFO_W: Final = 2
SECINFO_X: Final = 4
_RW: Final = SECINFO_R | SECINFO_W


GateMode = Literal["write", "execute"]
WrlockMode = Literal["wait", "shadow"]

# Gated enclaves are mapped here and nothing else is: the sealed process's filter knows them by this range.
EXTENT_BASE: Final = 0x1000_0000_0000
EXTENT_END: Final = 0x2000_0000_0000


@dataclass(frozen=True, order=True, slots=True)
class Run:
    """Pages that follow each other in the enclave and in its extent, with one set of SECINFO flags.

    ``linear`` and ``index`` are the first page's number from SECS.BASEADDR and in the extent; ``dynamic``
    pages are EAUG'd, not added; ``chunks`` is the mask of measured chunks; ``filled``: bytes are copied into
    them (the others are zero from the beginning).
    """

    linear: int
    index: int
    count: int
    flags: int
    dynamic: bool
    chunks: int
    filled: bool = True

    @property
    def gated(self) -> bool:
        """Whether anything is to be waited for: a copy, or a measurement."""
        return not self.dynamic and (self.filled or self.chunks != 0) and self.flags & _RW != 0

    @property
    def locked(self) -> bool:
        """Whether stores wait for the measurement (WRLOCK), where they do not go to a private copy."""
        return self.gated and self.chunks != 0 and self.flags & SECINFO_W != 0


@dataclass(frozen=True)
class EnclaveSpec:
    """What the enclave's process must know to map its pages. Times are seconds, the rest counts pages.

    ``first_page`` is the extent's first page in the EPC; ``page_count`` includes dynamic pages, which stand
    behind the ``stream_pages`` of the record stream. ``gate_timeout`` is what one access waits at most,
    where the gate is cooperative. ``wrlock``: whether a store to a page that is not measured waits, or goes
    to a private copy.
    """

    generation: int
    first_page: int
    page_count: int
    stream_pages: int
    runs: tuple[Run, ...]
    gate: GateMode = "write"
    gate_timeout: float = 30.0
    wrlock: WrlockMode = "wait"

    def to_message(self) -> list[Any]:
        """As plain lists, for a message."""
        return list(astuple(self))

    @classmethod
    def from_message(cls, message: list[Any]) -> EnclaveSpec:
        """The inverse of :meth:`to_message`."""
        generation, first, count, stream, runs, gate, timeout, wrlock = message
        runs = tuple(Run(*run) for run in runs)
        return cls(generation, first, count, stream, runs, gate, timeout, wrlock)

    @property
    def first_linear(self) -> int:
        """The lowest page of the enclave that is mapped."""
        return min(run.linear for run in self.runs)

    @property
    def span(self) -> int:
        """Bytes from there to the end of the highest."""
        return (max(run.linear + run.count for run in self.runs) - self.first_linear) * PAGE_SIZE


@dataclass(frozen=True)
class SealSpec:
    """How an enclave process is sealed.

    ``user_mode_only``: what userfaultfd may be had; ``features``: of it; ``gated``: whether there is anything
    left to gate (an enclave that is VERIFIED already is sealed alone). ``scratch``: the folder in which it
    may write after VERIFIED, empty for none; ``read``, ``write``: more paths of the policy.
    """

    user_mode_only: bool
    features: int
    gated: bool
    scratch: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()

    def to_message(self) -> list[Any]:
        """As plain lists, for a message."""
        return list(astuple(self))

    @classmethod
    def from_message(cls, message: list[Any]) -> SealSpec:
        """The inverse of :meth:`to_message`."""
        user_mode_only, features, gated, scratch, read, write = message
        return cls(user_mode_only, features, gated, scratch, tuple(read), tuple(write))
