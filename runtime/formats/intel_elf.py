"""Enclaves of the Intel SDK: signed ELF shared objects (``*.signed.so``).

What the SDK's loader adds, in its order::

    ECREATE        SIZE is enclave_size, or ELRANGE's size; with ELRANGE all offsets grow
    PT_LOADs       in the order of their headers, from the patched file; relocated pages get W
    inner PT_LOADs of a shared object inside the file, where an extend entry names one
    layout         heap, thread contexts, and groups that repeat them

Each metadata block describes an enclave of its own from the same segments, for another generation of loaders.
The first is the image, the others are its variants.

Source: intel/linux-sgx, ``build_image`` and ``build_sections`` in ``psw/urts/loader.cpp``, and what its
signing tool hashes, ``sdk/sign_tool/SignTool/enclave_creator_sign.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ...shm.errors import ImageFormatError
from ...shm.layout import PAGE_SIZE
from ..region import EXECUTE, READ, TYPE_REG, WRITE, Region
from ..sizes import pages_of
from .elf import DT_TEXTREL, PF_R, PF_W, PF_X, PT_TLS, Elf, Segment, has_section, map_file
from .intel_layout import LayoutLoader, loaded_entries
from .intel_metadata import Metadata, read_blocks
from .intel_records import SECTION
from .intel_regions import Budget, Bytes, FileImage, PageNumbers, SegmentLoader, relocated_pages

if TYPE_CHECKING:
    from ..backing import Backing
    from ..image import EnclaveImage

ENCLU: Final = b"\x0f\x01\xd7"
FILLS_A_PAGE: Final = (1, 3)  # the metadata version whose loader adds a page behind some segments
MAX_CODE: Final = 1 << 28  # bytes that are searched for ENCLU
_WINDOW: Final = 1 << 20


def is_it(file: BinaryIO, name: str) -> bool:
    """Whether an ELF file is an enclave of the Intel SDK: it has a section ``.note.sgxmeta``."""
    return has_section(file, name, SECTION)


def load(file: BinaryIO, name: str) -> EnclaveImage:
    """The image of the file's first metadata block; those of the others are its ``variants``.

    Raises ImageFormatError with file, structure, offset, expected and found.
    """
    data, backing = map_file(file, name)
    elf = Elf(data, name)
    try:
        blocks = read_blocks(elf)
        relocated = relocated_pages(elf)
        common = {
            "format": "intel-sdk-elf",
            "metadata_versions": [_version(metadata) for metadata in blocks],
            "textrel": DT_TEXTREL in elf.dynamic,
        }
        budget = Budget(elf)
        regions = [_regions(metadata, relocated, budget) for metadata in blocks]
        # Only now, when the file is known to be sound, is its code worth a pass.
        common["simulation"] = _is_simulation(elf)
        images: list[EnclaveImage] = []
        for metadata, rows in reversed(list(zip(blocks, regions, strict=True))):
            variants = images[::-1] if metadata is blocks[0] else ()
            images.append(_image(metadata, rows, common, backing, variants))
    except ImageFormatError as error:
        if error.file is not None:
            raise
        raise ImageFormatError(
            error.what, file=name, offset=error.offset, expected=error.expected, found=error.found
        ) from None
    return images[-1]


def _version(metadata: Metadata) -> str:
    return "{}.{}".format(*metadata.version)


def _image(
    metadata: Metadata,
    regions: Sequence[Region],
    common: dict[str, Any],
    backing: Backing,
    variants: Sequence[EnclaveImage],
) -> EnclaveImage:
    from ..image import EnclaveImage

    fields, elrange = metadata.fields, metadata.elrange
    shift = 0 if elrange is None else elrange.image_address - elrange.start_address
    return EnclaveImage(
        regions,
        size=metadata.enclave_size if elrange is None else elrange.size,
        ssa_frame_size=fields["ssa_frame_size"],
        sigstructs=[] if metadata.sigstruct is None else [metadata.sigstruct],
        backing=backing,
        details={
            "format": common["format"],
            "metadata_version": _version(metadata),
            **common,
            "tcs_policy": fields["tcs_policy"],
            "tcs_min_pool": fields["tcs_min_pool"],
            "ssa_frame_size": fields["ssa_frame_size"],
            "misc_select": fields["desired_misc_select"],
            "enclave_size": metadata.enclave_size,
            "attributes": {"flags": fields["attributes_flags"], "xfrm": fields["attributes_xfrm"]},
            "elrange": None if elrange is None else elrange._asdict(),
            "sections": [[name, at + shift, size] for name, at, size in metadata.elf.loaded_sections()],
        },
        variants=variants,
    )


def _regions(metadata: Metadata, relocated: PageNumbers, budget: Budget) -> list[Region]:
    """All that one block says is added, in order."""
    shift = 0 if metadata.elrange is None else metadata.elrange.image_address - metadata.elrange.start_address
    image = FileImage(metadata, budget)
    loader = SegmentLoader(image, relocated, shift, budget)
    regions = list(_segments(metadata, loader, budget))
    layout = LayoutLoader(metadata, shift, budget)
    for each in loaded_entries(metadata, budget):
        regions += layout.regions(each)
    return regions


def _segments(metadata: Metadata, loader: SegmentLoader, budget: Budget) -> Iterator[Region]:
    last: Segment | None = None
    for segment in metadata.elf.loads:
        yield from _page_behind(metadata, last, segment, budget)
        if segment.vaddr > (0 if last is None else last.vaddr):
            last = segment
        yield from _segment(metadata, metadata.elf, segment, 0, loader)
    yield from _page_behind(metadata, last, None, budget)
    if metadata.shared_object is not None:
        place = metadata.shared_object
        inner = _inner(metadata, place.file_offset, place.size)
        for segment in inner.loads:
            yield from _segment(metadata, inner, segment, place.mem_offset, loader)


def _segment(
    metadata: Metadata, elf: Elf, segment: Segment, mem_offset: int, loader: SegmentLoader
) -> Iterator[Region]:
    """One PT_LOAD. It may be anywhere in the image and anywhere in the file, also not on a page."""
    flags = _flags(elf, segment)
    rva, size = segment.vaddr + mem_offset, max(segment.memsz, segment.filesz)
    if rva + size > metadata.enclave_size:
        expected = f"inside the enclave's {metadata.enclave_size:#x} bytes"
        raise elf.error(f"segment {segment.number}", None, expected, f"{rva:#x} + {size:#x}")
    raw = Bytes(elf.base + segment.offset, segment.filesz)
    inner = "" if elf is metadata.elf else "inner "
    yield from loader.regions(
        raw, rva, segment.memsz, flags, f"{inner}PT_LOAD {segment.number} {_rwx(flags)}"
    )


def _flags(elf: Elf, segment: Segment) -> int:
    flags = TYPE_REG
    for bit, flag in ((PF_R, READ), (PF_W, WRITE), (PF_X, EXECUTE)):
        if segment.flags & bit:
            flags |= flag
    if flags == TYPE_REG:
        raise elf.error(f"segment {segment.number}'s flags", None, "R, W or X", hex(segment.flags))
    return flags


def _rwx(flags: int) -> str:
    return (
        "(" + " ".join(name for bit, name in ((READ, "R"), (WRITE, "W"), (EXECUTE, "X")) if flags & bit) + ")"
    )


def _page_behind(
    metadata: Metadata, last: Segment | None, following: Segment | None, budget: Budget
) -> Iterator[Region]:
    """Version 1.3 alone: a zero page behind the highest segment so far.

    Its loader rounds a segment's size up before it adds the address, and so takes one that does not begin on
    a page for a page longer than it is. (It knows no ELRANGE, so there is nothing to add to its offsets.)
    """
    if metadata.version != FILLS_A_PAGE or last is None:
        return
    end = _page_end(last.vaddr + last.memsz)
    if end >= _page_end(_page_end(last.memsz) + last.vaddr):
        return
    if following is not None and end >= following.vaddr - following.vaddr % PAGE_SIZE:
        return
    budget.take("regions", 1)
    flags = _flags(metadata.elf, last)
    yield Region(end, 1, flags, label=f"PT_LOAD {last.number} {_rwx(flags)}, page behind it")


def _page_end(offset: int) -> int:
    return pages_of(offset) * PAGE_SIZE


def _inner(metadata: Metadata, offset: int, size: int) -> Elf:
    """The shared object inside the file that an extend entry names.

    Its headers are read as they stand in the file, so no patch may touch it. Its loader takes PT_TLS for one
    more segment, whose pages it would then add a second time.
    """
    elf = metadata.elf
    inner = Elf(elf.slice("inner shared object", offset, size), elf.name, offset)
    for number, patch in enumerate(metadata.patches):
        if patch.size and patch.destination < offset + size and offset < patch.destination + patch.size:
            expected = "a destination outside the inner shared object"
            raise elf.error(f"patch {number}", offset, expected, f"{patch.destination:#x} + {patch.size:#x}")
    if any(segment.type == PT_TLS for segment in inner.segments):
        raise inner.error("inner shared object", 0, "no PT_TLS, whose pages would be added twice", "one")
    return inner


def _is_simulation(elf: Elf) -> bool | None:
    """Whether this is a build for simulation: its code has no ENCLU, the instruction that leaves an enclave.

    None where that is not known: the code is larger than any that one would wait for.
    """
    done = 0
    left = MAX_CODE
    for segment in sorted(elf.loads, key=lambda segment: segment.offset):
        if not segment.flags & PF_X:
            continue
        end = segment.offset + segment.filesz
        # Segments may share bytes of the file: each byte is looked at once, whatever the headers say.
        for at in range(max(done, segment.offset), end, _WINDOW):
            if left <= 0:
                return None
            if ENCLU in bytes(elf.data[at : min(at + _WINDOW + len(ENCLU) - 1, end)]):
                return False
            left -= _WINDOW
        done = max(done, end)
    return True
