"""The ``.enclave`` file: what is saved is loaded, and any damage is found, named and cheap."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enturbo.runtime.formats import detect, enclave_file
from enturbo.runtime.formats.enclave_file import HEADER
from enturbo.runtime.image import EnclaveImage, Region
from enturbo.shm.errors import EnturboError, ImageFormatError

R, RW, TCS = 0x201, 0x203, 0x100
IMAGE = EnclaveImage(
    [
        Region(0, 2, R, b"program" * 700),
        Region(12288, 1, TCS, bytes(range(72))),
        Region(16384, 3, RW, fill=0xCCCCCCCC, measured=0x8001),
        Region(1 << 20, 2, RW, b"\1" * 5000, measured=False),
        Region(1 << 21, 100, RW, measured=False),
    ],
    size=1 << 24,
    ssa_frame_size=2,
    dynamic=[Region(1 << 22, 7, RW, measured=False)],
)


def rows(image: EnclaveImage) -> list[tuple[object, ...]]:
    """All that an image says, contents padded to whole pages."""
    return [(image.size, image.ssa_frame_size)] + [
        (r.offset, r.page_count, r.flags, r.chunks, r.fill, bytes(r.content or b"").ljust(r.size, b"\0"))
        for r in image.regions + image.dynamic
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enclaves")


@pytest.fixture(scope="module")
def saved(folder: Path) -> bytes:
    IMAGE.save(folder / "image.enclave")
    return (folder / "image.enclave").read_bytes()


@st.composite
def images(draw: st.DrawFn) -> EnclaveImage:
    regions = []
    at = 0
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 3))
        pages = draw(st.integers(1, 3))
        content = draw(st.none() | st.binary(max_size=64) | st.just(b"\7" * (pages * 4096)))
        regions.append(
            Region(
                at * 4096,
                pages,
                draw(st.sampled_from([0x200, R, RW, 0x205, 0x207, TCS])),
                content,
                0 if content is not None else draw(st.sampled_from([0, 1, 0xFFFF_FFFF])),
                draw(st.booleans() | st.integers(0, 0xFFFF)),
            )
        )
        at += pages
    heap = [Region(at * 4096, 5, RW, measured=False)] if draw(st.booleans()) else []
    size = 1 << max(0, (at + 5) * 4096 - 1).bit_length()
    return EnclaveImage(
        draw(st.permutations(regions)), size=size, ssa_frame_size=draw(st.integers(1, 4)), dynamic=heap
    )


@given(image=images())
@settings(deadline=None)
def test_what_is_saved_is_loaded(image: EnclaveImage, folder: Path) -> None:
    image.save(folder / "random.enclave")
    with EnclaveImage.load(folder / "random.enclave") as loaded:
        assert rows(loaded) == rows(image)
        assert loaded.measure() == image.measure()
        first = (folder / "random.enclave").read_bytes()
        loaded.save(folder / "random.enclave")  # over the file that it is mapped from
        assert (folder / "random.enclave").read_bytes() == first


def test_layout_of_the_file(saved: bytes, folder: Path) -> None:
    assert saved[:8] == b"ENTURBOI"
    assert len(saved) % 4096 == 0
    assert HEADER.size == 64
    assert len(saved) == 4096 + 5 * 4096  # manifest's page, 2 + 1 + 2 pages of content; fills take none
    assert saved[4096:].startswith(b"program")
    assert detect(folder / "image.enclave").name == "enclave"


def test_contents_are_slices_of_the_mapping(saved: bytes, folder: Path) -> None:
    image = EnclaveImage.load(folder / "image.enclave")
    contents = [region.content for region in image.regions if region.content is not None]
    assert all(isinstance(content, memoryview) and content.readonly for content in contents)
    assert len({id(content.obj) for content in contents if isinstance(content, memoryview)}) == 1
    image.close()
    image.close()
    with pytest.raises(ValueError, match="released"):
        bytes(contents[0])


def test_closing_leaves_no_descriptor(folder: Path, saved: bytes) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with EnclaveImage.load(folder / "image.enclave") as image:
            assert image.as_edmm().page_count == image.page_count - 100
    (folder / "cut.enclave").write_bytes(saved[:5000])
    for _ in range(3):
        with pytest.raises(ImageFormatError):
            EnclaveImage.load(folder / "cut.enclave")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_slice_in_use_keeps_the_mapping(folder: Path, saved: bytes) -> None:
    with EnclaveImage.load(folder / "image.enclave") as image:
        content = image.regions[0].content
        assert isinstance(content, memoryview)
        mine = content[:7]
    assert bytes(mine) == b"program"


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_changed_byte_is_found(data: st.DataObject, folder: Path, saved: bytes) -> None:
    damaged = bytearray(saved)
    at = data.draw(st.integers(0, len(saved) - 1) | st.integers(0, 300))
    damaged[at] ^= data.draw(st.integers(1, 255))
    (folder / "damaged.enclave").write_bytes(damaged)
    with pytest.raises(ImageFormatError) as caught:
        EnclaveImage.load(folder / "damaged.enclave")
    error = caught.value
    assert error.file == str(folder / "damaged.enclave")
    assert error.offset is not None
    assert error.expected is not None
    assert error.found is not None


@given(data=st.data())
@settings(deadline=None)
def test_every_truncation_is_found(data: st.DataObject, folder: Path, saved: bytes) -> None:
    length = data.draw(st.integers(0, len(saved) - 1) | st.integers(0, 70))
    (folder / "short.enclave").write_bytes(saved[:length])
    with pytest.raises(ImageFormatError) as caught:
        EnclaveImage.load(folder / "short.enclave")
    assert caught.value.expected is not None


def test_a_longer_file_is_refused(folder: Path, saved: bytes) -> None:
    (folder / "long.enclave").write_bytes(saved + bytes(4096))
    with pytest.raises(ImageFormatError, match="file_size"):
        EnclaveImage.load(folder / "long.enclave")


def test_the_message_has_all_facts(folder: Path, saved: bytes) -> None:
    damaged = bytearray(saved)
    damaged[4096 + 10] ^= 1
    (folder / "fact.enclave").write_bytes(damaged)
    with pytest.raises(
        ImageFormatError,
        match=r"fact\.enclave: checksum of the region at 0x0 at offset 0x1000: "
        r"expected 0x[0-9a-f]+, found 0x[0-9a-f]+",
    ):
        EnclaveImage.load(folder / "fact.enclave")


def forge(manifest: object, content: bytes = b"", **header: int) -> bytes:
    """A file whose checksums all hold: what someone writes who knows the format."""
    packed = manifest if isinstance(manifest, bytes) else msgpack.packb(manifest)
    data_offset = -(-(64 + len(packed)) // 4096) * 4096
    values = {
        "magic": enclave_file.MAGIC,
        "version": 2,
        "manifest_size": len(packed),
        "manifest_checksum": xxhash.xxh3_64_intdigest(packed),
        "data_offset": data_offset,
        "file_size": data_offset + len(content),
        **header,
    }
    head = bytearray(64)
    for name, value in values.items():
        HEADER.struct(name).pack_into(head, HEADER.offset(name), value)
    HEADER.struct("header_checksum").pack_into(head, 56, xxhash.xxh3_64_intdigest(head[:56]))
    return (bytes(head) + packed).ljust(data_offset, b"\0") + content


PAGE = b"x" * 4096
PAGE_SUM = xxhash.xxh3_64_intdigest(PAGE)


def manifest(regions: object = (), **changes: object) -> dict[str, object]:
    keys = {"size": 1 << 20, "ssa_frame_size": 1, "layers": [], "regions": regions, "dynamic": []}
    return {**keys, **changes}


def row(**changes: Any) -> list[Any]:
    good = {"offset": 0, "pages": 1, "flags": R, "chunks": 0xFFFF, "fill": 0, "content": 1, "sum": PAGE_SUM}
    return list({**good, "layer": 0, "layer_page": 0, **changes}.values())


def test_a_forged_file_that_is_right_loads(folder: Path) -> None:
    (folder / "forged.enclave").write_bytes(forge(manifest([row()]), PAGE))
    with EnclaveImage.load(folder / "forged.enclave") as image:
        assert bytes(image.regions[0].content or b"") == PAGE


@pytest.mark.parametrize(
    "make",
    [
        lambda: forge(manifest([row(offset=1)]), PAGE),
        lambda: forge(manifest([row(offset=-4096)]), PAGE),
        lambda: forge(manifest([row(offset=1 << 60)]), PAGE),
        lambda: forge(manifest([row(offset=(1 << 64) - 4096)]), PAGE),
        lambda: forge(manifest([row(pages=0)]), PAGE),
        lambda: forge(manifest([row(pages=1 << 40)]), PAGE),
        lambda: forge(manifest([row(flags=0x300)]), PAGE),
        lambda: forge(manifest([row(flags=1 << 63)]), PAGE),
        lambda: forge(manifest([row(chunks=1 << 16)]), PAGE),
        lambda: forge(manifest([row(fill=1)]), PAGE),
        lambda: forge(manifest([row(content=2)]), PAGE),
        lambda: forge(manifest([row(content=2, pages=1, sum=xxhash.xxh3_64_intdigest(PAGE * 2))]), PAGE * 2),
        lambda: forge(manifest([row(content=1 << 52)]), PAGE),
        lambda: forge(manifest([row(content=0)]), PAGE),
        lambda: forge(manifest([row(content=0)])),
        lambda: forge(manifest([row(content=-1)]), PAGE),
        lambda: forge(manifest([row(content=True)]), PAGE),
        lambda: forge(manifest([row(content=1.0)]), PAGE),
        lambda: forge(manifest([row(sum=PAGE_SUM ^ 1)]), PAGE),
        lambda: forge(manifest([row(offset=None)]), PAGE),
        lambda: forge(manifest([row()[:-1]]), PAGE),
        lambda: forge(manifest([row(layer=1)]), PAGE),
        lambda: forge(manifest([row(layer_page=1)]), PAGE),
        lambda: forge(manifest([row(content=0, sum=0, layer_page=1)])),
        lambda: forge(manifest([], layers=None)),
        lambda: forge(manifest([], layers=[1])),
        lambda: forge(manifest([], layers=[[bytes(32), 1]])),
        lambda: forge(manifest([row(), row()]), PAGE * 2),
        lambda: forge(manifest([row()]), PAGE * 2),
        lambda: forge(manifest([row()]), PAGE + b"x"),
        lambda: forge(manifest({"a": 1})),
        lambda: forge(manifest([1, 2])),
        lambda: forge(manifest(None)),
        lambda: forge(manifest([], size=0)),
        lambda: forge(manifest([], size=3)),
        lambda: forge(manifest([], size="4096")),
        lambda: forge(manifest([], size=True)),
        lambda: forge(manifest([], ssa_frame_size=0)),
        lambda: forge(manifest([], ssa_frame_size=None)),
        lambda: forge(manifest([], dynamic=[[0]])),
        lambda: forge(manifest([], dynamic=[[1, 1]])),
        lambda: forge(manifest([], dynamic=[[1 << 20, 1]])),
        lambda: forge(manifest([row()], dynamic=[[0, 1]]), PAGE),
        lambda: forge(manifest([], more=1)),
        lambda: forge([]),
        lambda: forge(None),
        lambda: forge(b""),
        lambda: forge(b"\xc1"),
        lambda: forge(msgpack.packb(manifest()) + b"\0"),
        lambda: forge(manifest(), version=1),
        lambda: forge(manifest(), version=3),
        lambda: forge(manifest(), reserved=1),
        lambda: forge(manifest(), reserved2=1),
        lambda: forge(manifest(), data_offset=0),
        lambda: forge(manifest(), data_offset=8192),
        lambda: forge(manifest(), manifest_size=1 << 63),
        lambda: forge(manifest(), manifest_size=8000),
        lambda: forge(manifest(), file_size=1 << 40),
    ],
)
def test_a_forged_file_that_is_wrong(make: Callable[[], bytes], folder: Path) -> None:
    (folder / "forged.enclave").write_bytes(make())
    with pytest.raises(ImageFormatError) as caught:
        EnclaveImage.load(folder / "forged.enclave")
    assert caught.value.file == str(folder / "forged.enclave")


def test_an_older_file_is_refused_for_its_version(folder: Path) -> None:
    old = {"size": 1 << 20, "ssa_frame_size": 1, "regions": [row()[:-2]], "dynamic": []}
    (folder / "old.enclave").write_bytes(forge(old, PAGE, version=1))
    with pytest.raises(ImageFormatError, match=r"old\.enclave: header's version .*expected 0x2, found 0x1"):
        EnclaveImage.load(folder / "old.enclave")


def _tree(depth: int) -> bytes:
    return b"\x92" + _tree(depth - 1) * 2 if depth else b"\x90"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xdd\x00\x0f\xff\xf0" + b"\x90" * 0xFFFF0, id="one list of a million"),
        pytest.param(b"\x9f" + (b"\xdc\x3f\xff" + b"\x90" * 0x3FFF) * 15, id="empty lists"),
        pytest.param(_tree(18), id="a balanced tree"),
        pytest.param(b"\xdc\x40\x00" + b"\x80" * 0x4000, id="empty maps"),
        pytest.param((b"\xdc\x3f\xff" + b"\x90" * 30) * 30_000, id="long lists in long lists"),
        pytest.param(b"\xdc\x40\x00" * 300_000, id="long lists, as deep as it goes"),
        pytest.param(b"\x92\x91\x90" * 340_000, id="a deep tree"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="a long text that is not there"),
    ],
)
def test_hostile_manifests_are_cheap(body: bytes, folder: Path) -> None:
    """Less than 200 MiB, whatever the manifest says (time is not asserted: the machine may be busy)."""
    (folder / "hostile.enclave").write_bytes(forge(body))
    tracemalloc.start()
    try:
        with pytest.raises(ImageFormatError):
            EnclaveImage.load(folder / "hostile.enclave")
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@given(
    body=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ).map(lambda value: msgpack.packb(manifest(value)))
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_manifests_give_no_other_error(body: bytes, folder: Path) -> None:
    (folder / "fuzz.enclave").write_bytes(forge(body))
    try:
        EnclaveImage.load(folder / "fuzz.enclave").close()
    except ImageFormatError as error:
        assert error.file  # noqa: PT017 - both ends are fine; an empty list of regions is an image


def test_what_is_no_enclave_file(folder: Path) -> None:
    (folder / "text").write_text("hello")
    with pytest.raises(ImageFormatError, match=r"expected enclave .*found b'hello'"):
        EnclaveImage.load(folder / "text")
    (folder / "empty").write_bytes(b"")
    with pytest.raises(ImageFormatError, match="format"):
        EnclaveImage.load(folder / "empty")
    with pytest.raises(ImageFormatError, match="regular file"):
        EnclaveImage.load(folder)
    os.mkfifo(folder / "fifo")
    with pytest.raises(ImageFormatError, match="regular file"):
        EnclaveImage.load(folder / "fifo")
    with pytest.raises(FileNotFoundError):
        EnclaveImage.load(folder / "missing")


def test_saving_replaces_whole_files_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "image.enclave"
    target.write_bytes(b"old")
    with pytest.raises(EnturboError):
        EnclaveImage(
            [Region(page * 4096, 1, RW, fill=1) for page in range((1 << 14) + 1)], size=1 << 30
        ).save(target)
    with pytest.raises(OSError, match="directory"):
        IMAGE.save(tmp_path / "missing" / "image.enclave")
    assert target.read_bytes() == b"old"
    IMAGE.save(target)
    assert os.listdir(tmp_path) == ["image.enclave"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_huge_image_is_a_small_file(tmp_path: Path) -> None:
    image = EnclaveImage([Region(0, 31_000_000, RW, fill=7)], size=1 << 37)
    image.save(tmp_path / "huge.enclave")
    assert (tmp_path / "huge.enclave").stat().st_size == 4096
    with EnclaveImage.load(tmp_path / "huge.enclave") as loaded:
        assert rows_without_content(loaded) == rows_without_content(image)


def rows_without_content(image: EnclaveImage) -> list[tuple[int, ...]]:
    return [(r.offset, r.page_count, r.flags, r.chunks, r.fill) for r in image.regions]


def test_a_function_survives_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "handler.py").write_text("def handler(event, context): ...\n")
    image = EnclaveImage.from_function(tmp_path / "f", heap="1MiB", data=b"x")
    image.save(tmp_path / "f.enclave")
    image.as_edmm().save(tmp_path / "f2.enclave")
    with EnclaveImage.load(tmp_path / "f.enclave") as one, EnclaveImage.load(tmp_path / "f2.enclave") as two:
        assert one.handler == two.handler == "handler:handler"
        assert one.program == image.program
        assert one.measure() == image.measure()
        assert two.measure() == image.as_edmm().measure() != one.measure()
        assert one.as_edmm().dynamic == two.dynamic
