"""Reading records back: from hashed bytes to records, from domain streams to the page sequence.

The other direction of :mod:`enturbo.workers.records`. It is strict: what it accepts, the encoder reproduces
byte for byte, so two different page sequences never share their streams. That is the heart of the argument
that scheme ``enturbo`` is as collision resistant as SHA-256.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..shm.errors import ImageFormatError
from ..shm.layout import CHUNK_SIZE, PAGE_SIZE
from . import records
from .records import Eadd, Ecreate, Eextend, Hash, Hashdom, Record, Smcmerge

_TAGS: Final = (b"ECREATE\0", b"EADD\0\0\0\0", b"EEXTEND\0", b"HASHDOM\0", b"SMCMERGE")


@dataclass(frozen=True)
class Page:
    """One page of an enclave as far as it is measured.

    ``offset`` in bytes from SECS.BASEADDR; ``flags`` SECINFO.FLAGS; ``chunks`` pairs of (number 0..15, 256
    bytes), ascending.
    """

    offset: int
    flags: int
    chunks: tuple[tuple[int, bytes], ...] = ()

    def encode(self) -> bytes:
        """Its EADD and EEXTEND records."""
        stream: list[Record] = [Eadd(self.offset, self.flags)]
        stream += [Eextend(self.offset + number * CHUNK_SIZE, data) for number, data in self.chunks]
        return records.encode_stream(stream)


def decode_stream(stream: bytes) -> list[Record]:
    """The records in ``stream``. Raises ImageFormatError with the offset of the first that is none."""
    found: list[Record] = []
    at = 0
    while at < len(stream):
        record, size = _decode_one(stream, at)
        found.append(record)
        at += size
    return found


def _decode_one(stream: bytes, at: int) -> tuple[Record, int]:
    header = stream[at : at + records.HEADER_SIZE]
    if len(header) < records.HEADER_SIZE:
        raise ImageFormatError(
            "truncated record", offset=at, expected=f"{records.HEADER_SIZE} bytes", found=f"{len(header)}"
        )
    record: Record
    size = records.HEADER_SIZE
    version = records.VERSION
    match header[:8]:
        case b"ECREATE\0":
            record = Ecreate(*struct.unpack_from("<IQ", header, 8))
        case b"EADD\0\0\0\0":
            record = Eadd(*struct.unpack_from("<QQ", header, 8))
        case b"EEXTEND\0":
            size = records.EEXTEND_SIZE
            data = stream[at + records.HEADER_SIZE : at + size]
            if len(data) < CHUNK_SIZE:
                raise ImageFormatError(
                    "truncated EEXTEND", offset=at, expected=f"{CHUNK_SIZE} data bytes", found=f"{len(data)}"
                )
            record = Eextend(struct.unpack_from("<Q", header, 8)[0], data)
        case b"HASHDOM\0":
            *numbers, version = struct.unpack_from("<IIII", header, 8)
            record = _checked(at, Hashdom, numbers)
        case b"SMCMERGE":
            *numbers, version = struct.unpack_from("<QIII", header, 8)
            record = _checked(at, Smcmerge, numbers)
        case tag:
            raise ImageFormatError("no record", offset=at, expected=f"one of {_TAGS}", found=tag)
    if version != records.VERSION:
        raise ImageFormatError("scheme version", offset=at, expected=records.VERSION, found=version)
    encoded = record.encode()[: records.HEADER_SIZE]
    if encoded != header:  # only padding is left to differ
        first = next(i for i in range(records.HEADER_SIZE) if encoded[i] != header[i])
        raise ImageFormatError("padding is not zero", offset=at + first, expected=0, found=header[first])
    return record, size


def _checked(at: int, make: Callable[..., Hashdom | Smcmerge], numbers: list[int]) -> Hashdom | Smcmerge:
    record = make(*numbers)
    try:
        record.encode()
    except ValueError as error:
        raise ImageFormatError(f"scheme parameters: {error}", offset=at) from error
    return record


def decode_pages(stream: bytes) -> list[Page]:
    """The pages of a run of EADD and EEXTEND records (a scheme-``sgx`` stream after its ECREATE)."""
    return _pages(decode_stream(stream), 0)


def _pages(stream: Sequence[Record], at: int) -> list[Page]:
    """``at``: the byte offset of the first record, for messages."""
    pages: list[Page] = []
    chunks: list[tuple[int, bytes]] = []
    for record in stream:
        match record:
            case Eadd(offset, flags):
                if offset % PAGE_SIZE:
                    raise ImageFormatError(
                        "EADD", offset=at, expected="a page-aligned offset", found=hex(offset)
                    )
                _close(pages, chunks)
                pages.append(Page(offset, flags))
                at += records.HEADER_SIZE
            case Eextend(offset, data):
                base = pages[-1].offset if pages else 0
                low = base + (chunks[-1][0] + 1) * CHUNK_SIZE if chunks else base
                if not pages or offset % CHUNK_SIZE or not low <= offset < base + PAGE_SIZE:
                    wanted = f"a chunk from {low:#x} to {base + PAGE_SIZE:#x}" if pages else "an EADD first"
                    raise ImageFormatError("EEXTEND", offset=at, expected=wanted, found=hex(offset))
                chunks.append(((offset - base) // CHUNK_SIZE, data))
                at += records.EEXTEND_SIZE
            case _:
                raise ImageFormatError("stream of pages", offset=at, expected="EADD or EEXTEND", found=record)
    _close(pages, chunks)
    return pages


def _close(pages: list[Page], chunks: list[tuple[int, bytes]]) -> None:
    if chunks:
        pages[-1] = Page(pages[-1].offset, pages[-1].flags, tuple(chunks))
        chunks.clear()


def encode_enturbo(
    ecreate: Ecreate, pages: Sequence[Page], domains: int, block: int, sha256: Hash = records.sha256
) -> tuple[bytes, list[bytes]]:
    """What scheme ``enturbo`` hashes: (the root's preimage, the stream of each domain)."""
    parts = [[records.hashdom(domain, domains, block)] for domain in range(domains)]
    for number, page in enumerate(pages):
        parts[records.hash_dom(number, domains, block)].append(page.encode())
    streams = [b"".join(part) for part in parts]
    digests = [sha256(stream) for stream in streams]
    return records.merge_preimage(ecreate.encode(), len(pages), domains, block, digests), streams


def decode_enturbo(
    root_preimage: bytes, domain_streams: Sequence[bytes], sha256: Hash = records.sha256
) -> tuple[Ecreate, list[Page]]:
    """ECREATE and the page sequence, read back from what :func:`encode_enturbo` returns.

    ``sha256`` is the hash whose digests stand in the root. Raises ImageFormatError where the streams are not
    those of one enclave; its offset counts in the root or in the domain's stream, which the message names.
    """
    ecreate, merge = _root(root_preimage)
    streams = [_domain(stream, number, merge) for number, stream in enumerate(domain_streams)]
    digests = b"".join(sha256(stream) for stream in domain_streams)
    if len(streams) != merge.domains or digests != root_preimage[2 * records.HEADER_SIZE :]:
        raise ImageFormatError(
            "the merged digests are not those of the streams",
            offset=2 * records.HEADER_SIZE,
            expected=f"{merge.domains} digests {root_preimage[2 * records.HEADER_SIZE :].hex()}",
            found=f"{len(streams)} digests {digests.hex()}",
        )
    counts = [0] * merge.domains
    pages: list[Page] = []
    if sum(map(len, streams)) != merge.page_count:
        raise ImageFormatError("page count", expected=merge.page_count, found=sum(map(len, streams)))
    for number in range(merge.page_count):
        domain = records.hash_dom(number, merge.domains, merge.block)
        if counts[domain] == len(streams[domain]):
            raise ImageFormatError(
                f"domain {domain} ends early", expected=f"page {number}", found=f"{counts[domain]} pages"
            )
        pages.append(streams[domain][counts[domain]])
        counts[domain] += 1
    return ecreate, pages


def _root(preimage: bytes) -> tuple[Ecreate, Smcmerge]:
    found = decode_stream(preimage[: 2 * records.HEADER_SIZE])
    match found:
        case [Ecreate() as ecreate, Smcmerge() as merge]:
            return ecreate, merge
    raise ImageFormatError("root", offset=0, expected="ECREATE and SMCMERGE", found=found)


def _domain(stream: bytes, number: int, merge: Smcmerge) -> list[Page]:
    found = decode_stream(stream)
    expected = Hashdom(number, merge.domains, merge.block)
    if found[:1] != [expected]:
        raise ImageFormatError(f"stream of domain {number}", offset=0, expected=expected, found=found[:1])
    return _pages(found[1:], records.HEADER_SIZE)
