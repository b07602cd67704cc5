"""Open Enclave's enclaves: an ELF shared object with a section ``.oeinfo`` (``*.signed``).

``.oeinfo`` says how many pages of heap, stack and TCS there are, and holds the SIGSTRUCT. The loader
patches the image before it measures it: numbers that only the loader knows go into ``.oeinfo`` and a few
exported variables. Symbols and relocations are read by :mod:`enturbo.runtime.formats.open_enclave_tables`;
where pages go is :mod:`enturbo.runtime.formats.open_enclave_layout`.

Source: openenclave/openenclave, host/sgx/loadelf.c (image, patches), host/sgx/create.c (order of pages,
sizes), include/openenclave/bits/sgx/sgxproperties.h (``.oeinfo``).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ...shm.errors import ImageFormatError, SignatureError
from ...shm.layout import PAGE_SIZE, Record
from ..region import MAX_PAGES
from ..sigstruct import SIZE as SIGSTRUCT_SIZE
from ..sigstruct import Sigstruct
from .elf import Elf, has_section, map_file
from .open_enclave_layout import MAX_TCS, FlatImage, Layout, page_end
from .open_enclave_tables import ThreadLocal, relocations, symbol_values, thread_local

if TYPE_CHECKING:
    from ..image import EnclaveImage

OEINFO_SECTION: Final = b".oeinfo"
OEINFO: Final = Record(
    ".oeinfo",
    1960,
    (
        ("size", "I", 0),  # 1960
        ("enclave_type", "I", 4),
        ("heap_pages", "Q", 8),
        ("stack_pages", "Q", 16),  # of each thread
        ("tcs_count", "Q", 24),
        ("product_id", "H", 32),
        ("svn", "H", 34),
        ("flags", "I", 36),
        ("family_id", "16s", 40),
        ("extended_product_id", "16s", 56),
        ("attributes", "Q", 72),
        ("xfrm", "Q", 80),
        ("start_address", "Q", 88),  # of a zero-base enclave alone
        ("image_info", "48s", 96),  # six u64, patched by the loader
        ("sigstruct", f"{SIGSTRUCT_SIZE}s", 144),
    ),
)
FLAG_CAPTURE_FAULTS: Final = 1 << 0
FLAG_ZERO_BASE: Final = 1 << 1

# Variables without which the loader gives up. The others are set where they are exported.
NEEDED: Final = (b"_enclave_rva", b"_reloc_rva", b"_reloc_size")
PATCHED: Final = (
    *NEEDED,
    *(b"_tdata_rva", b"_tdata_size", b"_tdata_align"),
    *(b"_tbss_size", b"_tbss_align", b"_td_from_tcs_offset"),
)


def is_it(file: BinaryIO, name: str) -> bool:
    """Whether an ELF file has ``.oeinfo``."""
    return has_section(file, name, OEINFO_SECTION)


def load(file: BinaryIO, name: str) -> EnclaveImage:
    """Map ``file`` and lay out its pages. Raises ImageFormatError with offset, expected and found."""
    from ..image import EnclaveImage

    data, backing = map_file(file, name)
    try:
        reader = _Reader(Elf(data, name))
        layout = reader.layout()
        sigstructs = reader.sigstructs()
        # All that can be wrong has been looked at: patched segments are copied from here on.
        return EnclaveImage(
            layout.regions(),
            size=layout.size,
            ssa_frame_size=1,
            sigstructs=sigstructs,
            backing=backing,
            details=reader.details(layout),
        )
    except ImageFormatError as error:
        if error.file is not None:
            raise
        raise ImageFormatError(
            error.what, file=name, offset=error.offset, expected=error.expected, found=error.found
        ) from None


class _Reader:
    """One file's ``.oeinfo``, and the image patched as it says."""

    def __init__(self, elf: Elf) -> None:
        self.elf = elf
        self.flat = FlatImage(elf)
        section = elf.section(OEINFO_SECTION)
        if section is None:
            raise elf.error("section .oeinfo", None, "one", "none")
        self.oeinfo = section
        self._check_oeinfo()

    def _check_oeinfo(self) -> None:
        """It stands where the loader looks for it: in the image, as in the file."""
        section = self.oeinfo
        if section.size != OEINFO.size:
            raise self.elf.error("size of .oeinfo", section.offset, OEINFO.size, section.size)
        place = self.flat.file_offset(section.addr, section.size)
        if place != section.offset:
            raise self.elf.error(".oeinfo's place in a PT_LOAD", section.offset, hex(section.offset), place)
        if self.get("size") != OEINFO.size:
            raise self.elf.error(".oeinfo's size field", section.offset, OEINFO.size, self.get("size"))
        for field, limit in (("tcs_count", MAX_TCS), ("heap_pages", 1 << 32), ("stack_pages", 1 << 32)):
            if self.get(field) > limit:
                at = section.offset + OEINFO.offset(field)
                raise self.elf.error(f".oeinfo's {field}", at, f"at most {limit}", self.get(field))

    def get(self, field: str) -> Any:
        """A field of ``.oeinfo``."""
        at = self.oeinfo.offset + OEINFO.offset(field)
        return OEINFO.struct(field).unpack_from(self.elf.data, at)[0]

    def layout(self) -> Layout:
        """All pages, with the image patched."""
        tdata, tbss = thread_local(self.elf, b".tdata"), thread_local(self.elf, b".tbss")
        layout = Layout(
            flat=self.flat,
            relocations=relocations(self.elf),
            heap_pages=self.get("heap_pages"),
            stack_pages=self.get("stack_pages"),
            tcs_count=self.get("tcs_count"),
            tls_pages=page_end(tdata.aligned + tbss.aligned) // PAGE_SIZE,
            entry=self.elf.header("entry"),
            start=self._start_address(),
        )
        if layout.start + layout.end > MAX_PAGES * PAGE_SIZE:
            pages = (layout.start + layout.end) // PAGE_SIZE
            raise self.elf.error("pages of the enclave", self.oeinfo.offset, f"at most {MAX_PAGES}", pages)
        self._patch(layout, tdata, tbss)
        return layout

    def _start_address(self) -> int:
        """Where a zero-base enclave's image begins in it; 0 for others, whatever stands in the field."""
        if not self.get("flags") & FLAG_ZERO_BASE:
            return 0
        start: int = self.get("start_address")
        if start % PAGE_SIZE or not 0 < start < 1 << 44:
            at = self.oeinfo.offset + OEINFO.offset("start_address")
            raise self.elf.error(".oeinfo's start_address", at, "a page, not 0, below 2**44", hex(start))
        return start

    def _patch(self, layout: Layout, tdata: ThreadLocal, tbss: ThreadLocal) -> None:
        """What the loader writes into the image before it measures it."""
        info, image = self.oeinfo.addr, self.flat
        reloc_rva, reloc_size = image.size, len(layout.relocations)
        image_info = (info, OEINFO.size, reloc_rva, reloc_size, reloc_rva + reloc_size, layout.enclave_size)
        image.patch(info + OEINFO.offset("image_info"), struct.pack("<6Q", *image_info))
        symbols = symbol_values(self.elf, PATCHED)
        for name in NEEDED:
            if name not in symbols:
                raise self.elf.error(f"dynamic symbol {name.decode()}", None, "one", "none")
        values = {
            b"_enclave_rva": symbols[b"_enclave_rva"],
            b"_reloc_rva": reloc_rva,
            b"_reloc_size": reloc_size,
            b"_td_from_tcs_offset": layout.thread_data * PAGE_SIZE,
        }
        if tdata.size:
            values |= {b"_tdata_rva": tdata.rva, b"_tdata_size": tdata.size, b"_tdata_align": tdata.align}
        if tbss.size:
            values |= {b"_tbss_size": tbss.size, b"_tbss_align": tbss.align}
        for name, value in values.items():
            if name in symbols:
                image.patch(symbols[name], struct.pack("<Q", value))
        image.patch(info + OEINFO.offset("sigstruct"), bytes(SIGSTRUCT_SIZE))

    def sigstructs(self) -> list[Sigstruct]:
        """The SIGSTRUCT, if the file has been signed."""
        data: bytes = self.get("sigstruct")
        if not any(data):
            return []
        at = self.oeinfo.offset + OEINFO.offset("sigstruct")
        try:
            return [Sigstruct.parse(data, offset=at)]
        except SignatureError as error:
            raise self.elf.error("SIGSTRUCT in .oeinfo", at, "a well-formed one, or zeros", error) from None

    def details(self, layout: Layout) -> dict[str, Any]:
        """For ``enturbo inspect``."""
        names = ("product_id", "svn", "heap_pages", "stack_pages", "tcs_count", "attributes", "xfrm")
        flags = self.get("flags")
        base = self.get("start_address") if flags & FLAG_ZERO_BASE else 0
        return {
            "format": "open-enclave-elf",
            **{name: self.get(name) for name in names},
            "family_id": self.get("family_id").hex(),
            "extended_product_id": self.get("extended_product_id").hex(),
            "capture_pf_gp_exceptions": bool(flags & FLAG_CAPTURE_FAULTS),
            "zero_base": bool(flags & FLAG_ZERO_BASE),
            "start_address": self.get("start_address"),
            "entry": layout.entry,
            "image_size": self.flat.size,
            "relocation_bytes": len(layout.relocations),
            "tls_pages": layout.tls_pages,
            "sections": [[name, at + base, size] for name, at, size in self.elf.loaded_sections()],
        }
