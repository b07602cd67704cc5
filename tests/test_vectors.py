"""The published vectors: both schemes, every hasher, and the records' reference encoder.

Each enclave's bytes cycle modulo 251 with a start that depends on the page, so that swapped or shifted pages
never agree.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from enturbo.workers import records
from enturbo.workers.sha256 import available
from enturbo.workers.stream import measure_stream

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "vectors" / "enturbo-v1.json").read_text()
)
CYCLE = bytes(range(251)) * 18


class VectorPage(NamedTuple):
    """One page as a region."""

    offset: int
    flags: int
    chunks: int
    content: bytes
    page_count: int = 1
    fill: int = 0


def enclave(vector: dict[str, Any]) -> tuple[int, list[VectorPage]]:
    """(SECS.SIZE, pages) of a vector."""
    kinds = (0x205, 0x201, 0x203, 0x100) if vector["tcs"] else (0x205, 0x201, 0x203)
    pages = []
    for i in range(vector["pages"]):
        chunks = vector["chunk_mask"] if i % vector["measured_every"] == 0 else 0
        start = (vector["seed"] + 7 * i) % 251
        pages.append(VectorPage(i * 4096, kinds[i % len(kinds)], chunks, CYCLE[start : start + 4096]))
    return 1 << (max(1, len(pages) * 4096) - 1).bit_length(), pages


def test_all_vectors_are_there() -> None:
    assert len(VECTORS) == 364
    assert {vector["domains"] for vector in VECTORS} >= {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize("hasher", available())
def test_stream(hasher: str) -> None:
    wrong = []
    for number, vector in enumerate(VECTORS):
        size, pages = enclave(vector)
        frame = vector["ssa_frame_size"]
        sgx = measure_stream(frame, size, pages, scheme="sgx", hasher=hasher)
        parallel = measure_stream(
            frame, size, pages, domains=vector["domains"], block=vector["block"], workers=1, hasher=hasher
        )
        if (sgx.hex(), parallel.hex()) != (vector["sgx"], vector["enturbo"]):
            wrong.append(number)
    assert wrong == []


def test_records() -> None:
    """The encoder alone, with nothing but hashlib beside it."""
    wrong = []
    for number, vector in enumerate(VECTORS):
        size, pages = enclave(vector)
        domains, block = vector["domains"], vector["block"]
        opening = records.ecreate(vector["ssa_frame_size"], size)
        chain = hashlib.sha256(opening)
        parts = [hashlib.sha256(records.hashdom(d, domains, block)) for d in range(domains)]
        for i, page in enumerate(pages):
            encoded = records.page_records(page.offset // 4096, page.flags, page.chunks, page.content)
            chain.update(encoded)
            parts[records.hash_dom(i, domains, block)].update(encoded)
        merged = records.merge(opening, len(pages), domains, block, [part.digest() for part in parts])
        if (chain.hexdigest(), merged.hex()) != (vector["sgx"], vector["enturbo"]):
            wrong.append(number)
    assert wrong == []
