"""Hostile Intel SDK files: each is an image or an ImageFormatError, soon and in little memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage
from enturbo.shm.errors import ImageFormatError

Plain = Callable[..., Any]
SECONDS = 1.0
BYTES = 200 << 20
TEXTREL = [(22, 0)]
EXTREMES = [
    *(0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0xFFF, 0x1000, 0x1001, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF),
    *(1 << 32, (1 << 44) - 1, 1 << 63, (1 << 64) - 0x1000, (1 << 64) - 1),
]


@contextmanager
def bounded(memory: bool = False) -> Iterator[None]:
    """What a file may cost. Processor time: other processes may run meanwhile. Tracing memory takes a few
    times as long, so where it is traced time is not looked at."""
    if memory:
        tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        seconds, most = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert memory or seconds < SECONDS
    assert most < BYTES


def try_file(kit: Any, data: bytes, memory: bool = False) -> EnclaveImage | None:
    """Load, within bounds; None for a file that is refused."""
    with bounded(memory):
        try:
            image: EnclaveImage = kit.load(data)
        except ImageFormatError as error:
            text = str(error)
            image = None  # type: ignore[assignment]
    if image is None:
        assert text.startswith(f"{kit.path}: ")
        return None
    for region in image.regions:
        if region.content is not None:
            assert len(region.content) <= region.size
    return image


@pytest.fixture
def rich(kit: Any, plain: Plain) -> tuple[Any, bytes]:
    """A file with everything in it, and its bytes."""
    file = plain()
    inner = plain().build()
    file.inner, file.rela, file.jmprel = inner, [(0x1000, 8), (0x2FFC, 8)], [(0x3800, 7)]
    file.dynamic = TEXTREL
    file.build()
    entry = struct.pack("<QQQQ", file.at["inner"], 0x40000, len(inner), 0)
    layout = file.blocks[0].layout
    patches = [(file.offsets()[0] + 0x1100, b"patch" * 50), (40, bytes(8))]
    file.blocks = [
        kit.Block((13, 3), layout, patches, elrange=(0x40000, 0, 1 << 21), extend=[(0x1002, entry)]),
        kit.Block((2, 1), layout, patches),
        kit.Block((1, 3), layout),
    ]
    data = file.build()
    kit.agrees(file)
    return file, data


def interesting(file: Any, data: bytes) -> list[tuple[int, int]]:
    """(begin, size) of what a mutation should hit: headers, tables, the heads of blocks and their data."""
    found = [(0, 64), (64, 56 * (len(file.segments) + 1)), (file.at["shdr"], 64 * 6)]
    found += [(file.at["rela"], 48), (file.at["jmprel"], 24), (file.at["dynamic"], 96), (file.at["note"], 25)]
    found += [(file.at["inner"], 64 + 56 * 4)]
    at = file.at["blocks"]
    for block in file.blocks:
        size = len(block.encode())
        found += [(at, 64), (at + 1872, size - 1872)]
        at += size
    return found


def test_truncations(kit: Any, rich: tuple[Any, bytes]) -> None:
    """At the borders of every structure, and a byte to either side."""
    file, data = rich
    cuts = {
        at + more
        for begin, size in interesting(file, data)
        for at in (begin, begin + size)
        for more in (-1, 0, 1)
    }
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(data)):
        assert try_file(kit, data[:cut]) is None


@pytest.mark.parametrize("part", range(14))
@pytest.mark.parametrize("values", [EXTREMES[::6], pytest.param(EXTREMES, marks=pytest.mark.slow)])
def test_every_field_at_its_extremes(kit: Any, rich: tuple[Any, bytes], part: int, values: list[int]) -> None:
    """Each aligned u32 of each structure, and each u64, with numbers that overflow something."""
    file, data = rich
    begin, size = interesting(file, data)[part]
    for at in range(begin, min(begin + size, begin + 700) - 7, 4):
        for value in values:
            changed = bytearray(data)
            if value < 1 << 32:
                struct.pack_into("<I", changed, at, value)
            else:
                struct.pack_into("<Q", changed, at, value)
            try:
                kit.load(bytes(changed))
            except ImageFormatError:
                continue


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_changes(kit: Any, rich: tuple[Any, bytes], data: st.DataObject) -> None:
    """Several at once, most of them in structures: bits, numbers, pieces of the file moved or cut out."""
    file, good = rich
    changed = bytearray(good)
    places = st.one_of(
        st.sampled_from(interesting(file, good)).flatmap(lambda each: st.integers(each[0], sum(each) - 1)),
        st.integers(0, len(good) - 1),
    )
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(places)
        kind = data.draw(st.sampled_from(["bit", "u16", "u32", "u64", "copy", "cut"]))
        if kind == "bit":
            changed[at % max(1, len(changed))] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "copy":
            source = data.draw(places)
            changed[at : at + 64] = changed[source : source + 64]
        elif kind == "cut":
            del changed[at : at + data.draw(st.sampled_from([1, 8, 32, 4096]))]
        else:
            size = {"u16": 2, "u32": 4, "u64": 8}[kind]
            value = data.draw(st.sampled_from(EXTREMES) | st.integers(0, (1 << 64) - 1))
            changed[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if not changed:
            break
    try_file(kit, bytes(changed))


def test_single_bits_of_the_metadata(kit: Any, rich: tuple[Any, bytes]) -> None:
    file, data = rich
    at = file.at["blocks"]
    for place in (*range(at, at + 64), *range(at + 1872, at + 1904)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            try:
                kit.load(bytes(changed))
            except ImageFormatError:
                continue


def storms(kit: Any) -> dict[str, Any]:
    """Files that ask for as much as the format lets them."""
    seg, entry, group, block = kit.Seg, kit.Entry, kit.Group, kit.Block
    nothing = [entry(0x4000, 0, attributes=0)] * 8
    huge = 1 << 40
    code = [seg(0, b"x")]
    spread = [seg(0, b"x" * (1 << 23))]
    return {
        "a group of many": kit.File(code, [block(layout=[*nothing, group(8, 0xFFFF_FFFF, 0)])]),
        "a group of as many as may be": kit.File(
            code, [block(layout=[*nothing, group(8, 8191, 0), entry(0)])]
        ),
        "many groups": kit.File(code, [block(layout=[*nothing, group(8, 700, 0)])] * 16),
        "many blocks": kit.File(code, [block()] * 17),
        "threads": kit.File(
            code,
            [
                block(
                    layout=[entry(0x4000, 1, 0x100, content=bytes(72)), group(1, 60000, 0x2000)],
                    enclave_size=huge,
                )
            ],
        ),
        "threads that overlap at last": kit.File(
            code,
            [
                block(
                    layout=[entry(0x4000, content=bytes(72)), group(1, 32000, 0x2000), entry(0x5000, 0x8000)],
                    enclave_size=huge,
                )
            ],
        ),
        "pages of TCS": kit.File(
            code,
            [block(layout=[entry(0x4000, 0xFFFF_FF00, 0x100, content=bytes(4096))], enclave_size=1 << 45)],
        ),
        "many records": kit.File(code, [block(layout=[entry(0x4000 + (i << 12)) for i in range(5000)])]),
        "many segments": kit.File([seg(i << 12, b"", 1) for i in range(40000)], [block(enclave_size=huge)]),
        "many first pages": kit.File(
            [seg(i << 12 | 1, b"1") for i in range(5000)], [block(enclave_size=huge)]
        ),
        "many patches": kit.File(code, [block(patches=[(4096, b"p")] * 4000)] * 2),
        "patches on every page": kit.File(
            spread, [block(patches=[(4096 * i, b"p") for i in range(2, 2040)], enclave_size=huge)] * 3
        ),
        "every other page relocated": kit.File(
            [seg(0, b"", 0), *spread], rela=[(i << 13, 8) for i in range(1 << 15)], dynamic=TEXTREL
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("a group of many", "a group of as many as may be", "many groups", "many blocks", "threads"),
        *("threads that overlap at last", "pages of TCS", "many records", "many segments"),
        *("many first pages", "many patches", "patches on every page", "every other page relocated"),
    ],
)
@pytest.mark.parametrize("memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_storms(kit: Any, name: str, memory: bool) -> None:
    assert try_file(kit, storms(kit)[name].build(), memory) is None


def test_a_terabyte_of_nothing(kit: Any, plain: Plain) -> None:
    """A sparse file may be of any size, and what it says of itself true."""
    file = plain()
    data = bytearray(file.build())
    block, note = file.at["blocks"], file.at["note"]
    changes = [
        (file.at["shdr"] + 5 * 64 + 32, "<Q", 1 << 39),  # the section
        (note + 4, "<I", 0xFFFF_FFFF),  # descsz
        (block + 16, "<I", 0xFFFF_0000),  # the block
        (block + 1884, "<I", 0x4000_0000),  # its layout
        (block + 1884, "<I", 0x1_0000),
        (block + 1876, "<I", 0x1_0000),  # its patches
        (64 + 32, "<Q", 1 << 39),  # a segment
        (64 + 40, "<Q", 1 << 39),
        (block + 40, "<Q", 1 << 40),
    ]
    for at, code, value in changes:
        struct.pack_into(code, data, at, value)
        kit.path.unlink(missing_ok=True)
        kit.path.write_bytes(data)
        os.truncate(kit.path, 1 << 40)
        with bounded():
            try:
                EnclaveImage.load(kit.path)
            except ImageFormatError:
                continue


def test_code_of_half_a_terabyte_is_not_searched(kit: Any) -> None:
    file = kit.File([kit.Seg(0x1000, b"")], [kit.Block(enclave_size=1 << 42)])
    data = bytearray(file.build())
    struct.pack_into("<QQ", data, 64 + 32, 1 << 39, 1 << 39)
    kit.path.write_bytes(data)
    os.truncate(kit.path, 1 << 40)
    with bounded():
        image = EnclaveImage.load(kit.path)
    assert image.details["simulation"] is None
    assert image.page_count == 1 << 27
