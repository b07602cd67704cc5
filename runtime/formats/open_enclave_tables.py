"""What an Open Enclave image's own tables say: symbols, relocations, thread-local data.

The loader finds all of them by the names of their sections. Source: openenclave/openenclave, host/sgx/elf.c
and loadelf.c.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

import numpy as np

from ...shm.layout import PAGE_SIZE
from .elf import PT_TLS, Elf, Section

R_X86_64_TPOFF64: Final = 18
_RELA_SIZE: Final = 24  # u64 r_offset, u32 type, u32 symbol, u64 r_addend
_RELA_SYMBOL: Final = 12
_RELA_ADDEND: Final = 16
_SYMBOL: Final = struct.Struct("<I4xQ8x")  # st_name, st_value
MAX_SYMBOLS: Final = 1 << 18
MAX_RELOCATIONS: Final = (
    1 << 25
)  # bytes of a table: they are copied before all of the file has been looked at
MAX_TLS: Final = 1 << 44  # bytes


def symbol_values(elf: Elf, names: Collection[bytes]) -> dict[bytes, int]:
    """st_value of those of ``names`` that ``.dynsym`` has; the first of a name counts."""
    section = elf.section(b".dynstr")
    strings = b"" if section is None else elf.section_bytes(section, ".dynstr")
    longest = max(map(len, names)) + 1
    found: dict[bytes, int] = {}
    for number, (name, value) in enumerate(_dynsym(elf)):
        text, end, _ = bytes(strings[name : name + longest]).partition(b"\0")
        if number and end and text in names:  # symbol 0 is none
            found.setdefault(text, value)
    return found


def _dynsym(elf: Elf) -> Iterator[tuple[int, int]]:
    """(st_name, st_value) of each dynamic symbol."""
    section = elf.section(b".dynsym")
    if section is None:
        return iter(())
    table = elf.section_bytes(section, ".dynsym")
    count = len(table) // _SYMBOL.size
    if count > MAX_SYMBOLS:
        raise elf.error("symbols in .dynsym", section.offset, f"at most {MAX_SYMBOLS}", count)
    return _SYMBOL.iter_unpack(table[: count * _SYMBOL.size])


def relocations(elf: Elf) -> bytes:
    """``.rela.dyn`` and then ``.rela.plt``, padded to whole pages; nothing without ``.rela.dyn``.

    The enclave relocates itself and looks up no symbols: offsets into thread-local data, which are symbols'
    values, are put into the addends for it.
    """
    dyn = elf.section(b".rela.dyn")
    if dyn is None:
        return b""
    out = _table(elf, dyn)
    plt = elf.section(b".rela.plt")
    if plt is not None:
        out += _table(elf, plt)
    out += bytes(-len(out) % PAGE_SIZE)
    return bytes(out)


def _table(elf: Elf, section: Section) -> bytearray:
    raw = elf.section_bytes(section, "relocations")
    if len(raw) % _RELA_SIZE or len(raw) > MAX_RELOCATIONS:
        expected = f"a multiple of {_RELA_SIZE}, at most {MAX_RELOCATIONS}"
        raise elf.error("size of the relocations", section.offset, expected, len(raw))
    table = bytearray(raw)
    kinds = np.frombuffer(table, "<u4").reshape(-1, _RELA_SIZE // 4)[:, 2]
    places: list[int] = (np.flatnonzero(kinds == R_X86_64_TPOFF64) * _RELA_SIZE).tolist()
    values = [value for _, value in _dynsym(elf)] if places else []
    for at in places:
        (symbol,) = struct.unpack_from("<I", table, at + _RELA_SYMBOL)
        if symbol >= len(values):
            raise elf.error("relocation's symbol", section.offset + at, f"below {len(values)}", symbol)
        struct.pack_into("<Q", table, at + _RELA_ADDEND, values[symbol])
    return table


class ThreadLocal(NamedTuple):
    """``.tdata`` or ``.tbss``. ``align``: 0 and 1 mean none (System V ABI)."""

    rva: int = 0
    size: int = 0
    align: int = 1

    @property
    def aligned(self) -> int:
        """The size up to a multiple of the alignment."""
        align = max(self.align, 1)
        return -(-self.size // align) * align


def thread_local(elf: Elf, name: bytes) -> ThreadLocal:
    """``.tdata`` or ``.tbss``, if it is there and not empty.

    PT_TLS knows better how ``.tdata`` is aligned, if it begins with it.
    """
    section = elf.section(name)
    if section is None or not section.size:
        return ThreadLocal()
    align = section.align
    if name == b".tdata":
        for segment in elf.segments:
            if segment.type == PT_TLS and segment.vaddr == section.addr:
                align = segment.align
    if max(section.size, align) >= MAX_TLS:
        what = f"size and alignment of {name.decode()}"
        raise elf.error(what, section.offset, f"below {MAX_TLS:#x}", f"{section.size:#x}, {align:#x}")
    return ThreadLocal(section.addr, section.size, align)
