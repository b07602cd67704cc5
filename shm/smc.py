"""The Shadow Measurement Cache: 4096 bytes for one starting enclave, whatever its size.

Per hash domain it holds two copies, A and B, of the newest *result*: the SHA-256 midstate over the domain's
first n blocks, or the final digest. The holder of the domain's claim writes the copy that is not the newest
valid one (A if there is none): body, sequence, and the checksum last. A writer that is killed between any
two bytes of that leaves a copy whose checksum fails, and the other copy as it was. The checksum is seeded
with the launch's generation, so that a late write of an earlier launch is not taken for this one's.

Per block the order is: result -> blocks released -> pages released. The other way round, a crash would need
the bytes of a page again that the enclave has written since.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import xxhash

from .dtypes import SMC_PROGRESS_DTYPE, SMC_RESULT_DTYPE
from .layout import (
    FINAL_BIT,
    MAX_DOMAINS,
    SMC_HEADER,
    SMC_MAGIC,
    SMC_PROGRESS_AT,
    SMC_RESULT,
    SMC_RESULTS_AT,
    SMC_SIZE,
    SMC_VERSION,
)

_BODY = struct.Struct("<32sQI")
_CHECKSUM = struct.Struct("<I")
_PAIR = struct.Struct("<32sQII32sQII")  # copies A and B
HEADER_LENGTH: Final = 64  # bytes hashed where nothing but the domain's first record was
_HEADER = struct.Struct("<QIIIIQI")


def checksum_of(body: bytes | memoryview, generation: int) -> int:
    """What stands behind a result of the launch ``generation``."""
    return int(xxhash.xxh32_intdigest(body, generation))


class Result(NamedTuple):
    """A domain's newest valid result.

    ``state`` is the midstate (eight little-endian u32) or, when ``final``, the digest; ``length`` counts the
    bytes hashed; ``blocks`` the domain's blocks that are included; ``copy`` is 0 for A and 1 for B.
    """

    state: bytes
    length: int
    final: bool
    blocks: int
    copy: int


class Header(NamedTuple):
    """The SMC's header as the host wrote it when it opened the launch."""

    magic: int
    version: int
    scheme: int
    domains: int
    block: int
    page_count: int
    generation: int


class Smc:
    """One launch's SMC page. Written by the holders of its claims, reset by the host under the range."""

    def __init__(self, buffer: memoryview) -> None:
        if len(buffer) != SMC_SIZE:
            raise ValueError(f"the SMC is {SMC_SIZE} bytes, not {len(buffer)}")
        self._buffer = buffer
        progress = np.frombuffer(buffer, SMC_PROGRESS_DTYPE, MAX_DOMAINS, SMC_PROGRESS_AT)
        self._progress = progress
        # One aligned u32 a domain, read by everybody that looks for work.
        self.released: np.ndarray[Any, np.dtype[np.uint32]] = progress["blocks_released"]
        self.hashed: np.ndarray[Any, np.dtype[np.uint32]] = progress["blocks_hashed"]

    def reset(self, *, scheme: int, domains: int, block: int, page_count: int, generation: int) -> None:
        """Host, holding the claim range of a closed launch: nothing measured, nothing released."""
        self._buffer[:] = bytes(SMC_SIZE)
        _HEADER.pack_into(
            self._buffer, 0, SMC_MAGIC, SMC_VERSION, scheme, domains, block, page_count, generation
        )

    def header(self) -> Header:
        """The header; anyone may read it while the launch is open."""
        return Header(*_HEADER.unpack_from(self._buffer, 0))

    def newest(self, domain: int, generation: int) -> Result | None:
        """The newest copy whose checksum holds under ``generation``, or None."""
        # The copies stand side by side, and mostly the newer one is whole: one look at both, one checksum.
        at = SMC_RESULTS_AT + 2 * domain * SMC_RESULT.size
        copies = _PAIR.unpack_from(self._buffer, at)
        for copy in (0, 1) if copies[2] >= copies[6] else (1, 0):
            state, length, sequence, checksum = copies[4 * copy : 4 * copy + 4]
            if sequence == 0:
                continue
            begin = at + copy * SMC_RESULT.size
            if checksum == checksum_of(self._buffer[begin : begin + _BODY.size], generation):
                return Result(state, length & ~FINAL_BIT, bool(length & FINAL_BIT), sequence - 1, copy)
        return None

    def publish(
        self, domain: int, generation: int, result: Result | None, state: bytes, length: int,
        *, blocks: int, final: bool,
    ) -> Result:  # fmt: skip
        """Holder of the claim: make a result the newest one; ``result`` is what :meth:`newest` gave.

        ``generation`` is the one that was checked after the claim, never read again: a launch that closed
        since then gets a checksum that fails.
        """
        copy = 1 - result.copy if result is not None else 0
        at = SMC_RESULTS_AT + (2 * domain + copy) * SMC_RESULT.size
        body = _BODY.pack(state, length | (FINAL_BIT if final else 0), blocks + 1)
        self._buffer[at : at + _BODY.size] = body
        # Killed before the next line: this copy fails its checksum, the other one stays the newest.
        _CHECKSUM.pack_into(self._buffer, at + _BODY.size, checksum_of(body, generation))
        return Result(state, length, final, blocks, copy)

    def settle(self, digests: Mapping[int, bytes], generation: int) -> None:
        """Host, holding the claim range of a launch that is not open yet: final results of domains that have
        no pages, into copy A."""
        for domain, digest in digests.items():
            at = SMC_RESULTS_AT + 2 * domain * SMC_RESULT.size
            body = _BODY.pack(digest, HEADER_LENGTH | FINAL_BIT, 1)
            self._buffer[at : at + len(body)] = body
            _CHECKSUM.pack_into(self._buffer, at + len(body), checksum_of(body, generation))

    def final_digests(self, domains: int, generation: int) -> list[bytes | None]:
        """The final digest of each domain; None where the newest valid result is none.

        As :meth:`newest` for all at once: a final result does not change any more.
        """
        rows = np.frombuffer(self._buffer, SMC_RESULT_DTYPE, 2 * domains, SMC_RESULTS_AT)
        lengths, sequences, checksums = (rows[name].tolist() for name in ("length", "sequence", "checksum"))
        digests: list[bytes | None] = []
        for domain in range(domains):
            row = 2 * domain + (sequences[2 * domain] < sequences[2 * domain + 1])
            at = SMC_RESULTS_AT + row * SMC_RESULT.size
            body = self._buffer[at : at + _BODY.size]
            if lengths[row] & FINAL_BIT and checksums[row] == checksum_of(body, generation):
                digests.append(bytes(body[:32]))
            else:
                newest = self.newest(domain, generation)  # the other copy may be a whole one
                digests.append(newest.state if newest is not None and newest.final else None)
        return digests

    def raise_released(self, domain: int, blocks: int, worker: int, incarnation: int) -> None:
        """Holder of the claim, after the result that covers them and before the pages are released."""
        progress = self._progress[domain]
        progress["worker"] = worker
        progress["incarnation"] = incarnation
        self.released[domain] = blocks

    def blocks_released(self, domain: int) -> int:
        """Blocks of the domain whose release has begun; every newer result covers at least these."""
        return int(self.released[domain])


assert SMC_HEADER.size + MAX_DOMAINS * (16 + 2 * 48) <= SMC_SIZE
