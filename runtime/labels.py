"""Whose a region is: said by the program manifest of a function's image, for people.

Whoever shows regions shows the labels; nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..shm.errors import ImageFormatError
from . import bundle as tables
from . import program as manifests
from .bundle import Bundle
from .manifests import HEADER
from .program import BundleAt, Program
from .region import EXECUTE, Region


def program_of(regions: Sequence[Region]) -> Program | None:
    """The program manifest in the first region, if it stands at offset 0 and begins with the magic.

    Raises ImageFormatError if it is damaged.
    """
    if not regions or regions[0].offset != 0 or regions[0].content is None:
        return None
    head = memoryview(regions[0].content).cast("B")
    if bytes(head[: len(manifests.MAGIC)]) != manifests.MAGIC:
        return None
    return manifests.decode(head)


def labelled(regions: Sequence[Region]) -> list[Region]:
    """The same regions with labels; as they are where there is no manifest that can be read."""
    try:
        program = program_of(regions)
    except ImageFormatError:
        program = None
    if program is None:
        return list(regions)
    return [replace(region, label=_label(region, program)) for region in regions]


def _label(region: Region, program: Program) -> str:
    for bundle in program.bundles:
        if bundle.offset <= region.offset < bundle.offset + bundle.size:
            return f"{bundle.name} {bundle.version}" + (", native code" if region.flags & EXECUTE else "")
    for name, extent in (("data", program.data), ("heap", program.heap)):
        if extent is not None and extent[0] == region.offset:
            return name
    if region.offset == 0:
        return "program manifest"
    return "function" + (", native code" if region.flags & EXECUTE else "")


def bundles_of(regions: Sequence[Region], program: Program) -> Iterator[tuple[BundleAt, Bundle]]:
    """The distributions in an image, and their tables of contents. Raises ImageFormatError."""
    starts = {region.offset: region for region in regions}
    for at in program.bundles:
        region = starts.get(at.offset)
        if region is None or region.content is None:
            raise ImageFormatError(
                f"distribution {at.name}", offset=at.offset, expected="a region with its files", found="none"
            )
        head = memoryview(region.content).cast("B")
        yield at, tables.decode(head[: tables.peek_length(head[: HEADER.size])])


def distribution_facts(regions: Sequence[Region]) -> list[dict[str, Any]]:
    """Name, version, files and pages of each distribution in an image; none where that cannot be read."""
    try:
        program = program_of(regions)
        found = [] if program is None else list(bundles_of(regions, program))
    except ImageFormatError:
        return []
    facts = []
    for at, table in found:
        own = [region for region in regions if at.offset <= region.offset < at.offset + at.size]
        facts.append(
            {
                "name": at.name,
                "version": at.version,
                "files": len(table.files),
                "native_files": len(table.libraries),
                "pages": sum(region.page_count for region in own),
                "code_pages": sum(region.page_count for region in own if region.flags & EXECUTE),
            }
        )
    return facts
