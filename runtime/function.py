"""From a function's folder to an image: which files, and where they stand.

Layout, at rising offsets, an unmapped guard page between kinds::

    program manifest │ modules │ files (a page-aligned start each) │ data │ heap
    R                │ R       │ R                                 │ R W  │ R W, not measured

The image depends on the names and bytes alone: names are sorted, and no time, owner or absolute path goes in.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ..shm.errors import ImageFormatError
from ..shm.layout import PAGE_SIZE
from .backing import pack
from .image import EnclaveImage, PathLike
from .program import Extent, Program, encode, is_module_name, split_handler
from .region import READ, TYPE_REG, WRITE, Region
from .sizes import pages_of, parse_size

IGNORE_FILE: Final = "enclave-ignore.txt"
READ_ONLY: Final = TYPE_REG | READ
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
    modules = find_modules(contents)
    if split_handler(handler)[0] not in modules:
        known = ", ".join(sorted(modules)) or "no modules"
        raise ImageFormatError(
            f"handler {handler!r}",
            file=str(root),
            expected=f"one of the modules ({known})",
            found="no such module",
        )
    return _lay_out(handler, modules, contents, _data_bytes(data), parse_size(heap))


def find_modules(contents: dict[str, bytes]) -> dict[str, tuple[str, bool]]:
    """Modules among the files: dotted name → (file name, is it a package).

    A folder of modules without an ``__init__.py`` is a package with an empty one, which is added to
    ``contents``. As in Python a package comes before a module of the same name.
    """
    modules: dict[str, tuple[str, bool]] = {}
    for name in sorted(contents):
        dotted = name.removesuffix(".py").replace("/", ".")
        if not name.endswith(".py") or name == "__init__.py" or not is_module_name(dotted):
            continue
        if dotted.endswith(".__init__"):
            modules[dotted.removesuffix(".__init__")] = (name, True)
        else:
            modules.setdefault(dotted, (name, False))
    for dotted in list(modules):
        parents = dotted.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            file = "/".join((*parents[:depth], "__init__.py"))
            contents.setdefault(file, b"")
            modules[".".join(parents[:depth])] = (file, True)
    return dict(sorted(modules.items()))


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

    def pack(self, files: Iterable[tuple[str, bytes]], align: int) -> dict[str, Extent]:
        """One read-only region that holds all ``files``, each at a multiple of ``align``."""
        blob = bytearray()
        extents: dict[str, Extent] = {}
        for name, content in files:
            blob.extend(bytes(-len(blob) % align))
            extents[name] = (self.end + len(blob), len(content))
            blob += content
        if blob:
            self.place(len(blob), READ_ONLY, bytes(blob))
        return extents


def _lay_out(
    handler: str,
    modules: Mapping[str, tuple[str, bool]],
    contents: Mapping[str, bytes],
    data: bytes | int | None,
    heap: int,
) -> EnclaveImage:
    """Place everything; the manifest's own size moves all that follows it, so try until it fits."""
    manifest_pages = 1
    while True:
        layout = _Layout(manifest_pages * PAGE_SIZE)
        encoded = encode(_place_all(layout, handler, modules, contents, data, heap))
        needed = pages_of(len(encoded))
        if needed <= manifest_pages:
            break
        manifest_pages = needed
    first = Region(0, manifest_pages, READ_ONLY, content=encoded)
    regions, backing = pack((first, *layout.regions))
    return EnclaveImage(regions, size=1 << (layout.end - 1).bit_length(), backing=backing)


def _place_all(
    layout: _Layout,
    handler: str,
    modules: Mapping[str, tuple[str, bool]],
    contents: Mapping[str, bytes],
    data: bytes | int | None,
    heap: int,
) -> Program:
    sources = {file for file, _ in modules.values()}
    others = sorted(name for name in contents if name not in sources)
    layout.guard()
    files = layout.pack(((name, contents[name]) for name in sorted(sources)), _MODULE_ALIGN)
    layout.guard()
    small = (name for name in others if len(contents[name]) <= _SHARED)
    files |= layout.pack(((name, contents[name]) for name in small), PAGE_SIZE)
    for name in others:
        if len(contents[name]) > _SHARED:
            files[name] = (layout.place(len(contents[name]), READ_ONLY, contents[name]), len(contents[name]))
    data_extent = heap_extent = None
    if data:
        layout.guard()
        size, content = (data, None) if isinstance(data, int) else (len(data), data)
        data_extent = (layout.place(size, WRITABLE, content), size)
    if heap:
        layout.guard()
        size = pages_of(heap) * PAGE_SIZE
        heap_extent = (layout.place(size, WRITABLE, None, measured=False), size)
    return Program(handler, modules, dict(sorted(files.items())), data_extent, heap_extent)
