"""The records in an Intel SDK enclave's metadata, once, as struct tables.

Source: intel/linux-sgx, ``common/inc/internal/metadata.h``. A version is a u64, major << 32 | minor, here as
its two halves. Layout ids are numbered differently between versions: bit 12 alone tells groups from entries.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from ...shm.layout import Record
from ..sigstruct import SIZE as SIGSTRUCT_SIZE

SECTION: Final = b".note.sgxmeta"
NOTE_NAME: Final = b"sgx_metadata\0"
MAGIC: Final = 0x86A80294635D0E4C

NOTE: Final = Record("ELF note", 12, (("namesz", "I", 0), ("descsz", "I", 4), ("type", "I", 8)))
METADATA: Final = Record(
    "metadata",
    1872,  # and then the directories: two in old versions, four in new ones
    (
        ("magic", "Q", 0),
        ("minor", "I", 8),
        ("major", "I", 12),
        ("size", "I", 16),  # of the whole block
        ("tcs_policy", "I", 20),  # 0: a TCS is bound to its thread
        ("ssa_frame_size", "I", 24),  # pages
        ("max_save_buffer_size", "I", 28),
        ("desired_misc_select", "I", 32),
        ("tcs_min_pool", "I", 36),
        ("enclave_size", "Q", 40),
        ("attributes_flags", "Q", 48),
        ("attributes_xfrm", "Q", 56),
        ("sigstruct", f"{SIGSTRUCT_SIZE}s", 64),
    ),
)
DIRECTORY: Final = Record("directory", 8, (("offset", "I", 0), ("size", "I", 4)))
PATCHES, LAYOUT, ELRANGE, EXTEND = range(4)
ENTRY: Final = Record(
    "layout entry",
    32,
    (
        ("id", "H", 0),
        ("attributes", "H", 2),
        ("page_count", "I", 4),
        ("rva", "Q", 8),
        ("content_size", "I", 16),  # without content: the u32 that fills the pages
        ("content_offset", "I", 20),  # 0: no content
        ("si_flags", "Q", 24),
    ),
)
GROUP: Final = Record(
    "layout group",
    32,
    (("id", "H", 0), ("entry_count", "H", 2), ("load_times", "I", 4), ("load_step", "Q", 8)),
)
PATCH: Final = Record("patch", 32, (("destination", "Q", 0), ("source", "I", 8), ("size", "I", 12)))
ELRANGE_ENTRY: Final = Record(
    "ELRANGE", 24, (("image_address", "Q", 0), ("start_address", "Q", 8), ("size", "Q", 16))
)
EXTEND_ENTRY: Final = Record(
    "extend entry", 16, (("id", "I", 0), ("size", "I", 4), ("offset", "I", 8), ("reserved", "I", 12))
)
SHARED_OBJECT: Final = Record(
    "inner shared object", 24, (("file_offset", "Q", 0), ("mem_offset", "Q", 8), ("size", "Q", 16))
)

GROUP_FLAG: Final = 0x1000  # in an id
EADD: Final = 1  # in an entry's attributes
EEXTEND: Final = 2
EXTEND_SHARED_OBJECT: Final = 0x1002


class Entry(NamedTuple):
    """A run of pages in the layout."""

    id: int
    attributes: int
    page_count: int
    rva: int
    content_size: int
    content_offset: int
    si_flags: int


class Group(NamedTuple):
    """The ``entry_count`` entries before it again, ``load_times`` times, each time ``load_step`` further."""

    id: int
    entry_count: int
    load_times: int
    load_step: int


class Patch(NamedTuple):
    """Bytes of the block that replace bytes of the file before it is loaded."""

    destination: int
    source: int
    size: int


class Elrange(NamedTuple):
    """Where the enclave's address range lies, if it is larger than the image in it."""

    image_address: int
    start_address: int
    size: int


class SharedObject(NamedTuple):
    """An ELF file inside the file, loaded at an offset of its own."""

    file_offset: int
    mem_offset: int
    size: int


def whole(record: Record) -> struct.Struct:
    """All fields of a record at once: tables of them are read much faster so."""
    code, end = "<", 0
    for field in record.fields:
        code += f"{field.offset - end}x{field.code}"
        end = struct.calcsize(code)
    return struct.Struct(f"{code}{record.size - end}x")
