"""Region: a run of pages with one set of flags and one source.

The unit that images are made of. A region is never materialised: a fill or a zero region of a million
pages is four numbers.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..shm.errors import ImageFormatError
from ..shm.layout import ALL_CHUNKS, PAGE_SIZE

if TYPE_CHECKING:
    from .backing import Backing

Buffer = bytes | bytearray | memoryview | mmap.mmap

# SECINFO.FLAGS (Intel SDM Vol. 3D, "SECINFO"): permissions in bits 2:0, page type in bits 15:8.
READ: Final = 1
WRITE: Final = 2
EXECUTE: Final = 4
PERMISSIONS: Final = READ | WRITE | EXECUTE
TYPE_SECS: Final = 0x000
TYPE_TCS: Final = 0x100
TYPE_REG: Final = 0x200

MAX_PAGES: Final = 1 << 32  # a page's number in the enclave is a u32 in its EPCM entry


def check_flags(flags: int, offset: int | None = None) -> None:
    """Refuse SECINFO.FLAGS that EADD refuses (ImageFormatError).

    Only TCS pages (without R, W, X) and regular pages can be added here, and W needs R.
    """
    known = type(flags) is int and 0 <= flags <= 0xFFFF
    if not known or flags & ~PERMISSIONS not in (TYPE_TCS, TYPE_REG):
        raise ImageFormatError(
            "SECINFO.FLAGS",
            offset=offset,
            expected=f"page type TCS ({TYPE_TCS:#x}) or REG ({TYPE_REG:#x}) and R 1, W 2, X 4 alone",
            found=hex(flags) if isinstance(flags, int) else repr(flags),
        )
    if flags & TYPE_TCS and flags & PERMISSIONS:
        raise ImageFormatError(
            "SECINFO.FLAGS", offset=offset, expected="a TCS page without R, W, X", found=hex(flags)
        )
    if flags & WRITE and not flags & READ:
        raise ImageFormatError("SECINFO.FLAGS", offset=offset, expected="R where W is set", found=hex(flags))


@dataclass(frozen=True)
class Region:
    """A run of pages in EADD order.

    Args:
        offset: of the first page from the enclave's base, bytes, page-aligned.
        page_count: pages, at least one.
        flags: SECINFO.FLAGS of each page (R 1, W 2, X 4, type TCS 0x100 or REG 0x200).
        content: the bytes, zero-padded up to the last page; None: see ``fill``.
        fill: a u32 repeated over all pages when there is no content; 0: zero pages.
        measured: True: all of each page; False: none; an int: its bit i stands for chunk i (256 bytes).
        file_page: where the content stands in its file, in pages; None: in this process's memory alone. No
            part of what the region is.
        layer: the file that holds the content where that is not the image's own. Images share layers, and
            nobody closes one: it goes with its last user. No part of what the region is.
        label: where it comes from, for people: a segment, a layout entry. No part of what the region is.

    Raises ImageFormatError for what cannot be added.
    """

    offset: int
    page_count: int
    flags: int
    content: Buffer | None = None
    fill: int = 0
    measured: bool | int = True
    file_page: int | None = field(default=None, compare=False, repr=False)
    layer: Backing | None = field(default=None, compare=False, repr=False)
    label: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if type(self.offset) is not int or self.offset < 0 or self.offset % PAGE_SIZE:
            raise ImageFormatError("region's offset", expected="a multiple of 4096", found=repr(self.offset))
        if type(self.page_count) is not int or self.page_count < 1:
            raise self._odd("pages", "at least one page", self.page_count)
        if self.offset // PAGE_SIZE + self.page_count > MAX_PAGES:
            raise self._odd("end", f"at most page {MAX_PAGES}", self.offset // PAGE_SIZE + self.page_count)
        check_flags(self.flags, self.offset)
        if type(self.fill) is not int or not 0 <= self.fill <= 0xFFFF_FFFF:
            raise self._odd("fill", "a u32", self.fill)
        if not isinstance(self.measured, bool) and not (
            type(self.measured) is int and 0 <= self.measured <= ALL_CHUNKS
        ):
            raise self._odd("measured", "True, False or a mask of 16 chunks", self.measured)
        if self.content is not None:
            self._check_content(self.content)

    def _check_content(self, content: Buffer) -> None:
        if self.fill:
            raise self._odd("fill", "0 beside content", self.fill)
        with memoryview(content) as view:
            if not view.c_contiguous:
                raise self._odd("content", "contiguous bytes", f"strides {view.strides}")
            if view.nbytes > self.size:
                raise self._odd("content", f"at most {self.size} bytes", view.nbytes)

    def _odd(self, what: str, expected: str, found: object) -> ImageFormatError:
        return ImageFormatError(f"region's {what}", offset=self.offset, expected=expected, found=found)

    @property
    def size(self) -> int:
        """Bytes: ``page_count`` pages."""
        return self.page_count * PAGE_SIZE

    @property
    def end(self) -> int:
        """Offset behind the last page, bytes."""
        return self.offset + self.size

    @property
    def chunks(self) -> int:
        """Mask of the measured chunks of each page: 0 unmeasured, 0xFFFF all of it."""
        if isinstance(self.measured, bool):
            return ALL_CHUNKS if self.measured else 0
        return self.measured

    @property
    def is_heap(self) -> bool:
        """Zero, unmeasured, readable and writable: what EAUG could bring instead of EADD."""
        return (
            self.flags == TYPE_REG | READ | WRITE
            and self.chunks == 0
            and self.content is None
            and self.fill == 0
        )
