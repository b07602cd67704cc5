"""What a segment becomes in the enclave: the Intel SDK loader's way to add a run of bytes as pages.

Bytes of the file stay where they are in its mapping. Copied are only pages that differ from it: those that
patches touch, and the first page of bytes that do not begin on a page.

Source: intel/linux-sgx, ``build_mem_region`` and ``build_image`` in ``psw/urts/loader.cpp``,
``get_reloc_bitmap`` in ``psw/urts/parser/elfparser.cpp``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...shm.layout import PAGE_SIZE
from ..region import WRITE, Region
from ..sizes import pages_of
from .elf import DT_JMPREL, DT_PLTRELSZ, DT_RELA, DT_RELASZ, DT_TEXTREL, Elf
from .intel_metadata import Metadata
from .intel_records import PATCH

PageNumbers = NDArray[np.uint64]

# What one file may cost, all its blocks together. Real files: a few hundred regions, a dozen copied pages.
LIMITS: Final = {
    "copied pages": 1 << 12,
    "loaded entries": 1 << 16,  # of the layout, each time that a group repeats them
    "regions": 1 << 15,
}
MAX_RELOCATIONS: Final = 1 << 20  # of one table

_RELA: Final = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<u8")])


class Budget:
    """Counts what a file makes us keep in memory, and refuses it before it is too much."""

    def __init__(self, elf: Elf) -> None:
        self._elf = elf
        self._left = dict(LIMITS)

    def take(self, what: str, count: int) -> None:
        """Raises ImageFormatError when the file's share of ``what`` is used up."""
        self._left[what] -= count
        if self._left[what] < 0:
            raise self._elf.error(what, None, f"at most {LIMITS[what]}", "more")


def relocated_pages(elf: Elf) -> PageNumbers:
    """Numbers of the pages that relocations will write to, ascending: they get W where they lack it.

    Only files with DT_TEXTREL have any; DF_TEXTREL in DT_FLAGS is not looked at. The relocations themselves
    are applied inside the enclave, after it has been measured. An entry may reach into the next page.
    """
    none = np.empty(0, np.uint64)
    if DT_TEXTREL not in elf.dynamic:
        return none
    found = [none]
    for tag, size_tag in ((DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)):
        if tag in elf.dynamic:
            table = _rela_table(elf, elf.dynamic[tag], elf.dynamic.get(size_tag, 0))
            places = table["offset"][table["info"] & 0xFFFF_FFFF != 0]
            found += [places >> 12, (places[places & 0xFFF > PAGE_SIZE - 8] >> 12) + 1]
    return np.unique(np.concatenate(found))


def _rela_table(elf: Elf, address: int, size: int) -> NDArray[np.void]:
    """A table of relocations, found in the file through the section with its address."""
    if size == 0:
        return np.empty(0, _RELA)
    section = elf.section_at(address)
    if section is None:
        raise elf.error("relocations", None, f"a section at address {address:#x}", "none")
    if size % _RELA.itemsize or size // _RELA.itemsize > MAX_RELOCATIONS:
        expected = f"at most {MAX_RELOCATIONS} entries of {_RELA.itemsize} bytes"
        raise elf.error("relocations", section.offset, expected, f"{size} bytes")
    return np.frombuffer(elf.slice("relocations", section.offset, size), _RELA)


class Bytes(NamedTuple):
    """``size`` bytes of the patched file from ``offset`` on."""

    offset: int
    size: int


class FileImage:
    """The file as a block's patches leave it: its mapping, and copies of the patched ranges alone."""

    def __init__(self, metadata: Metadata, budget: Budget) -> None:
        self._data = metadata.elf.data
        self._starts: list[int] = []
        self._copies: list[bytearray] = []
        patches = [(patch.destination, patch.size) for patch in metadata.patches if patch.size]
        for number, patch in enumerate(metadata.patches):
            self._check(metadata, number, patch.destination, patch.size)
            metadata.content(f"patch {number}'s bytes", patch.source, patch.size)
            budget.take("copied pages", pages_of(patch.size))
        for start, end in _merged([(start, start + size) for start, size in patches]):
            self._starts.append(start)
            self._copies.append(bytearray(self._data[start:end]))
        for patch in metadata.patches:
            if patch.size:
                which = bisect_right(self._starts, patch.destination) - 1
                at = patch.destination - self._starts[which]
                self._copies[which][at : at + patch.size] = metadata.content("", patch.source, patch.size)

    def _check(self, metadata: Metadata, number: int, start: int, size: int) -> None:
        """A patch lies in the file, and not over the block that holds it: signer and loader, who keep the
        block in different places, would not see the same enclave then."""
        metadata.elf.slice(f"patch {number}", start, size)
        if size and start < metadata.at + len(metadata.data) and metadata.at < start + size:
            expected = f"a destination outside its own block ({PATCH.name} {number})"
            raise metadata.elf.error("patch", metadata.at, expected, f"{start:#x} + {size:#x}")

    def touched(self, span: Bytes) -> Iterator[tuple[int, int, bytearray, int]]:
        """The patched ranges in ``span``: begin and end counted in it, the copy, and where it begins."""
        first = max(bisect_right(self._starts, span.offset) - 1, 0)
        for number in range(first, len(self._starts)):
            copy = self._copies[number]
            begin = self._starts[number] - span.offset
            end = begin + len(copy)
            if begin >= span.size:
                return
            if end > 0:
                yield max(begin, 0), min(end, span.size), copy, begin

    def read(self, span: Bytes) -> bytearray:
        """A private copy of the patched bytes."""
        out = bytearray(self._data[span.offset : span.offset + span.size])
        for begin, end, copy, at in self.touched(span):
            out[begin:end] = copy[begin - at : end - at]
        return out

    def view(self, span: Bytes) -> memoryview:
        """The file's own bytes, where no patch touches them."""
        return self._data[span.offset : span.offset + span.size]


class SegmentLoader:
    """Makes regions of segments: all of a file's segments in one enclave."""

    def __init__(self, image: FileImage, relocated: PageNumbers, shift: int, budget: Budget) -> None:
        """``shift``: what is added to every offset, bytes (ELRANGE)."""
        self._image, self._relocated, self._shift, self._budget = image, relocated, shift, budget

    def regions(self, raw: Bytes, rva: int, vsize: int, flags: int, label: str) -> Iterator[Region]:
        """The pages of ``raw`` at ``rva``, and zero pages behind it up to ``vsize``; all of them measured.

        What is left of ``vsize`` is counted from the end of the pages that hold bytes. The relocated pages
        get W, but not those zero pages.
        """
        lead = rva % PAGE_SIZE
        base = rva - lead
        count = pages_of(lead + raw.size) if raw.size else 0
        if count:
            yield from self._content(raw, lead, base, count, flags, label)
        # Without bytes, the first zero page begins before rva.
        done = count * PAGE_SIZE - lead if count else 0
        if vsize > done:
            zeros = pages_of(vsize - done if count else vsize + lead)
            self._budget.take("regions", 1)
            yield Region(
                self._shift + base + count * PAGE_SIZE,
                zeros,
                flags,
                label=f"{label}, zeros" if count else label,
            )

    def _content(
        self, raw: Bytes, lead: int, base: int, count: int, flags: int, label: str
    ) -> Iterator[Region]:
        """Runs of pages that agree in flags and in whether they are copied."""
        copied = _merged([(begin // PAGE_SIZE, pages_of(end)) for begin, end in self._altered(raw, lead)])
        self._budget.take("copied pages", sum(end - begin for begin, end in copied))
        writable = self._writable(base // PAGE_SIZE, count) if not flags & WRITE else []
        cuts = sorted({0, count, *(cut for run in (*copied, *writable) for cut in run)})
        self._budget.take("regions", len(cuts) - 1)
        for begin, end in pairwise(cuts):
            is_relocated = _contains(writable, begin)
            first = max(begin * PAGE_SIZE - lead, 0)
            span = Bytes(raw.offset + first, min(end * PAGE_SIZE - lead, raw.size) - first)
            content: bytes | memoryview = (
                bytes(lead if begin == 0 else 0) + self._image.read(span)
                if _contains(copied, begin)
                else self._image.view(span)
            )
            yield Region(
                self._shift + base + begin * PAGE_SIZE,
                end - begin,
                flags | WRITE if is_relocated else flags,
                content,
                label=f"{label}, relocated" if is_relocated else label,
            )

    def _altered(self, raw: Bytes, lead: int) -> Iterator[tuple[int, int]]:
        """What must be copied, in bytes from the first page's begin."""
        if lead:
            yield 0, PAGE_SIZE
        for begin, end, _, _ in self._image.touched(raw):
            yield lead + begin, lead + end

    def _writable(self, page: int, count: int) -> list[tuple[int, int]]:
        """Runs of relocated pages among ``count`` pages from ``page`` on, counted from there."""
        first, last = np.searchsorted(self._relocated, np.array([page, page + count], np.uint64))
        pages = self._relocated[first:last] - np.uint64(page)
        if not len(pages):
            return []
        breaks = np.flatnonzero(np.diff(pages) > 1)
        self._budget.take("regions", len(breaks))
        begins = pages[np.concatenate(([0], breaks + 1))]
        ends = pages[np.concatenate((breaks, [len(pages) - 1]))] + np.uint64(1)
        return list(zip(begins.tolist(), ends.tolist(), strict=True))


def _merged(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open runs, ascending, those that touch joined."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(runs):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def _contains(runs: Sequence[tuple[int, int]], value: int) -> bool:
    at = bisect_right(runs, (value, 1 << 64))
    return at > 0 and value < runs[at - 1][1]
