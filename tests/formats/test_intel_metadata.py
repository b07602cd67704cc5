"""Every offset in an Intel SDK enclave's metadata and in an ELF file's header, a second time on purpose.

A change of a layout must be made twice.
"""

from __future__ import annotations

import struct

import pytest

from enturbo.runtime.formats import elf, intel_records
from enturbo.shm.layout import Record

# record: (table, size, {field: (offset, size)})
PINNED: dict[str, tuple[Record, int, dict[str, tuple[int, int]]]] = {
    "EHDR": (
        elf.EHDR,
        64,
        {
            "ident": (0, 16),
            "type": (16, 2),
            "machine": (18, 2),
            "entry": (24, 8),
            "phoff": (32, 8),
            "shoff": (40, 8),
            "phentsize": (54, 2),
            "phnum": (56, 2),
            "shentsize": (58, 2),
            "shnum": (60, 2),
            "shstrndx": (62, 2),
        },
    ),
    "NOTE": (intel_records.NOTE, 12, {"namesz": (0, 4), "descsz": (4, 4), "type": (8, 4)}),
    "METADATA": (
        intel_records.METADATA,
        1872,
        {
            "magic": (0, 8),
            "minor": (8, 4),
            "major": (12, 4),
            "size": (16, 4),
            "tcs_policy": (20, 4),
            "ssa_frame_size": (24, 4),
            "max_save_buffer_size": (28, 4),
            "desired_misc_select": (32, 4),
            "tcs_min_pool": (36, 4),
            "enclave_size": (40, 8),
            "attributes_flags": (48, 8),
            "attributes_xfrm": (56, 8),
            "sigstruct": (64, 1808),
        },
    ),
    "DIRECTORY": (intel_records.DIRECTORY, 8, {"offset": (0, 4), "size": (4, 4)}),
    "ENTRY": (
        intel_records.ENTRY,
        32,
        {
            "id": (0, 2),
            "attributes": (2, 2),
            "page_count": (4, 4),
            "rva": (8, 8),
            "content_size": (16, 4),
            "content_offset": (20, 4),
            "si_flags": (24, 8),
        },
    ),
    "GROUP": (
        intel_records.GROUP,
        32,
        {"id": (0, 2), "entry_count": (2, 2), "load_times": (4, 4), "load_step": (8, 8)},
    ),
    "PATCH": (intel_records.PATCH, 32, {"destination": (0, 8), "source": (8, 4), "size": (12, 4)}),
    "ELRANGE_ENTRY": (
        intel_records.ELRANGE_ENTRY,
        24,
        {"image_address": (0, 8), "start_address": (8, 8), "size": (16, 8)},
    ),
    "EXTEND_ENTRY": (
        intel_records.EXTEND_ENTRY,
        16,
        {"id": (0, 4), "size": (4, 4), "offset": (8, 4), "reserved": (12, 4)},
    ),
    "SHARED_OBJECT": (
        intel_records.SHARED_OBJECT,
        24,
        {"file_offset": (0, 8), "mem_offset": (8, 8), "size": (16, 8)},
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_offsets(name: str) -> None:
    record, size, fields = PINNED[name]
    assert record.size == size
    assert {field.name: (field.offset, record.struct(field.name).size) for field in record.fields} == fields


def test_every_record_is_pinned() -> None:
    tables = [each for module in (elf, intel_records) for each in vars(module).values()]
    assert {id(each) for each in tables if isinstance(each, Record)} == {
        id(row[0]) for row in PINNED.values()
    }


@pytest.mark.parametrize("name", PINNED)
def test_a_record_read_at_once_is_its_fields(name: str) -> None:
    record, size, _ = PINNED[name]
    data = bytes(i * 37 % 251 for i in range(size))
    whole = intel_records.whole(record)
    assert whole.size == size
    assert whole.unpack(data) == tuple(
        record.struct(field.name).unpack_from(data, field.offset)[0] for field in record.fields
    )


def test_constants() -> None:
    assert intel_records.MAGIC == 0x86A80294635D0E4C
    assert (intel_records.SECTION, intel_records.NOTE_NAME) == (b".note.sgxmeta", b"sgx_metadata\0")
    assert (intel_records.GROUP_FLAG, intel_records.EADD, intel_records.EEXTEND) == (0x1000, 1, 2)
    assert intel_records.EXTEND_SHARED_OBJECT == 0x1002
    numbers = ("PATCHES", "LAYOUT", "ELRANGE", "EXTEND")
    assert [getattr(intel_records, name) for name in numbers] == [0, 1, 2, 3]
    tags = ("DT_PLTRELSZ", "DT_RELA", "DT_RELASZ", "DT_TEXTREL", "DT_JMPREL")
    assert [getattr(elf, name) for name in tags] == [2, 7, 8, 22, 23]
    assert (elf.PT_LOAD, elf.PT_DYNAMIC, elf.PT_TLS, elf.SHT_NOBITS) == (1, 2, 7, 8)


def test_program_and_section_headers() -> None:
    """Elf64_Phdr and Elf64_Shdr, each field with a value of its own; p_paddr is left out."""
    header = struct.pack("<16sHHIQQQIHHHHHH", elf.IDENT, 3, 62, 1, 0, 64, 120, 0, 64, 56, 1, 64, 1, 0)
    program = struct.pack("<IIQQQQQQ", 9, 2, 3, 4, 5, 6, 7, 8)
    section = struct.pack("<IIQQQQIIQQ", *range(1, 11))
    file = elf.Elf(memoryview(header + program + section))
    assert file.segments == (elf.Segment(0, type=9, flags=2, offset=3, vaddr=4, filesz=6, memsz=7, align=8),)
    assert file.sections == (
        elf.Section(
            0, name=1, type=2, flags=3, addr=4, offset=5, size=6, link=7, info=8, align=9, entsize=10
        ),
    )
