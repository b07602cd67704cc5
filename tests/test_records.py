"""Records: exact bytes, domain arithmetic, and reading everything back."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enturbo.shm.errors import ImageFormatError
from enturbo.workers import decoder, records
from enturbo.workers.decoder import Page
from enturbo.workers.records import Eadd, Ecreate, Eextend, Hashdom, Smcmerge

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
DOMAINS = st.sampled_from([1, 2, 4, 8, 16, 32])
BLOCKS = st.sampled_from([2**i for i in range(11)])
CHUNK = st.binary(min_size=1, max_size=4).map(lambda seed: (seed * 256)[:256])
RECORDS = st.one_of(
    st.builds(Ecreate, u32, u64),
    st.builds(Eadd, u64, u64),
    st.builds(Eextend, u64, CHUNK),
    DOMAINS.flatmap(lambda d: st.builds(Hashdom, st.integers(0, d - 1), st.just(d), BLOCKS)),
    st.builds(Smcmerge, u64, DOMAINS, BLOCKS),
)
PAGES = st.lists(
    st.builds(
        Page,
        st.integers(0, 2**20).map(lambda page: page * 4096),
        st.sampled_from([0x100, 0x201, 0x203, 0x205]),
        st.dictionaries(st.integers(0, 15), CHUNK, max_size=4).map(
            lambda found: tuple(sorted(found.items()))
        ),
    ),
    max_size=40,
)


def test_exact_bytes() -> None:
    assert records.ecreate(2, 0x10000) == b"ECREATE\0" + struct.pack("<IQ", 2, 0x10000) + bytes(44)
    assert records.eadd(0x3000, 0x205) == b"EADD\0\0\0\0" + struct.pack("<QQ", 0x3000, 0x205) + bytes(40)
    assert records.eextend(0x3100) == b"EEXTEND\0" + struct.pack("<Q", 0x3100) + bytes(48)
    assert records.hashdom(3, 8, 16) == b"HASHDOM\0" + struct.pack("<IIII", 3, 8, 16, 1) + bytes(40)
    assert records.smcmerge(9, 8, 16) == b"SMCMERGE" + struct.pack("<QIII", 9, 8, 16, 1) + bytes(36)


def test_page_records() -> None:
    data = bytes(range(256)) * 16
    assert len(records.page_records(1, 0x205, 0xFFFF, data)) == 5184
    assert records.page_records(1, 0x205, 0, b"") == records.eadd(4096, 0x205)
    partly = records.eadd(4096, 0x203) + records.eextend(4096 + 512) + data[:256]
    assert records.page_records(1, 0x203, 0b100, data) == partly
    with pytest.raises(ValueError, match="4096 bytes, got 5"):
        records.page_records(1, 0x205, 1, b"short")
    with pytest.raises(ValueError, match="0x10000"):
        records.page_records(1, 0x205, 0x10000, data)


@pytest.mark.parametrize(("domains", "block"), [(0, 1), (3, 1), (64, 1), (-1, 1), (1, 0), (1, 3), (1, 2048)])
def test_scheme_parameters(domains: int, block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        records.check_scheme_params(domains, block)


@given(st.integers(0, 3000), DOMAINS, st.sampled_from([1, 2, 16, 64]))
def test_domain_blocks_counts_what_hash_dom_says(pages: int, domains: int, block: int) -> None:
    blocks = [
        {page // block for page in range(pages) if records.hash_dom(page, domains, block) == d}
        for d in range(domains)
    ]
    assert [records.domain_blocks(pages, d, domains, block) for d in range(domains)] == list(map(len, blocks))


def test_merge_wants_every_domain() -> None:
    with pytest.raises(ValueError, match="4 hash domains, but 3 digests"):
        records.merge(records.ecreate(1, 4096), 1, 4, 1, [bytes(32)] * 3)


@given(st.lists(RECORDS, max_size=12))
def test_stream_round_trip(stream: list[records.Record]) -> None:
    assert decoder.decode_stream(records.encode_stream(stream)) == stream


@given(u32, u64, PAGES, DOMAINS, st.sampled_from([1, 2, 4, 16]))
def test_enturbo_round_trip(frame: int, size: int, pages: list[Page], domains: int, block: int) -> None:
    root, streams = decoder.encode_enturbo(Ecreate(frame, size), pages, domains, block)
    assert decoder.decode_enturbo(root, streams) == (Ecreate(frame, size), pages)
    sgx = Ecreate(frame, size).encode() + b"".join(page.encode() for page in pages)
    assert decoder.decode_pages(sgx[64:]) == pages


@given(PAGES, st.data())
def test_one_flipped_bit_is_refused_or_read(pages: list[Page], data: st.DataObject) -> None:
    """What is accepted is encoded to the same bytes again: no two byte strings share a meaning."""
    stream = bytearray(b"".join(page.encode() for page in pages) or records.eadd(0, 0))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decoder.decode_pages(bytes(stream))
    except ImageFormatError:
        return
    assert b"".join(page.encode() for page in found) == stream


@pytest.mark.parametrize(
    ("stream", "offset", "what"),
    [
        (b"EADD", 0, "truncated record"),
        (records.eadd(0, 1) + records.eextend(0) + bytes(255), 64, "truncated EEXTEND"),
        (bytes(64), 0, "no record"),
        (records.eadd(0, 1)[:-1] + b"x", 63, "padding"),
        (records.eextend(0) + bytes(256), 0, "an EADD first"),
        (records.eadd(0, 1) + records.eextend(4096) + bytes(256), 64, "a chunk from 0x0 to 0x1000"),
        (records.eadd(0, 1) + (records.eextend(256) + bytes(256)) * 2, 384, "a chunk from 0x200"),
        (records.eadd(1, 1), 0, "page-aligned"),
        (records.ecreate(1, 1), 0, "EADD or EEXTEND"),
        (b"HASHDOM\0" + struct.pack("<IIII", 0, 3, 1, 1) + bytes(40), 0, "power of two"),
        (b"HASHDOM\0" + struct.pack("<IIII", 0, 4, 1, 2) + bytes(40), 0, "version"),
    ],
)
def test_refused(stream: bytes, offset: int, what: str) -> None:
    with pytest.raises(ImageFormatError, match=what) as caught:
        decoder.decode_pages(stream)
    assert caught.value.offset == offset


def test_refused_streams() -> None:
    pages = [Page(number * 4096, 0x201) for number in range(5)]
    root, streams = decoder.encode_enturbo(Ecreate(1, 1 << 15), pages, 4, 1)
    for broken, what in [
        (streams[:3], "digests"),
        ([streams[1], streams[0], *streams[2:]], "stream of domain 0"),
        ([streams[0] + records.eadd(0, 1), *streams[1:]], "digests"),
    ]:
        with pytest.raises(ImageFormatError, match=what):
            decoder.decode_enturbo(root, broken)
    # Digests that fit, but pages dealt to the wrong domains.
    moved = [streams[0][:64], streams[1] + streams[0][64:], *streams[2:]]
    wrong = records.merge_preimage(
        records.ecreate(1, 1 << 15), 5, 4, 1, [records.sha256(stream) for stream in moved]
    )
    with pytest.raises(ImageFormatError, match="domain 0 ends early"):
        decoder.decode_enturbo(wrong, moved)
    counted = records.merge_preimage(
        records.ecreate(1, 1 << 15), 6, 4, 1, [records.sha256(stream) for stream in streams]
    )
    with pytest.raises(ImageFormatError, match="page count"):
        decoder.decode_enturbo(counted, streams)
