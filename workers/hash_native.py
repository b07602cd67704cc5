"""The native hasher: a thin face over the optional C extension. Importing this may raise ImportError."""

from __future__ import annotations

from collections.abc import Sequence

from . import _sha256
from .sha256 import Chain, EaddSpan, Span


class NativeHasher:
    """Pages hashed in place, two chains in lockstep where there are two. One call is one C call.

    ``portable=True`` keeps to the C kernel that runs everywhere, whatever this processor can do.
    """

    name = "native"
    midstates = True

    def __init__(self, *, portable: bool = False) -> None:
        self._portable = portable
        self.kernel = "portable" if portable else _sha256.KERNEL
        self.lanes = 1 if self.kernel == "portable" else 2

    def start(self) -> Chain:
        """A new chain."""
        return _sha256.Chain(portable=self._portable)

    def resume(self, midstate: bytes, length: int) -> Chain:
        """The chain that exported ``midstate`` after ``length`` bytes."""
        return _sha256.Chain(midstate, length, self._portable)

    def extend(self, chains: Sequence[Chain], spans: Sequence[Span]) -> None:
        """Append each span's records to its chain. If it raises, no chain has changed."""
        _sha256.extend(chains, spans)

    def extend_eadd(self, chains: Sequence[Chain], spans: Sequence[EaddSpan]) -> None:
        """Append each span's EADDs to its chain. If it raises, no chain has changed."""
        _sha256.extend_eadd(chains, spans)
