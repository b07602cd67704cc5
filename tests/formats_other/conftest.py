"""Builders of Open Enclave files and SGXS streams, and the pages that each must give.

They are written from the formats' rules and share no code with the readers: a builder knows what it put
where, applies the loader's rules to its own buffers and lists the pages; these are hashed record by record.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from enturbo import EnclaveImage

PAGE = 4096
R, RW, RX, TCS = 0x201, 0x203, 0x205, 0x100
ALL = 0xFFFF
VARIABLES = (
    b"_enclave_rva",
    b"_reloc_rva",
    b"_reloc_size",
    b"_tdata_rva",
    b"_tdata_size",
    b"_tdata_align",
    b"_tbss_size",
    b"_tbss_align",
    b"_td_from_tcs_offset",
)


class Page(NamedTuple):
    """What a page must be: byte offset, SECINFO.FLAGS, mask of measured chunks, 4096 bytes."""

    offset: int
    flags: int
    mask: int
    data: bytes


def hash_pages(size: int, pages: list[Page], ssa_frame_size: int = 1) -> bytes:
    """MRENCLAVE of scheme ``sgx``, record by record."""
    digest = hashlib.sha256(struct.pack("<8sIQ44x", b"ECREATE", ssa_frame_size, size))
    for page in pages:
        digest.update(struct.pack("<8sQQ40x", b"EADD", page.offset, page.flags))
        for chunk in range(16):
            if page.mask >> chunk & 1:
                digest.update(struct.pack("<8sQ48x", b"EEXTEND", page.offset + 256 * chunk))
                digest.update(page.data[256 * chunk : 256 * chunk + 256])
    return digest.digest()


def image_pages(image: EnclaveImage) -> list[Page]:
    """The image's regions, page by page."""
    pages = []
    for region in image.regions:
        data = region.fill.to_bytes(4, "little") * (region.size // 4)
        if region.content is not None:
            data = bytes(region.content).ljust(region.size, b"\0")
        pages += [
            Page(region.offset + at, region.flags, region.chunks, data[at : at + PAGE])
            for at in range(0, region.size, PAGE)
        ]
    return pages


def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ from place to place."""
    return bytes((seed + 7 * (at // 256) + at) % 251 + 1 for at in range(length))


def up(value: int, step: int = PAGE) -> int:
    """``value`` up to a multiple of ``step``; 0: of 1."""
    step = step or 1
    return (value + step - 1) // step * step


# ----------------------------------------------------------------------------------------------- Open Enclave


@dataclass(frozen=True)
class OpenEnclave:
    """An Open Enclave file. Segments: tables (R) from 0, code (RX), data and bss (RW) at an odd address.

    ``where``: the rva of patched variables. ``rela``: (r_offset, type, symbol, addend); None: no section.
    """

    heap: int = 3
    stack: int = 2
    tcs: int = 2
    flags: int = 0
    start: int = 0
    tdata: bytes | None = None
    tdata_align: int = 8
    tls_align: int | None = None  # of PT_TLS; None: no PT_TLS
    tls_elsewhere: bool = False
    tbss: int = 0
    tbss_align: int = 8
    names: tuple[bytes, ...] = VARIABLES
    rela: tuple[tuple[int, int, int, int], ...] | None = ((0x6000, 8, 0, 0x1234), (0x6008, 18, 3, 5))
    plt: tuple[tuple[int, int, int, int], ...] | None = None
    entry: int = 0x2010
    text: bytes = pattern(5000, 3)
    data: bytes = pattern(900, 9)
    bss: int = 5 * PAGE
    data_at: int = 0x5968
    where: dict[bytes, int] = field(default_factory=dict)
    sigstruct: bytes = bytes(1808)
    swap: bool = False  # program headers out of order
    edits: tuple[tuple[str, int, bytes], ...] = ()  # (structure, offset in it, bytes) over the finished file

    # Where things are: segment 0 from 0, segment 1 from 0x2000.
    PHDRS = 64
    DYNSYM = 0x300

    @property
    def variables(self) -> dict[bytes, int]:
        """Rvas: half of them in data, half in the third page of bss, one over a page's end."""
        places = {name: self.data_at + 64 + 16 * number for number, name in enumerate(VARIABLES)}
        third = up(self.data_at) + 2 * PAGE
        places[b"_enclave_rva"], places[b"_reloc_size"] = third + 8, third + 2 * PAGE - 4
        return places | self.where

    @property
    def image_end(self) -> int:
        return self.data_at + len(self.data_bytes) + self.bss

    @property
    def image_size(self) -> int:
        return up(self.image_end)

    @property
    def data_bytes(self) -> bytes:
        return self.data + (self.tdata or b"")

    @property
    def tdata_rva(self) -> int:
        return self.data_at + len(self.data)

    def rela_bytes(self, table: tuple[tuple[int, int, int, int], ...]) -> bytes:
        return b"".join(struct.pack("<QIIQ", where, kind, symbol, add) for where, kind, symbol, add in table)

    @property
    def symbols(self) -> list[tuple[bytes, int]]:
        """Symbol 0 is none; one of another name, and a later one of the same name, are no matter."""
        rows = [(b"", 0), (b"main", 0x77), (b"_enclave_rva2", 0x2000), (b"thread_local", 0x48)]
        rows += [(name, self.variables[name]) for name in self.names]
        return [*rows, *((name, 0x2000) for name in self.names)]

    def tables(self) -> tuple[bytes, dict[bytes, tuple[int, int]]]:
        """Segment 0's bytes behind its headers, and (offset, size) of each section in it."""
        strings, rows = b"\0", b""
        for name, value in self.symbols:
            rows += struct.pack("<IBBHQQ", len(strings) if name else 0, 0x11, 0, 1, value, 8)
            strings += name + b"\0" if name else b""
        parts = [(b".dynsym", rows), (b".dynstr", strings), (b".oeinfo", self.oeinfo())]
        if self.rela is not None:
            parts.append((b".rela.dyn", self.rela_bytes(self.rela)))
        if self.plt is not None:
            parts.append((b".rela.plt", self.rela_bytes(self.plt)))
        out, places, at = b"", {}, self.DYNSYM
        for name, data in parts:
            places[name] = (at, len(data))
            data = data.ljust(up(len(data), 8), b"\0")
            out += data
            at += len(data)
        assert at <= 0x2000
        return out, places

    def oeinfo(self) -> bytes:
        out = struct.pack("<IIQQQHHI", 1960, 2, self.heap, self.stack, self.tcs, 7, 9, self.flags)
        out += b"F" * 16 + b"E" * 16 + struct.pack("<QQQ", 4, 3, self.start)
        return out + b"I" * 48 + self.sigstruct + b"\xec" * 8

    def build(self) -> bytes:
        """The file."""
        tables, places = self.tables()
        tdata_size = len(self.tdata or b"")
        text_at, data_at = 0x2000, up(0x2000 + len(self.text)) + self.data_at % PAGE
        first = self.DYNSYM + len(tables)
        program = [
            (1, 4, 0, 0, first, first, PAGE),
            (1, 5, text_at, 0x2000, len(self.text), len(self.text), PAGE),
            (
                *(1, 6, data_at, self.data_at, len(self.data_bytes)),
                *(len(self.data_bytes) + self.bss, PAGE),
            ),
        ]
        if self.swap:
            program.reverse()
        if self.tls_align is not None:
            tls = self.tdata_rva + (8 if self.tls_elsewhere else 0)
            program.append((7, 4, data_at + len(self.data), tls, tdata_size, tdata_size, self.tls_align))
        sections = [(b"", 0, 0, 0, 0, 0)]
        sections += [(name, 1, at, at, size, 8) for name, (at, size) in places.items()]
        if self.tdata is not None:
            sections.append(
                (b".tdata", 1, self.tdata_rva, data_at + len(self.data), tdata_size, self.tdata_align)
            )
        if self.tbss:
            sections.append((b".tbss", 8, 0x9999, 0x7FFFFFFF, self.tbss, self.tbss_align))
        out = bytearray(tables.rjust(first, b"\0").ljust(text_at, b"\0") + self.text)
        out = out.ljust(data_at, b"\xee") + self.data_bytes + b"debugging"
        names, headers = b"\0", b""
        sections.append((b".shstrtab", 3, 0, len(out), 0, 1))
        for section in sections:
            names += section[0] + b"\0" if section[0] else b""
        for name, kind, addr, offset, size, align in sections:
            size = len(names) if name == b".shstrtab" else size
            at = names.index(b"\0" + name + b"\0") + 1 if name else 0
            headers += struct.pack("<IIQQQQIIQQ", at, kind, 0, addr, offset, size, 0, 0, align, 0)
        out += names
        shoff = len(out)
        out += headers
        struct.pack_into(
            *(
                "<16sHHIQQQIHHHHHH",
                out,
                0,
                b"\x7fELF\2\1\1",
                3,
                62,
                1,
                self.entry,
                self.PHDRS,
                shoff,
                0,
                64,
                56,
            ),
            *(len(program), 64, len(sections), len(sections) - 1),
        )
        for number, (kind, flags, offset, vaddr, filesz, memsz, align) in enumerate(program):
            struct.pack_into(
                *("<IIQQQQQQ", out, self.PHDRS + 56 * number, kind, flags, offset, vaddr, vaddr),
                *(filesz, memsz, align),
            )
        bases = {
            "header": 0,
            "phdr": self.PHDRS,
            "shdr": shoff,
            "oeinfo": places[b".oeinfo"][0],
            "text": text_at,
        }
        for structure, offset, data in self.edits:
            at = bases[structure] + offset
            out[at : at + len(data)] = data
        return bytes(out)

    # ------------------------------------------------------------------------------------- what it must give

    @property
    def relocations(self) -> bytes:
        """The pages of relocation data."""
        if self.rela is None:
            return b""
        rows = [*self.rela, *(self.plt or ())]
        symbols = self.symbols
        rows = [(o, k, s, symbols[s][1] if k == 18 else add) for o, k, s, add in rows]
        data = self.rela_bytes(tuple(rows))
        return data.ljust(up(len(data)), b"\0")

    @property
    def tls_pages(self) -> int:
        total = 0
        if self.tdata:
            align = self.tdata_align
            if self.tls_align is not None and not self.tls_elsewhere:
                align = self.tls_align
            total += up(len(self.tdata), align)
        if self.tbss:
            total += up(self.tbss, self.tbss_align)
        return up(total) // PAGE

    @property
    def end(self) -> int:
        thread = self.stack + 2 + self.tls_pages + 5
        return self.image_size + len(self.relocations) + PAGE * (self.heap + self.tcs * thread)

    @property
    def base(self) -> int:
        return self.start if self.flags & 2 else 0

    @property
    def size(self) -> int:
        return power(self.end + self.base)

    def flat(self) -> bytes:
        """The image in memory, patched."""
        tables, places = self.tables()
        out = bytearray(self.image_size)
        built = self.build()
        out[: self.DYNSYM] = built[: self.DYNSYM]
        out[self.DYNSYM : self.DYNSYM + len(tables)] = tables
        out[0x2000 : 0x2000 + len(self.text)] = self.text
        out[self.data_at : self.data_at + len(self.data_bytes)] = self.data_bytes
        oeinfo = places[b".oeinfo"][0]
        reloc = self.image_size
        heap = reloc + len(self.relocations)
        image_info = (oeinfo, 1960, reloc, len(self.relocations), heap, power(self.end))
        struct.pack_into("<6Q", out, oeinfo + 96, *image_info)
        values = {
            b"_enclave_rva": self.variables[b"_enclave_rva"],
            b"_reloc_rva": reloc,
            b"_reloc_size": len(self.relocations),
            b"_td_from_tcs_offset": (self.tls_pages + 4) * PAGE,
        }
        if self.tdata:
            align = self.tdata_align
            if self.tls_align is not None and not self.tls_elsewhere:
                align = self.tls_align
            values |= {b"_tdata_rva": self.tdata_rva, b"_tdata_size": len(self.tdata), b"_tdata_align": align}
        if self.tbss:
            values |= {b"_tbss_size": self.tbss, b"_tbss_align": self.tbss_align}
        for name, value in values.items():
            if name in self.names:
                struct.pack_into("<Q", out, self.variables[name], value)
        out[oeinfo + 144 : oeinfo + 144 + 1808] = bytes(1808)
        return bytes(out)

    def pages(self) -> list[Page]:
        """All pages in EADD order."""
        base, flat = self.base, self.flat()
        found = []
        ends = ((0, up(self.DYNSYM + len(self.tables()[0])), R), (0x2000, up(0x2000 + len(self.text)), RX))
        for first, end, flags in (*ends, (self.data_at // PAGE * PAGE, self.image_size, RW)):
            found += [Page(base + at, flags, ALL, flat[at : at + PAGE]) for at in range(first, end, PAGE)]
        at = base + self.image_size
        for start in range(0, len(self.relocations), PAGE):
            found.append(Page(at, R, ALL, self.relocations[start : start + PAGE]))
            at += PAGE
        for _ in range(self.heap):
            found.append(Page(at, RW, 0, bytes(PAGE)))
            at += PAGE
        for _ in range(self.tcs):
            at += PAGE
            for _ in range(self.stack):
                found.append(Page(at, RW, ALL, b"\xcc" * PAGE))
                at += PAGE
            at += PAGE
            data = at + (self.tls_pages + 4) * PAGE
            words = struct.pack("<QQQII", 0, 0, at + PAGE, 0, 2)
            words += struct.pack("<QQQQII", base + self.entry, 0, data, data, 0xFFFFFFFF, 0xFFFFFFFF)
            found.append(Page(at, TCS, ALL, words.ljust(PAGE, b"\0")))
            found += [Page(at + each * PAGE, RW, ALL, bytes(PAGE)) for each in (1, 2)]
            at += 4 * PAGE
            for _ in range(self.tls_pages + 1):
                found.append(Page(at, RW, ALL, bytes(PAGE)))
                at += PAGE
        assert at == base + self.end
        return found


def power(size: int) -> int:
    """The next power of two."""
    found = 1
    while found < size:
        found *= 2
    return found


# ------------------------------------------------------------------------------------------------------- SGXS


def ecreate(size: int = 1 << 20, ssa_frame_size: int = 1, tag: bytes = b"ECREATE") -> bytes:
    return struct.pack("<8sIQ44x", tag, ssa_frame_size, size)


def eadd(offset: int, flags: int = RW) -> bytes:
    return struct.pack("<8sQQ40x", b"EADD", offset, flags)


def chunk(offset: int, data: bytes, tag: bytes = b"EEXTEND") -> bytes:
    return struct.pack("<8sQ48x", tag, offset) + data


def stream(pages: list[tuple[Page, int]], size: int = 1 << 20, ssa_frame_size: int = 1) -> bytes:
    """An SGXS stream of pages, each with the mask of its UNMEASRD chunks."""
    out = ecreate(size, ssa_frame_size)
    for page, unmeasured in pages:
        out += eadd(page.offset, page.flags)
        for number in range(16):
            data = page.data[256 * number : 256 * number + 256]
            if page.mask >> number & 1:
                out += chunk(page.offset + 256 * number, data)
            elif unmeasured >> number & 1:
                out += chunk(page.offset + 256 * number, data, b"UNMEASRD")
    return out


def stream_hash(data: bytes) -> bytes:
    """SHA-256 of a stream without its UNMEASRD headers and data: the rule itself."""
    digest, at = hashlib.sha256(), 0
    while at < len(data):
        length = 320 if data[at : at + 8] in (b"EEXTEND\0", b"UNMEASRD") else 64
        if data[at : at + 8] != b"UNMEASRD":
            digest.update(data[at : at + length])
        at += length
    return digest.digest()


class Builders(NamedTuple):
    """All of the above, for tests: they cannot import one another."""

    OpenEnclave: type[OpenEnclave]
    Page: type[Page]
    hash_pages: Callable[..., bytes]
    image_pages: Callable[[EnclaveImage], list[Any]]
    pattern: Callable[[int, int], bytes]
    ecreate: Callable[..., bytes]
    eadd: Callable[..., bytes]
    chunk: Callable[..., bytes]
    stream: Callable[..., bytes]
    stream_hash: Callable[[bytes], bytes]


BUILDERS = Builders(
    *(OpenEnclave, Page, hash_pages, image_pages, pattern, ecreate, eadd, chunk, stream, stream_hash)
)


@pytest.fixture(scope="session")
def build() -> Builders:
    """The builders."""
    return BUILDERS


@pytest.fixture(scope="session")
def some_stream() -> tuple[list[tuple[Page, int]], bytes]:
    """Pages of each kind, with the masks of their UNMEASRD chunks, and their stream."""
    full = [Page(PAGE * number, RX, ALL, pattern(PAGE, number)) for number in range(5)]
    pages = [(page, 0) for page in full]
    pages += [(Page(0x8000, TCS, ALL, pattern(72, 1).ljust(PAGE, b"\0")), 0)]
    pages += [(Page(0x9000 + PAGE * number, RW, 0, bytes(PAGE)), 0) for number in range(7)]  # heap
    for number, (mask, unmeasured) in enumerate([(0, ALL), (0x8001, 0x0FF0), (0x8001, 0x0FF0), (0x00FF, 0)]):
        data = bytearray(pattern(PAGE, number + 50))
        for each in range(16):
            if not (mask | unmeasured) >> each & 1:
                data[256 * each : 256 * each + 256] = bytes(256)
        pages.append((Page(0x10000 + PAGE * number, RW, mask, bytes(data)), unmeasured))
    pages += [(Page(0x20000, RW, ALL, pattern(PAGE, 77)), 0), (Page(0x30000, RW, ALL, pattern(PAGE, 78)), 0)]
    return pages, stream(pages, ssa_frame_size=2)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], EnclaveImage]:
    """An image of a file's bytes."""

    def write_and_load(data: bytes) -> EnclaveImage:
        path = tmp_path / "file"
        path.write_bytes(data)
        return EnclaveImage.load(path)

    return write_and_load


__all__ = ["Builders", "OpenEnclave", "Page", "replace"]
