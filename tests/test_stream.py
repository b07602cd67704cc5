"""Images measured without an EPC: any regions, any D, B and number of threads give the reference's value."""

from __future__ import annotations

import hashlib
import mmap
import random
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo.workers import records
from enturbo.workers.sha256 import available
from enturbo.workers.stream import domain_digests, measure_stream

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BYTES = random.Random(3).randbytes(300 * 4096)
SIZE = 1 << 40


@dataclass(frozen=True)
class Region:
    """All that measuring asks of a region."""

    offset: int
    page_count: int
    flags: int = 0x203
    chunks: int = 0xFFFF
    content: ReadableBuffer | None = None
    fill: int = 0


def reference(regions: list[Region], scheme: str, domains: int, block: int) -> bytes:
    """The value by the encoder and hashlib, page by page."""
    chain = hashlib.sha256(records.ecreate(1, SIZE))
    parts = [hashlib.sha256(records.hashdom(d, domains, block)) for d in range(domains)]
    number = 0
    for region in regions:
        content = None if region.content is None else bytes(region.content)
        for page in range(region.page_count):
            if content is None:
                data = region.fill.to_bytes(4, "little") * 1024
            else:
                data = content[page * 4096 : (page + 1) * 4096].ljust(4096, b"\0")
            encoded = records.page_records(region.offset // 4096 + page, region.flags, region.chunks, data)
            chain.update(encoded)
            parts[records.hash_dom(number, domains, block)].update(encoded)
            number += 1
    if scheme == "sgx":
        return chain.digest()
    return records.merge(records.ecreate(1, SIZE), number, domains, block, [part.digest() for part in parts])


@st.composite
def images(draw: st.DrawFn) -> tuple[list[Region], int, int]:
    """(regions, D, B) with sizes at block and domain boundaries, one page more and one less."""
    domains, block = draw(st.sampled_from([1, 2, 4, 8, 32])), draw(st.sampled_from([1, 2, 4, 16, 64, 1024]))
    edges = sorted({1, 2, 64, 65, block, min(domains * block, 130), 128})
    regions, linear = [], 0
    for _ in range(draw(st.integers(0, 6))):
        count = max(0, min(150, draw(st.sampled_from(edges)) + draw(st.integers(-1, 1))))
        linear += draw(st.sampled_from([0, 0, 1, 1000]))  # gaps
        kind = draw(st.sampled_from(["content", "fill", "eadd"]))
        chunks = draw(st.sampled_from([0xFFFF, 0xFFFF, 1, 0x8000, 0x0FF0])) if kind != "eadd" else 0
        content = None
        if kind == "content" or (kind == "eadd" and draw(st.booleans())):
            length = max(0, count * 4096 - draw(st.sampled_from([0, 0, 1, 4095, 4096, 9000])))
            at = draw(st.integers(0, 100))
            content = memoryview(BYTES)[at : at + length]
        fill = draw(st.sampled_from([0, 0xDEADBEEF]))
        flags = draw(st.sampled_from([0x201, 0x203, 0x205]))
        regions.append(Region(linear * 4096, count, flags, chunks, content, fill))
        linear += count
    return regions, domains, block


@pytest.mark.parametrize("hasher", available())
@pytest.mark.parametrize("scheme", ["sgx", "enturbo"])
@settings(max_examples=30, deadline=None)
@given(image=images(), workers=st.sampled_from([0, 1, 2, 3, 8]))
def test_random_images(hasher: str, scheme: str, image: tuple[list[Region], int, int], workers: int) -> None:
    regions, domains, block = image
    found = measure_stream(
        1, SIZE, regions, scheme=scheme, domains=domains, block=block, workers=workers, hasher=hasher
    )
    assert found == reference(regions, scheme, domains, block)


@pytest.mark.parametrize("hasher", available())
@pytest.mark.parametrize(("domains", "block"), [(32, 16), (2, 1024), (8, 1), (1, 1)])
def test_threads_and_windows(hasher: str, domains: int, block: int) -> None:
    """Large enough for threads, several fill batches and a window boundary inside a region."""
    regions = [
        Region(0, 3000, 0x203, 0),
        Region(3000 * 4096, 300, 0x205, 0xFFFF, BYTES),
        Region(3300 * 4096, 900, 0x203, 0x0101, None, 7),
        *(Region((5000 + i) * 4096, 1, 0x201, 0x0001, BYTES[i : i + 300]) for i in range(600)),
        Region(9000 * 4096, 100, 0x205, 0x8001, memoryview(BYTES)[: 99 * 4096 + 1]),
    ]
    wanted = reference(regions, "enturbo", domains, block)
    for workers in (1, 2, 3, 64):
        assert (
            measure_stream(1, SIZE, regions, domains=domains, block=block, workers=workers, hasher=hasher)
            == wanted
        )


def test_content_kinds() -> None:
    """Any buffer serves: bytes, mmap, wider items, and a strided view, which is copied piece by piece."""
    plain = Region(0, 100, content=BYTES[: 100 * 4096])
    wanted = reference([plain], "enturbo", 32, 16)
    with mmap.mmap(-1, 100 * 4096) as mapped:
        mapped[:] = BYTES[: 100 * 4096]
        assert measure_stream(1, SIZE, [Region(0, 100, content=mapped)]) == wanted
    wide = memoryview(bytearray(BYTES[: 100 * 4096])).cast("Q")
    assert measure_stream(1, SIZE, [Region(0, 100, content=wide)]) == wanted
    doubled = bytearray(200 * 4096)
    doubled[::2] = BYTES[: 100 * 4096]
    assert measure_stream(1, SIZE, [Region(0, 100, content=memoryview(doubled)[::2])]) == wanted


def test_domain_digests() -> None:
    digests = domain_digests([Region(0, 3, content=BYTES[:5000])], 4, 1, workers=1)
    data = BYTES[:5000].ljust(3 * 4096, b"\0")
    assert digests == [
        hashlib.sha256(
            records.hashdom(d, 4, 1)
            + (records.page_records(d, 0x203, 0xFFFF, data[d * 4096 : (d + 1) * 4096]) if d < 3 else b"")
        ).digest()
        for d in range(4)
    ]


@pytest.mark.parametrize("hasher", [name for name in available() if name != "reference"])
def test_memory_stays_bounded(hasher: str) -> None:
    """Two million EADD-only pages and 32 MiB of fill need a few MiB."""
    regions = [Region(0, 2_000_000, 0x203, 0), Region(1 << 35, 8192, 0x203, 0x0001, None, 9)]
    tracemalloc.start()
    try:
        measure_stream(1, SIZE, regions, workers=2, hasher=hasher)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("region", "what"),
    [
        (Region(1, 1), "offset 0x1"),
        (Region(-4096, 1), "offset -0x1000"),
        (Region(0, -1), "-1 pages"),
        (Region(0, 1, chunks=0x10000), "chunks 0x10000"),
        (Region(0, 1, content=bytes(4097)), "4097 bytes of content in 1 pages"),
    ],
)
def test_odd_regions(region: Region, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        measure_stream(1, SIZE, [region])


def test_odd_parameters() -> None:
    with pytest.raises(ValueError, match="'sgx2'"):
        measure_stream(1, SIZE, [], scheme="sgx2")
    with pytest.raises(ValueError, match="domains must be a power of two"):
        measure_stream(1, SIZE, [], domains=3)
    with pytest.raises(ValueError, match="workers must not be negative"):
        measure_stream(1, SIZE, [], workers=-1)
