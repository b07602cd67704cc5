"""The ``.enclave`` file: an image of ours on disk, made to be mapped.

::

    0        header, 64 bytes: magic, version, where things are, checksums
    64       manifest: msgpack, the regions in EADD order
    …        zeros up to the next page
    data     each region's content, whole pages, in the order of the regions, without holes

Data is page-aligned, so that any process can map a region's pages as they are. Each byte is covered by a
checksum (XXH3, 64 bits) or has to be zero, so a damaged or shortened file is refused before it is used.
Checksums are against accidents; against attackers there is the measurement.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgpack
import xxhash

from ...shm.errors import ImageFormatError
from ...shm.layout import ALL_CHUNKS, PAGE_SIZE, Record
from ..backing import Backing
from ..program import unpack_canonical
from ..region import READ, TYPE_REG, WRITE, Region

if TYPE_CHECKING:
    from ..image import EnclaveImage, PathLike

MAGIC: Final = b"ENTURBOI"
VERSION: Final = 1
HEADER: Final = Record(
    "enclave file header",
    64,
    (
        ("magic", "8s", 0),
        ("version", "I", 8),
        ("reserved", "I", 12),  # 0
        ("manifest_size", "Q", 16),
        ("manifest_checksum", "Q", 24),
        ("data_offset", "Q", 32),  # the first page behind the manifest
        ("file_size", "Q", 40),
        ("reserved2", "Q", 48),  # 0
        ("header_checksum", "Q", 56),  # of the 56 bytes before it
    ),
)
# A hostile manifest costs at most about 90 bytes of Python objects for each of its own.
MAX_MANIFEST: Final = 1 << 20
MAX_REGIONS: Final = 1 << 14

# One region in the manifest: [offset, pages, flags, chunks, fill, pages of content, checksum of these].
_REGION: Final = ("offset", "page_count", "flags", "chunks", "fill", "content_pages", "checksum")
_DYNAMIC: Final = ("offset", "page_count")
_KEYS: Final = ("size", "ssa_frame_size", "regions", "dynamic")


def load(file: BinaryIO, name: str) -> EnclaveImage:
    """Map ``file``, check all of it, and return the image, whose contents are slices of the mapping.

    Raises ImageFormatError with offset, expected and found.
    """
    from ..image import EnclaveImage

    file_size = os.fstat(file.fileno()).st_size
    if file_size < HEADER.size:
        raise ImageFormatError("file size", file=name, expected=f"at least {HEADER.size}", found=file_size)
    mapping = mmap.mmap(file.fileno(), file_size, access=mmap.ACCESS_READ)
    backing = Backing(os.dup(file.fileno()), mapping)
    try:
        manifest, data_offset = _check_ends(mapping, file_size, name)
        # Sizes and places before checksums: a lie in the manifest must not cost a pass over the file.
        image = EnclaveImage(
            _regions(manifest["regions"], memoryview(mapping), data_offset, name),
            size=manifest["size"],
            ssa_frame_size=manifest["ssa_frame_size"],
            dynamic=[_dynamic(row) for row in manifest["dynamic"]],
            backing=backing,
        )
    except ImageFormatError as error:
        if error.file is not None:
            raise
        raise ImageFormatError(
            error.what, file=name, offset=error.offset, expected=error.expected, found=error.found
        ) from None
    _check_contents(image, manifest["regions"], data_offset, name)
    return image


def _check_ends(mapping: mmap.mmap, file_size: int, name: str) -> tuple[dict[str, Any], int]:
    """Check header, manifest and the zeros behind it; returns the manifest and where the data starts."""
    header = _read_header(mapping[: HEADER.size], file_size, name)
    end = HEADER.size + header["manifest_size"]
    packed = mapping[HEADER.size : end]
    _check(
        "manifest checksum", xxhash.xxh3_64_intdigest(packed), header["manifest_checksum"], name, HEADER.size
    )
    if any(mapping[end : header["data_offset"]]):
        raise ImageFormatError(
            "padding behind the manifest", file=name, offset=end, expected="zeros", found="data"
        )
    manifest = unpack_canonical(
        packed, "manifest", offset=HEADER.size, max_array=MAX_REGIONS, max_map=len(_KEYS)
    )
    return _checked_manifest(manifest), header["data_offset"]


def _read_header(data: bytes, file_size: int, name: str) -> dict[str, int]:
    def get(field: str) -> Any:
        return HEADER.struct(field).unpack_from(data, HEADER.offset(field))[0]

    def check(field: str, expected: object) -> None:
        _check(f"header's {field}", get(field), expected, name, HEADER.offset(field))

    check("magic", MAGIC)
    check("version", VERSION)
    check("header_checksum", xxhash.xxh3_64_intdigest(data[: HEADER.offset("header_checksum")]))
    check("reserved", 0)
    check("reserved2", 0)
    check("file_size", file_size)
    if get("manifest_size") > MAX_MANIFEST:
        raise ImageFormatError(
            "header's manifest_size",
            file=name,
            offset=HEADER.offset("manifest_size"),
            expected=f"at most {MAX_MANIFEST}",
            found=get("manifest_size"),
        )
    check("data_offset", _page_end(HEADER.size + get("manifest_size")))
    if file_size < get("data_offset"):
        raise ImageFormatError(
            "file size", file=name, expected=f"at least {get('data_offset')}", found=file_size
        )
    return {field: get(field) for field in ("manifest_size", "manifest_checksum", "data_offset")}


def _check(what: str, found: object, expected: object, name: str | None, offset: int) -> None:
    if found != expected:
        raise ImageFormatError(what, file=name, offset=offset, expected=_text(expected), found=_text(found))


def _text(value: object) -> str:
    return hex(value) if isinstance(value, int) else repr(value)


def _checked_manifest(manifest: object) -> dict[str, Any]:
    """The manifest's form alone; what the numbers may be is said by Region and EnclaveImage."""
    if not isinstance(manifest, dict) or tuple(manifest) != _KEYS:
        found = list(manifest)[:8] if isinstance(manifest, dict) else type(manifest).__name__
        raise ImageFormatError("manifest", offset=HEADER.size, expected=f"the keys {_KEYS}", found=found)
    for key, names in (("regions", _REGION), ("dynamic", _DYNAMIC)):
        rows = manifest[key]
        if not isinstance(rows, tuple) or not all(
            isinstance(row, tuple) and len(row) == len(names) and all(type(value) is int for value in row)
            for row in rows
        ):
            raise ImageFormatError(
                f"manifest's {key}", offset=HEADER.size, expected=f"rows of numbers: {', '.join(names)}"
            )
        if any(value < 0 for row in rows for value in row):
            raise ImageFormatError(f"manifest's {key}", offset=HEADER.size, expected="no negative number")
    return manifest


def _regions(rows: Sequence[Sequence[int]], file: memoryview, at: int, name: str) -> Iterator[Region]:
    """The regions, whose contents follow one another from ``at`` to the end of the file."""
    for offset, page_count, flags, chunks, fill, content_pages, _ in rows:
        end = at + content_pages * PAGE_SIZE
        if end > len(file):
            raise ImageFormatError(
                f"content of the region at {offset:#x}",
                file=name,
                offset=at,
                expected=f"{content_pages} pages",
                found=f"{len(file) - at} bytes",
            )
        content = file[at:end] if content_pages else None
        measured = bool(chunks) if chunks in (0, ALL_CHUNKS) else chunks
        page = at // PAGE_SIZE if content_pages else None
        yield Region(offset, page_count, flags, content=content, fill=fill, measured=measured, file_page=page)
        at = end
    if at != len(file):
        raise ImageFormatError("file size", file=name, offset=at, expected=at, found=len(file))


def _check_contents(image: EnclaveImage, rows: Sequence[Sequence[int]], at: int, name: str) -> None:
    """Check the contents' checksums; ``at`` is where the first content stands in the file."""
    for region, row in zip(image.regions, rows, strict=True):
        found = 0
        if region.content is not None:
            found = xxhash.xxh3_64_intdigest(region.content)
        _check(f"checksum of the region at {region.offset:#x}", found, row[-1], name, at)
        at += row[-2] * PAGE_SIZE


def _dynamic(row: Sequence[int]) -> Region:
    return Region(row[0], row[1], TYPE_REG | READ | WRITE, measured=False)


def _page_end(offset: int) -> int:
    return -(-offset // PAGE_SIZE) * PAGE_SIZE


def save(image: EnclaveImage, path: PathLike) -> None:
    """Write ``image`` beside ``path`` and rename it: whoever reads sees the old file or the new one, whole.

    Equal images give equal files. Raises OSError, and ImageFormatError for an image with too many regions.
    """
    head = _encode_head(image)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(head)
            for content in _contents(image):
                file.write(content)
                file.write(bytes(-len(content) % PAGE_SIZE))
            file.flush()
            os.fsync(fd)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _contents(image: EnclaveImage) -> Iterator[memoryview]:
    for region in image.regions:
        if region.content is not None:
            yield memoryview(region.content).cast("B")


def _row(region: Region) -> list[int]:
    row = [region.offset, region.page_count, region.flags, region.chunks, region.fill, 0, 0]
    if region.content is not None and len(content := memoryview(region.content).cast("B")):
        digest = xxhash.xxh3_64(content)
        digest.update(bytes(-len(content) % PAGE_SIZE))
        row[-2:] = [-(-len(content) // PAGE_SIZE), digest.intdigest()]
    return row


def _encode_head(image: EnclaveImage) -> bytes:
    """Everything before the data: header, manifest, zeros."""
    if len(image.regions) > MAX_REGIONS or len(image.dynamic) > MAX_REGIONS:
        raise ImageFormatError("regions", expected=f"at most {MAX_REGIONS}", found=len(image.regions))
    manifest: bytes = msgpack.packb(
        {
            "size": image.size,
            "ssa_frame_size": image.ssa_frame_size,
            "regions": (rows := [_row(region) for region in image.regions]),
            "dynamic": [[region.offset, region.page_count] for region in image.dynamic],
        }
    )
    if len(manifest) > MAX_MANIFEST:
        raise ImageFormatError("manifest", expected=f"at most {MAX_MANIFEST} bytes", found=len(manifest))
    data_offset = _page_end(HEADER.size + len(manifest))
    values = {
        "magic": MAGIC,
        "version": VERSION,
        "manifest_size": len(manifest),
        "manifest_checksum": xxhash.xxh3_64_intdigest(manifest),
        "data_offset": data_offset,
        "file_size": data_offset + sum(row[-2] for row in rows) * PAGE_SIZE,
    }
    header = bytearray(HEADER.size)
    for field, value in values.items():
        HEADER.struct(field).pack_into(header, HEADER.offset(field), value)
    checksum = xxhash.xxh3_64_intdigest(header[: HEADER.offset("header_checksum")])
    HEADER.struct("header_checksum").pack_into(header, HEADER.offset("header_checksum"), checksum)
    return (bytes(header) + manifest).ljust(data_offset, b"\0")
