"""What stands in an enclave and in its SIGSTRUCT, as plain values: what ``enturbo inspect`` shows.

Of the pages' bytes only TCS pages are looked at, so an image of thirty million pages is told at once, as a
small one is. Everything comes from a file that nobody has verified: it is to be read, not believed.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..shm.errors import SignatureError
from ..shm.layout import ALL_CHUNKS, PAGE_SIZE, Record
from . import rsa3
from .attributes import ENTURBO_BITS
from .labels import distribution_facts
from .region import EXECUTE, READ, TYPE_REG, TYPE_TCS, WRITE

if TYPE_CHECKING:
    from .image import EnclaveImage
    from .region import Region
    from .sigstruct import Sigstruct

# Intel SDM Vol. 3D, "Thread Control Structure (TCS)"; STATE, AEP and PREVSSP belong to the processor.
TCS: Final = Record(
    "TCS",
    PAGE_SIZE,
    (
        ("state", "Q", 0),
        ("flags", "Q", 8),  # bit 0 DBGOPTIN, bit 1 AEXNOTIFY
        ("ossa", "Q", 16),
        ("cssa", "I", 24),
        ("nssa", "I", 28),
        ("oentry", "Q", 32),
        ("aep", "Q", 40),
        ("ofsbasgx", "Q", 48),
        ("ogsbasgx", "Q", 56),
        ("fslimit", "I", 64),
        ("gslimit", "I", 68),
        ("ocetssa", "Q", 72),
        ("prevssp", "Q", 80),
    ),
)
_TCS_END: Final = 88

# SDM Vol. 3D, "ATTRIBUTES Structure"; XFRM has XCR0's bits (Vol. 1, "XSAVE-Supported Features").
FLAG_NAMES: Final = {
    0: "INIT",
    1: "DEBUG",
    2: "MODE64BIT",
    4: "PROVISIONKEY",
    5: "EINITTOKENKEY",
    6: "CET",
    7: "KSS",
    10: "AEXNOTIFY",
}
XFRM_NAMES: Final = {
    0: "x87",
    1: "SSE",
    2: "AVX",
    3: "BNDREGS",
    4: "BNDCSR",
    5: "opmask",
    6: "ZMM_Hi256",
    7: "Hi16_ZMM",
    8: "PT",
    9: "PKRU",
    11: "CET_U",
    12: "CET_S",
    17: "XTILECFG",
    18: "XTILEDATA",
}
MISC_NAMES: Final = {0: "EXINFO", 1: "CPINFO"}
VENDORS: Final = {0: "none", 0x8086: "Intel"}
DEBUG_TYPE: Final = 1 << 31


def image_facts(image: EnclaveImage, sigstruct: Sigstruct | None = None) -> dict[str, Any]:
    """SECS, pages, regions, TCS pages and what the format says besides, of an image and of its variants.

    ``sigstruct``: the one to tell about, else the image's own.
    """
    own = sigstruct or next(iter(image.sigstructs), None)
    facts: dict[str, Any] = {
        "secs": {"size": image.size, "ssa_frame_size": image.ssa_frame_size},
        "pages": {
            "added": image.page_count,
            "measured": image.measured_pages,
            "by_eaug": image.dynamic_pages,
        },
        "regions": [region_facts(region) for region in image.regions],
        "dynamic": [region_facts(region) for region in image.dynamic],
        "tcs": [facts for region in image.regions for facts in tcs_facts(region)],
        "distributions": distribution_facts(image.regions),
        "details": dict(image.details),
        "sigstruct": None if own is None else sigstruct_facts(own),
    }
    if image.variants:
        facts["variants"] = [image_facts(variant) for variant in image.variants]
    return facts


def region_facts(region: Region) -> dict[str, Any]:
    """A region without its bytes."""
    return {
        "offset": region.offset,
        "pages": region.page_count,
        "flags": region.flags,
        "access": access(region.flags),
        "measured": measured(region.chunks),
        "source": source(region),
        "label": region.label,
    }


def access(flags: int) -> str:
    """SECINFO.FLAGS for people: ``R-X``, ``TCS``."""
    if flags & ~(READ | WRITE | EXECUTE) == TYPE_TCS:
        return "TCS"
    letters = zip("RWX", (READ, WRITE, EXECUTE), strict=True)
    text = "".join(letter if flags & bit else "-" for letter, bit in letters)
    return text if flags & ~(READ | WRITE | EXECUTE) == TYPE_REG else f"{text} type {flags >> 8:#x}"


def measured(chunks: int) -> str:
    """Which of a page's sixteen chunks are measured: ``all``, ``none`` or their mask."""
    return {ALL_CHUNKS: "all", 0: "none"}.get(chunks, f"{chunks:#06x}")


def source(region: Region) -> str:
    """What a region's pages hold: ``content``, ``zeros`` or the u32 that fills them."""
    if region.content is not None:
        return "content"
    return f"fill {region.fill:#010x}" if region.fill else "zeros"


def tcs_facts(region: Region) -> Iterator[dict[str, Any]]:
    """The TCS pages of a region; pages without content are told at once, as ``pages`` of them."""
    if not region.flags & TYPE_TCS:
        return
    content = memoryview(b"" if region.content is None else region.content).cast("B")
    told = min(-(-len(content) // PAGE_SIZE), region.page_count)
    for page in range(told):
        head = bytes(content[page * PAGE_SIZE : page * PAGE_SIZE + _TCS_END]).ljust(_TCS_END, b"\0")
        yield _tcs(region.offset + page * PAGE_SIZE, 1, head)
    if told < region.page_count:
        head = region.fill.to_bytes(4, "little") * (_TCS_END // 4)
        yield _tcs(region.offset + told * PAGE_SIZE, region.page_count - told, head)


def _tcs(offset: int, pages: int, head: bytes) -> dict[str, Any]:
    fields = {
        field.name: TCS.struct(field.name).unpack_from(head, field.offset)[0]
        for field in TCS.fields
        if field.name not in ("state", "aep", "prevssp")
    }
    return {"offset": offset, "pages": pages, **fields}


def sigstruct_facts(sigstruct: Sigstruct) -> dict[str, Any]:
    """All fields; numbers of 384 bytes and byte strings as hexadecimal digits in the order of the file."""
    return {
        "enclavehash": sigstruct.enclavehash.hex(),
        "mrsigner": sigstruct.mrsigner.hex(),
        "product_id": sigstruct.product_id,
        "svn": sigstruct.svn,
        "type": sigstruct.type,
        "debug_type": bool(sigstruct.type & DEBUG_TYPE),
        "vendor": sigstruct.vendor,
        "vendor_name": VENDORS.get(sigstruct.vendor, "other"),
        "date": dates(sigstruct.date),
        "hardware_version": sigstruct.hardware_version,
        "attributes": {
            "flags": f"{sigstruct.attributes_flags:#x}",  # 64 bits: more than JSON's readers may keep
            "flag_names": names(sigstruct.attributes_flags & ~ENTURBO_BITS, FLAG_NAMES),
            "xfrm": f"{sigstruct.attributes_xfrm:#x}",
            "xfrm_names": names(sigstruct.attributes_xfrm, XFRM_NAMES),
        },
        "attributemask": {
            "flags": f"{sigstruct.attributemask_flags:#x}",
            "flags_open": left_open(sigstruct.attributemask_flags, FLAG_NAMES),
            "xfrm": f"{sigstruct.attributemask_xfrm:#x}",
            "xfrm_open": left_open(sigstruct.attributemask_xfrm, XFRM_NAMES),
        },
        "scheme": _scheme(sigstruct),
        "miscselect": {"bits": sigstruct.miscselect, "names": names(sigstruct.miscselect, MISC_NAMES)},
        "miscmask": sigstruct.miscmask,
        "cet_attributes": sigstruct.cet_attributes,
        "cet_mask": sigstruct.cet_mask,
        "family_id": sigstruct.family_id.hex(),
        "extended_product_id": sigstruct.extended_product_id.hex(),
        "exponent": rsa3.EXPONENT,
        "modulus": sigstruct.modulus.hex(),
        "signature": sigstruct.signature.hex(),
        "q1": sigstruct.q1.hex(),
        "q2": sigstruct.q2.hex(),
        "checks": signature_checks(sigstruct),
    }


def _scheme(sigstruct: Sigstruct) -> str:
    try:
        measurement = sigstruct.measurement
    except SignatureError as error:
        return f"none: {error}"
    if measurement.scheme == "sgx":
        return "sgx"
    return f"enturbo ({measurement.domains} domains, {measurement.block} pages a block)"


def names(bits: int, known: Mapping[int, str]) -> list[str]:
    """The names of the bits that are set, ascending; one without a name is ``bit 17``."""
    return [known.get(bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


def left_open(mask: int, known: Mapping[int, str]) -> list[str]:
    """The names of the bits that a mask lets the loader choose."""
    return [name for bit, name in known.items() if not mask >> bit & 1]


def dates(date: int) -> dict[str, Any]:
    """DATE as stored, and as each of the two conventions reads it (ISO; None: no such date).

    ``bcd``: digits yyyymmdd, as the SDM says and Intel's signer writes; ``binary``: u16 year, u8 month,
    u8 day, as Gramine's signer writes.
    """
    digits = f"{date:08x}"
    bcd = _iso(*map(int, (digits[:4], digits[4:6], digits[6:]))) if digits.isdecimal() else None
    return {
        "stored": date,
        "bcd": bcd,
        "binary": _iso(date & 0xFFFF, date >> 16 & 0xFF, date >> 24),
    }


def _iso(year: int, month: int, day: int) -> str | None:
    try:
        return datetime.date(year, month, day).isoformat()
    except ValueError:
        return None


def signature_checks(sigstruct: Sigstruct) -> dict[str, bool]:
    """What EINIT checks with the key inside, one by one; ``Sigstruct.verify`` asks for all three."""
    modulus, signature, q1, q2 = (
        int.from_bytes(number, "little")
        for number in (sigstruct.modulus, sigstruct.signature, sigstruct.q1, sigstruct.q2)
    )
    try:
        rsa3.check_modulus(modulus)
        rsa3.verify(modulus, signature, hashlib.sha256(sigstruct.signed_bytes).digest())
        holds = True
    except SignatureError:
        holds = False
    expected = rsa3.quotients(modulus, signature) if modulus else ()
    return {"signature": holds, "q1": q1 in expected[:1], "q2": q2 in expected[1:]}
