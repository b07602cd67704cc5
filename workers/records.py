"""Measurement records, byte for byte: ECREATE, EADD, EEXTEND of SGX, HASHDOM and SMCMERGE of ``enturbo``.

Encoder and decoder, standard library only and plainly written: every faster path is checked against this one.
All integers are little-endian, all records whole 64-byte blocks (Intel SDM Vol. 3D: ECREATE, EADD, EEXTEND).

    sgx       MRENCLAVE = SHA-256(ECREATE . page records in EADD order)
    enturbo   h_d       = SHA-256(HASHDOM(d) . records of the pages with HASH_DOM = d, in EADD order)
              MRENCLAVE = SHA-256(ECREATE . SMCMERGE . h_0 ... h_{D-1})

That the page sequence can be read back from the hashed bytes is why ``enturbo`` is as strong as the single
chain; :mod:`enturbo.workers.decoder` does it, :mod:`enturbo.workers.collision` turns it into an extractor.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..shm.layout import (
    ALL_CHUNKS,
    CHUNK_SIZE,
    CHUNKS_PER_PAGE,
    MAX_BLOCK,
    MAX_DOMAINS,
    PAGE_SIZE,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HEADER_SIZE: Final = 64
EEXTEND_SIZE: Final = HEADER_SIZE + CHUNK_SIZE
VERSION: Final = 1

_ECREATE = struct.Struct("<8sIQ44x")
_EADD = struct.Struct("<8sQQ40x")
_EEXTEND = struct.Struct("<8sQ48x")
_HASHDOM = struct.Struct("<8sIIII40x")
_SMCMERGE = struct.Struct("<8sQIII36x")

Hash = Callable[[bytes], bytes]


def sha256(message: bytes) -> bytes:
    """SHA-256 (FIPS 180-4) of ``message``: 32 bytes."""
    return hashlib.sha256(message).digest()


# ---- encoder --------------------------------------------------------------------------------------------


def ecreate(ssa_frame_size: int, size: int) -> bytes:
    """The ECREATE record. ``ssa_frame_size`` in pages, ``size`` (SECS.SIZE) in bytes."""
    return _ECREATE.pack(b"ECREATE", ssa_frame_size, size)


def eadd(offset: int, flags: int) -> bytes:
    """The EADD record of the page at byte ``offset`` from SECS.BASEADDR, with SECINFO.FLAGS ``flags``."""
    return _EADD.pack(b"EADD", offset, flags)


def eextend(offset: int) -> bytes:
    """The header of an EEXTEND of the chunk at byte ``offset``; the chunk's 256 bytes follow it."""
    return _EEXTEND.pack(b"EEXTEND", offset)


def hashdom(domain: int, domains: int, block: int) -> bytes:
    """The record that opens the stream of hash domain ``domain``."""
    check_scheme_params(domains, block)
    if not 0 <= domain < domains:
        raise ValueError(f"hash domain {domain} of {domains}")
    return _HASHDOM.pack(b"HASHDOM", domain, domains, block, VERSION)


def smcmerge(page_count: int, domains: int, block: int) -> bytes:
    """The record that opens the merge, after ECREATE."""
    check_scheme_params(domains, block)
    return _SMCMERGE.pack(b"SMCMERGE", page_count, domains, block, VERSION)


def page_records(linear_page: int, flags: int, chunks: int, data: ReadableBuffer) -> bytes:
    """EADD and the EEXTENDs of the chunks set in ``chunks`` (bit 0: the first 256 bytes), ascending.

    ``linear_page`` counts pages from SECS.BASEADDR. ``data`` is the page's 4096 bytes; it may be shorter only
    if no chunk is measured. Raises ValueError otherwise.
    """
    if not 0 <= chunks <= ALL_CHUNKS:
        raise ValueError(f"chunk mask {chunks:#x} is not 16 bits")
    view = memoryview(data).cast("B")
    if chunks and len(view) != PAGE_SIZE:
        raise ValueError(f"a measured page is {PAGE_SIZE} bytes, got {len(view)}")
    offset = linear_page * PAGE_SIZE
    parts: list[bytes | memoryview] = [eadd(offset, flags)]
    for at in chunk_offsets(chunks):
        parts += [eextend(offset + at), view[at : at + CHUNK_SIZE]]
    return b"".join(parts)


def chunk_offsets(chunks: int) -> Iterator[int]:
    """Byte offsets in the page of the chunks set in ``chunks``, ascending."""
    return (CHUNK_SIZE * bit for bit in range(CHUNKS_PER_PAGE) if chunks >> bit & 1)


# ---- the scheme -----------------------------------------------------------------------------------------


def check_scheme_params(domains: int, block: int) -> None:
    """Raise ValueError unless D and B are powers of two with D in 1..32 and B in 1..1024."""
    for name, value, limit in (("domains", domains, MAX_DOMAINS), ("block", block, MAX_BLOCK)):
        if not 1 <= value <= limit or value & (value - 1):
            raise ValueError(f"{name} must be a power of two from 1 to {limit}, got {value}")


def hash_dom(page: int, domains: int, block: int) -> int:
    """The hash domain of the page added as number ``page``, from 0."""
    return page // block % domains


def domain_blocks(page_count: int, domain: int, domains: int, block: int) -> int:
    """How many blocks of ``block`` pages (the last may be short) domain ``domain`` has."""
    blocks = -(-page_count // block)
    return max(0, -(-(blocks - domain) // domains))


def merge_preimage(
    ecreate: bytes, page_count: int, domains: int, block: int, digests: Sequence[bytes]
) -> bytes:
    """What the root hashes: ECREATE, SMCMERGE and the digests in domain order."""
    if len(digests) != domains:
        raise ValueError(f"{domains} hash domains, but {len(digests)} digests")
    return ecreate + smcmerge(page_count, domains, block) + b"".join(digests)


def merge(
    ecreate: bytes,
    page_count: int,
    domains: int,
    block: int,
    digests: Sequence[bytes],
    sha256: Hash = sha256,
) -> bytes:
    """MRENCLAVE of scheme ``enturbo`` from the digests of its domains."""
    return sha256(merge_preimage(ecreate, page_count, domains, block, digests))


# ---- records as values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ecreate:
    """``ssa_frame_size`` in pages, ``size`` in bytes."""

    ssa_frame_size: int
    size: int

    def encode(self) -> bytes:
        """The record's bytes."""
        return ecreate(self.ssa_frame_size, self.size)


@dataclass(frozen=True)
class Eadd:
    """``offset`` in bytes from SECS.BASEADDR, ``flags`` as SECINFO.FLAGS."""

    offset: int
    flags: int

    def encode(self) -> bytes:
        """The record's bytes."""
        return eadd(self.offset, self.flags)


@dataclass(frozen=True)
class Eextend:
    """``offset`` in bytes from SECS.BASEADDR, ``data`` the 256 bytes there."""

    offset: int
    data: bytes

    def encode(self) -> bytes:
        """The record's bytes, data included."""
        return eextend(self.offset) + self.data


@dataclass(frozen=True)
class Hashdom:
    """Domain ``domain`` of ``domains``, ``block`` pages a block."""

    domain: int
    domains: int
    block: int

    def encode(self) -> bytes:
        """The record's bytes."""
        return hashdom(self.domain, self.domains, self.block)


@dataclass(frozen=True)
class Smcmerge:
    """The merge of ``domains`` digests over ``page_count`` pages, ``block`` pages a block."""

    page_count: int
    domains: int
    block: int

    def encode(self) -> bytes:
        """The record's bytes."""
        return smcmerge(self.page_count, self.domains, self.block)


Record = Ecreate | Eadd | Eextend | Hashdom | Smcmerge


def encode_stream(stream: Sequence[Record]) -> bytes:
    """The bytes of a list of records; ``decoder.decode_stream`` reads them back."""
    return b"".join(record.encode() for record in stream)
