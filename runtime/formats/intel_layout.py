"""The layout of an Intel SDK enclave: heap, stacks, TCSs and SSA pages that its metadata describes.

What an entry is follows from bit 12 of its id, its attributes, flags and content. Other bits of the id are
numbered differently between versions and decide nothing.

Source: intel/linux-sgx, ``build_contexts``, ``build_context`` and ``validate_layout_table`` in
``psw/urts/loader.cpp``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ...shm.errors import ImageFormatError
from ...shm.layout import PAGE_SIZE
from ..region import TYPE_TCS, Region
from ..sizes import pages_of
from .intel_metadata import Metadata
from .intel_records import EADD, EEXTEND, ENTRY, Entry, Group
from .intel_regions import Budget

TCS_RELATIVE: Final = (16, 48, 56)  # OSSA, OFSBASE, OGSBASE: the template has them relative to the TCS
_U64: Final = struct.Struct("<Q")
_MASK64: Final = (1 << 64) - 1


class Loaded(NamedTuple):
    """An entry at the place where it is loaded, ``delta`` bytes behind its own."""

    number: int  # of the entry in the layout
    entry: Entry
    delta: int
    label: str

    @property
    def rva(self) -> int:
        """Offset in the image, bytes."""
        return self.entry.rva + self.delta


def loaded_entries(metadata: Metadata, budget: Budget) -> list[Loaded]:
    """The entries in the order in which they are loaded, those of groups again and again.

    Raises ImageFormatError for groups that do not fit or would nest, for places that are unaligned, overlap
    or lie outside the enclave, and for content outside the block.
    """
    found: list[Loaded] = []
    for index, row in enumerate(metadata.layout):
        if isinstance(row, Group):
            _check_group(metadata, index, row)
            budget.take("loaded entries", row.load_times * row.entry_count)
            found.extend(_repeated(metadata, index, row))
        else:
            if row.content_offset:
                metadata.content(f"layout {index}'s content", row.content_offset, row.content_size)
            found.append(Loaded(index, row, 0, f"layout {index}: id {row.id}"))
    _check_places(metadata, found)
    return found


def _check_group(metadata: Metadata, index: int, group: Group) -> None:
    if group.entry_count > index:
        raise _error(
            metadata,
            index,
            f"layout {index}: group",
            f"at most {index} entries, those before it",
            group.entry_count,
        )
    if any(isinstance(row, Group) for row in metadata.layout[index - group.entry_count : index]):
        raise _error(
            metadata,
            index,
            f"layout {index}: group",
            f"{group.entry_count} entries",
            "another group among them",
        )
    if group.load_times * group.load_step > metadata.enclave_size:
        expected = f"steps inside the enclave's {metadata.enclave_size:#x} bytes"
        raise _error(
            metadata, index, f"layout {index}: group", expected, f"{group.load_times} of {group.load_step:#x}"
        )


def _repeated(metadata: Metadata, index: int, group: Group) -> Iterator[Loaded]:
    first = index - group.entry_count
    entries = [row for row in metadata.layout[first:index] if isinstance(row, Entry)]
    # What repeats nothing must not be gone through up to 2**32 times.
    for time in range(1, group.load_times + 1 if entries else 1):
        for number, entry in enumerate(entries, first):
            label = f"group {index}, load {time}: layout {number}: id {entry.id}"
            yield Loaded(number, entry, time * group.load_step, label)


def _check_places(metadata: Metadata, found: list[Loaded]) -> None:
    """Guards and pages that come later count as well: they have a place, too."""
    end, last = 0, ""
    for each in sorted(found, key=lambda each: each.rva):
        size = each.entry.page_count * PAGE_SIZE
        if each.rva % PAGE_SIZE:
            raise _error(metadata, each.number, each.label, "a page-aligned place", hex(each.rva))
        if each.rva >= metadata.enclave_size or size > metadata.enclave_size - each.rva:
            expected = f"a place inside the enclave's {metadata.enclave_size:#x} bytes"
            raise _error(metadata, each.number, each.label, expected, f"{each.rva:#x} + {size:#x}")
        if each.rva < end:
            raise _error(
                metadata,
                each.number,
                each.label,
                f"a place behind {last}, which ends at {end:#x}",
                hex(each.rva),
            )
        end, last = each.rva + size, each.label


def _error(metadata: Metadata, number: int, what: str, expected: object, found: object) -> ImageFormatError:
    return metadata.elf.error(what, metadata.layout_at + number * ENTRY.size, expected, found)


class LayoutLoader:
    """Makes regions of entries."""

    def __init__(self, metadata: Metadata, shift: int, budget: Budget) -> None:
        """``shift``: what is added to every offset, bytes (ELRANGE)."""
        self._metadata, self._shift, self._budget = metadata, shift, budget

    def regions(self, each: Loaded) -> Iterator[Region]:
        """The pages of one entry. Those without EADD are none: guards, and pages that come by EAUG.

        Pages that the loader takes away again after EINIT (EREMOVE) are added and measured like others.
        """
        entry = each.entry
        if not entry.attributes & EADD:
            return
        if entry.content_offset:
            if entry.si_flags == TYPE_TCS:
                yield from self._tcs(each)
            else:
                yield from self._content(each)
        elif entry.si_flags and entry.page_count:
            self._budget.take("regions", 1)
            kind = f"filled with {entry.content_size:#x}" if entry.content_size else "zeros"
            yield Region(
                self._shift + each.rva,
                entry.page_count,
                entry.si_flags,
                fill=entry.content_size,
                measured=_is_measured(entry),
                label=f"{each.label}, {kind}",
            )

    def _tcs(self, each: Loaded) -> Iterator[Region]:
        """The same TCS on each page: the entry's place is added to its fields, never the page's."""
        entry = each.entry
        if entry.content_size > PAGE_SIZE:
            raise _error(
                self._metadata,
                each.number,
                each.label,
                f"a TCS of at most {PAGE_SIZE} bytes",
                entry.content_size,
            )
        self._budget.take("regions", entry.page_count)
        page = bytearray(max(entry.content_size, 72))
        page[: entry.content_size] = self._metadata.content("TCS", entry.content_offset, entry.content_size)
        for field in TCS_RELATIVE:
            (value,) = _U64.unpack_from(page, field)
            _U64.pack_into(page, field, value + each.rva & _MASK64)
        content = bytes(page)
        for number in range(entry.page_count):
            yield Region(
                self._shift + each.rva + number * PAGE_SIZE,
                1,
                entry.si_flags,
                content,
                measured=_is_measured(entry),
                label=f"{each.label}, TCS",
            )

    def _content(self, each: Loaded) -> Iterator[Region]:
        """Added as segments are, and so measured whatever its attributes say."""
        entry = each.entry
        content = self._metadata.content("content", entry.content_offset, entry.content_size)
        if pages := max(pages_of(len(content)), entry.page_count):
            self._budget.take("regions", 1)
            yield Region(
                self._shift + each.rva, pages, entry.si_flags, content, label=f"{each.label}, content"
            )


def _is_measured(entry: Entry) -> bool:
    return entry.attributes & (EADD | EEXTEND) == EADD | EEXTEND
