"""Why two enclaves differ: SECS, pages in EADD order, fields of the SIGSTRUCTs. Compares; prints nothing.

What is measured comes first: two images have different MRENCLAVEs if SECS, a page's offset, flags or measured
chunks, or a byte of a measured chunk differ. Bytes that are not measured are told only if no page differs so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from ..shm.layout import PAGE_SIZE
from .page_difference import Extent, PageDifference, first_page
from .sigstruct import Sigstruct

if TYPE_CHECKING:
    from .image import EnclaveImage
    from .region import Region


class Field(NamedTuple):
    """A named value that differs."""

    name: str
    a: object
    b: object


@dataclass(frozen=True)
class Difference:
    """All that differs between two images and their SIGSTRUCTs."""

    secs: tuple[Field, ...] = ()
    only_a: tuple[Extent, ...] = ()
    only_b: tuple[Extent, ...] = ()
    order: bool = False  # the same extents, added in another order
    page: PageDifference | None = None
    dynamic_a: tuple[Extent, ...] = ()  # EAUG's, in one image alone
    dynamic_b: tuple[Extent, ...] = ()
    sigstruct: tuple[Field, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.in_image or self.sigstruct)

    @property
    def in_image(self) -> bool:
        """The images differ, the SIGSTRUCTs aside."""
        return bool(self.secs or self.page or self.dynamic_a or self.dynamic_b)

    @property
    def in_mrenclave(self) -> bool:
        """The images have different values of MRENCLAVE, in any scheme."""
        return bool(self.secs or (self.page and self.page.in_mrenclave))


def difference(
    a: EnclaveImage,
    b: EnclaveImage,
    sigstruct_a: Sigstruct | None = None,
    sigstruct_b: Sigstruct | None = None,
) -> Difference:
    """Compare two images, and their SIGSTRUCTs."""
    secs = [
        Field(name, getattr(a, name), getattr(b, name))
        for name in ("size", "ssa_frame_size")
        if getattr(a, name) != getattr(b, name)
    ]
    extents_a, extents_b = list(extents(a.regions)), list(extents(b.regions))
    only_a, only_b = _without(extents_a, extents_b), _without(extents_b, extents_a)
    order = not only_a and not only_b and [e.key for e in extents_a] != [e.key for e in extents_b]
    dynamic_a, dynamic_b = list(extents(a.dynamic)), list(extents(b.dynamic))
    return Difference(
        secs=tuple(secs),
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        order=order,
        page=first_page(a.regions, b.regions),
        dynamic_a=tuple(_without(dynamic_a, dynamic_b)),
        dynamic_b=tuple(_without(dynamic_b, dynamic_a)),
        sigstruct=tuple(sigstruct_difference(sigstruct_a, sigstruct_b)),
    )


def sigstruct_difference(a: Sigstruct | None, b: Sigstruct | None) -> Iterator[Field]:
    """The fields that differ, in the order of the class; ``signed`` where one is missing."""
    if a is None or b is None:
        if a is not b:
            yield Field("signed", a is not None, b is not None)
        return
    for name in (field.name for field in fields(Sigstruct)):
        if getattr(a, name) != getattr(b, name):
            yield Field(name, getattr(a, name), getattr(b, name))


def section_of(image: EnclaveImage | None, offset: int) -> str | None:
    """The ELF section that stands at ``offset`` in the enclave, where the image's file tells."""
    sections = () if image is None else image.details.get("sections", ())
    return next((name for name, start, size in sections if start <= offset < start + size), None)


def extents(regions: Iterable[Region]) -> Iterator[Extent]:
    """Regions joined where one goes on where the one before it ends: how images were cut is no difference."""
    open_: Extent | None = None
    for region in regions:
        if open_ is not None:
            goes_on = open_.offset + open_.pages * PAGE_SIZE == region.offset
            if goes_on and (open_.flags, open_.chunks) == (region.flags, region.chunks):
                open_ = open_._replace(pages=open_.pages + region.page_count)
                continue
            yield open_
        open_ = Extent(region.offset, region.page_count, region.flags, region.chunks, region.label)
    if open_ is not None:
        yield open_


def _without(these: Iterable[Extent], others: Iterable[Extent]) -> list[Extent]:
    known = {extent.key for extent in others}
    return [extent for extent in these if extent.key not in known]
