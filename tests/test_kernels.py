"""The C extension's kernels by one lane and by two: messages, resumed lanes, edges of memory, failed calls.

What all hashers must do alike is in test_hashers.py. These tests also run under the sanitizers: `make asan`.
"""

from __future__ import annotations

import gc
import hashlib
import platform
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from enturbo.shm.dtypes import EPCM_DTYPE
from enturbo.workers import records
from enturbo.workers.sha256 import Chain, EaddSpan, Pages, Span

_sha256 = pytest.importorskip("enturbo.workers._sha256", exc_type=ImportError)

from enturbo.workers.hash_native import NativeHasher  # noqa: E402 - it needs the extension

KERNELS = [NativeHasher(), NativeHasher(portable=True)]
every_kernel = pytest.mark.parametrize("hasher", KERNELS, ids=[hasher.kernel for hasher in KERNELS])
QUEUE = 324
"""Blocks that a lane holds at once, for sizes around it; nothing depends on it being right."""
BYTES = random.Random(5).randbytes(4 * QUEUE * 64 + 64)


def padded(message: bytes, before: int = 0) -> bytes:
    """``message`` with the padding of FIPS 180-4, section 5.1.1, if ``before`` bytes precede it."""
    zeros = -(len(message) + 9) % 64
    return message + b"\x80" + bytes(zeros) + struct.pack(">Q", 8 * (before + len(message)))


def as_digest(midstate: bytes) -> bytes:
    """The state's words in a digest's byte order."""
    return struct.pack(">8I", *struct.unpack("<8I", midstate))


def unaligned(content: bytes, at: int) -> memoryview:
    """A copy that begins ``at`` bytes after an aligned address."""
    room = np.zeros(len(content) + 128, np.uint8)
    first = -room.ctypes.data % 64 + at
    room[first : first + len(content)] = np.frombuffer(content, np.uint8)
    return room.data[first : first + len(content)]


def entries(chunks: Sequence[int], linear: int = 0) -> bytes:
    """EPCM entries, one a mask."""
    found = np.zeros(len(chunks), EPCM_DTYPE)
    found["chunks"], found["flags"] = chunks, 0x205
    found["linear"] = np.arange(linear, linear + len(chunks))
    return found.tobytes()


def page_span(chunks: Sequence[int], at: int, linear: int = 0) -> tuple[Span, bytes]:
    """All pages of these masks as one span at an unaligned address, and their records."""
    data, count = BYTES[at : at + len(chunks) * 4096], len(chunks)
    pages = Pages(unaligned(entries(chunks, linear), at % 32), unaligned(data, at))
    wanted = (
        records.page_records(linear + i, 0x205, mask, data[i * 4096 : (i + 1) * 4096])
        for i, mask in enumerate(chunks)
    )
    return Span(pages, 0, count or 1, count or 1, 1, count), b"".join(wanted)


def test_detection() -> None:
    """The kernel is the best that the processor's own list of features allows."""
    listed = re.search(r"^(?:flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    features = set(listed[1].split()) if listed else set()
    wanted = {
        "x86_64": "sha-ni x2" if {"sha_ni", "ssse3", "sse4_1"} <= features else "portable",
        "aarch64": "armv8 x2" if "sha2" in features else "portable",
    }
    assert wanted.get(platform.machine(), "portable") == _sha256.KERNEL
    assert [hasher.lanes for hasher in KERNELS] == [1 if _sha256.KERNEL == "portable" else 2, 1]


@every_kernel
@settings(max_examples=80, deadline=None)
@given(length=st.integers(0, 2000), at=st.integers(0, 63))
@example(55, 0)
@example(56, 1)
@example(63, 15)
@example(64, 17)
@example(QUEUE * 64 - 9, 0)
@example(QUEUE * 64 - 8, 3)
@example(QUEUE * 64, 1)
@example(3 * QUEUE * 64 - 9, 63)
def test_messages(hasher: NativeHasher, length: int, at: int) -> None:
    """The state after a padded message is the message's digest: any size, any address."""
    message = BYTES[at : at + length]
    chain = hasher.start()
    chain.update(unaligned(padded(message), at))
    assert as_digest(chain.midstate()) == hashlib.sha256(message).digest()


@every_kernel
@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.tuples(st.integers(0, 2 * QUEUE), st.integers(0, 63)), max_size=6))
def test_pieces(hasher: NativeHasher, pieces: list[tuple[int, int]]) -> None:
    """A chain that changes the kernel, by its midstate, before each piece."""
    chain: Chain = hasher.start()
    wanted = hashlib.sha256()
    for number, (blocks, at) in enumerate(pieces):
        chain = KERNELS[number % 2].resume(chain.midstate(), chain.length)
        chain.update(unaligned(BYTES[at : at + 64 * blocks], at))
        wanted.update(BYTES[at : at + 64 * blocks])
    assert (chain.length, chain.digest()) == (64 * sum(blocks for blocks, _ in pieces), wanted.digest())


@every_kernel
@pytest.mark.parametrize("length", [2**29 - 64, 2**29, 2**32, 2**40, 2**61 - 64])
def test_long_chains(hasher: NativeHasher, length: int) -> None:
    """The length stands in the padding as 64 bits, however much was hashed before."""
    midstate = BYTES[:32]
    by_hand = hasher.resume(midstate, length)
    by_hand.update(padded(b"", before=length))
    assert hasher.resume(midstate, length).digest() == as_digest(by_hand.midstate())


LENGTHS = (0, 1, 3, 4, 5, 8, 9)


@every_kernel
@pytest.mark.parametrize("masks", [(0xFFFF,), (0,), (0x8001, 0xFFFF, 0, 0x0FF0)], ids=["all", "none", "some"])
def test_two_lanes_of_different_length(hasher: NativeHasher, masks: tuple[int, ...]) -> None:
    """Both lanes resumed, of every pair of lengths around what one refill of a lane holds."""
    for a, b in product(LENGTHS, repeat=2):
        chains, spans, wanted = [], [], []
        for number, count in enumerate((a, b)):
            before = BYTES[64 * number : 64 * number + 64 * (number + 1)]
            start = KERNELS[1 - number].start()
            start.update(before)
            chains.append(hasher.resume(start.midstate(), start.length))
            span, content = page_span([masks[i % len(masks)] for i in range(count)], 7 + number, 100 * number)
            spans.append(span)
            wanted.append(hashlib.sha256(before + content).digest())
        hasher.extend(chains, spans)
        assert [chain.digest() for chain in chains] == wanted, (a, b)


@every_kernel
@pytest.mark.parametrize("counts", [(1, 700), (127, 128), (128, 129), (513, 0), (129, 1, 300, 2, 256)])
def test_eadd_lanes_of_different_length(hasher: NativeHasher, counts: tuple[int, ...]) -> None:
    chains, wanted = [], []
    for number, _ in enumerate(counts):
        chain = hasher.start()
        chain.update(BYTES[: 64 * number])
        chains.append(chain)
        run = b"".join(records.eadd((2**31 + page) * 4096, 0x203) for page in range(counts[number]))
        wanted.append(hashlib.sha256(BYTES[: 64 * number] + run).digest())
    hasher.extend_eadd(
        chains, [EaddSpan(2**31, 0x203, 0, count or 1, count or 1, 1, count) for count in counts]
    )
    assert [chain.digest() for chain in chains] == wanted


def test_kernels_mix_in_a_call() -> None:
    """A portable chain makes the call portable, which no digest shows."""
    for order in ([0, 1], [1, 0], [0, 1, 0], [1, 1, 0, 0]):
        chains = [KERNELS[which].start() for which in order]
        made = [page_span([0xFFFF] * (3 + 2 * i), i) for i in range(len(order))]
        KERNELS[0].extend(chains, [span for span, _ in made])
        assert [chain.digest() for chain in chains] == [
            hashlib.sha256(content).digest() for _, content in made
        ]


AT_THE_EDGE = """
import mmap, os, sys
from enturbo.workers.hash_native import NativeHasher
from enturbo.workers.sha256 import Pages, Span

def before_the_edge(content):
    size = -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE
    file = os.memfd_create("edge")
    os.ftruncate(file, size + mmap.PAGESIZE)
    memory = mmap.mmap(file, size + mmap.PAGESIZE)
    os.ftruncate(file, size)
    os.close(file)
    memory[size - len(content) : size] = content
    return memory, memoryview(memory)[size - len(content) : size]

content, table = os.urandom(3 * 4096), bytes.fromhex(sys.argv[1])
memory, data = before_the_edge(content)
_, last_entries = before_the_edge(table)
for hasher in (NativeHasher(), NativeHasher(portable=True)):
    for count in (1, 2, 3):
        for lanes in (1, 2):
            chains, plain = ([hasher.start() for _ in range(lanes)] for _ in range(2))
            hasher.extend(chains, [Span(Pages(last_entries, data), 0, count, count, 1, count)] * lanes)
            hasher.extend(plain, [Span(Pages(table, content), 0, count, count, 1, count)] * lanes)
            assert {chain.digest() for chain in chains} == {plain[0].digest()}
    chain = hasher.start()
    chain.update(data)
print("done", flush=True)
if sys.argv[2:]:
    memory[-1]
"""


@pytest.mark.parametrize("beyond", [[], ["beyond"]], ids=["up to the edge", "beyond"])
def test_nothing_is_read_beyond_a_buffer(beyond: list[str]) -> None:
    """Entries and data end where the next byte is a bus error, which the second case shows."""
    table = entries([0xFFFF, 0x8000, 0xFFFF]).hex()
    ended = subprocess.run(
        [sys.executable, "-c", AT_THE_EDGE, table, *beyond], capture_output=True, text=True, check=False
    )
    assert ended.stdout == "done\n", ended.stderr
    assert (ended.returncode != 0) == bool(beyond)


def two(change: Callable[[list[Any], list[Any]], object]) -> tuple[list[Any], list[Any], list[bytearray]]:
    """Arguments for ``extend``, two good chains and spans after ``change``, and the buffers behind them."""
    held = [bytearray(entries([0xFFFF] * 4)), bytearray(4 * 4096)]
    chains: list[Any] = [KERNELS[0].start(), KERNELS[0].start()]
    spans: list[Any] = [Span(Pages(held[0], held[1]), 0, 4, 4, 1, 4)] * 2
    change(chains, spans)
    return chains, spans, held


def set_item(where: int, index: int, value: object) -> Callable[[list[Any], list[Any]], object]:
    return lambda chains, spans: (chains, spans)[where].__setitem__(index, value)


def with_entries(change: Callable[[Span], object]) -> Callable[[list[Any], list[Any]], object]:
    return lambda chains, spans: spans.__setitem__(1, change(spans[1]))


REFUSED: dict[str, tuple[type[Exception], Callable[[list[Any], list[Any]], object]]] = {
    "too few spans": (ValueError, lambda chains, spans: spans.pop()),
    "no chain": (TypeError, set_item(0, 1, None)),
    "a chain twice": (RuntimeError, lambda chains, spans: chains.__setitem__(1, chains[0])),
    "no span": (TypeError, set_item(1, 1, ())),
    "no pages": (TypeError, with_entries(lambda span: (None, *span[1:]))),
    "odd number": (ValueError, with_entries(lambda span: span._replace(block=0))),
    "no number": (TypeError, with_entries(lambda span: (*span[:-1], "4"))),
    "number too large": (OverflowError, with_entries(lambda span: span._replace(end=2**64))),
    "no buffer": (TypeError, with_entries(lambda span: (Pages(span[0].entries, 1), *span[1:]))),  # type: ignore[arg-type]
    "entries too short": (IndexError, with_entries(lambda span: span._replace(block=5, stride=5, end=5))),
    "data too short": (IndexError, with_entries(lambda span: (Pages(span[0].entries, b""), *span[1:]))),
    "no data": (ValueError, with_entries(lambda span: (Pages(span[0].entries, None), *span[1:]))),
}


def leaves_nothing(call: Callable[[], None], held: list[bytearray], *others: object) -> None:
    """A hundred calls keep no memory, no reference and no buffer."""
    call()
    counts = [sys.getrefcount(item) for item in (*others, *held)]
    tracemalloc.start()
    try:
        call()
        gc.collect()  # exceptions and their tracebacks are in cycles
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            call()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 100 * 16, "the smallest block that a call could keep"
    assert counts == [sys.getrefcount(item) for item in (*others, *held)]
    for buffer in held:
        buffer.append(0)  # BufferError while somebody holds it


@pytest.mark.parametrize("name", REFUSED)
def test_refused_calls_leave_nothing_behind(name: str) -> None:
    """Nor half a result, whichever check refuses."""
    error, change = REFUSED[name]
    chains, spans, held = two(change)

    def refused() -> None:
        with pytest.raises(error):
            _sha256.extend(chains, spans)

    left = {chain for chain in chains if chain is not None}
    leaves_nothing(refused, held, *left, *spans)
    for chain in left:
        assert (chain.length, chain.digest()) == (0, hashlib.sha256().digest())
        chain.update(bytes(64))  # nobody has it in use


def test_calls_leave_nothing_behind() -> None:
    chains, spans, held = two(lambda chains, spans: None)

    def call() -> None:
        _sha256.extend(chains, spans)
        _sha256.Chain(bytes(32), 64).digest()

    leaves_nothing(call, held, *chains, *spans)
