"""Intel SDK enclaves: every rule of the order of measurement, each in a file that is told page by page.

``kit.agrees`` compares all pages of all blocks, and their hash, with what the builder in conftest.py says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage
from enturbo.runtime.formats import detect
from enturbo.shm.errors import ImageFormatError

R, RW, RX, RWX, TCS = 0x201, 0x203, 0x205, 0x207, 0x100
TEXTREL = [(22, 0)]
Plain = Callable[..., Any]


def flags_of(image: EnclaveImage) -> dict[int, int]:
    """SECINFO.FLAGS by page number."""
    return {
        (region.offset >> 12) + number: region.flags
        for region in image.regions
        for number in range(region.page_count)
    }


def test_a_plain_enclave(kit: Any, plain: Plain) -> None:
    image = kit.agrees(plain())
    assert image.size == 1 << 20
    assert image.sigstructs == ()
    assert image.details == {
        "format": "intel-sdk-elf",
        "metadata_version": "2.4",
        "metadata_versions": ["2.4"],
        "textrel": False,
        "simulation": True,
        "tcs_policy": 1,
        "tcs_min_pool": 0,
        "ssa_frame_size": 1,
        "misc_select": 0,
        "enclave_size": 1 << 20,
        "attributes": {"flags": 4, "xfrm": 3},
        "elrange": None,
        "sections": [],
    }
    labels = [region.label for region in image.regions]
    assert labels[:6] == [
        "PT_LOAD 0 (R X)",
        "PT_LOAD 1 (R)",
        "PT_LOAD 1 (R)",
        "PT_LOAD 2 (R W)",
        "PT_LOAD 2 (R W), zeros",
        "layout 0: id 1, zeros",
    ]
    assert labels[6:8] == ["layout 2: id 1, filled with 0xcccccccc", "layout 3: id 1, TCS"]
    assert labels[-1] == "group 6, load 2: layout 5: id 1, content"


def test_the_file_is_detected_and_mapped(kit: Any, plain: Plain) -> None:
    image = kit.load(plain().build())
    assert detect(kit.path).name == "intel-sdk-elf"
    copied = [not isinstance(region.content, memoryview) for region in image.regions[:4]]
    assert copied == [False, True, False, True]  # first pages that begin before their segment
    before = kit.pages_of(image)
    kit.path.unlink()
    assert kit.pages_of(image) == before
    with image:
        pass


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_ssa_frame_size_is_what_ecreate_is_told(kit: Any, plain: Plain, frames: int) -> None:
    file = plain()
    file.blocks[0].ssa_frame_size = frames
    assert kit.agrees(file).ssa_frame_size == frames


# ---- segments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vaddr", [0, 1, 0x800, 0xFFF, 0x1000, 0x1001])
@pytest.mark.parametrize("size", [0, 1, 0x7FF, 0x800, 0x1000, 0x1001, 0x2FFF])
@pytest.mark.parametrize("more", [0, 1, 0x7FF, 0x800, 0x801, 0x1000, 0x2801])
def test_a_segment_anywhere_in_its_page(kit: Any, vaddr: int, size: int, more: int) -> None:
    """Bytes, then zeros up to memsz, counted from the end of the last page that holds bytes."""
    kit.agrees(kit.File([kit.Seg(vaddr, kit.pattern(size, 1), memsz=size + more)]))


@pytest.mark.parametrize("shift", [0, 1, 0x123])
def test_a_segment_anywhere_in_the_file(kit: Any, shift: int) -> None:
    kit.agrees(kit.File([kit.Seg(0x1080, kit.pattern(0x3333, 1), shift=shift)]))


@pytest.mark.parametrize("flags", [1, 4, 5, 6, 7])
def test_a_segments_flags(kit: Any, flags: int) -> None:
    image = kit.agrees(kit.File([kit.Seg(0, b"x" * 5000, memsz=9000, flags=flags)]))
    wanted = 0x200 | flags >> 2 & 1 | flags & 2 | (flags & 1) << 2
    assert set(flags_of(image).values()) == {wanted}


def test_segments_in_the_order_of_their_headers(kit: Any) -> None:
    file = kit.File([kit.Seg(0x5000, b"second"), kit.Seg(0x1000, b"first"), kit.Seg(0x9000, b"third")])
    image = kit.agrees(file)
    assert [region.offset for region in image.regions] == [0x5000, 0x1000, 0x9000]


def test_other_segments_are_not_loaded(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"code"), kit.Seg(0x3000, b"tls", memsz=0x2000, flags=4, type=7)])
    assert kit.agrees(file).page_count == 1


@pytest.mark.parametrize("tag", [None, 22, 30])
def test_relocated_pages_become_writable(kit: Any, tag: int | None) -> None:
    """Only with DT_TEXTREL; DT_FLAGS (30), here with DF_TEXTREL, is not looked at."""
    file = kit.File(
        [
            kit.Seg(0, kit.pattern(0x9000, 1)),
            kit.Seg(0x9000, kit.pattern(0x1000, 2), flags=6),
            kit.Seg(0xA123, kit.pattern(0x1800, 3), memsz=0x4000, flags=4),
        ],
        rela=[(0x1000, 8), (0x1008, 8), (0x2FF8, 8), (0x4FF9, 1), (0x7000, 0), (0x9010, 8), (0xA000, 6)],
        jmprel=[(0x8FFF, 7), (0xC010, 7), (0x30000, 7)],
        dynamic=[] if tag is None else [(tag, 4)],
    )
    image = kit.agrees(file)
    assert image.details["textrel"] is (tag == 22)
    flags = flags_of(image)
    wanted = {1, 2, 4, 5, 8} if tag == 22 else set()
    assert {page for page in range(9) if flags[page] == RWX} == wanted
    assert flags[0xA] == (RW if tag == 22 else R)
    assert flags[0xC] == R  # zeros behind the segment's bytes: relocated or not
    assert len(image.regions) <= 12


def test_a_relocation_of_type_0_writes_nothing(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"x" * 8192)], rela=[(0, 0), (4095, 0)], dynamic=TEXTREL)
    assert set(flags_of(kit.agrees(file)).values()) == {RX}


def test_relocations_are_read_from_both_tables(kit: Any) -> None:
    for name in ("rela", "jmprel"):
        file = kit.File([kit.Seg(0, b"x" * 8192)], dynamic=TEXTREL, **{name: [(0x1000, 8)]})
        assert flags_of(kit.agrees(file)) == {0: RX, 1: RWX}


@pytest.mark.parametrize(("offset", "pages"), [(0xFF8, {0}), (0xFF9, {0, 1}), (0xFFF, {0, 1}), (0x1000, {1})])
def test_a_relocation_may_reach_into_the_next_page(kit: Any, offset: int, pages: set[int]) -> None:
    file = kit.File([kit.Seg(0, b"x" * 12288)], rela=[(offset, 8)], dynamic=TEXTREL)
    flags = flags_of(kit.agrees(file))
    assert {page for page in flags if flags[page] == RWX} == pages


# ---- patches --------------------------------------------------------------------------------------------


def test_patches_go_over_the_file(kit: Any, plain: Plain) -> None:
    """In their order, over page borders, headers and what is never loaded; the rest stays mapped."""
    file = plain()
    code, rodata, data = file.offsets()
    file.blocks[0].patches = [
        (code + 0xFF0, b"A" * 0x20),
        (code + 0x1008, b"B" * 4),
        (code - 8, b"before the segment"),
        (code + 0x2340, b"C" * 40),
        (rodata - 2, b"D" * 4),
        (data, b"E"),
        (data + 0x7FF, b"F"),
        (40, bytes(8)),
        (code + 0x1FFF, b""),
    ]
    image = kit.agrees(file)
    copied = [region for region in image.regions if isinstance(region.content, bytes | bytearray)]
    assert sum(region.page_count for region in copied if region.label.startswith("PT_LOAD")) == 5


def test_a_later_patch_wins(kit: Any) -> None:
    file = kit.File([kit.Seg(0, bytes(100))])
    (at,) = file.offsets()
    file.blocks[0].patches = [(at, b"aaaa"), (at + 1, b"bb"), (at + 2, b"cccc")]
    assert bytes(kit.agrees(file).regions[0].content)[:6] == b"abcccc"


def test_relocations_are_read_before_patching(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"x" * 8192)], rela=[(0x1000, 8)], dynamic=TEXTREL)
    file.build()
    file.blocks[0].patches = [(file.at["rela"], bytes(24)), (file.at["dynamic"], bytes(64))]
    assert flags_of(kit.agrees(file)) == {0: RX, 1: RWX}


def test_each_block_has_its_own_patches(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"x" * 5000)])
    (at,) = file.offsets()
    file.blocks = [
        kit.Block(patches=[(at, b"one")]),
        kit.Block((2, 1)),
        kit.Block((1, 4), patches=[(at, b"3")]),
    ]
    image = kit.agrees(file)
    assert image.details["metadata_versions"] == ["2.4", "2.1", "1.4"]
    assert [each.details["metadata_version"] for each in image.variants] == ["2.1", "1.4"]
    assert len({image.measure("sgx"), *(each.measure("sgx") for each in image.variants)}) == 3
    assert [each.variants for each in image.variants] == [(), ()]


# ---- version 1.3 ----------------------------------------------------------------------------------------

OLD = (1, 3)


@pytest.mark.parametrize("version", [(1, 3), (1, 4), (2, 1), (2, 4), (3, 3)])
@pytest.mark.parametrize("vaddr", [0, 0x800, 0x1000, 0x1001, 0x1800, 0x1FFF])
@pytest.mark.parametrize("memsz", [1, 0x800, 0x801, 0x1000, 0x1001, 0x17FF])
def test_the_page_behind_the_last_segment(kit: Any, version: tuple[int, int], vaddr: int, memsz: int) -> None:
    """Version 1.3 exactly, and only where the segment does not begin on a page and ends early enough."""
    file = kit.File([kit.Seg(vaddr, b"x", memsz=memsz, flags=4)], [kit.Block(version)])
    image = kit.agrees(file)
    other = kit.agrees(kit.File(file.segments, [kit.Block((1, 4))]))
    if version != OLD:
        assert image.measure("sgx") == other.measure("sgx")


@pytest.mark.parametrize("following", [0x3000, 0x3001, 0x3FFF, 0x4000, 0x4800, 0x5000])
def test_the_page_behind_needs_a_gap(kit: Any, following: int) -> None:
    """0x1800 + 0x1001 ends in page 2; rounded up first, in page 3. The page is added if nobody needs it."""
    segments = [kit.Seg(0x1800, b"x" * 0x1001), kit.Seg(following, b"y" * 16, flags=6)]
    image = kit.agrees(kit.File(segments, [kit.Block(OLD)]))
    found = [region.flags for region in image.regions if region.offset == 0x3000 and not region.content]
    assert found == ([RX] if following >= 0x4000 else [])


def test_the_page_behind_is_that_of_the_highest_segment_so_far(kit: Any) -> None:
    high, low = kit.Seg(0x8800, b"h" * 0x1001, flags=4), kit.Seg(0x2000, b"l" * 16, flags=6)
    last = kit.Seg(0x10000, b"z" * 16)
    for segments in ([high, low, last], [low, high, last], [high, last, low], [high, low]):
        image = kit.agrees(kit.File(segments, [kit.Block(OLD)]))
        assert flags_of(image)[0xA] == R


def test_a_segment_at_0_is_never_the_highest(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"x" * 10), kit.Seg(0x4000, b"y")], [kit.Block(OLD)])
    assert kit.agrees(file).page_count == 2


# ---- layout ---------------------------------------------------------------------------------------------


def with_layout(kit: Any, *layout: Any, **options: Any) -> Any:
    return kit.File([kit.Seg(0, b"code")], [kit.Block(layout=list(layout), **options)])


@pytest.mark.parametrize("attributes", range(8))
def test_eadd_and_eextend(kit: Any, attributes: int) -> None:
    """Without EADD nothing; measured if both bits are set; EREMOVE (4) changes nothing."""
    image = kit.agrees(with_layout(kit, kit.Entry(0x4000, 3, attributes=attributes, fill=7)))
    found = [(region.page_count, region.chunks) for region in image.regions[1:]]
    assert found == ([(3, 0xFFFF if attributes & 2 else 0)] if attributes & 1 else [])


@pytest.mark.parametrize("attributes", [1, 3, 7])
def test_a_tcs(kit: Any, attributes: int) -> None:
    entry = kit.Entry(0x4000, 1, flags=TCS, attributes=attributes, content=kit.tcs(0x1000, 0x3000))
    image = kit.agrees(with_layout(kit, entry))
    page = image.regions[1]
    assert struct.unpack_from("<QIIQQQ", page.content, 16) == (0x5000, 0, 2, 0x1234, 0x55, 0x7000)
    assert page.chunks == (0xFFFF if attributes & 2 else 0)


def test_a_tcs_counts_modulo_2_to_the_64(kit: Any) -> None:
    entry = kit.Entry(0x4000, 1, flags=TCS, content=kit.tcs((1 << 64) - 0x1000, (1 << 64) - 0x4000))
    page = kit.agrees(with_layout(kit, entry)).regions[1]
    assert struct.unpack_from("<Q24xQQ", page.content, 16) == (0x3000, 0, 0)


def test_a_tcs_on_several_pages_is_the_same_on_each(kit: Any) -> None:
    entry = kit.Entry(0x4000, 3, flags=TCS, content=kit.tcs(0x1000, 0x3000))
    image = kit.agrees(with_layout(kit, entry))
    assert len({bytes(region.content) for region in image.regions[1:]}) == 1


@pytest.mark.parametrize("size", [0, 20, 72, 100, 4096])
def test_a_tcs_of_other_lengths(kit: Any, size: int) -> None:
    kit.agrees(with_layout(kit, kit.Entry(0x4000, 1, flags=TCS, content=kit.pattern(size, 1))))


@pytest.mark.parametrize("attributes", [1, 3])
@pytest.mark.parametrize("size", [1, 4096, 4097, 12288])
def test_other_content_is_always_measured(kit: Any, attributes: int, size: int) -> None:
    entry = kit.Entry(0x4000, 3, flags=R, attributes=attributes, content=kit.pattern(size, 5))
    image = kit.agrees(with_layout(kit, entry))
    assert all(region.chunks == 0xFFFF for region in image.regions)


def test_other_content_is_not_relocated(kit: Any) -> None:
    file = with_layout(kit, kit.Entry(0x4000, 2, flags=R, content=b"x" * 5000))
    file.rela, file.dynamic = [(0x4000, 8), (0x5000, 8), (0, 8)], TEXTREL
    assert flags_of(kit.agrees(file)) == {0: RWX, 4: R, 5: R}


def test_fills_and_nothing(kit: Any) -> None:
    file = with_layout(
        kit,
        kit.Entry(0x4000, 2, fill=0xCCCCCCCC),
        kit.Entry(0x6000, 2, fill=1, flags=TCS),
        kit.Entry(0x8000, 2, fill=0),
        kit.Entry(0xA000, 2, fill=5, flags=0),
        kit.Entry(0xC000, 0, fill=5),
        kit.Entry(0xC000, 2, fill=0x01020304, attributes=1),
    )
    image = kit.agrees(file)
    assert [(region.page_count, region.fill) for region in image.regions[1:]] == [
        *((2, 0xCCCCCCCC), (2, 1), (2, 0), (2, 0x01020304))
    ]


def test_an_enormous_heap_is_one_region(kit: Any) -> None:
    entry = kit.Entry(1 << 20, 31_500_000, attributes=1)
    image = kit.load(with_layout(kit, entry, enclave_size=1 << 37).build())
    assert (image.page_count, len(image.regions)) == (31_500_001, 2)


@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_groups_repeat_what_stands_before_them(kit: Any, times: int, count: int) -> None:
    """The entries were loaded once already; each time they are ``step`` further."""
    file = with_layout(
        kit,
        kit.Entry(0x4000, 1, fill=1),
        kit.Entry(0x5000, 1, flags=TCS, content=kit.tcs(0x1000, 0x3000)),
        kit.Entry(0x6000, 1, flags=0, attributes=0),
        kit.Group(count + 1, times, 0x8000),
        kit.Entry(0x1000, 1, fill=2),
    )
    image = kit.agrees(file)
    assert image.page_count == 4 + times * count


def test_two_groups(kit: Any) -> None:
    entry = kit.Entry
    layout = [entry(0x4000), kit.Group(1, 2, 0x1000, id=0x1001), entry(0x8000), kit.Group(1, 1, 0x4000)]
    image = kit.agrees(with_layout(kit, *layout))
    assert [region.offset >> 12 for region in image.regions] == [0, 4, 5, 6, 8, 12]


def test_ids_decide_nothing_but_bit_12(kit: Any) -> None:
    values = set()
    for number in (1, 4, 10, 0x2004, 0xEFFF):
        image = kit.agrees(with_layout(kit, kit.Entry(0x4000, 2, fill=3, id=number)))
        values.add(image.measure("sgx").digest)
    assert len(values) == 1


# ---- directories that only some versions have -------------------------------------------------------------

RANGE = (0x10000000 + 0x40000, 0x10000000, 1 << 21)


@pytest.mark.parametrize("version", [(11, 5), (12, 1), (13, 3)])
def test_elrange_moves_everything(kit: Any, plain: Plain, version: tuple[int, int]) -> None:
    file = plain()
    file.blocks[0].version, file.blocks[0].elrange = version, RANGE
    image = kit.agrees(file)
    assert (image.size, image.regions[0].offset) == (1 << 21, 0x40000)
    assert image.details["elrange"] == dict(
        zip(("image_address", "start_address", "size"), RANGE, strict=True)
    )


@pytest.mark.parametrize("version", [(1, 5), (2, 4), (3, 3), (10, 5)])
def test_elrange_is_not_read_in_other_versions(kit: Any, plain: Plain, version: tuple[int, int]) -> None:
    file = plain()
    file.blocks[0].version, file.blocks[0].elrange = version, RANGE
    image = kit.load(file.build())
    assert (image.size, image.details["elrange"]) == (1 << 20, None)


def inner_file(kit: Any) -> Any:
    return kit.File([kit.Seg(0, kit.pattern(0x1234, 7)), kit.Seg(0x2100, b"data", memsz=0x1F00, flags=6)])


@pytest.mark.parametrize(
    ("version", "read"),
    [
        ((1, 4), False),
        ((1, 5), True),
        ((2, 4), False),
        ((2, 9), False),
        ((3, 1), False),
        ((3, 2), True),
        ((3, 3), True),
        ((11, 5), True),
        ((13, 1), False),
        ((13, 3), True),
    ],
)
def test_an_inner_shared_object(kit: Any, version: tuple[int, int], read: bool) -> None:
    """Its segments follow the file's own, before the layout, where the version has such entries."""
    inner = inner_file(kit).build()
    file = kit.File([kit.Seg(0, b"x" * 5000)], [], inner=inner, rela=[(0x21000, 8)], dynamic=TEXTREL)
    file.build()
    entries = [
        (0x1001, b"a FIPS signature"),
        (0x1002, struct.pack("<QQQQ", file.at["inner"], 0x20000, len(inner), 0)),
        (0x1002, struct.pack("<QQQQ", 0, 0, 0, 0)),
    ]
    elrange = RANGE if version[0] > 10 else None
    file.blocks = [kit.Block(version, [kit.Entry(0x8000)], extend=entries, elrange=elrange)]
    if version == (1, 4):  # such blocks have two directories, and no room for others
        file.blocks[0].extend = []
    image = kit.agrees(file)
    labels = [region.label for region in image.regions if region.label.startswith("inner")]
    assert labels == (
        [
            *("inner PT_LOAD 0 (R X)", "inner PT_LOAD 0 (R X), relocated"),
            *("inner PT_LOAD 1 (R W)", "inner PT_LOAD 1 (R W), zeros"),
        ]
        if read
        else []
    )


def test_the_directories_of_1_4_are_two(kit: Any) -> None:
    """What stands where newer blocks have their third and fourth is content."""
    file = with_layout(kit, kit.Entry(0x4000, content=b"\xff" * 64), version=(1, 4))
    file.blocks[0].layout.append(kit.Entry(0x5000, content=b"more"))
    kit.agrees(file)


# ---- blocks ---------------------------------------------------------------------------------------------


def test_blocks_end_with_a_wrong_magic_or_size_0(kit: Any, plain: Plain) -> None:
    """What stands behind them is not looked at."""
    for at, code in ((0, "<Q"), (16, "<I")):
        file = plain()
        file.blocks = [file.blocks[0], kit.Block((2, 1)), kit.Block((1, 4))]
        data = bytearray(file.build())
        second = file.at["blocks"] + len(file.blocks[0].encode())
        struct.pack_into(code, data, second + at, 0)
        assert kit.load(bytes(data)).variants == ()


def test_blocks_end_with_descsz(kit: Any, plain: Plain) -> None:
    file = plain()
    file.blocks = [file.blocks[0], kit.Block((2, 1))]
    data = bytearray(file.build())
    struct.pack_into("<I", data, file.at["note"] + 4, len(file.blocks[0].encode()))
    assert kit.load(bytes(data)).variants == ()


def test_a_sigstruct_comes_along(kit: Any, plain: Plain, key: Any) -> None:
    file = plain()
    unsigned = kit.load(file.build())
    file.blocks[0].sigstruct = key.sign(unsigned, scheme="sgx").encode()
    image = kit.agrees(file)
    (sigstruct,) = image.sigstructs
    sigstruct.verify()
    assert sigstruct.enclavehash == image.measure("sgx").digest


def test_code_without_enclu_is_a_simulation(kit: Any) -> None:
    enclu = b"\x0f\x01\xd7"
    for code, data, simulation in (
        (b"x" * 5000, b"y", True),
        (b"x" * 5000 + enclu, b"y", False),
        (enclu, b"y", False),
        (b"x" * ((1 << 20) - 1) + enclu, b"y", False),
        (b"x" * 50, enclu, True),
        (enclu[:2], b"y", True),
    ):
        file = kit.File(
            [kit.Seg(0, code), kit.Seg(1 << 21, data, flags=4)], [kit.Block(enclave_size=1 << 22)]
        )
        assert kit.load(file.build()).details["simulation"] is simulation


# ---- random enclaves --------------------------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn, kit: Any) -> Any:
    """Segments and entries in rising places, and relocations and patches anywhere."""
    segments: list[Any] = []
    at = draw(st.integers(0, 0x1800))
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from([0, 1, 100, 0xFFF, 0x1000, 0x1001, 0x2800]))
        more = draw(st.sampled_from([0, 1, 0xF00, 0x1000, 0x2345]))
        flags = draw(st.sampled_from([4, 5, 6, 7]))
        shift = draw(st.sampled_from([0, 0, 7]))
        segments.append(kit.Seg(at, kit.pattern(size, len(segments)), size + more, flags, shift=shift))
        at = (at + size + more + 0x2FFF & ~0xFFF) + draw(st.sampled_from([0, 0, 0x10, 0x800, 0xFFF]))
    layout: list[Any] = []
    place = 0x40000
    for _ in range(draw(st.integers(0, 5))):
        pages = draw(st.integers(0, 3))
        content = draw(st.sampled_from([None, None, kit.tcs(0x1000, 0x5000)]))
        flags = draw(st.sampled_from([0, R, RW, TCS])) if content is None else TCS
        entry = kit.Entry(
            place, pages, flags, draw(st.integers(0, 7)), draw(st.sampled_from([0, 0xCC])), content
        )
        layout.append(entry)
        place += pages << 12
    if layout:
        layout.append(kit.Group(draw(st.integers(0, len(layout))), draw(st.integers(0, 3)), 0x10000))
    version = draw(st.sampled_from([(1, 3), (1, 4), (2, 1), (2, 4), (3, 3)]))
    places = st.integers(0, 0x10000)
    file = kit.File(
        segments,
        [kit.Block(version, layout, ssa_frame_size=draw(st.integers(1, 4)))],
        rela=draw(st.lists(st.tuples(places, st.sampled_from([0, 8])), max_size=6)),
        jmprel=draw(st.lists(st.tuples(places, st.sampled_from([0, 7])), max_size=3)),
        dynamic=draw(st.sampled_from([[], TEXTREL])),
    )
    end = file.offsets()[-1]
    spots = st.tuples(st.integers(0, end), st.binary(max_size=300))
    file.blocks[0].patches = [
        (begin, data[: max(0, end - begin)]) for begin, data in draw(st.lists(spots, max_size=4))
    ]
    return file


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_enclaves(kit: Any, data: st.DataObject) -> None:
    kit.agrees(data.draw(files(kit)))


# ---- what is refused --------------------------------------------------------------------------------------


def poke(at: int, code: str, value: int) -> Callable[[Any, bytearray], None]:
    def change(file: Any, data: bytearray) -> None:
        struct.pack_into(code, data, at, value)

    return change


def poke_block(at: int, code: str, value: int) -> Callable[[Any, bytearray], None]:
    def change(file: Any, data: bytearray) -> None:
        struct.pack_into(code, data, file.at["blocks"] + at, value)

    return change


def poke_note(at: int, code: str, value: int) -> Callable[[Any, bytearray], None]:
    def change(file: Any, data: bytearray) -> None:
        struct.pack_into(code, data, file.at["note"] + at, value)

    return change


BIG = (1 << 64) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poke(4, "<B", 1), "ELF identification at offset 0x0"),
        (poke(5, "<B", 2), "ELF identification"),
        (poke(16, "<H", 2), r"ELF header's type at offset 0x10: expected 3 \(ET_DYN\), found 2"),
        (poke(18, "<H", 183), "ELF header's machine at offset 0x12"),
        (poke(54, "<H", 32), "phentsize"),
        (poke(58, "<H", 40), "shentsize"),
        (poke(32, "<Q", BIG), "program header table"),
        (poke(40, "<Q", BIG), "section header table"),
        (poke(56, "<H", 0xFFFF), "program header table"),
        (poke(60, "<H", 0xFFFF), "section header table"),
        (poke(62, "<H", 0xFFFF), "shstrndx"),
        (poke(64 + 4, "<I", 0), "segment 0's flags: expected R, W or X"),
        (poke(64 + 4, "<I", 2), "R where W is set"),
        (poke(64 + 8, "<Q", BIG), "segment 0"),
        (poke(64 + 32, "<Q", BIG), "segment 0"),
        (poke(64 + 40, "<Q", BIG), "segment 0: expected inside the enclave"),
        (poke(64 + 16, "<Q", 0x3000), "overlap"),
        (poke_note(0, "<I", 14), "note's namesz"),
        (poke_note(12, "<B", 0x53), "note's name"),
        (poke_note(4, "<I", 0xFFFF_FFFF), "note's descsz"),
        (poke_block(0, "<Q", 0), "metadata.*has it been signed"),
        (poke_block(16, "<I", 0), "metadata.*has it been signed"),
        (poke_block(16, "<I", 100), "metadata block's size"),
        (poke_block(16, "<I", 0xFFFF_FFFF), "metadata block's size"),
        (poke_block(24, "<I", 0), "ssa_frame_size"),
        (poke_block(24, "<I", 5), "ssa_frame_size"),
        (poke_block(40, "<Q", 0), "enclave_size"),
        (poke_block(40, "<Q", 3 << 19), "enclave_size"),
        (poke_block(40, "<Q", 1 << 12), "inside the enclave"),
        (poke_block(64, "<B", 1), "SIGSTRUCT"),
        (poke_block(1872, "<I", 0xFFFF_FFFF), "directory 0"),
        (poke_block(1876, "<I", 0xFFFF_FFE0), "directory 0"),
        (poke_block(1876, "<I", 31), "directory 0"),
        (poke_block(1880, "<I", 0xFFFF_FFFF), "directory 1"),
        (poke_block(1884, "<I", 33), "directory 1"),
    ],
)
def test_files_that_are_refused(kit: Any, plain: Plain, change: Any, message: str) -> None:
    file = plain()
    data = bytearray(file.build())
    change(file, data)
    with pytest.raises(ImageFormatError, match=message) as caught:
        kit.load(bytes(data))
    assert caught.value.file == str(kit.path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([("Entry", 0x4800)], "page-aligned"),
        ([("Entry", 1 << 20)], "inside the enclave"),
        ([("Entry", 0xFF000, 2)], "inside the enclave"),
        ([("Entry", 1 << 63, 2)], "inside the enclave"),
        ([("Entry", 0x4000, 0xFFFF_FFFF)], "inside the enclave"),
        ([("Entry", 0x4000, 2), ("Entry", 0x5000)], "behind layout 0: id 1, which ends at 0x6000"),
        ([("Entry", 0x5000), ("Entry", 0x4000, 2, 0, 0)], "behind layout 1"),
        ([("Entry", 0x4000, 2), ("Entry", 0x5000, 1, 0, 0)], "behind layout 0"),
        ([("Entry", 0)], "overlap"),
        ([("Entry", 0x4000, 1, 0x3)], "SECINFO.FLAGS"),
        ([("Entry", 0x4000, 1, 0x10203)], "SECINFO.FLAGS"),
        ([("Entry", 0x4000, 1, 0x101)], "TCS"),
        ([("Entry", 0x4000, 1, 0x202)], "R where W"),
        ([("Entry", 0x4000, 1, 0, 3, 0, b"x")], "SECINFO.FLAGS"),
        ([("Entry", 0x4000, 1, TCS, 3, 0, bytes(4097))], "a TCS of at most 4096"),
        ([("Group", 1, 1, 0x1000)], "at most 0 entries"),
        ([("Entry", 0x4000), ("Group", 2, 1, 0x1000)], "at most 1 entries"),
        ([("Entry", 0x4000), ("Group", 1, 1, 0x1000), ("Group", 2, 1, 0x8000)], "another group"),
        ([("Entry", 0x4000), ("Group", 1, 1, 0)], "behind"),
        ([("Entry", 0x4000), ("Group", 1, 1, 0x800)], "page-aligned"),
        ([("Entry", 0x4000), ("Group", 1, 1, 0xFC000)], "inside the enclave"),
        ([("Entry", 0x4000), ("Group", 1, 2, 1 << 20)], "steps inside"),
        ([("Entry", 0x4000), ("Group", 1, 0xFFFF_FFFF, BIG)], "steps inside"),
        ([("Entry", 0x4000, 0), ("Group", 1, 0x1_0001, 0)], "loaded entries: expected at most"),
        ([("Entry", 0x4000, 0), ("Group", 1, 0xFFFF_FFFF, 0)], "loaded entries: expected at most"),
    ],
)
def test_layouts_that_are_refused(kit: Any, layout: Any, message: str) -> None:
    rows = [getattr(kit, kind)(*arguments) for kind, *arguments in layout]
    file = kit.File([kit.Seg(0, b"code", flags=5)], [kit.Block(layout=rows)])
    with pytest.raises(ImageFormatError, match=message):
        kit.load(file.build())


def test_groups_of_nothing_cost_nothing(kit: Any) -> None:
    image = kit.load(with_layout(kit, kit.Entry(0x4000), kit.Group(0, 0xFFFF_FFFF, 0)).build())
    assert image.page_count == 2


def test_a_tcs_on_all_pages_there_are(kit: Any) -> None:
    entry = kit.Entry(0x4000, 0xFFFF_FFF0, TCS, content=kit.tcs(0, 0))
    with pytest.raises(ImageFormatError, match="regions: expected at most"):
        kit.load(with_layout(kit, entry, enclave_size=1 << 45).build())


def test_content_outside_its_block(kit: Any) -> None:
    for field, value in ((16, 0xFFFF_FFFF), (20, 0xFFFF_FFFF), (16, 4000)):
        file = with_layout(kit, kit.Entry(0x4000, content=b"x" * 64))
        data = bytearray(file.build())
        block = file.at["blocks"]
        row = block + struct.unpack_from("<I", data, block + 1880)[0]
        struct.pack_into("<I", data, row + field, value)
        with pytest.raises(ImageFormatError, match="layout 0's content"):
            kit.load(bytes(data))


@pytest.mark.parametrize(
    ("field", "code", "value", "message"),
    [
        (0, "<Q", BIG, "patch 0 at offset"),
        (0, "<Q", 1 << 20, "patch 0 at offset"),
        (8, "<I", 0xFFFF_FFFF, "patch 0's bytes"),
        (12, "<I", 1 << 19, "patch 0"),
        (12, "<I", 0xFFFF_FFFF, "patch 0"),
    ],
)
def test_patches_that_are_refused(kit: Any, field: int, code: str, value: int, message: str) -> None:
    file = kit.File([kit.Seg(0, b"code")])
    file.blocks[0].patches = [(0x1000, b"patch")]
    data = bytearray(file.build())
    block = file.at["blocks"]
    row = block + struct.unpack_from("<I", data, block + 1872)[0]
    struct.pack_into(code, data, row + field, value)
    with pytest.raises(ImageFormatError, match=message):
        kit.load(bytes(data))


def test_a_patch_over_its_own_block(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"code")])
    file.build()
    file.blocks[0].patches = [(file.at["blocks"] + 1900, b"patch")]
    with pytest.raises(ImageFormatError, match="outside its own block"):
        kit.load(file.build())


@pytest.mark.parametrize(
    "elrange",
    [
        None,
        (0x1000, 0, 0),
        (0x1000, 0, 3 << 20),
        (0x1000, 0, 2048),
        (0x1000, 0x2000, 1 << 21),
        (0x0F000000, 0x10000000, 1 << 21),
        (0x10000800, 0x10000000, 1 << 21),
        (0x10180000, 0x10000000, 1 << 21),
        (0x10000000, 0x10100000, 1 << 21),
        (0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF_FFE0_0000, 1 << 21),
    ],
)
def test_elranges_that_are_refused(kit: Any, elrange: tuple[int, int, int] | None) -> None:
    file = kit.File([kit.Seg(0, b"code")], [kit.Block((13, 3), elrange=elrange)])
    with pytest.raises(ImageFormatError, match="ELRANGE"):
        kit.load(file.build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dynamic": [*TEXTREL, (7, 0x1234)]}, "section at address 0x1234"),
        ({"dynamic": [*TEXTREL, (8, 25)]}, "entries of 24 bytes"),
        ({"dynamic": [*TEXTREL, (8, 24 << 40)]}, "entries of 24 bytes"),
        ({"dynamic": [*TEXTREL, (8, 24000)]}, "relocations"),
    ],
)
def test_relocations_that_are_refused(kit: Any, change: Any, message: str) -> None:
    file = kit.File([kit.Seg(0, b"code")], rela=[(0, 8)], **change)
    with pytest.raises(ImageFormatError, match=message):
        kit.load(file.build())


def test_a_dynamic_table_without_end(kit: Any) -> None:
    file = kit.File([kit.Seg(0, b"code")], dynamic=TEXTREL)
    data = bytearray(file.build())
    struct.pack_into("<Q", data, file.at["dynamic"] + 16, 1)
    with pytest.raises(ImageFormatError, match="DT_NULL"):
        kit.load(bytes(data))


@pytest.mark.parametrize("inner", [b"", b"\x7fELF" + bytes(60), bytes(1000)])
def test_inner_shared_objects_that_are_none(kit: Any, inner: bytes) -> None:
    entry = struct.pack("<QQQQ", 0x1000, 0x20000, len(inner), 0)
    file = kit.File([kit.Seg(0, inner or b"x")], [kit.Block((3, 3), extend=[(0x1002, entry)])])
    with pytest.raises(ImageFormatError, match="ELF"):
        kit.load(file.build())


def test_inner_shared_objects_that_are_refused(kit: Any) -> None:
    tls = kit.File([kit.Seg(0, b"x"), kit.Seg(0x1000, b"t", type=7)]).build()
    good = inner_file(kit).build()
    for inner, place, size, patch, message in (
        (good, 1 << 40, len(good), 0, "inside the enclave"),
        (good, BIG, len(good), 0, "inside the enclave"),
        (good, 0x20000, BIG, 0, "inner shared object"),
        (good, 0, len(good), 0, "overlap"),
        (good, 0x20000, len(good), 100, "outside the inner"),
        (tls, 0x20000, len(tls), 0, "PT_TLS"),
    ):
        file = kit.File([kit.Seg(0, b"x")], [], inner=inner)
        file.build()
        entry = struct.pack("<QQQQ", file.at["inner"], place, size, 0)
        file.blocks = [kit.Block((3, 3), extend=[(0x1002, entry)])]
        if patch:
            file.blocks[0].patches = [(file.at["inner"] + patch, b"p")]
        with pytest.raises(ImageFormatError, match=message):
            kit.load(file.build())


def test_other_elf_files_are_no_known_format(kit: Any, plain: Plain) -> None:
    file = plain(section=".note.other")
    with pytest.raises(ImageFormatError, match=r"format at offset 0x0.*intel-sdk-elf"):
        kit.load(file.build())


def test_loaded_sections_are_named_for_people(kit: Any, tmp_path: Path) -> None:
    """Those with SHF_ALLOC; a table of names that is not there costs nothing but the names."""
    file = kit.File([kit.Seg(0, b"x" * 8192)], rela=[(0x1000, 8)])
    raw = bytearray(file.build())
    struct.pack_into("<Q", raw, file.at["shdr"] + 64 + 8, 2)
    path = tmp_path / "named.so"
    path.write_bytes(raw)
    with EnclaveImage.load(path) as image:
        assert image.details["sections"] == [[".rela.dyn", 0x7000_0000, 24]]
