"""SGXS streams: an image has the stream's own value, or the stream is refused where it deviates."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enturbo import EnclaveImage, Runtime, SigningKey
from enturbo.runtime.formats import detect
from enturbo.shm.errors import ImageFormatError

Load = Callable[[bytes], EnclaveImage]
RW, TCS, ALL = 0x203, 0x100, 0xFFFF


def test_the_image_has_the_streams_value(some_stream: Any, build: Any, load: Load, tmp_path: Path) -> None:
    pages, data = some_stream
    with load(data) as image:
        assert image.measure("sgx").digest == build.stream_hash(data)
        assert build.image_pages(image) == [page for page, _ in pages]
        assert (image.size, image.ssa_frame_size) == (1 << 20, 2)
    assert detect(tmp_path / "file").name == "sgxs"


def test_like_pages_are_one_region(some_stream: Any, load: Load) -> None:
    """Equal flags and chunks, one after another; a gap or another mask begins a region."""
    with load(some_stream[1]) as image:
        rows = [(each.offset, each.page_count, each.flags, each.measured) for each in image.regions]
        assert rows == [
            (0, 5, 0x205, True),
            (0x8000, 1, TCS, True),
            (0x9000, 7, RW, False),
            (0x10000, 1, RW, False),
            (0x11000, 2, RW, 0x8001),
            (0x13000, 1, RW, 0x00FF),
            (0x20000, 1, RW, True),
            (0x30000, 1, RW, True),
        ]
        assert image.regions[2].content is None
        assert image.regions[0].label == "records from 0x40 on"
        assert dict(image.details)["unmeasrd_records"] == 16 + 8 + 8


def test_a_stream_without_pages(build: Any, load: Load) -> None:
    with load(build.ecreate()) as image:
        assert image.measure("sgx").digest == build.stream_hash(build.ecreate())


def test_workers_can_copy_it(some_stream: Any, load: Load) -> None:
    """Its chunks are in a file of whole pages."""
    with load(some_stream[1]) as image:
        assert image.backing is not None
        for region in image.regions:
            if region.content is not None:
                assert region.file_page is not None
                found = os.pread(image.backing.fd, region.size, region.file_page * 4096)
                assert found == bytes(region.content)


@st.composite
def page_lists(draw: st.DrawFn) -> list[tuple[int, int, int, int, int]]:
    """(page number, flags, mask, UNMEASRD mask, how many alike)."""
    rows, at = [], 0
    masks = st.sampled_from([0, ALL, 1, 0x8000]) | st.integers(0, ALL)
    for _ in range(draw(st.integers(0, 8))):
        at += draw(st.integers(0, 2))
        mask = draw(masks)
        count = draw(st.integers(1, 5) | st.just(70))
        rows.append((at, draw(st.sampled_from([0x201, RW, TCS])), mask, draw(masks) & ~mask, count))
        at += count
    return rows


@given(rows=page_lists())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stream(rows: list[tuple[int, int, int, int, int]], build: Any, load: Load) -> None:
    check_stream(rows, build, load)


def test_pages_that_differ_in_their_flags_alone(build: Any, load: Load) -> None:
    """They follow each other with equal chunks, and are not one run."""
    check_stream([(0, 0x201, ALL, 0, 3), (3, RW, ALL, 0, 2), (5, 0x201, ALL, 0, 1)], build, load)


def check_stream(rows: list[tuple[int, int, int, int, int]], build: Any, load: Load) -> None:
    pages = []
    for first, flags, mask, unmeasured, count in rows:
        for number in range(first, first + count):
            data = bytearray(build.pattern(4096, number))
            for chunk in range(16):
                if not (mask | unmeasured) >> chunk & 1:
                    data[256 * chunk : 256 * chunk + 256] = bytes(256)
            pages.append((build.Page(number * 4096, flags, mask, bytes(data)), unmeasured))
    stream = build.stream(pages, 1 << 22)
    with load(stream) as image:
        assert image.measure("sgx").digest == build.stream_hash(stream)
        assert build.image_pages(image) == [page for page, _ in pages]
        assert len(image.regions) <= len(rows)


# ---------------------------------------------------------------------------------------------------- refused

DATA = bytes(range(256))

# Name: (the records after ECREATE, number of the record that is wrong, what the message names).
REFUSED: dict[str, tuple[Callable[[Any], list[bytes]], int, str]] = {
    "a second ECREATE": (lambda b: [b.eadd(0), b.ecreate()], 1, "record"),
    "a second ECREATE at once": (lambda b: [b.ecreate()], 0, "record"),
    "an unknown record": (lambda b: [b.eadd(0), b.eadd(4096).replace(b"EADD", b"EDEL")], 1, "record"),
    "a chunk before any page": (lambda b: [b.chunk(0, DATA)], 0, "record"),
    "EADD's offset unaligned": (lambda b: [b.eadd(0x800)], 0, "EADD's offset"),
    "EADD's offset twice": (lambda b: [b.eadd(0), b.eadd(0)], 1, "EADD's offset"),
    "EADD's offset falls": (lambda b: [b.eadd(0), b.eadd(8192), b.eadd(4096)], 2, "EADD's offset"),
    "EADD's offset falls after a run": (
        lambda b: [*(b.eadd(4096 * n) for n in range(20)), b.eadd(4096)],
        20,
        "EADD's offset",
    ),
    "EADD behind SIZE": (lambda b: [b.eadd(1 << 20)], 0, "EADD's offset"),
    "a run that goes on behind SIZE": (
        lambda b: [b.eadd(4096 * n) for n in range(257)],
        256,
        "EADD's offset",
    ),
    "EADD far away": (lambda b: [b.eadd((1 << 64) - 4096)], 0, "EADD's offset"),
    "TCS that may be read": (lambda b: [b.eadd(0, TCS | 1)], 0, "SECINFO.FLAGS"),
    "TCS that may be written": (lambda b: [b.eadd(0, TCS | 2)], 0, "SECINFO.FLAGS"),
    "TCS that may be run": (lambda b: [b.eadd(0), b.eadd(4096, TCS | 4)], 1, "SECINFO.FLAGS"),
    "another page type": (lambda b: [b.eadd(0, 0x400)], 0, "SECINFO.FLAGS"),
    "EADD's padding": (lambda b: [b.eadd(0)[:-1] + b"\1"], 0, "EADD's padding"),
    "EADD's padding in a run": (
        lambda b: [b.eadd(0), b.eadd(4096)[:24] + b"\1" + bytes(39)],
        1,
        "EADD's padding",
    ),
    "EEXTEND's padding": (
        lambda b: [b.eadd(0), b.chunk(0, DATA), b.chunk(256, DATA)[:16] + b"\1" + bytes(47) + DATA],
        2,
        "EEXTEND's padding",
    ),
    "EEXTEND's padding in a run": (
        lambda b: [
            *(b.eadd(0), b.chunk(0, DATA)),
            *(b.eadd(4096), b.chunk(4096, DATA)[:63] + b"\1" + DATA),
        ],
        3,
        "EEXTEND's padding",
    ),
    "UNMEASRD's padding": (
        lambda b: [b.eadd(0), b.chunk(0, DATA, b"UNMEASRD")[:40] + b"\1" + bytes(23) + DATA],
        1,
        "UNMEASRD's padding",
    ),
    "a chunk off 256": (lambda b: [b.eadd(0), b.chunk(128, DATA)], 1, "EEXTEND's offset"),
    "a chunk twice": (lambda b: [b.eadd(0), b.chunk(0, DATA), b.chunk(0, DATA)], 2, "EEXTEND's offset"),
    "a chunk measured and not": (
        lambda b: [b.eadd(0), b.chunk(0, DATA), b.chunk(0, DATA, b"UNMEASRD")],
        2,
        "UNMEASRD's offset",
    ),
    "chunks that fall": (lambda b: [b.eadd(0), b.chunk(256, DATA), b.chunk(0, DATA)], 2, "EEXTEND's offset"),
    "a chunk of the next page": (lambda b: [b.eadd(0), b.chunk(4096, DATA)], 1, "EEXTEND's offset"),
    "a chunk of the page before": (
        lambda b: [b.eadd(0), b.eadd(4096), b.chunk(0, DATA)],
        2,
        "EEXTEND's offset",
    ),
    "another chunk in a run": (
        lambda b: [b.eadd(0), b.chunk(0, DATA), b.eadd(4096), b.chunk(0, DATA)],
        3,
        "EEXTEND's offset",
    ),
    "seventeen chunks": (
        lambda b: [b.eadd(0), *(b.chunk(256 * n, DATA) for n in range(17))],
        17,
        "EEXTEND's offset",
    ),
    "a header cut": (lambda b: [b.eadd(0), b.eadd(4096)[:63]], 1, "truncated record"),
    "one byte more": (lambda b: [b.eadd(0), b"E"], 1, "truncated record"),
    "data cut": (lambda b: [b.eadd(0), b.chunk(0, DATA)[:-1]], 1, "truncated record"),
    "data cut in a run": (
        lambda b: [b.eadd(0), b.chunk(0, DATA), b.eadd(4096), b.chunk(4096, DATA)[:-64]],
        3,
        "truncated record",
    ),
}


@pytest.mark.parametrize(("make", "number", "what"), REFUSED.values(), ids=REFUSED)
def test_refused(
    make: Callable[[Any], list[bytes]], number: int, what: str, build: Any, load: Load, tmp_path: Path
) -> None:
    """The message names the record, and where it begins (or, for padding, that)."""
    records = make(build)
    with pytest.raises(ImageFormatError) as caught:
        load(build.ecreate() + b"".join(records))
    error = caught.value
    assert error.what == what
    assert error.file == str(tmp_path / "file")
    at = 64 + sum(map(len, records[:number]))
    assert error.offset is not None
    assert at <= error.offset < at + 64
    assert error.offset == at or "padding" in what
    assert error.expected is not None
    assert error.found is not None


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"UNSIZED\0" + bytes(56), "SGXS stream"),
        (struct.pack("<8sIQ44x", b"ECREATE", 1, 3 << 12), "ECREATE's SIZE"),
        (struct.pack("<8sIQ44x", b"ECREATE", 1, 0), "ECREATE's SIZE"),
        (struct.pack("<8sIQ44x", b"ECREATE", 0, 1 << 12), "ECREATE's SSAFRAMESIZE"),
        (struct.pack("<8sIQ43xB", b"ECREATE", 1, 1 << 12, 1), "ECREATE's padding"),
        (b"ECREATE\0", "truncated stream"),
    ],
)
def test_a_beginning_that_is_refused(head: bytes, what: str, load: Load) -> None:
    with pytest.raises(ImageFormatError) as caught:
        load(head)
    assert caught.value.what == what


def test_an_unsized_stream_is_told_so(build: Any, load: Load) -> None:
    with pytest.raises(ImageFormatError, match=r"UNSIZED.*cannot be measured"):
        load(build.ecreate(tag=b"UNSIZED") + build.eadd(0))


def test_too_many_regions(build: Any, load: Load) -> None:
    """A region costs memory of its own, so a stream may have as many as an .enclave file."""
    flags = (0x201, RW)
    records = b"".join(build.eadd(4096 * n, flags[n % 2]) for n in range(16385))
    with load(build.ecreate(1 << 30) + records[:-64]) as image:
        assert len(image.regions) == 16384
    with pytest.raises(ImageFormatError, match="at most 16384"):
        load(build.ecreate(1 << 30) + records)


# ---------------------------------------------------------------------------------------------------- hostile


def outcome(path: Path, data: bytes | bytearray) -> EnclaveImage | None:
    """An image, or None for a file that was refused as it should be."""
    path.write_bytes(data)
    try:
        return EnclaveImage.load(path)
    except ImageFormatError as error:
        if error.file != str(path):
            raise AssertionError("the message lacks the file") from error
        return None


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_altered_records(data: st.DataObject, some_stream: Any, build: Any, tmp_path: Path) -> None:
    """What is still accepted is measured to its own value, whatever has been changed."""
    stream = bytearray(some_stream[1])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(stream) // 64 - 1)) * 64 + data.draw(st.integers(0, 63))
        match data.draw(st.sampled_from(["flip", "set", "cut", "drop", "double"])):
            case "flip":
                stream[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                at -= at % 8
                stream[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
            case "cut":
                del stream[at:]
            case "drop":
                del stream[at - at % 64 : at - at % 64 + data.draw(st.sampled_from([64, 320]))]
            case "double":
                start = at - at % 64
                stream[start:start] = stream[start : start + data.draw(st.sampled_from([64, 320]))]
        if len(stream) < 64:
            break
    image = outcome(tmp_path / "file", stream)
    if image is not None:
        assert image.measure("sgx").digest == build.stream_hash(bytes(stream))
        image.close()


def test_truncated_at_every_record(some_stream: Any, build: Any, tmp_path: Path) -> None:
    """A stream ends well at the end of any record, and nowhere else."""
    data = some_stream[1]
    ends, at = [], 0
    while at < len(data):
        at += 320 if data[at : at + 8] in (b"EEXTEND\0", b"UNMEASRD") else 64
        ends.append(at)
    for end in ends:
        image = outcome(tmp_path / "file", data[:end])
        assert image is not None
        assert image.measure("sgx").digest == build.stream_hash(data[:end])
        image.close()
        assert outcome(tmp_path / "file", data[: end - 1]) is None
        assert outcome(tmp_path / "file", data[: end + 1]) is None or end == len(data)


def many_eadds(path: Path, pages: int, tail: bytes = b"") -> None:
    """A stream of so many unmeasured pages, and ``tail``."""
    with path.open("wb") as file:
        file.write(struct.pack("<8sIQ44x", b"ECREATE", 1, 1 << 40))
        for first in range(0, pages, 1 << 16):
            rows = np.zeros((min(1 << 16, pages - first), 8), "<u8")
            rows[:, 0] = int.from_bytes(b"EADD\0\0\0\0", "little")
            rows[:, 1] = np.arange(first, first + len(rows)) * 4096
            rows[:, 2] = RW
            file.write(rows.tobytes())
        file.write(tail)


MEASURE = """
import sys
from pathlib import Path
from enturbo import EnclaveImage
image = EnclaveImage.load(sys.argv[1])
assert len(image.regions) == 1
digest = image.measure("sgx").digest.hex()
lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count the parent that was forked
print(image.page_count, digest, next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("pages", [1_000_000, pytest.param(4_000_000, marks=pytest.mark.slow)])
def test_millions_of_pages(pages: int, build: Any, tmp_path: Path) -> None:
    """64 or 256 MB of records are one region, and are never in memory together."""
    path = tmp_path / "huge.sgxs"
    many_eadds(path, pages)
    expected = build.stream_hash(path.read_bytes()) if pages < 2_000_000 else None
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    path.unlink()
    count, digest, peak = done.stdout.split()
    assert int(count) == pages
    assert expected is None or digest == expected.hex()
    assert int(peak) << 10 < 100 << 20


def test_a_long_stream_with_a_bad_end_is_refused_cheaply(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.sgxs"
    many_eadds(path, 1_000_000, build.chunk(0, DATA))
    tracemalloc.start()
    try:
        with pytest.raises(ImageFormatError, match=f"at offset {64 + 64 * 1_000_000:#x}"):
            EnclaveImage.load(path)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
    path.unlink()


@pytest.mark.parametrize("startup", ["serial", "enturbo"])
def test_it_starts(
    startup: Literal["serial", "enturbo"], some_stream: Any, load: Load, key: SigningKey, runtime: Runtime
) -> None:
    """It names no handler; it is copied, measured and VERIFIED all the same."""
    with load(some_stream[1]) as image:
        signed = key.sign(image, "sgx")
        with runtime.launch(image, signed, startup=startup) as enclave:
            assert enclave.wait_verified(20) == signed.enclavehash
