"""The ``.enclave`` file: an image of ours on disk, made to be mapped.

::

    0        header, 64 bytes: magic, version, where things are, checksums
    64       manifest: msgpack, the layers and the regions in EADD order
    …        zeros up to the next page
    data     contents of regions, whole pages, in the order of the regions, without holes

Data is page-aligned, so that any process can map a region's pages as they are. Each byte is covered by a
checksum (XXH3, 64 bits) or has to be zero, so a damaged or shortened file is refused before it is used.
Checksums are against accidents; against attackers there is the measurement.

A region's content may stand in a layer instead, an object of a store that the manifest names by its SHA-256:
the file is thin then, and whoever loads it needs these objects. Layers are numbered from 1 on in the order in
which regions first use them, each is used, and none comes twice, so an image has one form with given layers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import msgpack
import xxhash

from ...shm.errors import ImageFormatError
from ...shm.layout import ALL_CHUNKS, PAGE_SIZE, Record
from ..backing import Backing
from ..labels import labelled
from ..manifests import unpack_canonical
from ..region import MAX_PAGES, READ, TYPE_REG, WRITE, Region
from ..store import Store

if TYPE_CHECKING:
    from ..image import EnclaveImage, PathLike

MAGIC: Final = b"ENTURBOI"
VERSION: Final = 2
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
PIECE: Final = 1 << 20  # bytes of a layer that are read at a time


class _Row(NamedTuple):
    """One region in the manifest. ``checksum`` is of the content, where that stands in this file (layer 0);
    a layer's content begins at ``layer_page`` of it and has the layer's digest."""

    offset: int
    page_count: int
    flags: int
    chunks: int
    fill: int
    content_pages: int
    checksum: int
    layer: int
    layer_page: int

    @property
    def data_pages(self) -> int:
        """Pages of content in this file."""
        return 0 if self.layer else self.content_pages


_DIGEST_SIZE: Final = 32
_DYNAMIC: Final = ("offset", "page_count")
_KEYS: Final = ("size", "ssa_frame_size", "layers", "regions", "dynamic")


def load(file: BinaryIO, name: str, store: Store | None = None) -> EnclaveImage:
    """Map ``file``, check all of it, and return the image, whose contents are slices of the mapping, or of
    layers from ``store`` (None: the default store).

    Raises ImageFormatError with offset, expected and found, also for a layer that the store does not have.
    """
    from ..image import EnclaveImage

    file_size = os.fstat(file.fileno()).st_size
    if file_size < HEADER.size:
        raise ImageFormatError("file size", file=name, expected=f"at least {HEADER.size}", found=file_size)
    mapping = mmap.mmap(file.fileno(), file_size, access=mmap.ACCESS_READ)
    backing = Backing(os.dup(file.fileno()), mapping)
    try:
        manifest, data_offset = _check_ends(mapping, file_size, name)
        rows = [_Row(*row) for row in manifest["regions"]]
        _check_layers(manifest["layers"], rows)
        layers = _open_layers(manifest["layers"], store, name)
        # Sizes and places before checksums: a lie in the manifest must not cost a pass over the file.
        image = EnclaveImage(
            labelled(list(_regions(rows, layers, memoryview(mapping), data_offset, name))),
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
    _check_contents(image, rows, data_offset, name)
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
    for key, names in (("regions", _Row._fields), ("dynamic", _DYNAMIC)):
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
    layers = manifest["layers"]
    if not isinstance(layers, tuple) or not all(map(_is_layer, layers)):
        raise ImageFormatError("manifest's layers", offset=HEADER.size, expected="rows of SHA-256, pages")
    return manifest


def _is_layer(row: object) -> bool:
    match row:
        case (bytes(digest), int(pages)):
            return len(digest) == _DIGEST_SIZE and type(pages) is int and 0 < pages < MAX_PAGES
    return False


def _check_layers(layers: Sequence[tuple[bytes, int]], rows: Sequence[_Row]) -> None:
    """What regions and layers say of one another, before any layer is opened."""

    def check(what: str, good: bool, expected: str, found: object) -> None:
        if not good:
            raise ImageFormatError(what, offset=HEADER.size, expected=expected, found=found)

    used = 0
    for row in rows:
        what, most = f"layer of the region at {row.offset:#x}", min(used + 1, len(layers))
        check(what, row.layer <= most, f"at most {most}", row.layer)
        used = max(used, row.layer)
        place = f"{row.content_pages} pages from {row.layer_page} on, checksum {row.checksum:#x}"
        if row.layer:
            pages = layers[row.layer - 1][1]
            inside = row.content_pages > 0 and row.layer_page + row.content_pages <= pages
            check(what, inside and row.checksum == 0, f"some of its {pages} pages, checksum 0", place)
        else:
            check(what, row.layer_page == 0, "page 0 where there is no layer", place)
    check("manifest's layers", used == len(layers), f"{used}, which are used", len(layers))
    different = len({digest for digest, _ in layers})
    check("manifest's layers", different == len(layers), "each once", f"{different} of {len(layers)}")


def _open_layers(layers: Sequence[tuple[bytes, int]], store: Store | None, name: str) -> list[Backing]:
    """The layers' objects, of which the store has checked the content."""
    found: list[Backing] = []
    if not layers:
        return found
    store = store or Store.default()
    for number, (digest, pages) in enumerate(layers, 1):
        try:
            layer = store.open(digest.hex())
        except ImageFormatError as error:
            raise ImageFormatError(f"layer {number}: {error}", file=name, offset=HEADER.size) from None
        _check(f"size of layer {number}", len(layer.view), pages * PAGE_SIZE, name, HEADER.size)
        found.append(layer)
    return found


def _regions(
    rows: Sequence[_Row], layers: Sequence[Backing], file: memoryview, at: int, name: str
) -> Iterator[Region]:
    """The regions, whose contents in the file follow one another from ``at`` to its end."""
    for row in rows:
        layer = layers[row.layer - 1] if row.layer else None
        start = at if layer is None else row.layer_page * PAGE_SIZE
        end = start + row.content_pages * PAGE_SIZE
        if layer is None and end > len(file):
            raise ImageFormatError(
                f"content of the region at {row.offset:#x}",
                file=name,
                offset=at,
                expected=f"{row.content_pages} pages",
                found=f"{len(file) - at} bytes",
            )
        view = file if layer is None else layer.view
        yield Region(
            row.offset,
            row.page_count,
            row.flags,
            content=view[start:end] if row.content_pages else None,
            fill=row.fill,
            measured=bool(row.chunks) if row.chunks in (0, ALL_CHUNKS) else row.chunks,
            file_page=start // PAGE_SIZE if row.content_pages else None,
            layer=layer,
        )
        at += row.data_pages * PAGE_SIZE
    if at != len(file):
        raise ImageFormatError("file size", file=name, offset=at, expected=at, found=len(file))


def _check_contents(image: EnclaveImage, rows: Sequence[_Row], at: int, name: str) -> None:
    """Check the checksums of what stands in the file, from ``at`` on."""
    for region, row in zip(image.regions, rows, strict=True):
        found = 0
        if region.content is not None and region.layer is None:
            found = xxhash.xxh3_64_intdigest(region.content)
        _check(f"checksum of the region at {region.offset:#x}", found, row.checksum, name, at)
        at += row.data_pages * PAGE_SIZE


def _dynamic(row: Sequence[int]) -> Region:
    return Region(row[0], row[1], TYPE_REG | READ | WRITE, measured=False)


def _page_end(offset: int) -> int:
    return -(-offset // PAGE_SIZE) * PAGE_SIZE


def save(image: EnclaveImage, path: PathLike, store: Store | None = None) -> None:
    """Write ``image`` beside ``path`` and rename it: whoever reads sees the old file or the new one, whole.

    With a ``store`` the file names the layers that have a digest, and the store gets those that it does not
    have; without one everything stands in the file. Equal images give equal files, if their layers are equal,
    too. Raises OSError, and ImageFormatError for an image with too many regions.
    """
    layers = {} if store is None else _layers(image)
    for digest, layer in layers.items():
        if store is not None and not store.has(digest):
            _keep(layer, store)
    head = _encode_head(image, layers)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(head)
            for content in _contents(image, layers):
                file.write(content)
                file.write(bytes(-len(content) % PAGE_SIZE))
            file.flush()
            os.fsync(fd)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _digest(region: Region) -> str | None:
    """What names the region's layer in a store; None: no layer, or it has no name."""
    if region.layer is None or region.file_page is None or not region.content:
        return None
    return region.layer.digest


def _layers(image: EnclaveImage) -> dict[str, Backing]:
    """Layers by their digests, in the order of their first use."""
    layers: dict[str, Backing] = {}
    for region in image.regions:
        if (digest := _digest(region)) is not None and region.layer is not None:
            layers.setdefault(digest, region.layer)
    return layers


def _keep(layer: Backing, store: Store) -> None:
    """Put a layer into ``store``, too."""
    found = store.put(os.pread(layer.fd, PIECE, at) for at in range(0, len(layer.view), PIECE))
    if found != layer.digest:
        raise ImageFormatError("layer: changed after it was loaded", expected=layer.digest, found=found)


def _contents(image: EnclaveImage, layers: Container[str | None]) -> Iterator[memoryview]:
    for region in image.regions:
        if region.content is not None and _digest(region) not in layers:
            yield memoryview(region.content).cast("B")


def _row(region: Region, numbers: Mapping[str | None, int]) -> _Row:
    row = _Row(region.offset, region.page_count, region.flags, region.chunks, region.fill, 0, 0, 0, 0)
    if region.content is None or not len(content := memoryview(region.content).cast("B")):
        return row
    row = row._replace(content_pages=-(-len(content) // PAGE_SIZE))
    if (number := numbers.get(_digest(region))) is not None:
        return row._replace(layer=number, layer_page=region.file_page or 0)
    digest = xxhash.xxh3_64(content)
    digest.update(bytes(-len(content) % PAGE_SIZE))
    return row._replace(checksum=digest.intdigest())


def _encode_head(image: EnclaveImage, layers: Mapping[str, Backing]) -> bytes:
    """Everything before the data: header, manifest, zeros."""
    if len(image.regions) > MAX_REGIONS or len(image.dynamic) > MAX_REGIONS:
        raise ImageFormatError("regions", expected=f"at most {MAX_REGIONS}", found=len(image.regions))
    numbers: dict[str | None, int] = {digest: number for number, digest in enumerate(layers, 1)}
    manifest: bytes = msgpack.packb(
        {
            "size": image.size,
            "ssa_frame_size": image.ssa_frame_size,
            "layers": [[bytes.fromhex(name), len(each.view) // PAGE_SIZE] for name, each in layers.items()],
            "regions": (rows := [_row(region, numbers) for region in image.regions]),
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
        "file_size": data_offset + sum(row.data_pages for row in rows) * PAGE_SIZE,
    }
    header = bytearray(HEADER.size)
    for field, value in values.items():
        HEADER.struct(field).pack_into(header, HEADER.offset(field), value)
    checksum = xxhash.xxh3_64_intdigest(header[: HEADER.offset("header_checksum")])
    HEADER.struct("header_checksum").pack_into(header, HEADER.offset("header_checksum"), checksum)
    return (bytes(header) + manifest).ljust(data_offset, b"\0")
