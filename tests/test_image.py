"""Regions and images: what is accepted, what is refused, and what a function's folder becomes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo.runtime.image import EnclaveImage, Region
from enturbo.runtime.measurement import Measurement, SchemeError
from enturbo.runtime.program import Program
from enturbo.runtime.sizes import parse_size
from enturbo.shm.errors import EnturboError, ImageFormatError

R, RW, RX, TCS = 0x201, 0x203, 0x205, 0x100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "function"
    (root / "pkg" / "deep").mkdir(parents=True)
    (root / "handler.py").write_text("def handler(event, context):\n    return event\n")
    (root / "pkg" / "__init__.py").write_text("")
    (root / "pkg" / "deep" / "mod.py").write_text("X = 1\n")
    (root / "not-a-module.py").write_text("print()\n")
    (root / "notes.txt").write_bytes(b"hello")
    (root / "big.bin").write_bytes(bytes(range(256)) * 5000)
    return root


def program_of(image: EnclaveImage) -> Program:
    assert image.program is not None
    return image.program


def read(image: EnclaveImage, offset: int, size: int) -> bytes:
    """``size`` bytes of the enclave's pages at ``offset``, which lie in one region."""
    for region in image.regions:
        if region.offset <= offset and offset + size <= region.end:
            content = bytes(region.content or b"").ljust(region.size, b"\0")
            return content[offset - region.offset :][:size]
    raise AssertionError(f"no region holds {offset:#x} + {size}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1, R), "multiple of 4096"),
        ((-4096, 1, R), "multiple of 4096"),
        ((0, 0, R), "at least one page"),
        ((0, -1, R), "at least one page"),
        ((0, (1 << 32) + 1, R), "end"),
        (((1 << 32) * 4096, 1, R), "end"),
        ((0, 1, 0x000), "page type"),
        ((0, 1, 0x001), "page type"),
        ((0, 1, 0x300), "page type"),
        ((0, 1, 0x208), "page type"),
        ((0, 1, 0x210), "page type"),
        ((0, 1, 0x10201), "page type"),
        ((0, 1, -1), "page type"),
        ((0, 1, TCS | 1), "TCS"),
        ((0, 1, 0x202), "R where W"),
        ((0, 1, 0x206), "R where W"),
        ((0, 1, R, bytes(4097)), "at most 4096 bytes"),
        ((0, 1, R, b"x", 1), "0 beside content"),
        ((0, 1, R, None, -1), "u32"),
        ((0, 1, R, None, 1 << 32), "u32"),
        ((0, 1, R, None, 0, 1 << 16), "mask"),
        ((0, 1, R, None, 0, -1), "mask"),
        ((0, 1, R, memoryview(bytes(100))[::2]), "contiguous"),
    ],
)
def test_regions_that_cannot_be_added(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ImageFormatError, match=message):
        Region(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "chunks"), [(True, 0xFFFF), (False, 0), (1, 1), (0, 0), (0x8001, 0x8001)]
)
def test_measured_is_a_word_or_a_mask(measured: bool | int, chunks: int) -> None:
    assert Region(0, 1, R, measured=measured).chunks == chunks


@pytest.mark.parametrize("flags", [0x200, R, RW, 0x204, RX, 0x207, TCS])
def test_flags_that_sgx_knows(flags: int) -> None:
    assert Region(4096, 2, flags).end == 3 * 4096


@pytest.mark.parametrize(
    ("regions", "size", "message"),
    [
        ([Region(0, 2, R), Region(4096, 1, R)], 8192, "overlap.* at offset 0x1000"),
        ([Region(4096, 1, R), Region(0, 2, R)], 8192, "overlap"),
        ([Region(0, 3, R)], 8192, "outside SECS.SIZE"),
        ([Region(0, 1, R)], 12288, "power of two"),
        ([], 0, "power of two"),
        ([], -4096, "power of two"),
        ([], 1 << 64, "power of two"),
        ([Region(0, 1, R)], 1, "outside"),
    ],
)
def test_images_that_cannot_be_made(regions: list[Region], size: int, message: str) -> None:
    with pytest.raises(ImageFormatError, match=message):
        EnclaveImage(regions, size=size)


def test_more_images_that_cannot_be_made() -> None:
    with pytest.raises(ImageFormatError, match="SSAFRAMESIZE"):
        EnclaveImage([], size=4096, ssa_frame_size=0)
    with pytest.raises(ImageFormatError, match="dynamic"):
        EnclaveImage([], size=4096, dynamic=[Region(0, 1, RW)])
    with pytest.raises(ImageFormatError, match="overlap"):
        EnclaveImage([Region(0, 1, R)], size=4096, dynamic=[Region(0, 1, RW, measured=False)])


def test_the_smallest_images() -> None:
    assert EnclaveImage([], size=1).page_count == 0
    image = EnclaveImage([Region(0, 1, TCS, b"x")], size=4096)
    assert (image.page_count, image.handler) == (1, None)


def test_a_huge_image_costs_nothing() -> None:
    pages = 31_000_000
    image = EnclaveImage([Region(0, pages, RW, fill=0xCCCCCCCC)], size=1 << 37)
    assert (image.page_count, image.measured_pages, image.epc_pages) == (pages, pages, pages)


def test_from_function_places_everything(folder: Path) -> None:
    image = EnclaveImage.from_function(folder, heap="1MiB", data=b"12345678", files={"more.txt": b"more"})
    program = program_of(image)
    assert image.handler == "handler:handler"
    for name in (
        "handler.py",
        "pkg/__init__.py",
        "pkg/deep/mod.py",
        "not-a-module.py",
        "notes.txt",
        "big.bin",
    ):
        assert read(image, *program.files[name]) == (folder / name).read_bytes(), name
    assert read(image, *program.files["more.txt"]) == b"more"
    for name in ("notes.txt", "big.bin", "more.txt"):
        assert program.files[name][0] % 4096 == 0
    assert program.data is not None
    assert program.heap is not None
    assert read(image, *program.data) == b"12345678"
    assert program.heap[1] == 1 << 20


def test_from_function_flags_guards_and_order(folder: Path) -> None:
    image = EnclaveImage.from_function(folder, heap=5000, data=10000)
    flags = [(region.flags, region.chunks) for region in image.regions]
    assert flags == [(R, 0xFFFF)] * 4 + [(RW, 0xFFFF), (RW, 0)]
    assert [region.offset for region in image.regions] == sorted(region.offset for region in image.regions)
    gaps = [
        after.offset - before.end for before, after in zip(image.regions, image.regions[1:], strict=False)
    ]
    assert gaps == [4096, 4096, 0, 4096, 4096]  # manifest | modules | small files, large file | data | heap
    assert [region.page_count for region in image.regions[-2:]] == [3, 2]
    assert image.size == 1 << (image.regions[-1].end - 1).bit_length()
    assert image.measured_pages == image.page_count - 2


def test_equal_folders_give_equal_images(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, other)
    os.utime(other / "handler.py", (0, 0))
    (other / "pkg" / "__pycache__").mkdir()
    (other / "pkg" / "__pycache__" / "mod.cpython-311.pyc").write_bytes(b"x")
    (other / "old.pyc").write_bytes(b"x")
    (other / ".hidden").write_bytes(b"x")
    (other / ".git").mkdir()
    (other / ".git" / "config").write_bytes(b"x")
    first, second = EnclaveImage.from_function(folder), EnclaveImage.from_function(other)
    assert first.regions == second.regions
    (other / "notes.txt").write_bytes(b"hellO")
    assert EnclaveImage.from_function(other).regions != first.regions


def test_many_names_make_the_manifest_longer_than_a_page(folder: Path) -> None:
    for number in range(300):
        (folder / f"file{number:04}.txt").write_bytes(b"%d" % number)
    image = EnclaveImage.from_function(folder)
    assert image.regions[0].page_count > 1
    assert image.regions[1].offset == image.regions[0].end + 4096
    program = program_of(image)
    assert all(read(image, *program.files[f"file{number:04}.txt"]) == b"%d" % number for number in range(300))


def test_without_heap_and_data(folder: Path) -> None:
    program = program_of(EnclaveImage.from_function(folder, heap=0))
    assert program.heap is None
    assert program.data is None


def test_data_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"from a file")
    image = EnclaveImage.from_function(folder, data=tmp_path / "data.bin")
    extent = program_of(image).data
    assert extent is not None
    assert read(image, *extent) == b"from a file"


def test_exclude_and_ignore_file(folder: Path) -> None:
    (folder / "enclave-ignore.txt").write_text("# comment\n\npkg/deep\n*.txt\n")
    program = program_of(EnclaveImage.from_function(folder, exclude=["big.*"]))
    assert set(program.files) == {"handler.py", "pkg/__init__.py", "not-a-module.py"}


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("main:handler", r"main:handler.*expected one of the modules \(handler, pkg, .*no such module"),
        ("not-a-module:handler", "module:function"),
        ("handler", "module:function"),
        ("handler.py:handler", "no such module"),
    ],
)
def test_a_missing_handler_is_told_at_build_time(folder: Path, handler: str, message: str) -> None:
    with pytest.raises(ImageFormatError, match=message):
        EnclaveImage.from_function(folder, handler=handler)


def _link_out(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to("../secret")


def _link_out_absolute(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")


def _link_folder_out(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)


def _link_loop(folder: Path) -> None:
    (folder / "pkg" / "link").symlink_to("..")


def _link_to_itself(folder: Path) -> None:
    (folder / "link").symlink_to("link")


def _link_broken(folder: Path) -> None:
    (folder / "link").symlink_to("missing")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")


def _bad_name(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt"))).write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [
        _link_out,
        _link_out_absolute,
        _link_folder_out,
        _link_loop,
        _link_to_itself,
        _link_broken,
        _fifo,
        _bad_name,
    ],
)
def test_what_does_not_belong_in_an_image(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder)
    with pytest.raises(ImageFormatError) as caught:
        EnclaveImage.from_function(folder)
    assert caught.value.file is not None


def test_links_inside_are_followed(folder: Path) -> None:
    (folder / "again.txt").symlink_to("notes.txt")
    (folder / "also").symlink_to("pkg")
    image = EnclaveImage.from_function(folder)
    program = program_of(image)
    assert read(image, *program.files["again.txt"]) == b"hello"
    assert "also/deep/mod.py" in program.files


def test_a_folder_that_is_none_and_a_file_given_twice(folder: Path) -> None:
    with pytest.raises(ImageFormatError, match="not a folder"):
        EnclaveImage.from_function(folder / "handler.py")
    with pytest.raises(ImageFormatError, match=r"notes\.txt"):
        EnclaveImage.from_function(folder, files={"notes.txt": b""})


def test_as_edmm_moves_the_heap_out_of_the_record_stream(folder: Path) -> None:
    image = EnclaveImage.from_function(folder, heap="64KiB", data=8)
    dynamic = image.as_edmm()
    assert (image.dynamic_pages, dynamic.dynamic_pages) == (0, 16)
    assert dynamic.page_count == image.page_count - 16
    assert dynamic.epc_pages == image.epc_pages
    assert dynamic.regions == image.regions[:-1]
    assert dynamic.dynamic == image.regions[-1:]
    assert dynamic.handler == image.handler
    assert dynamic.as_edmm().dynamic == dynamic.dynamic
    assert image.measure() != dynamic.measure()


def test_a_damaged_manifest_leaves_an_image_without_handler(folder: Path) -> None:
    """Such an image can be launched, and is then refused for its measurement."""
    image = EnclaveImage.from_function(folder)
    content = bytearray(image.regions[0].content or b"")
    content[30] ^= 0xFF
    damaged = EnclaveImage(
        [Region(0, image.regions[0].page_count, R, bytes(content)), *image.regions[1:]], size=image.size
    )
    assert damaged.handler is None
    with pytest.raises(ImageFormatError):
        _ = damaged.program
    assert damaged.measure() != image.measure()


def test_measure_says_what_it_measured(folder: Path) -> None:
    image = EnclaveImage.from_function(folder, heap="64KiB")
    assert image.measure(domains=4, block=2) == image.measure("enturbo", domains=4, block=2, workers=2)
    assert len({image.measure().digest, image.measure("sgx").digest, image.measure(domains=4).digest}) == 3
    sgx = image.measure("sgx", domains=8)
    assert (sgx.scheme, sgx.domains, sgx.block) == ("sgx", 1, 1)


@pytest.mark.parametrize(
    ("scheme", "domains", "block", "message"),
    [
        ("sha1", 32, 16, "'sha1'"),
        ("enturbo", 0, 16, "domains"),
        ("enturbo", 64, 16, "domains"),
        ("enturbo", 3, 16, "domains"),
        ("enturbo", 32, 0, "block"),
        ("enturbo", 32, 2048, "block"),
        ("enturbo", 32, 5, "block"),
    ],
)
def test_unknown_schemes_and_parameters(scheme: str, domains: int, block: int, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        EnclaveImage([], size=4096).measure(scheme, domains=domains, block=block)
    with pytest.raises(SchemeError, match=message):
        Measurement(bytes(32), scheme, domains, block)


def test_measurements_compare_by_what_they_mean() -> None:
    assert Measurement(bytes(32), "sgx", 8, 8) == Measurement(bytes(32), "sgx")
    assert Measurement(bytes(32), domains=8) != Measurement(bytes(32))
    with pytest.raises(SchemeError):
        Measurement(bytes(31))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 << 20),
        ("1 GiB", 1 << 30),
        ("1.5KiB", 1536),
        ("10kB", 10_000),
        ("4096", 4096),
        ("7 b", 7),
        (0, 0),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e3", "64 XiB", "0x10", "1MiBs", -1, True])
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(EnturboError, match="not a size"):
        parse_size(text)


@given(st.text(max_size=12))
@settings(deadline=None)
def test_sizes_never_raise_anything_else(text: str) -> None:
    with contextlib.suppress(EnturboError):
        assert parse_size(text) >= 0
