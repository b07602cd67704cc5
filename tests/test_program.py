"""The program manifest: what is written is read back, and nothing else gets through."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo.runtime import manifests
from enturbo.runtime.manifests import HEADER, MAX_MANIFEST, Library
from enturbo.runtime.program import (
    MAGIC,
    VERSION,
    BundleAt,
    Program,
    decode,
    encode,
    module_files,
    peek_length,
)
from enturbo.shm.errors import ImageFormatError

PROGRAM = Program(
    handler="handler:handler",
    files={
        "handler.py": (8192, 100),
        "pkg/__init__.py": (8304, 0),
        "pkg/u.py": (8304, 9),
        "data/ä b.bin": (16384, 1 << 30),
        "native.so": (8192, 20),
    },
    libraries={"native.so": Library("libnative.so.1", ("libc.so.6", "libother.so"))},
    bundles=(BundleAt("Some-Thing", "1.0", 1 << 20, 8192), BundleAt("other", "2.0.post1", 1 << 21, 4096)),
    data=(1 << 31, 8),
    heap=None,
)

_identifiers = st.from_regex(r"[a-zA-Z_]\w{0,8}", fullmatch=True)
_extents = st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    files = draw(
        st.dictionaries(
            st.text(
                st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
            ),
            _extents,
            min_size=1,
            max_size=8,
        )
    )
    names = draw(st.lists(_identifiers, min_size=1, max_size=5, unique=True))
    files |= {draw(st.sampled_from(module_files(name))): draw(_extents) for name in names}
    texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=9)
    libraries = {
        name: Library(draw(texts | st.just("")), tuple(draw(st.lists(texts, max_size=3))))
        for name in draw(st.lists(st.sampled_from(sorted(files)), max_size=3, unique=True))
    }
    bundles = tuple(
        BundleAt(name, draw(texts), *draw(_extents)) for name in sorted(draw(st.sets(texts, max_size=3)))
    )
    optional = st.none() | _extents
    handler = f"{draw(st.sampled_from(names))}:{draw(_identifiers)}"
    return Program(handler, files, libraries, bundles, draw(optional), draw(optional))


def pack(body: object) -> bytes:
    packed: bytes = msgpack.packb(body)
    return HEADER.pack(MAGIC, VERSION, len(packed)) + packed


def fields(**changes: object) -> dict[str, object]:
    good: dict[str, object] = {
        "handler": "h:f",
        "files": {"h.py": [0, 1]},
        "libraries": {"h.py": ["", []]},
        "bundles": [["a", "1", 0, 1], ["b", "1", 0, 1]],
        "data": None,
        "heap": [4096, 8192],
    }
    return {**good, **changes}


@given(programs(), st.binary(max_size=20))
@settings(deadline=None)
def test_decode_reads_what_encode_wrote(program: Program, behind: bytes) -> None:
    encoded = encode(program)
    assert decode(encoded + behind) == program
    assert peek_length(encoded[:16]) == len(encoded)
    assert encode(decode(encoded)) == encoded


def test_the_header_is_fixed() -> None:
    encoded = encode(PROGRAM)
    assert encoded[:8] == b"ENTURBOF"
    assert encoded[8:12] == (2).to_bytes(4, "little")
    assert int.from_bytes(encoded[12:16], "little") == len(encoded) - 16
    assert decode(memoryview(bytearray(encoded))) == PROGRAM


@given(st.data())
@settings(deadline=None)
def test_a_changed_byte_never_gives_another_exception(data: st.DataObject) -> None:
    encoded = bytearray(encode(PROGRAM))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for damaged in (encoded, encoded[:cut]):
        with contextlib.suppress(ImageFormatError):
            assert isinstance(decode(damaged), Program)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_hostile_bodies_give_image_format_errors(body: bytes) -> None:
    with pytest.raises(ImageFormatError):
        decode(HEADER.pack(MAGIC, VERSION, len(body)) + body)


@pytest.mark.parametrize(
    "changes",
    [
        {"handler": "h"},
        {"handler": "h:f:g"},
        {"handler": ":f"},
        {"handler": "h.:f"},
        {"handler": "other:f"},
        {"handler": None},
        {"handler": b"h:f"},
        {"libraries": []},
        {"libraries": {"missing.so": ["", []]}},
        {"libraries": {"h.py": [0, []]}},
        {"libraries": {"h.py": [""]}},
        {"libraries": {"h.py": ["", "libc.so.6"]}},
        {"libraries": {"h.py": ["", [0]]}},
        {"libraries": {"h.py": ["x" * 1025, []]}},
        {"bundles": {}},
        {"bundles": [["a", "1", 0]]},
        {"bundles": [["a", 1, 0, 1]]},
        {"bundles": [["", "1", 0, 1]]},
        {"bundles": [["a", "1", -1, 1]]},
        {"bundles": [["b", "1", 0, 1], ["a", "1", 0, 1]]},
        {"bundles": [["a", "1", 0, 1], ["a", "2", 0, 1]]},
        {"files": {"h.py": [-1, 1]}},
        {"files": {"h.py": [0, -1]}},
        {"files": {"h.py": [0, True]}},
        {"files": {"h.py": [0, 1.0]}},
        {"files": {"h.py": [0, 1 << 60]}},
        {"files": {"h.py": [0, 1], "": [0, 1]}},
        {"files": {"h.py": [0, 1], "a\0": [0, 1]}},
        {"files": {"h.py": [0, 1], "x" * 1025: [0, 1]}},
        {"data": 0},
        {"data": [1]},
        {"heap": {"a": 1}},
        {"more": None},
    ],
)
def test_odd_fields_are_refused(changes: dict[str, object]) -> None:
    assert decode(pack(fields())).handler == "h:f"
    with pytest.raises(ImageFormatError):
        decode(pack(fields(**changes)))


def test_other_orders_and_other_forms_are_refused() -> None:
    """One meaning has one encoding: a second one would be a second image that does the same."""
    good = fields()
    with pytest.raises(ImageFormatError, match="keys"):
        decode(pack(dict(reversed(good.items()))))
    packed = msgpack.packb(good)
    long_none = packed.replace(b"\xa4data\xc0", b"\xd9\x04data\xc0")  # the key as str8 instead of fixstr
    assert long_none != packed
    with pytest.raises(ImageFormatError, match="canonical"):
        decode(HEADER.pack(MAGIC, VERSION, len(long_none)) + long_none)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "too short"),
        (HEADER.pack(b"ENTURBOX", VERSION, 0), "magic"),
        (HEADER.pack(MAGIC, 1, 0), "version"),
        (HEADER.pack(MAGIC, VERSION, MAX_MANIFEST + 1), "length"),
        (HEADER.pack(MAGIC, VERSION, 0xFFFF_FFFF), "length"),
        (HEADER.pack(MAGIC, VERSION, 5), "cut short"),
    ],
)
def test_headers(header: bytes, message: str) -> None:
    with pytest.raises(ImageFormatError, match=message):
        decode(header)


def test_encode_refuses_what_decode_would() -> None:
    with pytest.raises(ImageFormatError, match="length"):
        encode(Program("h:f", {"h.py": (0, 1), **{f"{i:0900}": (0, 1) for i in range(1300)}}))
    with pytest.raises(ImageFormatError):
        encode(Program("h:f", {}))


@pytest.mark.parametrize(
    "body",
    [
        b"\x81" * 600,  # maps in maps, deeper than msgpack follows
        b"\x91" * 600,
        b"\xdd\xff\xff\xff\xff",  # arrays and maps that claim 2**32-1 items
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\x00\xff",  # a timestamp without a time
        b"\xa2\xff\xfe",  # text that is not UTF-8
        b"\x82\xa1a\x01\xa1a\x01",  # one key twice
    ],
)
def test_hostile_msgpack(body: bytes) -> None:
    with pytest.raises(ImageFormatError):
        manifests.unpack_canonical(body, "test", offset=0, max_array=2, max_map=10)
