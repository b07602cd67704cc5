"""``diff``: why two enclaves differ. Nothing is measured: the pages themselves are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import typer

from ..difference import Difference, Field, difference, section_of, sigstruct_difference
from ..inspection import access, measured
from ..page_difference import Extent, PageDifference
from . import options
from .common import OK, REFUSED, InputError, print_facts, print_json
from .inspecting import print_table
from .subject import Subject, subject

SHOWN_EXTENTS: Final = 24  # rows of a table; --json has all
SHOWN_BYTES: Final = 16  # of a long field


def diff(a: options.InspectedFile, b: options.InspectedFile, json: options.Json = False) -> None:
    """Why two enclave files, or two SIGSTRUCTs, differ: SECS, regions, the first page, SIGSTRUCT.

    Exits with 0 if they say the same, 1 if they differ, 2 if one cannot be read. Of a file and a SIGSTRUCT
    alone the SIGSTRUCTs are compared.
    """
    with subject(a) as first, subject(b) as second:
        found = _compare(first, second)
    if json:
        print_json(_row(found, first, second))
    else:
        _print(found, first, second)
    raise typer.Exit(REFUSED if found else OK)


def _compare(a: Subject, b: Subject) -> Difference:
    if a.image is not None and b.image is not None:
        return difference(a.image, b.image, a.sigstruct, b.sigstruct)
    for each in (a, b):
        if each.sigstruct is None:
            raise InputError(f"{each.file}: it is unsigned, so there is nothing to compare a SIGSTRUCT with")
    return Difference(sigstruct=tuple(sigstruct_difference(a.sigstruct, b.sigstruct)))


def _row(found: Difference, a: Subject, b: Subject) -> dict[str, Any]:
    return {
        "a": str(a.file),
        "b": str(b.file),
        "same": not found,
        # None: one of them is a SIGSTRUCT alone, so no pages were compared.
        "same_mrenclave": None if a.image is None or b.image is None else not found.in_mrenclave,
        "secs": _fields(found.secs),
        "regions_only_a": [_extent(each) for each in found.only_a],
        "regions_only_b": [_extent(each) for each in found.only_b],
        "order_differs": found.order,
        "page": None if found.page is None else _page(found.page, a, b),
        "dynamic_only_a": [_extent(each) for each in found.dynamic_a],
        "dynamic_only_b": [_extent(each) for each in found.dynamic_b],
        "sigstruct": _fields(found.sigstruct),
    }


def _fields(fields: Sequence[Field]) -> dict[str, dict[str, object]]:
    return {field.name: {"a": _plain(field.a), "b": _plain(field.b)} for field in fields}


def _plain(value: object) -> object:
    """Bytes as digits; numbers of 64 bits as text, which no reader of JSON rounds."""
    if isinstance(value, bytes):
        return value.hex()
    return hex(value) if isinstance(value, int) and value >= 1 << 53 else value


def _extent(extent: Extent) -> dict[str, Any]:
    return {
        "offset": extent.offset,
        "pages": extent.pages,
        "flags": extent.flags,
        "access": access(extent.flags),
        "measured": measured(extent.chunks),
        "label": extent.label,
    }


def _page(page: PageDifference, a: Subject, b: Subject) -> dict[str, Any]:
    def side(extent: Extent | None, subject: Subject) -> dict[str, Any] | None:
        if extent is None:
            return None
        return _extent(extent) | {"section": section_of(subject.image, extent.offset + (page.at or 0))}

    return {
        **asdict(page),
        "a": side(page.a, a),
        "b": side(page.b, b),
        "bytes_a": page.bytes_a.hex(),
        "bytes_b": page.bytes_b.hex(),
    }


def _print(found: Difference, a: Subject, b: Subject) -> None:
    print_facts({"A": a.file, "B": b.file, **_verdict(found, a, b)}, "differ" if found else "the same")
    if found.secs:
        print()
        print_facts(_texts(found.secs), "SECS")
    for title, extents in (
        ("regions of A that B has not so", found.only_a),
        ("regions of B that A has not so", found.only_b),
        ("EAUG regions of A alone", found.dynamic_a),
        ("EAUG regions of B alone", found.dynamic_b),
    ):
        if extents:
            print(f"\n{title}", end="")
            rows = [
                [f"{each.offset:#x}", str(each.pages), access(each.flags), measured(each.chunks), each.label]
                for each in extents[:SHOWN_EXTENTS]
            ]
            columns = ("offset", "pages", "flags", "measured", "from")
            print_table(columns, rows, len(extents) - SHOWN_EXTENTS, "of them")
    if found.page is not None:
        print()
        print_facts(
            _page_texts(found.page, a, b), f"first differing page: number {found.page.number} in EADD order"
        )
    if found.sigstruct:
        print()
        print_facts(_texts(found.sigstruct), "SIGSTRUCT fields that differ")


def _verdict(found: Difference, a: Subject, b: Subject) -> Mapping[str, object]:
    texts: dict[str, object] = {}
    if a.image is not None and b.image is not None:
        texts["MRENCLAVE"] = "differs" if found.in_mrenclave else "the same"
        if found.order:
            texts["order"] = "the same regions, added in another order"
    texts["SIGSTRUCT"] = "differs" if found.sigstruct else "the same"
    if a.sigstruct is b.sigstruct is None:
        texts["SIGSTRUCT"] = "none"
    return texts


def _texts(fields: Sequence[Field]) -> dict[str, object]:
    return {field.name: f"A {_text(field.a)}  B {_text(field.b)}" for field in fields}


def _text(value: object) -> str:
    if isinstance(value, bytes):
        shown = value[:SHOWN_BYTES].hex() if len(value) > 2 * SHOWN_BYTES else value.hex()
        return shown if len(value) <= 2 * SHOWN_BYTES else f"{shown}… ({len(value)} bytes)"
    return str(value) if isinstance(value, bool) or not isinstance(value, int) else f"{value:#x}"


def _page_texts(page: PageDifference, a: Subject, b: Subject) -> dict[str, object]:
    texts: dict[str, object] = {"what": page.what}
    if page.what == "bytes":
        measured_too = "measured" if page.in_mrenclave else "not measured: MRENCLAVE is the same"
        texts["what"] = f"{page.run} bytes at {page.at:#x} in the page, {measured_too}"
    for side, of, extent, differing in (
        ("A", a, page.a, page.bytes_a),
        ("B", b, page.b, page.bytes_b),
    ):
        if extent is None:
            texts[side] = "no such page: the image ends before it"
            continue
        parts = [f"offset {extent.offset:#x}", access(extent.flags), f"measured {measured(extent.chunks)}"]
        section = section_of(of.image, extent.offset + (page.at or 0))
        where = [extent.label, f"section {section}" if section else ""]
        texts[side] = ", ".join([*parts, *filter(None, where)])
        if differing:
            texts[f"{side} holds"] = differing.hex(" ") + (" …" if page.run > len(differing) else "")
    return texts
