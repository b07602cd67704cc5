"""Open Enclave files: each of the loader's rules, what is refused, and what hostile files cost."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage, SigningKey
from enturbo.runtime.formats import detect
from enturbo.runtime.formats.open_enclave import OEINFO
from enturbo.shm.errors import ImageFormatError

Load = Callable[[bytes], EnclaveImage]

ZERO_BASE = {"flags": 2, "start": 0x1_0000_0000}
TPOFF = (0x6000, 18, 3, 5)

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no heap": {"heap": 0},
    "no stack": {"stack": 0},
    "no threads": {"tcs": 0},
    "many threads": {"tcs": 20, "stack": 1},
    "no relocations": {"rela": None},
    "rela.plt alone is nothing": {"rela": None, "plt": (TPOFF,)},
    "rela.plt behind rela.dyn": {"plt": (TPOFF, (0x7000, 7, 1, 9))},
    "relocations of more than a page": {
        "rela": tuple((8 * n, 8, 0, n) for n in range(180)),
        "data_at": 0x7968,
    },
    "rela.dyn is padded behind rela.plt": {
        "rela": ((1, 8, 0, 1),) * 171,
        "plt": ((2, 8, 0, 2),),
        "data_at": 0x8968,
    },
    "relocations of a whole page": {"rela": (), "plt": ()},
    "tdata": {"tdata": b"t" * 100},
    "tdata aligned by its section": {"tdata": b"t" * 100, "tdata_align": 8192},
    "tdata aligned by PT_TLS": {"tdata": b"t" * 100, "tls_align": 8192},
    "PT_TLS elsewhere": {"tdata": b"t" * 100, "tls_align": 8192, "tls_elsewhere": True},
    "empty tdata": {"tdata": b"", "tdata_align": 8192, "tbss": 8},
    "tbss": {"tbss": 100, "tbss_align": 8192},
    "tdata and tbss share a page": {"tdata": b"t" * 2000, "tbss": 2000},
    "alignment puts tbss on a page of its own": {"tdata": b"t" * 2000, "tbss": 2000, "tbss_align": 4096},
    "thread-local data without alignment": {"tdata": b"t" * 5, "tdata_align": 0, "tbss": 4, "tbss_align": 0},
    "many pages of thread-local data": {"tbss": 30_000},
    "zero base": ZERO_BASE,
    "zero base with a larger SIZE": {"flags": 2, "start": 0x8_0000},
    "a start address without zero base": {"start": 0x8_0000},
    "segments end on page ends": {"text": b"x" * 8192, "data": b"y" * (0x698), "bss": 5 * 4096},
    "few symbols": {"names": (b"_enclave_rva", b"_reloc_rva", b"_reloc_size")},
    "a patch on two pages": {"where": {b"_reloc_rva": 0x7000 - 1}},
    "zeros behind the last patch": {"bss": 9 * 4096},
    "a patch in code": {"where": {b"_reloc_rva": 0x2100}},
    "a patch before its segment": {"where": {b"_reloc_rva": 0x5900}},
    "a patch behind its segment": {"where": {b"_reloc_rva": 0x2000 + 5100}},
    "SIZE is the end": {"heap": 32 - 11 - 1, "tcs": 0},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_rule(options: dict[str, Any], build: Any, load: Load) -> None:
    """Pages and value are those of the rules, applied by the builder."""
    file = build.OpenEnclave(**options)
    with load(file.build()) as image:
        pages = file.pages()
        assert image.size == file.size
        assert image.ssa_frame_size == 1
        assert build.image_pages(image) == pages
        assert image.measure("sgx").digest == build.hash_pages(file.size, pages)


def test_size_is_reached_exactly(build: Any) -> None:
    """What the rule of that name means to try."""
    file = build.OpenEnclave(**RULES["SIZE is the end"])
    assert file.end == file.size


def test_signed(build: Any, load: Load, key: SigningKey, tmp_path: Path) -> None:
    """The SIGSTRUCT is no part of what it signs."""
    file = build.OpenEnclave()
    with load(file.build()) as image:
        assert image.sigstructs == ()
        signed = key.sign(image, "sgx")
    with load(replace(file, sigstruct=signed.encode()).build()) as image:
        assert image.sigstructs == (signed,)
        assert image.measure("sgx").digest == signed.enclavehash
    assert detect(tmp_path / "file").name == "open-enclave-elf"


def test_what_inspect_is_told(build: Any, load: Load) -> None:
    with load(build.OpenEnclave(**ZERO_BASE, tbss=1).build()) as image:
        details = dict(image.details)
        labels = [region.label for region in image.regions]
    expected = {"format": "open-enclave-elf", "product_id": 7, "svn": 9, "attributes": 4, "xfrm": 3}
    expected |= {"heap_pages": 3, "stack_pages": 2, "tcs_count": 2, "zero_base": True, "tls_pages": 1}
    expected |= {"start_address": 0x1_0000_0000, "relocation_bytes": 4096, "family_id": b"F".hex() * 16}
    assert details.items() >= expected.items()
    assert labels[:2] == ["PT_LOAD 0 (R)", "PT_LOAD 1 (R X)"]
    assert labels[-4:] == ["stack 1", "TCS 1", "SSA 1", "TLS and thread data 1"]


def test_oeinfo_layout() -> None:
    at = {"heap_pages": 8, "stack_pages": 16, "tcs_count": 24, "product_id": 32, "svn": 34, "flags": 36}
    at |= {"attributes": 72, "xfrm": 80, "start_address": 88, "image_info": 96, "sigstruct": 144}
    assert {name: OEINFO.offset(name) for name in at} == at
    assert OEINFO.size == 1960


def test_only_what_is_patched_is_copied(build: Any, load: Load) -> None:
    """The code is a view of the file; the zeros behind the data exist only where something is patched."""
    with load(build.OpenEnclave(bss=1 << 30, tcs=0, where={b"_reloc_rva": 1 << 29}).build()) as image:
        rows = [(each.content, each.page_count) for each in image.regions if each.flags & 6]
        kinds = [(None if view is None else type(memoryview(view).obj), pages) for view, pages in rows]
    # Code; data with the first variables; zeros; two variables on three pages; zeros; one more; zeros; heap.
    assert kinds[0] == (mmap.mmap, 2)
    assert kinds[1:3] == [(bytearray, 1), (None, 2)]
    assert [kind for kind, pages in kinds if pages > 100] == [None] * 2
    assert sum(pages for kind, pages in kinds if kind is bytearray) == 5


def test_what_is_refused_is_not_copied(build: Any, tmp_path: Path) -> None:
    """A file of 60 MB, all of it in a patched segment, and something wrong at its end."""
    data = b"x" * (60 << 20)
    for odd in ({"sigstruct": b"\1" * 1808}, {"heap": 1 << 32}, {"where": {b"_reloc_size": 1 << 40}}):
        (tmp_path / "file").write_bytes(build.OpenEnclave(data=data, **odd).build())
        tracemalloc.start()
        try:
            with pytest.raises(ImageFormatError):
                EnclaveImage.load(tmp_path / "file")
            assert tracemalloc.get_traced_memory()[1] < 10 << 20
        finally:
            tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------- refused


def edit(structure: str, at: int, code: str, *values: int) -> dict[str, Any]:
    return {"edits": ((structure, at, struct.pack(code, *values)),)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "32 bits": (edit("header", 4, "B", 1), "ELF identification"),
    "not ET_DYN": (edit("header", 16, "<H", 2), "type"),
    "not x86-64": (edit("header", 18, "<H", 183), "machine"),
    "program headers outside": (edit("header", 32, "<Q", 1 << 40), "program header table"),
    "no segments": (edit("header", 56, "<H", 0), "PT_LOAD segments"),
    "too many program headers": (edit("header", 56, "<H", 0xFFFF), "program header table"),
    "segment outside the file": (edit("phdr", 8, "<Q", 1 << 40), "segment 0"),
    "p_filesz above p_memsz": (edit("phdr", 40, "<Q", 1), "segment 0's p_filesz"),
    "lowest address not 0": (edit("phdr", 16, "<Q", 0x1000), "lowest p_vaddr"),
    "segments overlap": (edit("phdr", 56 + 40, "<Q", 0x5000), "segment 2's p_vaddr"),
    "segments on one page": ({"data_at": 0x3968, "text": b"x" * 5000}, "segment 2's p_vaddr"),
    "segments out of order": ({"swap": True}, "lowest p_vaddr"),
    "second segment out of order": (edit("phdr", 2 * 56 + 16, "<Q", 0x968), "segment 2's p_vaddr"),
    "segment without permissions": (edit("phdr", 4, "<I", 8), "segment 0's p_flags"),
    "segment with W alone": (edit("phdr", 4, "<I", 2), "SECINFO.FLAGS"),
    "segment of many exabytes": (edit("phdr", 2 * 56 + 40, "<Q", 1 << 62), "segment 2's end"),
    "segment that wraps": (edit("phdr", 2 * 56 + 40, "<Q", (1 << 64) - 1), "segment 2's end"),
    "bytes in several segments": (
        {
            "edits": (
                ("phdr", 2 * 56 + 8, struct.pack("<Q", 0)),
                ("phdr", 2 * 56 + 32, struct.pack("<Q", 0x4000)),
            )
        },
        "PT_LOAD segments",
    ),
    "oeinfo of another size": (
        {"edits": (("shdr", 3 * 64 + 32, struct.pack("<Q", 1952)),)},
        "size of .oeinfo",
    ),
    "oeinfo says another size": (edit("oeinfo", 0, "<I", 1952), "size field"),
    "oeinfo elsewhere in memory": ({"edits": (("shdr", 3 * 64 + 16, struct.pack("<Q", 0x400)),)}, "place"),
    "oeinfo in no segment": ({"edits": (("shdr", 3 * 64 + 16, struct.pack("<Q", 1 << 63)),)}, "place"),
    "too many threads": ({"tcs": 4097}, "tcs_count"),
    "2**64 - 1 threads": ({"tcs": (1 << 64) - 1}, "tcs_count"),
    "too much heap": ({"heap": 1 << 32}, "pages of the enclave"),
    "2**64 - 1 pages of heap": ({"heap": (1 << 64) - 1}, "heap_pages"),
    "too much stack": ({"stack": 1 << 31}, "pages of the enclave"),
    "2**64 - 1 pages of stack": ({"stack": (1 << 64) - 1}, "stack_pages"),
    "too much thread-local data": ({"tbss": 1 << 45}, "tbss"),
    "a huge alignment": ({"tbss": 1, "tbss_align": 1 << 63}, "tbss"),
    "zero base at 0": ({"flags": 2}, "start_address"),
    "zero base off a page": ({"flags": 2, "start": 0x1234}, "start_address"),
    "zero base far away": ({"flags": 2, "start": 1 << 63}, "start_address"),
    "variable missing: _enclave_rva": ({"names": (b"_reloc_rva", b"_reloc_size")}, "symbol _enclave_rva"),
    "variable missing: _reloc_rva": ({"names": (b"_enclave_rva", b"_reloc_size")}, "symbol _reloc_rva"),
    "variable missing: _reloc_size": ({"names": (b"_enclave_rva", b"_reloc_rva")}, "symbol _reloc_size"),
    "variable outside the image": ({"where": {b"_reloc_rva": 1 << 20}}, "patched variable"),
    "variable over the image's end": ({"where": {b"_reloc_rva": 0xB000 - 7}}, "patched variable"),
    "variable at 2**64 - 1": ({"where": {b"_reloc_rva": (1 << 64) - 1}}, "patched variable"),
    "relocation of no symbol": (
        {"rela": ((0, 18, 2, 0),), "edits": (("shdr", 64 + 32, bytes(8)),)},
        "relocation's symbol",
    ),
    "relocations of odd size": ({"edits": (("shdr", 4 * 64 + 32, struct.pack("<Q", 47)),)}, "relocations"),
    "a damaged SIGSTRUCT": ({"sigstruct": b"\1" * 1808}, "SIGSTRUCT in .oeinfo"),
}


@pytest.mark.parametrize(("options", "what"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], what: str, build: Any, tmp_path: Path) -> None:
    """With the structure's name, the file's, what was expected and what was found."""
    (tmp_path / "odd.signed").write_bytes(build.OpenEnclave(**{"rela": (), **options}).build())
    with pytest.raises(ImageFormatError, match=r"odd\.signed") as caught:
        EnclaveImage.load(tmp_path / "odd.signed")
    assert what in caught.value.what
    assert caught.value.file == str(tmp_path / "odd.signed")
    assert caught.value.expected is not None


def test_an_elf_without_oeinfo_is_not_ours(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "plain.so"
    path.write_bytes(build.OpenEnclave().build().replace(b".oeinfo\0", b".oeinfa\0"))
    with pytest.raises(ImageFormatError):
        EnclaveImage.load(path)


# ---------------------------------------------------------------------------------------------------- hostile


def outcome(path: Path, data: bytes | bytearray) -> EnclaveImage | None:
    """An image, or None for a file that was refused as it should be; any other error is one."""
    path.write_bytes(data)
    try:
        return EnclaveImage.load(path)
    except ImageFormatError as error:
        if error.file != str(path):
            raise AssertionError("the message lacks the file") from error
        return None


@pytest.fixture(scope="module")
def sound(build: Any) -> bytes:
    """A file with everything in it."""
    options = {"tdata": b"t" * 9, "tbss": 9, "tls_align": 8, "plt": (TPOFF,)}
    data: bytes = build.OpenEnclave(**options).build()
    return data


def test_truncated_anywhere(sound: bytes, tmp_path: Path) -> None:
    """The section headers stand last, so every shorter file is refused."""
    boundaries = {at + by for at in range(0, len(sound), 512) for by in (-1, 0, 1)}
    boundaries |= {4, 5, 16, 63, 64, 65, 120, 232, 0x300, 0x2000, len(sound) - 64, len(sound) - 1}
    for length in sorted(at for at in boundaries if 0 <= at < len(sound)):
        assert outcome(tmp_path / "file", sound[:length]) is None


BIG = [0, 1, 2, 7, 0x1000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 44, 1 << 62, 1 << 63, (1 << 64) - 1]


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_altered_structures(data: st.DataObject, sound: bytes, tmp_path: Path) -> None:
    """Fields of all tables set to any number: an image or ImageFormatError, at little cost."""
    shoff = struct.unpack_from("<Q", sound, 40)[0]
    places = (
        st.integers(0, 63)
        | st.integers(64, 64 + 4 * 56)
        | st.integers(0x300, 0x1400)
        | st.integers(shoff, len(sound) - 1)
    )
    altered = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(places)
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.sampled_from(BIG) | st.integers(0, (1 << 64) - 1))
        at = at // size * size if data.draw(st.booleans()) else at
        altered[at : at + size] = value.to_bytes(8, "little")[:size]
    del altered[len(sound) :]
    tracemalloc.start()
    try:
        image = outcome(tmp_path / "file", altered)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    if image is not None:
        image.close()


@given(bit=st.integers(0, 8 * 0x1400))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits(bit: int, sound: bytes, tmp_path: Path) -> None:
    altered = bytearray(sound)
    altered[bit // 8] ^= 1 << bit % 8
    image = outcome(tmp_path / "file", altered)
    if image is not None and image.page_count < 1000:
        image.measure("sgx")
        image.close()


@pytest.mark.parametrize("count", [1025, 0xFFFF])
def test_many_program_headers(count: int, sound: bytes, tmp_path: Path) -> None:
    """All of them in the file, and all PT_LOAD: the sound ones, and then a page each."""
    rows = sound[64 : 64 + 3 * 56]
    rows += b"".join(struct.pack("<IIQQQQQQ", 1, 4, 0, n << 20, 0, 0, 1, 4096) for n in range(1, count - 2))
    altered = bytearray(sound)
    struct.pack_into("<Q", altered, 32, len(altered))
    struct.pack_into("<H", altered, 56, count)
    (tmp_path / "file").write_bytes(altered + rows)
    with pytest.raises(ImageFormatError, match=r"PT_LOAD segments .*1\.\.1024"):
        EnclaveImage.load(tmp_path / "file")


def test_many_section_headers(sound: bytes, tmp_path: Path) -> None:
    """All of them the same section, which is not the one that is looked for."""
    altered = bytearray(sound)
    struct.pack_into("<Q", altered, 40, len(altered))
    struct.pack_into("<HH", altered, 60, 0xFFFF, 7)
    assert outcome(tmp_path / "file", altered + sound[-64:] * 0xFFFF) is None


MEASURE = """
import sys
from pathlib import Path
from enturbo import EnclaveImage
image = EnclaveImage.load(sys.argv[1])
digest = image.measure("sgx").digest.hex()
lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count the parent that was forked
print(digest, next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def measure_apart(path: Path) -> tuple[str, int]:
    """(MRENCLAVE, peak RSS in bytes) of a file measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    digest, peak = done.stdout.split()
    return digest, int(peak) << 10  # kB means KiB


@pytest.mark.parametrize("heap", [4_000_000, pytest.param(31_500_000, marks=pytest.mark.slow)])
def test_a_heap_of_millions_of_pages(heap: int, build: Any, tmp_path: Path) -> None:
    """One region, and less than 200 MiB to measure it."""
    path = tmp_path / "huge.signed"
    path.write_bytes(build.OpenEnclave(heap=heap, tcs=1).build())
    with EnclaveImage.load(path) as image:
        assert sum(region.page_count == heap for region in image.regions) == 1
        assert image.page_count > heap
        expected = image.measure("sgx").digest.hex()
    digest, peak = measure_apart(path)
    assert digest == expected
    assert peak < 200 << 20
