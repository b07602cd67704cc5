"""Three hashers and the portable kernel behind one interface: always the reference's digest."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo.shm.dtypes import EPCM_DTYPE
from enturbo.shm.errors import EnturboError
from enturbo.workers import copying, records
from enturbo.workers.sha256 import (
    Chain,
    EaddSpan,
    Hasher,
    Pages,
    Span,
    available,
    get_hasher,
    hasher_report,
)


def _all_hashers() -> list[Hasher]:
    hashers = [get_hasher(name) for name in available()]
    if "native" in available():
        from enturbo.workers.hash_native import NativeHasher

        hashers.append(NativeHasher(portable=True))
    return hashers


HASHERS = _all_hashers()
MIDSTATES = [hasher for hasher in HASHERS if hasher.midstates]
IDS = [f"{hasher.name}-{getattr(hasher, 'kernel', 'any')}" for hasher in HASHERS]
every_hasher = pytest.mark.parametrize("hasher", HASHERS, ids=IDS)
BYTES = random.Random(11).randbytes(200 * 4096 + 64)


def entries(count: int, chunks: Any = 0xFFFF, flags: Any = 0x205, linear: int = 0) -> bytes:
    """EPCM entries of ``count`` pages."""
    found = np.zeros(count, EPCM_DTYPE)
    found["chunks"], found["flags"] = chunks, flags
    found["linear"] = np.arange(linear, linear + count)
    return found.tobytes()


def walked(span: Span | EaddSpan) -> list[int]:
    """The pages of a span, straight from its definition."""
    first, block, stride, blocks, end = span[-5:]
    return [p for k in range(blocks) for p in range(first + k * stride, min(first + k * stride + block, end))]


def expected(span: Span | EaddSpan) -> bytes:
    """The records of a span, by the encoder alone."""
    if isinstance(span, EaddSpan):
        return b"".join(records.eadd((span.base + page) * 4096, span.flags) for page in walked(span))
    table = np.frombuffer(memoryview(span.pages.entries), EPCM_DTYPE)
    data = memoryview(b"" if span.pages.data is None else span.pages.data)
    return b"".join(
        records.page_records(
            int(table[page]["linear"]),
            int(table[page]["flags"]),
            int(table[page]["chunks"]),
            data[page * 4096 : (page + 1) * 4096],
        )
        for page in walked(span)
    )


@st.composite
def spans(draw: st.DrawFn) -> Span:
    count = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 128, 130]))
    kind = draw(st.sampled_from(["all", "none", "mixed"]))
    source = random.Random(draw(st.integers(0, 1000)))
    masks = {
        "all": [0xFFFF] * count,
        "none": [0] * count,
        "mixed": [source.choice((0, 1, 0x8000, 0xFFFF, source.randrange(65536))) for _ in range(count)],
    }[kind]
    flags = [source.choice((0x100, 0x201, 0x203, 0x205)) for _ in range(count)]
    at = draw(st.integers(0, 63))  # unaligned
    data = memoryview(BYTES)[at : at + count * 4096]
    linear = draw(st.sampled_from([0, 1, 2**20 - 1, 2**32 - 1 - count]))
    pages = Pages(entries(count, masks, flags, linear), data)
    block = draw(st.sampled_from([1, 2, 16, 63, 64, 100]))
    stride = block * draw(st.integers(1, 4)) + draw(st.sampled_from([0, 0, 1]))
    first, blocks = draw(st.integers(0, count + 2)), draw(st.integers(0, 12))
    return Span(pages, first, block, stride, blocks, draw(st.integers(0, count)))


EADD_SPANS = st.builds(
    lambda base, flags, first, block, gap, blocks, end: EaddSpan(
        base, flags, first, block, block + gap, blocks, end
    ),
    st.sampled_from([0, 5, 2**32]),
    st.sampled_from([0x201, 0x203]),
    st.integers(0, 50),
    st.sampled_from([1, 16, 200, 5000]),
    st.sampled_from([0, 1, 48]),
    st.integers(0, 30),
    st.integers(0, 9000),
)


@every_hasher
@settings(max_examples=60, deadline=None)
@given(given_spans=st.lists(spans(), min_size=1, max_size=5))
def test_spans(hasher: Hasher, given_spans: list[Span]) -> None:
    """One to five chains a call, of any shape and length: lanes never mix."""
    chains = [hasher.start() for _ in given_spans]
    hasher.extend(chains, given_spans)
    for chain, span in zip(chains, given_spans, strict=True):
        wanted = expected(span)
        assert (chain.length, chain.digest()) == (len(wanted), hashlib.sha256(wanted).digest())


@every_hasher
@settings(max_examples=40, deadline=None)
@given(given_spans=st.lists(EADD_SPANS, min_size=1, max_size=4))
def test_eadd_spans(hasher: Hasher, given_spans: list[EaddSpan]) -> None:
    chains = [hasher.start() for _ in given_spans]
    hasher.extend_eadd(chains, given_spans)
    for chain, span in zip(chains, given_spans, strict=True):
        wanted = expected(span)
        assert (chain.length, chain.digest()) == (len(wanted), hashlib.sha256(wanted).digest())


@every_hasher
@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 4095, 4096, 4097])
def test_eadd_run(hasher: Hasher, count: int) -> None:
    chain = hasher.start()
    chain.eadd_run(2**32 - 50, count, 0x203)
    wanted = expected(EaddSpan(2**32 - 50, 0x203, 0, count or 1, count or 1, 1, count))
    assert chain.digest() == hashlib.sha256(wanted).digest()


@every_hasher
def test_one_chain_through_everything(hasher: Hasher) -> None:
    """Appending in steps is appending at once, and a digest does not end the chain."""
    chain, wanted = hasher.start(), b""
    pages = Pages(entries(20), BYTES)
    for number in range(20):
        span = Span(pages, number, 1, 1, 1, 20)
        chain.update(records.hashdom(0, 1, 1))
        hasher.extend([chain], [span])
        chain.eadd_run(number, 3, 1)
        wanted += records.hashdom(0, 1, 1) + expected(span) + expected(EaddSpan(number, 1, 0, 3, 3, 1, 3))
        assert (chain.length, chain.digest()) == (len(wanted), hashlib.sha256(wanted).digest())


@pytest.mark.skipif(not MIDSTATES, reason="the C extension is not built")
@settings(max_examples=60, deadline=None)
@given(span=spans(), cut=st.integers(0, 12), source=st.integers(0, 1), target=st.integers(0, 1))
def test_midstates(span: Span, cut: int, source: int, target: int) -> None:
    """Cut anywhere, go on in another chain, on another kernel too."""
    before = span._replace(blocks=min(cut, span.blocks))
    after = span._replace(first=span.first + before.blocks * span.stride, blocks=span.blocks - before.blocks)
    first = MIDSTATES[source].start()
    MIDSTATES[source].extend([first], [before])
    assert len(first.midstate()) == 32
    second = MIDSTATES[target].resume(first.midstate(), first.length)
    MIDSTATES[target].extend([second], [after])
    assert second.digest() == hashlib.sha256(expected(span)).digest()


@pytest.mark.skipif(not MIDSTATES, reason="the C extension is not built")
def test_midstate_bytes() -> None:
    """Before the first block it is the initial state of FIPS 180-4, little-endian words."""
    assert MIDSTATES[0].start().midstate()[:8].hex() == "67e6096a85ae67bb"
    for midstate, length, what in [
        (bytes(31), 64, "32 bytes, got 31"),
        (bytes(32), 65, "got 65 bytes"),
        (None, 64, "need their midstate"),
    ]:
        with pytest.raises(ValueError, match=what):
            MIDSTATES[0].resume(midstate, length)  # type: ignore[arg-type]


@every_hasher
def test_no_midstates_is_said(hasher: Hasher) -> None:
    if hasher.midstates:
        assert hasher.resume(hasher.start().midstate(), 0).digest() == hashlib.sha256().digest()
        return
    with pytest.raises(NotImplementedError):
        hasher.start().midstate()
    with pytest.raises(NotImplementedError):
        hasher.resume(bytes(32), 0)


PAGES_10 = Pages(entries(10), BYTES[: 10 * 4096])


@every_hasher
@pytest.mark.parametrize(
    ("span", "error", "what"),
    [
        (Span(PAGES_10, 0, 0, 1, 1, 10), ValueError, "block is 0"),
        (Span(PAGES_10, 0, 4, 3, 1, 10), ValueError, "stride 3"),
        (Span(PAGES_10, -1, 1, 1, 1, 10), ValueError, "first is -1"),
        (Span(PAGES_10, 0, 1, 1, -1, 10), ValueError, "blocks is -1"),
        (Span(PAGES_10, 0, 1, 1, 1, 2**50), ValueError, "end is"),
        (Span(PAGES_10, 0, 11, 11, 1, 11), IndexError, "reaches page 10, its EPCM entries end after 10"),
        (Span(PAGES_10, 9, 1, 3, 2, 13), IndexError, "reaches page 12"),
        (Span(Pages(entries(11), PAGES_10.data), 0, 11, 11, 1, 11), IndexError, "its data end after 10"),
        (Span(Pages(entries(10), None), 0, 10, 10, 1, 10), ValueError, "has no data"),
    ],
)
def test_odd_spans(hasher: Hasher, span: Span, error: type[Exception], what: str) -> None:
    chain = hasher.start()
    with pytest.raises(error, match=what):
        hasher.extend([chain], [span])
    assert (chain.length, chain.digest()) == (0, hashlib.sha256().digest())


@every_hasher
def test_no_data_is_needed_without_measured_pages(hasher: Hasher) -> None:
    chain = hasher.start()
    span = Span(Pages(entries(10, 0), None), 0, 10, 10, 1, 10)
    hasher.extend([chain], [span])
    assert chain.digest() == hashlib.sha256(expected(span)).digest()


@every_hasher
def test_odd_calls(hasher: Hasher) -> None:
    chain = hasher.start()
    with pytest.raises(ValueError, match="64-byte blocks, got 63"):
        chain.update(bytes(63))
    with pytest.raises(ValueError, match="1 chains, but 0 spans"):
        hasher.extend([chain], [])
    with pytest.raises(ValueError, match="-1 pages"):
        chain.eadd_run(0, -1, 1)
    with pytest.raises(ValueError, match="no page offset"):
        hasher.extend_eadd([chain], [EaddSpan(-1, 1, 0, 1, 1, 1, 1)])
    assert chain.length == 0


@pytest.mark.skipif(not MIDSTATES, reason="the C extension is not built")
def test_native_arguments() -> None:
    hasher = MIDSTATES[0]
    chain = hasher.start()
    span = Span(PAGES_10, 0, 1, 1, 1, 10)
    with pytest.raises(RuntimeError, match="in use"):
        hasher.extend([chain, chain], [span, span])
    with pytest.raises(TypeError, match="not a chain"):
        hasher.extend([get_hasher("reference").start()], [span])
    with pytest.raises(TypeError, match="a span is"):
        hasher.extend([chain], [(1, 2)])  # type: ignore[list-item]
    hasher.extend([chain], [span])  # usable after every refusal
    assert chain.digest() == hashlib.sha256(expected(span)).digest()


@pytest.mark.skipif(not MIDSTATES, reason="the C extension is not built")
def test_other_threads_run_during_a_native_call() -> None:
    """Seen by a chain that is found in use: with the GIL held, nobody could look."""
    hasher = MIDSTATES[0]
    chain = hasher.start()
    worker = threading.Thread(target=chain.eadd_run, args=(0, 3_000_000, 1))
    worker.start()
    refusals = set()
    while worker.is_alive() and RuntimeError not in refusals:
        with pytest.raises((RuntimeError, TypeError)) as caught:
            hasher.extend([chain], [()])  # type: ignore[list-item]
        refusals.add(caught.type)
    worker.join()
    assert RuntimeError in refusals
    assert chain.length == 3_000_000 * 64


@every_hasher
def test_threads_share_a_hasher(hasher: Hasher) -> None:
    all_spans = [Span(Pages(entries(60, linear=i), BYTES), i, 3, 7, 8, 60) for i in range(8)]

    def digest(span: Span) -> bytes:
        chain: Chain = hasher.start()
        hasher.extend([chain], [span])
        return chain.digest()

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(digest, all_spans)) == [
            hashlib.sha256(expected(span)).digest() for span in all_spans
        ]


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTURBO_HASHER", raising=False)
    assert get_hasher().name == available()[0]
    monkeypatch.setenv("ENTURBO_HASHER", "reference")
    assert get_hasher().name == "reference"
    assert get_hasher("hashlib").name == "hashlib"
    assert hasher_report()["default"] == "reference"
    monkeypatch.setenv("ENTURBO_HASHER", "md5")
    with pytest.raises(EnturboError, match=r"'md5': expected one of .*hashlib, reference"):
        get_hasher()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 63, 64, 65, 4096, 100_001])
@pytest.mark.parametrize("offset", [0, 1, 15])
def test_non_temporal_copy(size: int, offset: int) -> None:
    native = pytest.importorskip("enturbo.workers._sha256", exc_type=ImportError)
    target = bytearray(b"\xaa" * (size + 64))
    source = memoryview(BYTES)[3 : 3 + size]
    native.copy_nt(memoryview(target)[offset : offset + size], source)
    assert target[offset : offset + size] == source
    assert set(target[:offset] + target[offset + size :]) == {0xAA}
    native.zero_nt(memoryview(target)[offset : offset + size])
    assert target[offset : offset + size] == bytes(size)
    assert set(target[:offset] + target[offset + size :]) == {0xAA}
    with pytest.raises(ValueError, match="cannot copy"):
        native.copy_nt(target, bytes(size))
    with pytest.raises(TypeError, match="read-write"):
        native.zero_nt(bytes(size))
    if size > 1:
        with pytest.raises(ValueError, match="overlap"):
            native.copy_nt(memoryview(target)[1 : size + 1], memoryview(target)[:size])


@pytest.mark.parametrize("with_extension", [True, False])
def test_rows_are_copied_and_nothing_between_them(
    with_extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_extension:
        monkeypatch.setattr(copying, "_copy_rows", None)
    else:
        pytest.importorskip("enturbo.workers._sha256", exc_type=ImportError)
    source = np.random.default_rng(5).integers(0, 256, 5000, np.uint8).tobytes()
    for width, stride, rows, offset in ((64, 64, 3, 0), (100, 700, 7, 3), (1, 2, 1, 1), (500, 500, 0, 0)):
        target = bytearray(6000)
        length = (rows - 1) * stride + width if rows else 0
        copying.copy_rows(
            memoryview(target)[offset : offset + length], memoryview(source)[:length], width, stride, rows
        )
        expected = bytearray(6000)
        for at in range(0, rows * stride, stride):
            expected[offset + at : offset + at + width] = source[at : at + width]
        assert target == expected
    for width, stride, rows in ((100, 100, 61), (6001, 6001, 1), (10, 5999, 3)):
        with pytest.raises(ValueError, match="do not lie in"):
            copying.copy_rows(memoryview(bytearray(6000)), memoryview(source), width, stride, rows)
