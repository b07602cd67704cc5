"""From a function's folder to an image: which files, and where they stand.

Layout, at rising offsets, an unmapped guard page between kinds::

    program manifest │ modules │ files │ native code │ distributions, by name │ data │ heap
    R                │ R       │ R     │ R X         │ R, R X                 │ R W  │ R W, not measured

Files and native code have a page-aligned start each. A distribution is the same pages in every image
(:mod:`enturbo.runtime.bundling`). The image depends on the names and bytes alone: names are sorted, and no
time, owner or absolute path goes in.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple

from ..shm.errors import ImageFormatError
from ..shm.layout import PAGE_SIZE
from . import bytecode
from .backing import pack
from .bundling import BuiltBundle, bundle_of
from .distributions import Distribution, find
from .files import MOUNT, SITE
from .image import EnclaveImage, PathLike
from .importer import base_names
from .labels import labelled
from .manifests import Extent, Library, is_module_name
from .natives import check_needed, natives
from .program import BundleAt, Program, encode, module_files, split_handler
from .region import EXECUTE, READ, TYPE_REG, WRITE, Region
from .sizes import pages_of, parse_size
from .store import Store

IGNORE_FILE: Final = "enclave-ignore.txt"
READ_ONLY: Final = TYPE_REG | READ
CODE: Final = TYPE_REG | READ | EXECUTE
WRITABLE: Final = TYPE_REG | READ | WRITE

# Modules are small and many: packed, their sources cost no half page each.
_MODULE_ALIGN: Final = 16
# Files up to this size share a region; a larger one has its own and is not copied again.
_SHARED: Final = 1 << 20


def build_image(
    folder: PathLike,
    *,
    heap: int | str,
    data: bytes | PathLike | int | None,
    handler: str,
    files: Mapping[str, PathLike | bytes],
    exclude: Sequence[str],
    requirements: Iterable[str],
    site: Sequence[PathLike] | None,
    store: Store | None,
    with_bytecode: bool,
) -> EnclaveImage:
    """See :meth:`EnclaveImage.from_function`."""
    root = Path(folder)
    if not root.is_dir():
        raise ImageFormatError("not a folder", file=str(root))
    contents = {name: path.read_bytes() for name, path in _walk(root, (*exclude, *_ignored(root)))}
    for name, source in files.items():
        if name in contents:
            raise ImageFormatError(f"{name!r} is given, but stands in the folder, too", file=str(root))
        contents[name] = source if isinstance(source, bytes) else Path(source).read_bytes()
    _check_handler(handler, contents, root)
    found = find(
        requirements, site=None if site is None else [os.fspath(one) for one in site], exclude=exclude
    )
    _check_distributions(found, contents, root)
    kept = Store.default() if store is None else store
    bundles = [bundle_of(distribution, kept, with_bytecode=with_bytecode) for distribution in found]
    if with_bytecode:
        bytecode.tag()
        contents |= bytecode.compiled(contents, MOUNT)
    libraries = natives(contents.items())
    _check_libraries(libraries, bundles)
    return _lay_out(_Function(handler, contents, libraries, bundles, _data_bytes(data), parse_size(heap)))


def _check_handler(handler: str, contents: Mapping[str, bytes], root: Path) -> None:
    if any(name in contents for name in module_files(split_handler(handler)[0])):
        return
    stems = (name[: -len(".py")].removesuffix("/__init__") for name in contents if name.endswith(".py"))
    modules = sorted(filter(is_module_name, (stem.replace("/", ".") for stem in stems)))
    raise ImageFormatError(
        f"handler {handler!r}",
        file=str(root),
        expected=f"one of the modules ({', '.join(modules) or 'no modules'})",
        found="no such module",
    )


def _check_distributions(found: Sequence[Distribution], contents: Mapping[str, bytes], root: Path) -> None:
    """No name means two things: not with the function's folder, the standard library, or another one."""
    if found and any(name.startswith(f"{SITE}/") for name in contents):
        raise ImageFormatError(
            f"a folder {SITE}", file=str(root), expected="none: the distributions' place in an enclave"
        )
    base = set(base_names())
    owners: dict[str, tuple[Distribution, str]] = {}
    for distribution in found:
        for file in distribution.files:
            top = file.name.partition("/")[0].partition(".")[0]
            if top in base and file.name.endswith((".py", ".so")):
                raise ImageFormatError(
                    f"{distribution} replaces a module of the standard library",
                    file=file.name,
                    expected=f"another name than {top}",
                )
            owner, digest = owners.setdefault(file.name, (distribution, file.digest))
            if owner is not distribution and digest != file.digest:
                raise ImageFormatError(
                    "two distributions have a file of one name, and different ones",
                    file=file.name,
                    expected="one of them left out (exclude)",
                    found=f"{owner} and {distribution}",
                )


def _check_libraries(own: Mapping[str, Library], bundles: Sequence[BuiltBundle]) -> None:
    whose: dict[str, str] = {}
    libraries = dict(own)
    for bundle in bundles:
        for name, library in bundle.table.libraries.items():
            libraries[f"{SITE}/{name}"] = library
            whose[f"{SITE}/{name}"] = f"{bundle.table.name} {bundle.table.version}"
    check_needed(libraries, whose)


def _ignored(root: Path) -> list[str]:
    try:
        lines = (root / IGNORE_FILE).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [IGNORE_FILE, *(line.strip() for line in lines if line.strip() and not line.startswith("#"))]


def _walk(root: Path, patterns: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Names (with ``/``) and paths of the files that go into the image."""
    top = root.resolve()

    def visit(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
        for path in sorted(folder.iterdir()):
            name = prefix + path.name
            if path.name.startswith(".") or path.name == "__pycache__" or path.name.endswith(".pyc"):
                continue
            if any(fnmatchcase(name, pattern) or fnmatchcase(path.name, pattern) for pattern in patterns):
                continue
            real = _resolve(path, top)
            mode = real.stat().st_mode
            if stat.S_ISDIR(mode):
                if real in above:
                    raise ImageFormatError("a link that leads back to its own folder", file=str(path))
                yield from visit(path, name + "/", (*above, real))
            elif stat.S_ISREG(mode):
                yield _text(name, path), real
            else:
                raise ImageFormatError("neither a file nor a folder", file=str(path))

    yield from visit(root, "", (top,))


def _resolve(path: Path, top: Path) -> Path:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ImageFormatError(f"cannot be followed ({error})", file=str(path)) from None
    if not real.is_relative_to(top):
        raise ImageFormatError(
            "a link that leads out of the folder", file=str(path), expected=f"below {top}", found=real
        )
    return real


def _text(name: str, path: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ImageFormatError("file name", file=str(path), expected="UTF-8", found=ascii(name)) from None
    return name


def _data_bytes(data: bytes | PathLike | int | None) -> bytes | int | None:
    if data is None or isinstance(data, bytes):
        return data
    if isinstance(data, int):
        return parse_size(data)
    return Path(data).read_bytes()


class _Layout:
    """Places regions at rising offsets."""

    def __init__(self, first_free: int) -> None:
        self.end = first_free
        self.regions: list[Region] = []

    def guard(self) -> None:
        """Leave one page unmapped."""
        self.end += PAGE_SIZE

    def place(self, size: int, flags: int, content: bytes | None, *, measured: bool = True) -> int:
        region = Region(self.end, pages_of(size), flags, content=content, measured=measured)
        self.regions.append(region)
        self.end = region.end
        return region.offset

    def pack(
        self, files: Iterable[tuple[str, bytes]], align: int, flags: int = READ_ONLY
    ) -> dict[str, Extent]:
        """One region that holds all ``files``, each at a multiple of ``align``."""
        blob = bytearray()
        extents: dict[str, Extent] = {}
        for name, content in files:
            blob.extend(bytes(-len(blob) % align))
            extents[name] = (self.end + len(blob), len(content))
            blob += content
        if blob:
            self.place(len(blob), flags, bytes(blob))
        return extents

    def bundle(self, built: BuiltBundle) -> BundleAt:
        """The regions of a distribution."""
        at = BundleAt(built.table.name, built.table.version, self.end, built.size)
        self.regions += built.regions(self.end)
        self.end += built.size
        return at


class _Function(NamedTuple):
    """What goes into an image."""

    handler: str
    contents: Mapping[str, bytes]
    libraries: Mapping[str, Library]
    bundles: Sequence[BuiltBundle]
    data: bytes | int | None
    heap: int


def _lay_out(function: _Function) -> EnclaveImage:
    """Place everything; the manifest's own size moves all that follows it, so try until it fits."""
    manifest_pages = 1
    while True:
        layout = _Layout(manifest_pages * PAGE_SIZE)
        encoded = encode(_place_all(layout, function))
        needed = pages_of(len(encoded))
        if needed <= manifest_pages:
            break
        manifest_pages = needed
    first = Region(0, manifest_pages, READ_ONLY, content=encoded)
    regions, backing = pack((first, *layout.regions))
    return EnclaveImage(labelled(regions), size=1 << (layout.end - 1).bit_length(), backing=backing)


def _place_all(layout: _Layout, function: _Function) -> Program:
    contents, libraries = function.contents, function.libraries
    sources = sorted(name for name in contents if name.endswith(".py"))
    others = sorted(name for name in contents if not name.endswith(".py") and name not in libraries)
    layout.guard()
    files = layout.pack(((name, contents[name]) for name in sources), _MODULE_ALIGN)
    layout.guard()
    small = (name for name in others if len(contents[name]) <= _SHARED)
    files |= layout.pack(((name, contents[name]) for name in small), PAGE_SIZE)
    for name in others:
        if len(contents[name]) > _SHARED:
            files[name] = (layout.place(len(contents[name]), READ_ONLY, contents[name]), len(contents[name]))
    if libraries:
        layout.guard()
        files |= layout.pack(((name, contents[name]) for name in sorted(libraries)), PAGE_SIZE, CODE)
    bundles = []
    for built in function.bundles:
        layout.guard()
        bundles.append(layout.bundle(built))
    data, data_extent, heap_extent = function.data, None, None
    if data:
        layout.guard()
        size, content = (data, None) if isinstance(data, int) else (len(data), data)
        data_extent = (layout.place(size, WRITABLE, content), size)
    if function.heap:
        layout.guard()
        size = pages_of(function.heap) * PAGE_SIZE
        heap_extent = (layout.place(size, WRITABLE, None, measured=False), size)
    return Program(
        function.handler,
        dict(sorted(files.items())),
        dict(sorted(libraries.items())),
        tuple(sorted(bundles)),
        data_extent,
        heap_extent,
    )
