"""Intel SDK enclaves made for tests: a builder of small files, and the pages that the rules say they become.

Nothing here comes from the reader. The pages are listed one by one, each with its 4096 bytes, and hashed
record by record with hashlib. What stands between the parts of a file is 0xEE, so that a byte taken from a
wrong place shows.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from enturbo import EnclaveImage

PAGE = 4096
REG = 0x200
MAGIC = 0x86A80294635D0E4C
NOTE_NAME = b"sgx_metadata\0"
RELA_AT, JMPREL_AT, DYNAMIC_AT = 0x7000_0000, 0x7100_0000, 0x7200_0000  # sh_addr alone: never loaded


class Page(NamedTuple):
    """One page as it is added, with all its bytes, also where none of them is measured."""

    offset: int
    flags: int
    measured: bool
    data: bytes


class Stream(NamedTuple):
    """What an enclave's measurement is made of."""

    ssa_frame_size: int
    size: int
    pages: list[Page]

    def digest(self) -> bytes:
        """MRENCLAVE of scheme ``sgx``."""
        sha = hashlib.sha256(struct.pack("<8sIQ44x", b"ECREATE", self.ssa_frame_size, self.size))
        for page in self.pages:
            sha.update(struct.pack("<8sQQ40x", b"EADD", page.offset, page.flags))
            for at in range(0, PAGE if page.measured else 0, 256):
                sha.update(struct.pack("<8sQ48x", b"EEXTEND", page.offset + at))
                sha.update(page.data[at : at + 256])
        return sha.digest()


@dataclass
class Seg:
    """A program header and its bytes; ``flags`` as in ELF: X 1, W 2, R 4."""

    vaddr: int
    data: bytes = b""
    memsz: int | None = None
    flags: int = 5
    type: int = 1
    shift: int = 0  # file offset and address differ by this, modulo a page

    @property
    def si_flags(self) -> int:
        return REG | (self.flags >> 2 & 1) | (self.flags & 2) | (self.flags & 1) << 2

    @property
    def span(self) -> int:
        return len(self.data) if self.memsz is None else self.memsz


@dataclass
class Entry:
    """A layout entry; with ``content`` its fill is not used."""

    rva: int
    pages: int = 1
    flags: int = 0x203
    attributes: int = 3
    fill: int = 0
    content: bytes | None = None
    id: int = 1


@dataclass
class Group:
    count: int
    times: int
    step: int
    id: int = 0x1009


@dataclass
class Block:
    """A metadata block."""

    version: tuple[int, int] = (2, 4)
    layout: list[Entry | Group] = field(default_factory=list)
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    enclave_size: int = 1 << 20
    ssa_frame_size: int = 1
    elrange: tuple[int, int, int] | None = None  # image address, start address, size
    extend: list[tuple[int, bytes]] = field(default_factory=list)  # id, data
    sigstruct: bytes = bytes(1808)
    padding: int = 0

    def encode(self) -> bytes:
        directories = 2 if self.version[0] == 1 and self.version[1] < 5 else 4
        blob = bytearray(1872 + 8 * directories)

        def put(data: bytes) -> int:
            at = len(blob)
            blob.extend(data)
            return at

        def directory(number: int, data: bytes) -> None:
            if data:
                struct.pack_into("<II", blob, 1872 + 8 * number, put(data), len(data))

        rows = b""
        for row in self.layout:
            if isinstance(row, Group):
                rows += struct.pack("<HHIQ16x", row.id, row.count, row.times, row.step)
            else:
                at, size = (0, row.fill) if row.content is None else (put(row.content), len(row.content))
                rows += struct.pack(
                    "<HHIQIIQ", row.id, row.attributes, row.pages, row.rva, size, at, row.flags
                )
        patches = b"".join(struct.pack("<QII16x", to, put(data), len(data)) for to, data in self.patches)
        directory(0, patches)
        directory(1, rows)
        if self.elrange is not None:
            directory(2, struct.pack("<QQQ", *self.elrange))
        directory(3, b"".join(struct.pack("<IIII", kind, len(d), put(d), 0) for kind, d in self.extend))
        blob.extend(bytes(self.padding))
        major, minor = self.version
        head = struct.pack("<QIIIIIIII", MAGIC, minor, major, len(blob), 1, self.ssa_frame_size, 0, 0, 0)
        blob[: len(head)] = head
        struct.pack_into("<QQQ", blob, 40, self.enclave_size, 4, 3)
        blob[64:1872] = self.sigstruct
        return bytes(blob)


@dataclass
class SdkFile:
    """A signed shared object. ``inner``: another one, placed in the file, for extend entry 0x1002."""

    segments: list[Seg]
    blocks: list[Block] = field(default_factory=lambda: [Block()])
    rela: list[tuple[int, int]] = field(default_factory=list)  # r_offset, type
    jmprel: list[tuple[int, int]] = field(default_factory=list)
    dynamic: list[tuple[int, int]] = field(default_factory=list)  # tags beside those of the tables
    inner: bytes = b""
    section: str = ".note.sgxmeta"
    at: dict[str, int] = field(default_factory=dict)  # where things stand in the file, for tests

    def offsets(self) -> list[int]:
        """Where each segment's bytes stand in the file."""
        found, end = [], PAGE
        for seg in self.segments:
            begin = end + (seg.vaddr + seg.shift - end) % PAGE
            found.append(begin)
            end = begin + len(seg.data) + 100
        return found

    def build(self) -> bytes:
        """The file's bytes."""
        out = bytearray()

        def put(data: bytes, align: int = 8) -> int:
            at = -(-len(out) // align) * align
            out.extend(b"\xee" * (at - len(out)) + data)
            return at

        def fill(begin: int, data: bytes) -> None:
            out.extend(b"\xee" * max(0, begin + len(data) - len(out)))
            out[begin : begin + len(data)] = data

        offsets = self.offsets()
        count = len(self.segments) + 1  # and PT_DYNAMIC
        fill(0, bytes(64 + 56 * count))
        for seg, begin in zip(self.segments, offsets, strict=True):
            fill(begin, seg.data)
        tables = [
            put(b"".join(struct.pack("<QQq", offset, kind | 7 << 32, 5) for offset, kind in rows))
            for rows in (self.rela, self.jmprel)
        ]
        tags = [(7, RELA_AT), (8, 24 * len(self.rela))] if self.rela else []
        tags += [(23, JMPREL_AT), (2, 24 * len(self.jmprel))] if self.jmprel else []
        table = b"".join(struct.pack("<QQ", *row) for row in [*tags, *self.dynamic, (0, 0)])
        self.at |= {"rela": tables[0], "jmprel": tables[1], "dynamic": put(table)}
        self.at["inner"] = put(self.inner, PAGE) if self.inner else 0
        names = b"\0.rela.dyn\0.rela.plt\0.dynamic\0.shstrtab\0" + self.section.encode() + b"\0"
        strings = put(names)
        self.at["note"] = put(b"")
        meta = b"".join(block.encode() for block in self.blocks)
        put(struct.pack("<III", len(NOTE_NAME), len(meta), 0) + NOTE_NAME + meta)
        self.at["blocks"] = self.at["note"] + 25
        rows = [
            (0, 0, 0, 0, 0),
            (1, 4, RELA_AT, tables[0], 24 * len(self.rela)),
            (11, 4, JMPREL_AT, tables[1], 24 * len(self.jmprel)),
            (21, 6, DYNAMIC_AT, self.at["dynamic"], len(table)),
            (30, 3, 0, strings, len(names)),
            (40, 7, 0, self.at["note"], 25 + len(meta)),
        ]
        self.at["shdr"] = put(b"".join(struct.pack("<IIQQQQ24x", n, t, 0, a, o, s) for n, t, a, o, s in rows))
        headers = b"".join(
            struct.pack("<IIQQQQQQ", s.type, s.flags, begin, s.vaddr, s.vaddr, len(s.data), s.span, PAGE)
            for s, begin in zip(self.segments, offsets, strict=True)
        )
        headers += struct.pack(
            "<IIQQQQQQ", 2, 6, self.at["dynamic"], DYNAMIC_AT, 0, len(table), len(table), 8
        )
        ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
        out[:64] = struct.pack(
            *(
                "<16sHHIQQQIHHHHHH",
                ident,
                3,
                62,
                1,
                0,
                64,
                self.at["shdr"],
                0,
                64,
                56,
                count,
                64,
                len(rows),
                4,
            )
        )
        out[64 : 64 + len(headers)] = headers
        return bytes(out)

    def expected(self, number: int = 0) -> Stream:
        """What block ``number`` says, rule by rule."""
        block = self.blocks[number]
        return Stream(
            block.ssa_frame_size,
            block.enclave_size if block.elrange is None else block.elrange[2],
            list(_Loader(self, block).pages()),
        )


class _Loader:
    """The order of measurement, written down page by page."""

    def __init__(self, file: SdkFile, block: Block) -> None:
        self.file, self.block = file, block
        self.shift = 0 if block.elrange is None else block.elrange[0] - block.elrange[1]
        self.image = bytearray(file.build())
        self.relocated: set[int] = set()
        if any(tag == 22 for tag, _ in file.dynamic):
            for offset, kind in (*file.rela, *file.jmprel):
                if kind != 0:
                    self.relocated.add(offset >> 12)
                    if offset & 0xFFF > 4088:
                        self.relocated.add((offset >> 12) + 1)
        for destination, data in block.patches:
            self.image[destination : destination + len(data)] = data

    def pages(self) -> Iterator[Page]:
        loads = [
            (seg, begin)
            for seg, begin in zip(self.file.segments, self.file.offsets(), strict=True)
            if seg.type == 1
        ]
        last: Seg | None = None
        for seg, begin in loads:
            yield from self.gap(last, seg)
            if seg.vaddr > (last.vaddr if last else 0):
                last = seg
            raw = bytes(self.image[begin : begin + len(seg.data)])
            yield from self.region(raw, seg.vaddr, seg.span, seg.si_flags, self.relocated)
        yield from self.gap(last, None)
        for kind, data in self.block.extend:
            if kind == 0x1002 and self.has_extend():
                yield from self.inner(*struct.unpack_from("<QQ", data))
                break
        for index, row in enumerate(self.block.layout):
            if isinstance(row, Entry):
                yield from self.entry(row, 0)
                continue
            step = 0
            for _ in range(row.times):
                step += row.step
                for each in self.block.layout[index - row.count : index]:
                    assert isinstance(each, Entry)
                    yield from self.entry(each, step)

    def has_extend(self) -> bool:
        major, minor = self.block.version
        return (major % 10 == 1 and minor >= 5) or (major % 10 == 3 and minor >= 2)

    def inner(self, file_offset: int, mem_offset: int) -> Iterator[Page]:
        phoff, count = struct.unpack_from("<Q", self.image, file_offset + 32)[0], self.image[file_offset + 56]
        for number in range(count):
            at = file_offset + phoff + 56 * number
            kind, flags, begin, vaddr, _, size, memsz, _ = struct.unpack_from("<IIQQQQQQ", self.image, at)
            if kind == 1:
                raw = bytes(self.image[file_offset + begin : file_offset + begin + size])
                yield from self.region(
                    raw, vaddr + mem_offset, memsz, Seg(0, flags=flags).si_flags, self.relocated
                )

    def gap(self, last: Seg | None, following: Seg | None) -> Iterator[Page]:
        if self.block.version != (1, 3) or last is None:
            return
        end = up(last.vaddr + last.span)
        if end < up(up(last.span) + last.vaddr) and (following is None or end < following.vaddr & ~4095):
            yield Page(self.shift + end, last.si_flags, True, bytes(PAGE))

    def region(self, raw: bytes, rva: int, vsize: int, flags: int, relocated: set[int]) -> Iterator[Page]:
        off = 0
        while off < len(raw):
            inside = (rva + off) & 4095
            data = bytes(inside) + raw[off : off + PAGE - inside]
            written = 2 if (rva + off) >> 12 in relocated else 0
            yield Page(self.shift + rva + off - inside, flags | written, True, data.ljust(PAGE, b"\0"))
            off += PAGE - inside
        if vsize > off:
            inside = (rva + off) & 4095
            for at in range(0, up(vsize - off + inside), PAGE):
                yield Page(self.shift + rva + off - inside + at, flags, True, bytes(PAGE))

    def entry(self, entry: Entry, delta: int) -> Iterator[Page]:
        if not entry.attributes & 1:
            return
        rva, measured = entry.rva + delta, entry.attributes & 3 == 3
        if entry.content is not None and entry.flags != 0x100:
            yield from self.region(entry.content, rva, entry.pages * PAGE, entry.flags, set())
            return
        if entry.content is not None:
            page = bytearray(entry.content.ljust(PAGE, b"\0"))
            for at in (16, 48, 56):
                value = (int.from_bytes(page[at : at + 8], "little") + rva) % (1 << 64)
                page[at : at + 8] = value.to_bytes(8, "little")
            data = bytes(page)
        elif entry.flags:
            data = entry.fill.to_bytes(4, "little") * 1024
        else:
            return
        for number in range(entry.pages):
            yield Page(self.shift + rva + number * PAGE, entry.flags, measured, data)


def up(value: int) -> int:
    return -(-value // PAGE) * PAGE


def pages_of(image: EnclaveImage) -> Stream:
    """The same list, from an image's regions."""
    pages = []
    for region in image.regions:
        if region.content is not None:
            data = bytes(region.content).ljust(region.size, b"\0")
        else:
            data = region.fill.to_bytes(4, "little") * (region.size // 4)
        assert region.chunks in (0, 0xFFFF)
        for number in range(region.page_count):
            at = number * PAGE
            pages.append(Page(region.offset + at, region.flags, bool(region.chunks), data[at : at + PAGE]))
    return Stream(image.ssa_frame_size, image.size, pages)


def tcs(ossa: int, base: int) -> bytes:
    """A TCS template of 72 bytes: OSSA, NSSA 2, OENTRY 0x1234, OFSBASE and OGSBASE, both limits."""
    return struct.pack("<QQQIIQQQQII", 0, 0, ossa, 0, 2, 0x1234, 0x55, base, base, 0xFFF, 0xFFF)


def pattern(size: int, seed: int) -> bytes:
    """Bytes that repeat every 251: no two pages alike."""
    cycle = bytes((seed * 17 + i) % 251 for i in range(251))
    return (cycle * (size // 251 + 1))[:size]


class Kit:
    """What tests of the format need, in one fixture."""

    File, Seg, Block, Entry, Group = SdkFile, Seg, Block, Entry, Group
    tcs, pattern, pages_of = staticmethod(tcs), staticmethod(pattern), staticmethod(pages_of)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "enclave.signed.so"

    def load(self, data: bytes) -> EnclaveImage:
        """``data`` as a file, loaded."""
        self.path.unlink(missing_ok=True)  # an image loaded before keeps its own file
        self.path.write_bytes(data)
        return EnclaveImage.load(self.path)

    def agrees(self, file: SdkFile) -> EnclaveImage:
        """Loads the file and compares every block's pages and value with the rules."""
        image = self.load(file.build())
        assert len(image.variants) == len(file.blocks) - 1
        for number, each in enumerate((image, *image.variants)):
            expected = file.expected(number)
            assert pages_of(each) == expected
            assert each.measure("sgx").digest == expected.digest()
        return image


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    """The builder, and a comparison with the rules."""
    return Kit(tmp_path)


@pytest.fixture
def plain(kit: Kit) -> Callable[..., SdkFile]:
    """A small enclave as signing tools make them: three segments, heap, two threads."""

    def make(**options: object) -> SdkFile:
        layout: list[Entry | Group] = [
            Entry(0x10000, 4, attributes=1),  # heap
            Entry(0x14000, 2, flags=0, attributes=0),  # guard
            Entry(0x16000, 2, fill=0xCCCCCCCC),  # stack
            Entry(0x18000, 1, flags=0x100, content=tcs(0x1000, 0x3000)),
            Entry(0x19000, 2),  # SSA
            Entry(0x1B000, 1, content=b"thread data"),
            Group(5, 2, 0x8000),
        ]
        options.setdefault("blocks", [Block(layout=layout)])
        segments = [
            Seg(0, pattern(0x2345, 1), flags=5),
            Seg(0x3345, pattern(0x1000, 2), flags=4),
            Seg(0x5100, pattern(0x800, 3), memsz=0x2800, flags=6),
        ]
        return SdkFile(segments, **options)  # type: ignore[arg-type]

    return make
