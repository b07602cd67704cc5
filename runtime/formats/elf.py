"""ELF64 as far as loaders read it: header, program headers, section headers, the dynamic table.

Fixed little-endian tables, read by hand: a hostile file may hold any number in any field, and here each one
is checked before it is followed, with ImageFormatError as the only answer and the file's offset in it. (A
general ELF library raises whatever its innermost parser met.) Nothing is read that nobody asks for.

Source: System V ABI, "Object Files"; x86-64 psABI.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from typing import BinaryIO, Final, NamedTuple

from ...shm.errors import ImageFormatError
from ...shm.layout import Record
from ..backing import Backing

MAGIC: Final = b"\x7fELF"
ET_DYN: Final = 3
EM_X86_64: Final = 62
MACHINES: Final = {EM_X86_64: "x86-64", 183: "aarch64"}
PT_LOAD: Final = 1
PT_DYNAMIC: Final = 2
PT_TLS: Final = 7
PF_X: Final = 1
PF_W: Final = 2
PF_R: Final = 4
SHT_NOBITS: Final = 8
DT_PLTRELSZ: Final = 2
DT_RELA: Final = 7
DT_RELASZ: Final = 8
DT_TEXTREL: Final = 22
DT_JMPREL: Final = 23

EHDR: Final = Record(
    "ELF header",
    64,
    (
        ("ident", "16s", 0),  # magic, class, byte order, version
        ("type", "H", 16),
        ("machine", "H", 18),
        ("entry", "Q", 24),
        ("phoff", "Q", 32),
        ("shoff", "Q", 40),
        ("phentsize", "H", 54),
        ("phnum", "H", 56),
        ("shentsize", "H", 58),
        ("shnum", "H", 60),
        ("shstrndx", "H", 62),
    ),
)
IDENT: Final = MAGIC + bytes([2, 1, 1])  # 64 bits, little-endian, version 1
_PHDR: Final = struct.Struct("<IIQQ8xQQQ")  # type, flags, offset, vaddr, filesz, memsz, align
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")  # all ten fields
_DYN: Final = struct.Struct("<QQ")
SHF_ALLOC: Final = 2
MAX_NAMED: Final = 256  # sections that are told to people
MAX_DYNAMIC: Final = 1 << 14  # entries; linkers write a few dozen


class Segment(NamedTuple):
    """A program header: the segment's number in the table and what the table says of it."""

    number: int
    type: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int


class Section(NamedTuple):
    """A section header: its number, where its name stands in the string table, and the rest."""

    number: int
    name: int
    type: int
    flags: int
    addr: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entsize: int


def map_file(file: BinaryIO, name: str) -> tuple[memoryview, Backing]:
    """The whole of ``file`` mapped for reading, and what keeps it open. Raises ImageFormatError."""
    size = os.fstat(file.fileno()).st_size
    if size < EHDR.size:
        raise ImageFormatError("file size", file=name, expected=f"at least {EHDR.size}", found=size)
    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return memoryview(mapping), Backing(os.dup(file.fileno()), mapping)


def has_section(file: BinaryIO, name: str, section: bytes) -> bool:
    """Whether the ELF file has a section of that name. True, too, for a file that is damaged before that can
    be told: who loads it says what is wrong."""
    try:
        data, backing = map_file(file, name)
        with data:
            found = Elf(data, name).section(section) is not None
        backing.close()
    except ImageFormatError:
        return True
    return found


class Elf:
    """A shared object for x86-64, in ``data``.

    ``name`` and ``base`` (where ``data`` begins in that file) are for messages. Raises ImageFormatError, here
    and in every method, for tables and ranges that are not inside ``data``.
    """

    def __init__(
        self, data: memoryview, name: str | None = None, base: int = 0, machine: int = EM_X86_64
    ) -> None:
        self.data: Final = data
        self.name: Final = name
        self.base: Final = base
        self.slice("ELF header", 0, EHDR.size)
        if (ident := bytes(data[: len(IDENT)])) != IDENT:
            raise self.error("ELF identification", 0, f"{IDENT.hex()} (64 bits, little-endian)", ident.hex())
        for field, expected, text in (
            ("type", ET_DYN, "ET_DYN"),
            ("machine", machine, MACHINES.get(machine, "this machine")),
        ):
            if (found := self.header(field)) != expected:
                raise self.error(f"ELF header's {field}", EHDR.offset(field), f"{expected} ({text})", found)

    def header(self, field: str) -> int:
        """One number of the ELF header."""
        value: int = EHDR.struct(field).unpack_from(self.data, EHDR.offset(field))[0]
        return value

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The program headers, in their order."""
        rows = self._table("program header", self.header("phoff"), "ph", _PHDR)
        return tuple(Segment(number, *row) for number, row in enumerate(rows))

    @cached_property
    def loads(self) -> tuple[Segment, ...]:
        """The PT_LOAD segments, each with its bytes inside the file."""
        found = tuple(segment for segment in self.segments if segment.type == PT_LOAD)
        for segment in found:
            self.segment_bytes(segment)
        return found

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The section headers, in their order; none in a file that has been stripped of them."""
        if not self.header("shoff"):
            return ()
        rows = self._table("section header", self.header("shoff"), "sh", _SHDR)
        return tuple(Section(number, *row) for number, row in enumerate(rows))

    def section(self, name: bytes) -> Section | None:
        """The first section of that name."""
        names = self.header("shstrndx")
        if not self.sections:
            return None
        if names >= len(self.sections):
            raise self.error(
                "ELF header's shstrndx", EHDR.offset("shstrndx"), f"below {len(self.sections)}", names
            )
        strings = self.section_bytes(self.sections[names], "section names")
        wanted = name + b"\0"
        for section in self.sections:
            if strings[section.name : section.name + len(wanted)] == wanted:
                return section
        return None

    def loaded_sections(self) -> list[tuple[str, int, int]]:
        """(name, address, size) of the sections that stand in memory, to tell people where an address lies.

        Nothing depends on them: without a table of sections, or with an odd one, there are none.
        """
        names = self.header("shstrndx")
        try:
            if names >= len(self.sections):
                return []
            strings = self.section_bytes(self.sections[names], "section names")
        except ImageFormatError:
            return []
        found = []
        for section in self.sections[:MAX_NAMED]:
            if section.flags & SHF_ALLOC and section.size:
                text = bytes(strings[section.name : section.name + 64]).partition(b"\0")[0]
                found.append((text.decode("utf-8", "backslashreplace"), section.addr, section.size))
        return found

    def section_at(self, addr: int) -> Section | None:
        """The first section with that sh_addr: how loaders find a table in the file by its address."""
        return next((section for section in self.sections if section.addr == addr), None)

    def section_bytes(self, section: Section, what: str) -> memoryview:
        """What a section holds in the file; nothing for SHT_NOBITS."""
        size = 0 if section.type == SHT_NOBITS else section.size
        return self.slice(what, section.offset if size else 0, size)

    def segment_bytes(self, segment: Segment) -> memoryview:
        """What a segment holds in the file: p_filesz bytes."""
        return self.slice(f"segment {segment.number}", segment.offset, segment.filesz)

    @cached_property
    def dynamic(self) -> dict[int, int]:
        """The dynamic table: value by tag, the last one where a tag comes twice."""
        return dict(self.dynamic_entries)

    @cached_property
    def dynamic_entries(self) -> list[tuple[int, int]]:
        """The dynamic table up to DT_NULL: tags and values in their order.

        From PT_DYNAMIC, which loaders follow; from the section ``.dynamic`` where there is no such segment.
        """
        table = self._dynamic_bytes()
        if table is None:
            return []
        found: list[tuple[int, int]] = []
        for tag, value in _DYN.iter_unpack(table[: min(len(table) // _DYN.size, MAX_DYNAMIC) * _DYN.size]):
            if tag == 0:
                return found
            found.append((tag, value))
        raise self.error("dynamic table", None, f"DT_NULL after at most {MAX_DYNAMIC} entries", "none")

    def _dynamic_bytes(self) -> memoryview | None:
        for segment in self.segments:
            if segment.type == PT_DYNAMIC:
                return self.segment_bytes(segment)
        section = self.section(b".dynamic")
        return None if section is None else self.section_bytes(section, ".dynamic")

    def slice(self, what: str, offset: int, size: int) -> memoryview:
        """``size`` bytes of ``data``."""
        if offset > len(self.data) or size > len(self.data) - offset:
            place = min(offset, len(self.data))
            raise self.error(what, place, f"{offset:#x} + {size:#x} inside the file", len(self.data))
        return self.data[offset : offset + size]

    def error(self, what: str, offset: int | None, expected: object, found: object) -> ImageFormatError:
        """An ImageFormatError with the file's name; ``offset`` counts in ``data``."""
        at = None if offset is None else self.base + offset
        return ImageFormatError(what, file=self.name, offset=at, expected=expected, found=found)

    def _table(self, what: str, offset: int, prefix: str, row: struct.Struct) -> Iterator[tuple[int, ...]]:
        count, size = self.header(prefix + "num"), self.header(prefix + "entsize")
        if count and size != row.size:
            field = prefix + "entsize"
            raise self.error(f"ELF header's {field}", EHDR.offset(field), row.size, size)
        return row.iter_unpack(self.slice(f"{what} table", offset if count else 0, count * row.size))
