"""``enturbo inspect`` and what it stands on: facts of images and SIGSTRUCTs, from values chosen here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage, Measurement, Region, SigningKey, Sigstruct
from enturbo.runtime import inspection
from enturbo.runtime.cli import main
from enturbo.runtime.commands import subject
from enturbo.runtime.commands.inspecting import SHOWN_REGIONS, SHOWN_TCS
from enturbo.runtime.inspection import dates, image_facts, names, signature_checks, sigstruct_facts

Enturbo = Callable[..., tuple[int, str, str]]

TCS = struct.pack(
    "<QQQIIQQQQIIQQ", 0, 1, 0x9000, 3, 2, 0x1234, 0, 0x5000, 0x6000, 0xFFF, 0xFFFF_FFFF, 0x7000, 0
)


@pytest.fixture
def enturbo(capsys: pytest.CaptureFixture[str]) -> Enturbo:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def image() -> EnclaveImage:
    """Every kind of region, one TCS page with all its fields set and one that is zeros."""
    return EnclaveImage(
        [
            Region(0, 2, 0x205, b"code", label="PT_LOAD 0 (R X)"),
            Region(0x2000, 1, 0x100, TCS, label="layout 3 (tcs)"),
            Region(0x3000, 2, 0x203, fill=0xCCCC_CCCC),
            Region(0x5000, 1, 0x201, b"x", measured=0x8001),
            Region(0x10000, 8, 0x203, measured=False, label="heap"),
            Region(0x20000, 3, 0x100, measured=True),
        ],
        size=1 << 20,
        ssa_frame_size=2,
        dynamic=[Region(0x40000, 4, 0x203, measured=False)],
        details={"format": "by hand", "metadata_version": "2.4"},
    )


def test_regions_as_they_are(image: EnclaveImage) -> None:
    facts = image_facts(image)
    assert facts["secs"] == {"size": 1 << 20, "ssa_frame_size": 2}
    assert facts["pages"] == {"added": 17, "measured": 9, "by_eaug": 4}
    assert facts["details"] == {"format": "by hand", "metadata_version": "2.4"}
    assert facts["sigstruct"] is None
    kinds = [(row["access"], row["measured"], row["source"], row["label"]) for row in facts["regions"]]
    assert kinds == [
        ("R-X", "all", "content", "PT_LOAD 0 (R X)"),
        ("TCS", "all", "content", "layout 3 (tcs)"),
        ("RW-", "all", "fill 0xcccccccc", ""),
        ("R--", "0x8001", "content", ""),
        ("RW-", "none", "zeros", "heap"),
        ("TCS", "all", "zeros", ""),
    ]
    assert [(row["offset"], row["pages"], row["flags"]) for row in facts["regions"]] == [
        (region.offset, region.page_count, region.flags) for region in image.regions
    ]
    (dynamic,) = facts["dynamic"]
    assert (dynamic["offset"], dynamic["pages"]) == (0x40000, 4)


def test_tcs_fields_stand_where_the_manual_has_them(image: EnclaveImage) -> None:
    one, zeros = image_facts(image)["tcs"]
    assert one == {
        "offset": 0x2000,
        "pages": 1,
        "flags": 1,
        "ossa": 0x9000,
        "cssa": 3,
        "nssa": 2,
        "oentry": 0x1234,
        "ofsbasgx": 0x5000,
        "ogsbasgx": 0x6000,
        "fslimit": 0xFFF,
        "gslimit": 0xFFFF_FFFF,
        "ocetssa": 0x7000,
    }
    # Pages without content are told at once.
    assert (zeros["offset"], zeros["pages"], zeros["oentry"]) == (0x20000, 3, 0)
    places = {field.name: field.offset for field in inspection.TCS.fields}
    assert places == {
        "state": 0,
        "flags": 8,
        "ossa": 16,
        "cssa": 24,
        "nssa": 28,
        "oentry": 32,
        "aep": 40,
        "ofsbasgx": 48,
        "ogsbasgx": 56,
        "fslimit": 64,
        "gslimit": 68,
        "ocetssa": 72,
        "prevssp": 80,
    }


def test_tcs_pages_of_one_region_each_with_its_fields() -> None:
    content = b"".join(TCS.ljust(4096, b"\0")[:32] + struct.pack("<Q", n) + bytes(4056) for n in range(3))
    tcs = image_facts(EnclaveImage([Region(0, 5, 0x100, content)], size=1 << 16))["tcs"]
    assert [(each["offset"], each["pages"], each["oentry"]) for each in tcs] == [
        (0, 1, 0),
        (0x1000, 1, 1),
        (0x2000, 1, 2),
        (0x3000, 2, 0),
    ]


@pytest.mark.parametrize(
    ("stored", "bcd", "binary"),
    [
        (0x2017_1206, "2017-12-06", None),
        (0x0C15_07E6, None, None),  # month 21
        (2022 | 3 << 16 | 21 << 24, None, "2022-03-21"),
        (0, None, None),
        (0x2021_0229, None, None),  # no such day
        (0x1003_2024, None, "8228-03-16"),  # digits, but month 20; the other reading is a date
        (0xFFFF_FFFF, None, None),
    ],
)
def test_dates_in_both_conventions(stored: int, bcd: str | None, binary: str | None) -> None:
    assert dates(stored) == {"stored": stored, "bcd": bcd, "binary": binary}


def test_sigstruct_fields(key: SigningKey) -> None:
    signed = key.sign(Measurement(bytes(range(32)), "sgx"), product_id=7, svn=3, debug=True, date=0x20240229)
    facts = sigstruct_facts(
        replace(signed, vendor=0x8086, type=1 << 31, attributemask_flags=~2 & (1 << 64) - 1, miscselect=1)
    )
    assert facts["enclavehash"] == bytes(range(32)).hex()
    assert facts["mrsigner"] == key.mrsigner.hex()
    assert (facts["product_id"], facts["svn"]) == (7, 3)
    assert (facts["vendor_name"], facts["debug_type"]) == ("Intel", True)
    assert facts["attributes"]["flag_names"] == ["DEBUG", "MODE64BIT"]
    assert facts["attributes"]["xfrm_names"] == ["x87", "SSE"]
    assert facts["attributemask"]["flags_open"] == ["DEBUG"]
    assert facts["attributemask"]["xfrm_open"] == []
    assert facts["miscselect"]["names"] == ["EXINFO"]
    assert facts["date"]["bcd"] == "2024-02-29"
    assert facts["scheme"] == "sgx"
    assert facts["checks"] == {"signature": False, "q1": True, "q2": True}  # it was changed after signing


def test_names_of_bits() -> None:
    assert names(0b1001_0101, inspection.FLAG_NAMES) == ["INIT", "MODE64BIT", "PROVISIONKEY", "KSS"]
    assert names(1 << 40 | 1 << 3, inspection.FLAG_NAMES) == ["bit 3", "bit 40"]
    assert names(0, inspection.FLAG_NAMES) == []


def test_scheme_enturbo_is_named_and_odd_bits_are_told(key: SigningKey) -> None:
    signed = key.sign(Measurement(bytes(32), "enturbo", 8, 4))
    assert sigstruct_facts(signed)["scheme"] == "enturbo (8 domains, 4 pages a block)"
    odd = replace(signed, attributes_flags=signed.attributes_flags | 1)
    assert sigstruct_facts(odd)["scheme"].startswith("none: ")


@pytest.mark.parametrize(
    ("field", "failing"),
    [("signature", {"signature", "q1", "q2"}), ("q1", {"q1"}), ("q2", {"q2"}), ("svn", {"signature"})],
)
def test_signature_and_quotients_one_by_one(key: SigningKey, field: str, failing: set[str]) -> None:
    signed = key.sign(Measurement(bytes(32)))
    assert all(signature_checks(signed).values())
    value = getattr(signed, field)
    changed: Any = 9 if field == "svn" else value[:200] + bytes([value[200] ^ 1]) + value[201:]
    checks = signature_checks(replace(signed, **{field: changed}))
    assert {name for name, holds in checks.items() if not holds} == failing


# ------------------------------------------------------------------------------------------------ the command


def test_inspect_an_image_with_its_sigstruct(
    image: EnclaveImage, key: SigningKey, tmp_path: Path, enturbo: Enturbo
) -> None:
    path = tmp_path / "i.enclave"
    image.save(path)
    (tmp_path / "i.enclave.sig").write_bytes(key.sign(image, "sgx", date=0x20240229).encode())
    code, out, err = enturbo("inspect", path)
    assert (code, err) == (0, "")
    for text in ("0x100000", "R-X", "TCS", "0x8001", "fill 0xcccccccc", "EAUG", "0x1234", "2024-02-29"):
        assert text in out
    assert key.mrsigner.hex() in out
    code, out, err = enturbo("inspect", path, "--json")
    facts = json.loads(out)
    assert (code, facts["file"], facts["format"]) == (0, str(path), "enclave")
    assert len(facts["regions"]) == 6
    assert facts["sigstruct"]["mrsigner"] == key.mrsigner.hex()


def test_inspect_a_sigstruct_alone(key: SigningKey, tmp_path: Path, enturbo: Enturbo) -> None:
    path = tmp_path / "alone.css"
    path.write_bytes(key.sign(Measurement(bytes(32), "sgx"), svn=5).encode())
    code, out, _ = enturbo("inspect", path)
    assert (code, "SECS" in out, key.mrsigner.hex() in out) == (0, False, True)
    _, out, _ = enturbo("inspect", path, "--json")
    facts = json.loads(out)
    assert (facts["format"], facts["sigstruct"]["svn"]) == ("sigstruct", 5)
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = enturbo("inspect", path)
    assert (code, out) == (2, "")
    assert "1808" in err


def test_output_is_bounded(tmp_path: Path, enturbo: Enturbo) -> None:
    path = tmp_path / "many.enclave"
    flags = (0x201, 0x100)
    regions = [Region(page * 0x2000, 1, flags[page % 2], b"x") for page in range(10_000)]
    EnclaveImage(regions, size=1 << 27).save(path)
    code, out, _ = enturbo("inspect", path)
    assert code == 0
    assert len(out.splitlines()) < SHOWN_REGIONS + SHOWN_TCS + 40
    assert f"{10_000 - SHOWN_REGIONS} more regions" in out
    assert f"{5_000 - SHOWN_TCS} more TCS pages" in out
    _, out, _ = enturbo("inspect", path, "--json")
    facts = json.loads(out)
    assert (len(facts["regions"]), len(facts["tcs"])) == (10_000, 5_000)


def test_inspect_tells_variants(
    image: EnclaveImage, key: SigningKey, tmp_path: Path, enturbo: Enturbo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image as the reader of a file with three metadata blocks gives it."""

    def variant(version: str, regions: list[Region], sigstructs: list[Sigstruct]) -> EnclaveImage:
        return EnclaveImage(
            regions,
            size=image.size,
            ssa_frame_size=2,
            sigstructs=sigstructs,
            details={"metadata_version": version},
        )

    regions = list(image.regions)
    signed = [key.sign(image, "sgx")]
    several = EnclaveImage(
        regions,
        size=image.size,
        ssa_frame_size=2,
        sigstructs=signed,
        details={
            "metadata_version": "2.4",
            "simulation": True,
            "attributes": {"flags": 4, "list": [1, None]},
        },
        variants=[variant("2.1", regions, signed), variant("1.4", regions[:-1], [])],
    )
    path = tmp_path / "i.enclave"
    image.save(path)
    monkeypatch.setattr(subject, "load_image", lambda path: several)
    _, out, _ = enturbo("inspect", path)
    first, second, third = out.split("\nmetadata ")
    assert "simulation         yes" in first
    assert "flags 4, list 1, none" in first
    assert "pages as above      yes" in second
    assert "no: --json" not in second
    assert third.count("no: --json") == 2
    _, out, _ = enturbo("inspect", path, "--json")
    assert [each["details"]["metadata_version"] for each in json.loads(out)["variants"]] == ["2.1", "1.4"]


def test_what_cannot_be_inspected(tmp_path: Path, enturbo: Enturbo) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"neither")
    for path in (odd, tmp_path / "missing", tmp_path):
        code, out, err = enturbo("inspect", path)
        assert (code, out) == (2, "")
        assert str(path) in err


def test_hostile_names_stay_on_their_line(tmp_path: Path, enturbo: Enturbo) -> None:
    """Labels and details come from a file: no control character of theirs reaches the terminal."""
    region = Region(0, 1, 0x201, b"x", label="evil\x1b[2J\n\\[bold]")
    image = EnclaveImage([region], size=4096, details={"name": "\x1b]0;title\x07"})
    path = tmp_path / "i.enclave"
    image.save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "load_image", lambda path: image)
        _, out, _ = enturbo("inspect", path)
    assert "\x1b[2J" not in out
    assert "\x07" not in out
    assert "evil\\x1b[2J\\x0a\\[bold]" in out
