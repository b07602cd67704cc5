"""``inspect``: what stands in an enclave file and in its SIGSTRUCT. Nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..inspection import image_facts, sigstruct_facts
from . import options
from .common import console, print_facts, print_json, printable
from .subject import subject

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_REGIONS: Final = 48  # rows of a table; --json has all
SHOWN_TCS: Final = 16
SHOWN_CHARACTERS: Final = 300  # of a detail

REGION_COLUMNS: Final = ("offset", "pages", "flags", "measured", "holds", "from")
TCS_COLUMNS: Final = (
    *("offset", "FLAGS", "OSSA", "CSSA", "NSSA", "OENTRY"),
    *("OFSBASGX", "OGSBASGX", "FSLIMIT", "GSLIMIT"),
)
DISTRIBUTION_COLUMNS: Final = ("distribution", "version", "files", "pages", "native")
_TCS_NUMBERS: Final = tuple(name.lower() for name in TCS_COLUMNS)


def inspect(
    file: options.InspectedFile, sigstruct: options.SigstructFile = None, json: options.Json = False
) -> None:
    """What an enclave file, or a SIGSTRUCT alone, says: SECS, regions, TCS pages, SIGSTRUCT.

    No page is measured: apart from the signature, what it shows is what the file claims.
    """
    with subject(file, sigstruct) as found:
        signed = None if found.sigstruct is None else sigstruct_facts(found.sigstruct)
        facts = {"sigstruct": signed} if found.image is None else image_facts(found.image, found.sigstruct)
    facts = {"file": str(file), "format": found.format, **facts}
    if json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: Mapping[str, Any]) -> None:
    if "secs" in facts:
        print_facts({"format": facts["format"], **_image(facts)}, facts["file"])
        _tables(facts)
        for variant in facts.get("variants", ()):
            print()
            version = variant["details"].get("metadata_version", "another")
            print_facts(_variant(variant, facts), f"metadata {version}")
        print()
    if facts["sigstruct"] is None:
        print_facts({"SIGSTRUCT": "none"}, "unsigned")
    else:
        title = "SIGSTRUCT" if "secs" in facts else f"{facts['file']}: SIGSTRUCT"
        print_facts(sigstruct_texts(facts["sigstruct"]), title)


def _image(facts: Mapping[str, Any]) -> dict[str, object]:
    secs, pages = facts["secs"], facts["pages"]
    by_eaug = f", {pages['by_eaug']} by EAUG" if pages["by_eaug"] else ""
    texts = {
        "SECS.SIZE": f"{secs['size']:#x}",
        "SECS.SSAFRAMESIZE": f"{secs['ssa_frame_size']} pages",
        "pages": f"{pages['added']} added, {pages['measured']} measured{by_eaug}",
        "regions": len(facts["regions"]),
        "TCS pages": sum(tcs["pages"] for tcs in facts["tcs"]),
    }
    shown = {name: value for name, value in facts["details"].items() if name != "sections"}  # --json has them
    return texts | {name.replace("_", " "): _short(value) for name, value in shown.items()}


def _variant(variant: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, object]:
    """Another metadata block: what it says, and where that is not what the first says."""
    texts = _image(variant)
    same = all(variant[name] == first[name] for name in ("secs", "regions", "tcs"))
    texts["pages as above"] = "yes" if same else "no: --json has them, enturbo measure compares the values"
    texts["SIGSTRUCT as above"] = "yes" if variant["sigstruct"] == first["sigstruct"] else "no: --json has it"
    return texts


def _tables(facts: Mapping[str, Any]) -> None:
    regions = facts["regions"] + facts["dynamic"]
    rows = (
        (
            f"{region['offset']:#x}",
            str(region["pages"]),
            region["access"],
            region["measured"] if number < len(facts["regions"]) else "EAUG",
            region["source"],
            region["label"],
        )
        for number, region in enumerate(regions[:SHOWN_REGIONS])
    )
    print_table(REGION_COLUMNS, rows, len(regions) - SHOWN_REGIONS, "regions")
    if facts.get("distributions"):
        distributions = (
            (each["name"], each["version"], str(each["files"]), str(each["pages"]), str(each["code_pages"]))
            for each in facts["distributions"]
        )
        print_table(DISTRIBUTION_COLUMNS, distributions, 0, "distributions")
    if facts["tcs"]:
        tcs = [[f"{each[name]:#x}" for name in _TCS_NUMBERS] for each in facts["tcs"][:SHOWN_TCS]]
        print_table(TCS_COLUMNS, tcs, len(facts["tcs"]) - SHOWN_TCS, "TCS pages")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left_out: int, what: str) -> None:
    """A plain table with numbers to the right, and how many rows it leaves out."""
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(
        box=None, padding=(0, 1 if len(columns) > 6 else 2, 0, 0), pad_edge=False, header_style="cyan"
    )
    for column in columns:
        right = column in ("offset", "pages", "files", "native") or column.isupper()
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    out = console()
    out.print()
    out.print(table)
    if left_out > 0:
        out.print(f"… and {left_out} more {what}; --json has all")


def sigstruct_texts(facts: Mapping[str, Any]) -> dict[str, object]:
    """A SIGSTRUCT's facts for people; numbers of 384 bytes are left to --json."""
    date = facts["date"]
    readings = [
        f"{date[way]} ({text})"
        for way, text in (("bcd", "BCD yyyymmdd"), ("binary", "u16 year, u8 month, u8 day"))
        if date[way] is not None
    ]
    flags, mask = facts["attributes"], facts["attributemask"]
    checks = facts["checks"]
    return {
        "ENCLAVEHASH": facts["enclavehash"],
        "MRSIGNER": facts["mrsigner"],
        "product id": facts["product_id"],
        "svn": facts["svn"],
        "vendor": f"{facts['vendor']:#x} ({facts['vendor_name']})",
        "type": f"{facts['type']:#x} ({'debug' if facts['debug_type'] else 'production'})",
        "date": f"{date['stored']:#010x}: " + (", or ".join(readings) or "no date"),
        "hardware version": f"{facts['hardware_version']:#x}",
        "ATTRIBUTES.FLAGS": _bits(flags["flags"], flags["flag_names"]),
        "FLAGS mask": _mask(mask["flags"], mask["flags_open"]),
        "ATTRIBUTES.XFRM": _bits(flags["xfrm"], flags["xfrm_names"]),
        "XFRM mask": _mask(mask["xfrm"], mask["xfrm_open"]),
        "MISCSELECT": _bits(f"{facts['miscselect']['bits']:#x}", facts["miscselect"]["names"]),
        "MISC mask": f"{facts['miscmask']:#x}",
        "CET attributes": f"{facts['cet_attributes']:#x}, mask {facts['cet_mask']:#x}",
        "family id": facts["family_id"],
        "extended product id": facts["extended_product_id"],
        "scheme": facts["scheme"],
        **{name: "holds" if checks[name.lower()] else "DOES NOT HOLD" for name in ("signature", "Q1", "Q2")},
    }


def _bits(text: str, names: Sequence[str]) -> str:
    return f"{text} ({', '.join(names)})" if names else text


def _mask(text: str, open_: Sequence[str]) -> str:
    return f"{text} (leaves open {', '.join(open_)})" if open_ else text


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_short, value)) or "none"
    else:
        known: dict[object, str] = {True: "yes", False: "no", None: "none"}
        text = known[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
