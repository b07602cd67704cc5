"""Reading the metadata of an Intel SDK enclave: what its signer wrote into the section ``.note.sgxmeta``.

One block for each generation of loaders, back to back, each complete in itself: sizes, SIGSTRUCT and four
directories (patches, layout, ELRANGE, extend entries). Every offset in a block counts from the block's first
byte, but a patch's destination, which counts in the file.

Source: intel/linux-sgx, ``psw/urts/urts_com.h`` and ``psw/urts/loader.cpp`` (``validate_metadata``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ...shm.errors import ImageFormatError, SignatureError
from ...shm.layout import PAGE_SIZE, Record
from ..sigstruct import Sigstruct
from .elf import Elf
from .intel_records import (
    DIRECTORY,
    ELRANGE,
    ELRANGE_ENTRY,
    ENTRY,
    EXTEND,
    EXTEND_ENTRY,
    EXTEND_SHARED_OBJECT,
    GROUP,
    GROUP_FLAG,
    LAYOUT,
    MAGIC,
    METADATA,
    NOTE,
    NOTE_NAME,
    PATCH,
    PATCHES,
    SECTION,
    SHARED_OBJECT,
    Elrange,
    Entry,
    Group,
    Patch,
    SharedObject,
    whole,
)

# Signing tools write at most five blocks of 24 KiB each: room for 708 records.
MAX_BLOCKS: Final = 16
MAX_RECORDS: Final = 1 << 12  # of one directory

_STRUCTS: Final = {
    record.name: whole(record)
    for record in (NOTE, DIRECTORY, ENTRY, GROUP, PATCH, ELRANGE_ENTRY, EXTEND_ENTRY, SHARED_OBJECT)
}


@dataclass(frozen=True)
class Metadata:
    """One block: its bytes, where it stands in the file, and what has been read of it.

    That its records and their offsets are inside the block has been checked; what they say has not.
    """

    elf: Elf
    at: int
    data: memoryview
    fields: dict[str, Any]
    sigstruct: Sigstruct | None
    patches: tuple[Patch, ...]
    layout: tuple[Entry | Group, ...]
    layout_at: int  # in the file
    elrange: Elrange | None
    shared_object: SharedObject | None

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor)."""
        return self.fields["major"], self.fields["minor"]

    @property
    def enclave_size(self) -> int:
        """Bytes; SECS.SIZE where there is no ELRANGE."""
        size: int = self.fields["enclave_size"]
        return size

    def content(self, what: str, offset: int, size: int) -> memoryview:
        """Bytes of the block. Raises ImageFormatError if they are not all inside."""
        return _inside(self.elf, self.at, self.data, what, offset, size)


def read_blocks(elf: Elf) -> list[Metadata]:
    """The blocks of a file in their order, at least one. Raises ImageFormatError.

    Blocks end at the first that has no magic or size 0, or with the note.
    """
    at, end = _note(elf)
    found: list[Metadata] = []
    while at + METADATA.offset("tcs_policy") <= end:
        fields = _fields(elf.data, at, METADATA.offset("tcs_policy"))
        if fields["magic"] != MAGIC or fields["size"] == 0:
            break
        if len(found) == MAX_BLOCKS:
            raise elf.error("metadata blocks", at, f"at most {MAX_BLOCKS}", "more")
        if fields["size"] > end - at:
            raise elf.error("metadata block's size", at + METADATA.offset("size"), end - at, fields["size"])
        found.append(_read_block(elf, at, elf.data[at : at + fields["size"]]))
        at += fields["size"]
    if not found:
        raise elf.error("metadata", at, f"a block with magic {MAGIC:#x}: has it been signed?", "none")
    return found


def _note(elf: Elf) -> tuple[int, int]:
    """Where the first block begins in the file, and where the last one ends at most.

    The blocks stand directly behind the name, which is not padded to four bytes as in other notes.
    """
    section = elf.section(SECTION)
    if section is None:
        raise elf.error("sections", None, SECTION.decode(), "none of that name")
    note = elf.section_bytes(section, SECTION.decode())
    begin = NOTE.size + len(NOTE_NAME)
    if bytes(note[NOTE.size : begin]) != NOTE_NAME:
        raise elf.error("note's name", section.offset + NOTE.size, NOTE_NAME, bytes(note[NOTE.size : begin]))
    namesz, descsz, _ = _STRUCTS[NOTE.name].unpack_from(note)
    if namesz != len(NOTE_NAME):
        raise elf.error("note's namesz", section.offset, len(NOTE_NAME), namesz)
    if descsz > len(note) - begin:
        raise elf.error(
            "note's descsz", section.offset + NOTE.offset("descsz"), f"at most {len(note) - begin}", descsz
        )
    return section.offset + begin, section.offset + begin + descsz


def _fields(data: memoryview, at: int, size: int) -> dict[str, Any]:
    """The fields that stand in the first ``size`` bytes of the block at ``at``."""
    return {
        field.name: METADATA.struct(field.name).unpack_from(data, at + field.offset)[0]
        for field in METADATA.fields
        if field.offset < size
    }


def _read_block(elf: Elf, at: int, data: memoryview) -> Metadata:
    if len(data) < METADATA.size + 2 * DIRECTORY.size:
        expected = f"at least {METADATA.size + 2 * DIRECTORY.size}"
        raise elf.error("metadata block's size", at + METADATA.offset("size"), expected, len(data))
    fields = _fields(data, 0, METADATA.size)
    size, frames = fields["enclave_size"], fields["ssa_frame_size"]
    if size == 0 or size & (size - 1):
        raise elf.error("enclave_size", at + METADATA.offset("enclave_size"), "a power of two", hex(size))
    if not 1 <= frames <= 4:
        raise elf.error("ssa_frame_size", at + METADATA.offset("ssa_frame_size"), "1 to 4 pages", frames)
    reader = _Directories(elf, at, data, fields["major"], fields["minor"])
    return Metadata(
        elf=elf,
        at=at,
        data=data,
        fields=fields,
        sigstruct=_sigstruct(elf, at + METADATA.offset("sigstruct"), fields.pop("sigstruct")),
        patches=tuple(Patch(*row) for row in reader.rows(PATCHES, PATCH)),
        layout=tuple(reader.layout()),
        layout_at=at + reader.place(LAYOUT)[0],
        elrange=reader.elrange(size),
        shared_object=reader.shared_object(),
    )


def _sigstruct(elf: Elf, at: int, data: bytes) -> Sigstruct | None:
    """None where nobody has signed yet: all zeros."""
    if not any(data):
        return None
    try:
        return Sigstruct.parse(data, offset=at)
    except SignatureError as error:
        raise ImageFormatError(str(error), file=elf.name) from None


def _inside(elf: Elf, at: int, data: memoryview, what: str, offset: int, size: int) -> memoryview:
    if offset > len(data) or size > len(data) - offset:
        place = at + min(offset, len(data))
        raise elf.error(what, place, f"{offset:#x} + {size:#x} inside its metadata block", len(data))
    return data[offset : offset + size]


class _Directories:
    """The directories of one block, and what they point at."""

    def __init__(self, elf: Elf, at: int, data: memoryview, major: int, minor: int) -> None:
        self.elf, self.at, self.data = elf, at, data
        self.has = {
            PATCHES: True,
            LAYOUT: True,
            ELRANGE: major > 10,
            EXTEND: (major % 10 == 1 and minor >= 5) or (major % 10 == 3 and minor >= 2),
        }

    def slice(self, what: str, offset: int, size: int) -> memoryview:
        return _inside(self.elf, self.at, self.data, what, offset, size)

    def _error(self, what: str, offset: int, expected: object, found: object) -> ImageFormatError:
        return self.elf.error(what, self.at + offset, expected, found)

    def place(self, number: int) -> tuple[int, int]:
        """(offset, size) of a directory's contents; (0, 0) where this version has no such directory."""
        if not self.has[number]:
            return 0, 0
        row = self.slice(f"directory {number}", METADATA.size + number * DIRECTORY.size, DIRECTORY.size)
        offset, size = _STRUCTS[DIRECTORY.name].unpack(row)
        return offset, size

    def rows(self, number: int, record: Record) -> Iterator[tuple[Any, ...]]:
        """The records of a directory."""
        offset, size = self.place(number)
        data = self.slice(f"directory {number} ({record.name})", offset, size)
        if size % record.size or size // record.size > MAX_RECORDS:
            expected = f"at most {MAX_RECORDS} records of {record.size} bytes"
            raise self._error(f"directory {number} ({record.name})", offset, expected, f"{size} bytes")
        return _STRUCTS[record.name].iter_unpack(data)

    def layout(self) -> Iterator[Entry | Group]:
        """Entries and groups: bit 12 of the id tells, and nothing else of an id may be relied upon."""
        groups = self.rows(LAYOUT, GROUP)
        for entry, group in zip(self.rows(LAYOUT, ENTRY), groups, strict=True):
            yield Group(*group) if group[0] & GROUP_FLAG else Entry(*entry)

    def elrange(self, enclave_size: int) -> Elrange | None:
        """Checked as ``set_elrange_config`` of the loader does it."""
        if not self.has[ELRANGE]:
            return None
        offset, size = self.place(ELRANGE)
        if offset == 0 or size != ELRANGE_ENTRY.size:
            raise self._error("ELRANGE", offset, f"{ELRANGE_ENTRY.size} bytes", f"{size} bytes")
        found = Elrange(*_STRUCTS[ELRANGE_ENTRY.name].unpack(self.slice("ELRANGE", offset, size)))
        end = found.start_address + found.size
        if (
            found.size < PAGE_SIZE
            or found.size & (found.size - 1)
            or found.start_address % found.size
            or found.image_address % PAGE_SIZE
            or found.image_address < found.start_address
            or found.image_address + enclave_size > end
        ):
            expected = f"a power of two, aligned to itself, with {enclave_size:#x} bytes of image inside"
            raise self._error("ELRANGE", offset, expected, [hex(value) for value in found])
        return found

    def shared_object(self) -> SharedObject | None:
        """The first extend entry for one that is not empty. Others, such as a FIPS signature, add no page."""
        for kind, size, offset, _ in self.rows(EXTEND, EXTEND_ENTRY):
            if kind == EXTEND_SHARED_OBJECT and size and offset:
                data = self.slice("extend entry", offset, SHARED_OBJECT.size)
                return SharedObject(*_STRUCTS[SHARED_OBJECT.name].unpack(data))
        return None
