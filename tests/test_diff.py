"""``enturbo diff`` and what it stands on: where two images part, against a comparison page by page."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage, Measurement, Region, SigningKey
from enturbo.runtime.cli import main
from enturbo.runtime.commands.differing import SHOWN_EXTENTS
from enturbo.runtime.difference import difference, section_of
from enturbo.runtime.page_difference import PIECE_PAGES, first_page

Enturbo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def enturbo(capsys: pytest.CaptureFixture[str]) -> Enturbo:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def image(*regions: Region, size: int = 1 << 40, **options: Any) -> EnclaveImage:
    return EnclaveImage(regions, size=size, **options)


def pages(image: EnclaveImage) -> Iterator[tuple[int, int, int, bytes]]:
    """Every page: offset, flags, chunks, bytes."""
    for region in image.regions:
        content = b"" if region.content is None else bytes(region.content)
        for page in range(region.page_count):
            data = content[page * 4096 : (page + 1) * 4096].ljust(4096, b"\0")
            if region.content is None:
                data = region.fill.to_bytes(4, "little") * 1024
            yield region.offset + page * 4096, region.flags, region.chunks, data


def by_page(a: EnclaveImage, b: EnclaveImage) -> tuple[int, str, int | None] | None:
    """The slow answer: (page's number, what differs, offset in the page); unmeasured bytes come last."""
    all_a, all_b = list(pages(a)), list(pages(b))
    unmeasured = None
    for number in range(max(len(all_a), len(all_b))):
        if number >= min(len(all_a), len(all_b)):
            return number, "page", None
        (offset, flags, chunks, data), other = all_a[number], all_b[number]
        if offset != other[0]:
            return number, "offset", None
        if flags != other[1]:
            return number, "flags", None
        if chunks != other[2]:
            return number, "measured", None
        for at in range(4096):
            if data[at] != other[3][at]:
                if chunks >> at // 256 & 1:
                    return number, "bytes", at
                unmeasured = unmeasured or (number, "bytes", at)
    return unmeasured


def short(a: EnclaveImage, b: EnclaveImage) -> tuple[int, str, int | None] | None:
    found = first_page(a.regions, b.regions)
    return None if found is None else (found.number, found.what, found.at)


def cut(regions: list[Region], dice: random.Random) -> list[Region]:
    """The same pages in other regions."""
    out = []
    for region in regions:
        if region.page_count == 1 or dice.random() < 0.5:
            out.append(region)
            continue
        at = dice.randrange(1, region.page_count)
        first = region.content and region.content[: at * 4096]
        second = region.content and region.content[at * 4096 :]
        out.append(replace(region, page_count=at, content=first))
        rest = replace(region, page_count=region.page_count - at, content=second)
        out.append(replace(rest, offset=region.offset + at * 4096))
    return out


def some_regions(dice: random.Random) -> list[Region]:
    regions, offset = [], 0
    for _ in range(dice.randrange(1, 6)):
        count = dice.randrange(1, 5)
        kind = dice.randrange(3)
        content = bytes(dice.randrange(256) for _ in range(300)) * (count * 13) if kind == 0 else None
        measured: bool | int = dice.choice((True, True, False, 0x0F0F, 0x8000))
        flags = dice.choice((0x201, 0x203))
        fill = 0xCCCC_CCCC if kind == 1 else 0
        regions.append(Region(offset, count, flags, content and content[: count * 4096], fill, measured))
        offset += (count + dice.randrange(2)) * 4096
    return regions


def changed(regions: list[Region], dice: random.Random) -> list[Region]:
    """One thing is another one, or nothing."""
    out = list(regions)
    at = dice.randrange(len(out))
    region = out[at]
    match dice.randrange(6):
        case 0:
            out[at] = replace(region, flags=region.flags ^ 2)
        case 1:
            out[at] = replace(region, measured=dice.choice((True, False, 1)))
        case 2 if region.content:
            content = bytearray(region.content)
            for _ in range(dice.randrange(1, 4)):
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            out[at] = replace(region, content=bytes(content))
        case 3:
            del out[at]
        case 4 if region.content is None:
            out[at] = replace(region, fill=region.fill ^ 0x100)
        case 5 if region.content is None:
            data = bytearray(region.fill.to_bytes(4, "little") * 1024 * region.page_count)
            data[dice.randrange(len(data))] ^= dice.randrange(2)
            out[at] = replace(region, content=bytes(data), fill=0)
    return out


@pytest.mark.parametrize("seed", range(150))
def test_as_page_by_page(seed: int) -> None:
    dice = random.Random(seed)
    regions = some_regions(dice)
    a, b = image(*cut(regions, dice)), image(*cut(changed(regions, dice), dice))
    assert short(a, b) == by_page(a, b)
    found = difference(a, b)
    assert found.in_mrenclave is (a.measure("sgx") != b.measure("sgx"))
    if found.page is not None and found.page.what == "bytes":
        page = dict(enumerate(zip(pages(a), pages(b), strict=True)))[found.page.number]
        data_a, data_b = (each[3] for each in page)
        assert found.page.at is not None
        end = found.page.at + len(found.page.bytes_a)
        assert found.page.bytes_a == data_a[found.page.at : end]
        assert found.page.bytes_b == data_b[found.page.at : end]
        assert all(x != y for x, y in zip(found.page.bytes_a, found.page.bytes_b, strict=True))


def test_how_regions_are_cut_is_no_difference() -> None:
    whole = image(Region(0, 4, 0x201, b"a" * 16384))
    parts = image(Region(0, 1, 0x201, b"a" * 4096), Region(0x1000, 3, 0x201, b"a" * 12288))
    assert not difference(whole, parts)


def test_a_fill_written_out_is_no_difference() -> None:
    assert not difference(
        image(Region(0, 2, 0x203, fill=0xCCCC_CCCC)), image(Region(0, 2, 0x203, b"\xcc" * 8192))
    )
    assert not difference(image(Region(0, 2, 0x203)), image(Region(0, 2, 0x203, b"")))


def test_secs_and_dynamic_pages() -> None:
    heap = Region(0x10000, 4, 0x203, measured=False)
    found = difference(image(Region(0, 1, 0x201)), image(Region(0, 1, 0x201), size=1 << 30, ssa_frame_size=3))
    assert [field.name for field in found.secs] == ["size", "ssa_frame_size"]
    assert found.in_mrenclave
    found = difference(image(Region(0, 1, 0x201)), image(Region(0, 1, 0x201), dynamic=[heap]))
    assert (found.in_mrenclave, bool(found), len(found.dynamic_b)) == (False, True, 1)


def test_the_order_counts() -> None:
    one, two = Region(0, 1, 0x201, b"a"), Region(0x1000, 2, 0x203, b"b")
    found = difference(image(one, two), image(two, one))
    assert (found.order, found.only_a, found.only_b) == (True, (), ())
    assert found.page is not None
    assert (found.page.number, found.page.what) == (0, "offset")


def test_unmeasured_bytes_are_told_last() -> None:
    a = image(Region(0, 1, 0x203, b"a", measured=False), Region(0x1000, 1, 0x201, b"same"))
    b = image(Region(0, 1, 0x203, b"b", measured=False), Region(0x1000, 1, 0x201, b"same"))
    c = image(Region(0, 1, 0x203, b"b", measured=False), Region(0x1000, 1, 0x201, b"samE"))
    found = difference(a, b)
    assert found.page is not None
    assert (found.page.number, found.page.in_mrenclave, found.in_mrenclave, bool(found)) == (
        0,
        False,
        False,
        True,
    )
    found = difference(a, c)
    assert found.page is not None
    assert (found.page.number, found.page.at, found.page.in_mrenclave) == (1, 3, True)


def test_a_difference_behind_many_pieces() -> None:
    count = 3 * PIECE_PAGES + 2
    content = bytearray(count * 4096)
    a = image(Region(0, count, 0x201, bytes(content), label="here"))
    content[-2:] = b"\xff\xfe"
    found = first_page(a.regions, image(Region(0, count, 0x201, bytes(content))).regions)
    assert found is not None
    assert found.a is not None
    assert (found.number, found.at, found.run, found.bytes_b) == (count - 1, 4094, 2, b"\xff\xfe")
    assert (found.a.offset, found.a.label) == ((count - 1) * 4096, "here")


@pytest.mark.parametrize("last", [0x203, 0x201])
def test_thirty_million_pages_are_a_few_numbers(last: int) -> None:
    """Fills and zeros, measured and not, cut differently: neither time nor memory follows their number."""
    many = 31_000_000

    def large(parts: int, flags: int) -> EnclaveImage:
        each = many // parts
        regions = [Region(n * each * 4096, each, 0x203, measured=False) for n in range(parts)]
        regions.append(Region(many * 4096, 1_000_000, 0x203, fill=0xCCCC_CCCC))
        regions.append(Region((many + 1_000_000) * 4096, 1, flags, b"end"))
        return image(*regions)

    a, b = large(1, 0x203), large(5, last)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        found = difference(a, b)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bool(found) is (last != 0x203)
    if found.page is not None:
        assert (found.page.number, found.page.what) == (many + 1_000_000, "flags")
    assert time.perf_counter() - started < 1
    assert peak < 8 << 20


# ------------------------------------------------------------------------------------------------ the command


def test_exit_codes(key: SigningKey, tmp_path: Path, enturbo: Enturbo) -> None:
    one, two, odd = tmp_path / "1.enclave", tmp_path / "2.enclave", tmp_path / "odd"
    image(Region(0, 1, 0x205, b"code", label="x")).save(one)
    image(Region(0, 1, 0x205, b"coDe")).save(two)
    odd.write_bytes(b"odd")
    code, out, err = enturbo("diff", one, one)
    assert (code, err, out.splitlines()[0]) == (0, "", "the same")
    code, out, _ = enturbo("diff", one, two)
    assert code == 1
    for text in ("0x2 in the page", "R-X", "A holds  64", "B holds  44"):
        assert text in out
    for pair in ((one, odd), (tmp_path / "missing", one)):
        code, out, err = enturbo("diff", *pair)
        assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_json(key: SigningKey, tmp_path: Path, enturbo: Enturbo) -> None:
    one, two = tmp_path / "1.enclave", tmp_path / "2.enclave"
    first = image(Region(0, 1, 0x205, b"code"), Region(0x2000, 1, 0x203, measured=False))
    second = image(Region(0, 1, 0x205, b"coDe"), Region(0x3000, 1, 0x203, measured=False), size=1 << 30)
    first.save(one)
    second.save(two)
    (tmp_path / "1.enclave.sig").write_bytes(key.sign(first, "sgx", svn=1, date=1).encode())
    (tmp_path / "2.enclave.sig").write_bytes(key.sign(second, "sgx", svn=2, date=1).encode())
    code, out, _ = enturbo("diff", one, two, "--json")
    found = json.loads(out)
    assert (code, found["same"], found["same_mrenclave"]) == (1, False, False)
    assert found["secs"] == {"size": {"a": 1 << 40, "b": 1 << 30}}
    assert [each["offset"] for each in found["regions_only_a"]] == [0x2000]
    assert [each["offset"] for each in found["regions_only_b"]] == [0x3000]
    assert (found["page"]["number"], found["page"]["at"], found["page"]["bytes_a"]) == (0, 2, b"d".hex())
    assert set(found["sigstruct"]) == {"signature", "q1", "q2", "enclavehash", "svn"}
    assert found["sigstruct"]["svn"] == {"a": 1, "b": 2}


def test_only_the_signer_differs(key: SigningKey, tmp_path: Path, enturbo: Enturbo) -> None:
    one, two = tmp_path / "1.enclave", tmp_path / "2.enclave"
    first = image(Region(0, 1, 0x205, b"code"))
    for path in (one, two):
        first.save(path)
    (tmp_path / "1.enclave.sig").write_bytes(key.sign(first, "sgx").encode())
    code, out, _ = enturbo("diff", one, two)
    assert (code, "signed  A True  B False" in out) == (1, True)
    (tmp_path / "2.enclave.sig").write_bytes(SigningKey.generate().sign(first, "sgx").encode())
    code, out, _ = enturbo("diff", one, two)
    assert (code, "MRENCLAVE  the same" in out, "modulus" in out) == (1, True, True)


def test_sigstructs_alone(key: SigningKey, tmp_path: Path, enturbo: Enturbo) -> None:
    one, two, plain = tmp_path / "1.sig", tmp_path / "2.css", tmp_path / "plain.enclave"
    one.write_bytes(key.sign(Measurement(bytes(32), "sgx"), date=5).encode())
    two.write_bytes(key.sign(Measurement(bytes(32), "sgx"), date=6).encode())
    assert enturbo("diff", one, one)[0] == 0
    code, out, _ = enturbo("diff", one, two, "--json")
    found = json.loads(out)
    assert (code, found["same_mrenclave"], found["sigstruct"]["date"]) == (1, None, {"a": 5, "b": 6})
    image(Region(0, 1, 0x205, b"code")).save(plain)
    code, _, err = enturbo("diff", one, plain)
    assert code == 2
    assert "unsigned" in err


def test_output_is_bounded(tmp_path: Path, enturbo: Enturbo) -> None:
    one, two = tmp_path / "1.enclave", tmp_path / "2.enclave"
    for path, flags in ((one, 0x201), (two, 0x203)):
        image(*(Region(page * 0x2000, 1, flags, b"x") for page in range(5_000))).save(path)
    code, out, _ = enturbo("diff", one, two)
    assert code == 1
    assert out.count(f"{5_000 - SHOWN_EXTENTS} more of them") == 2
    assert len(out.splitlines()) < 2 * SHOWN_EXTENTS + 30
    _, out, _ = enturbo("diff", one, two, "--json")
    assert len(json.loads(out)["regions_only_a"]) == 5_000


def test_the_section_is_named_where_the_file_tells() -> None:
    sections = [[".text", 0x10, 0xFF0], [".data", 0x1000, 8]]
    told = EnclaveImage([Region(0, 1, 0x205, b"code")], size=4096, details={"sections": sections})
    assert section_of(told, 0xF) is None
    assert section_of(told, 0x10) == ".text"
    assert section_of(told, 0x1000) == ".data"
    assert section_of(told, 0x1008) is None
    assert section_of(EnclaveImage([Region(0, 1, 0x205, b"code")], size=4096), 0x10) is None
    assert section_of(None, 0x10) is None
