"""What an enclave may import: modules in its own measured pages, then the listed standard library.

In an enclave ``sys.path`` holds the image's own folders (:mod:`enturbo.runtime.files`), the only path hook is
:class:`ImageFolder`, and ``sys.meta_path`` is exactly::

    BuiltinImporter, FrozenImporter    the interpreter's own
    ImageFinder                        modules and packages in the image's folders
    BaseFinder                         the standard library, as listed
    PathFinder                         what is left: folders of the image that are namespace packages

No folder of the host, no .pth hook and no finder of the embedding process decides what runs. A name that the
image carries is the image's, as in a script's own folder, even if the base had been imported before. Standard
library and msgpack only.
"""

from __future__ import annotations

import fnmatch
import importlib.abc
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    BuiltinImporter,
    ExtensionFileLoader,
    FrozenImporter,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
)
from importlib.util import decode_source, spec_from_file_location
from types import CodeType, ModuleType
from typing import Any, Final

from . import bytecode
from .files import MOUNT, SITE, SITE_MOUNT, Files, name_of
from .libraries import Libraries

_Path = Sequence[str] | None
_OURS: Final = ("msgpack",)  # not standard, and imported by the enclave's side


class ImageLoader(SourceFileLoader):
    """Runs a module from its source in EPC pages. ``get_source`` serves tracebacks, ``get_data`` pkgutil.

    The resource reader that it inherits goes by paths, which lead into the image: see
    :mod:`enturbo.runtime.mount`.
    """

    def __init__(self, fullname: str, path: str, files: Files) -> None:
        super().__init__(fullname, path)
        self._files = files

    def get_data(self, path: str) -> bytes:
        """The bytes of the image's file at ``path``. Raises FileNotFoundError."""
        name = name_of(path)
        if name is None:
            raise FileNotFoundError(f"not a file of the enclave: {path!r}")
        return self._files.read(name)

    def get_source(self, fullname: str) -> str:
        """The module's source text."""
        return decode_source(self.get_data(self.get_filename(fullname)))

    def get_code(self, fullname: str) -> CodeType:
        """The module's code: compiled when the image was built, or now, from its source in the EPC."""
        path = self.get_filename(fullname)
        name = name_of(path)
        extent = None if name is None else self._files.extents.get(bytecode.cache_name(name))
        code = None if extent is None else bytecode.load(self._files.read_at(*extent))
        if code is None:
            code = compile(self.get_data(path), path, "exec", dont_inherit=True)
        return code


class ImageExtensionLoader(ExtensionFileLoader):
    """Loads an extension module from a memory file that was filled from EPC pages, after what it needs."""

    def __init__(self, fullname: str, path: str, libraries: Libraries) -> None:
        super().__init__(fullname, path)
        self._libraries = libraries

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See :class:`importlib.abc.Loader`. Raises ImportError."""
        name = name_of(self.path)
        assert name is not None  # the path is the image's: ImageFolder gave it
        with self._libraries.opened(name) as path:
            # The dynamic loader is told the memory file; everyone else sees where the image has the module.
            return super().create_module(ModuleSpec(spec.name, self, origin=path))

    def exec_module(self, module: ModuleType) -> None:
        """See :class:`importlib.abc.Loader`."""
        module.__file__ = self.path
        super().exec_module(module)


class ImageFolder:
    """The finder of one folder of the image: what ``sys.path_hooks`` gives for its path."""

    def __init__(self, files: Files, libraries: Libraries, path: str) -> None:
        """Raises ImportError for a path that is not the image's."""
        name = name_of(path)
        if name is None or not files.is_folder(name):
            raise ImportError(f"only what the enclave carries can be imported, not what is in {path!r}")
        self.path = path
        self._files, self._libraries = files, libraries
        self._prefix = f"{name}/" if name else ""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """A package before a module, an extension before a source, as the interpreter's own finder has it."""
        tail = fullname.rpartition(".")[2]
        found = self._load(fullname, tail + "/__init__") or self._load(fullname, tail)
        if found is None and self._files.is_folder(self._prefix + tail):
            found = ModuleSpec(fullname, None, is_package=True)
            found.submodule_search_locations = [f"{self.path}/{tail}"]
        return found

    def _load(self, fullname: str, stem: str) -> ModuleSpec | None:
        extents, base = self._files.extents, self._prefix + stem
        locations = [f"{self.path}/{stem[: -len('/__init__')]}"] if stem.endswith("/__init__") else None
        for suffix in EXTENSION_SUFFIXES:
            if base + suffix in extents:
                path = f"{self.path}/{stem}{suffix}"
                extension = ImageExtensionLoader(fullname, path, self._libraries)
                return _spec(fullname, path, extension, locations)
        for suffix in SOURCE_SUFFIXES:
            if base + suffix in extents:
                path = f"{self.path}/{stem}{suffix}"
                return _spec(fullname, path, ImageLoader(fullname, path, self._files), locations)
        return None

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """Names and kinds (is it a package?) of what the folder holds, for pkgutil."""
        names = self._files.folders.get(self._prefix.rstrip("/"), {})
        seen = {"__init__"}
        for name in names:
            module, dot, rest = name.partition(".")
            is_package = self._files.is_folder(self._prefix + name)
            if module in seen or not module.isidentifier():
                continue
            if (is_package and self._load(module, f"{name}/__init__")) or (
                not is_package and dot and dot + rest in (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES)
            ):
                seen.add(module)
                yield prefix + module, is_package

    def invalidate_caches(self) -> None:
        """An image does not change."""


def _spec(fullname: str, path: str, loader: Any, locations: list[str] | None) -> ModuleSpec | None:
    return spec_from_file_location(fullname, path, loader=loader, submodule_search_locations=locations)


class ImageFinder(importlib.abc.MetaPathFinder):
    """What stands in the image's folders, but for folders that are namespace packages: those come last."""

    def find_spec(self, fullname: str, path: _Path, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's spec, or None if the image carries no such module."""
        spec = PathFinder.find_spec(fullname, path, target)
        return None if spec is None or spec.loader is None else spec


class BaseFinder(importlib.abc.MetaPathFinder):
    """Finds the named standard-library modules, and what stands in their packages, in fixed folders."""

    def __init__(self, names: Iterable[str], stdlib: str, dynload: Sequence[str]) -> None:
        names = list(names)
        self._names = frozenset(names)
        self._patterns = [name for name in names if "*" in name]
        self._stdlib = stdlib
        self._top = [stdlib, *dynload]

    def find_spec(self, fullname: str, path: _Path, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's spec, or None if the base has no such module."""
        top, *rest = fullname.split(".")
        if top not in self._names and not any(fnmatch.fnmatchcase(top, name) for name in self._patterns):
            return None
        # Below the top only in a package of the base: an image's package of that name has another path.
        folders = [folder for folder in path or () if self._inside(folder)] if rest else self._top
        for folder in folders:
            spec = _find_in(folder, fullname)
            if spec is not None:
                return spec
        return None

    def _inside(self, folder: str) -> bool:
        return any(folder.startswith(top + os.sep) for top in self._top)


def _find_in(folder: str, fullname: str) -> ModuleSpec | None:
    base = os.path.join(folder, fullname.rpartition(".")[2])
    package = os.path.join(base, "__init__.py")
    if os.path.isfile(package):
        return spec_from_file_location(
            fullname, package, loader=SourceFileLoader(fullname, package), submodule_search_locations=[base]
        )
    for suffix in EXTENSION_SUFFIXES:
        if os.path.isfile(base + suffix):
            loader = ExtensionFileLoader(fullname, base + suffix)
            return spec_from_file_location(fullname, base + suffix, loader=loader)
    if os.path.isfile(base + ".py"):
        return spec_from_file_location(
            fullname, base + ".py", loader=SourceFileLoader(fullname, base + ".py")
        )
    return None


def base_names() -> list[str]:
    """The names in base.txt, which stands beside this module."""
    with open(os.path.join(os.path.dirname(__file__), "base.txt"), encoding="ascii") as file:
        lines = [line.strip() for line in file]
    return [line for line in lines if line and not line.startswith("#")]


def base_finder() -> BaseFinder:
    """The base finder of this interpreter. Its folders are those that hold ``os`` and the extensions."""
    stdlib = os.path.dirname(os.__file__)
    dynload = [
        folder for folder in sys.path if folder != stdlib and os.path.basename(folder) == "lib-dynload"
    ]
    return BaseFinder(base_names(), stdlib, dynload)


def confine(base: BaseFinder) -> None:
    """From now on only what is built in, and the base, can be imported in this process."""
    first: list[Any] = [BuiltinImporter, FrozenImporter]
    sys.meta_path[:] = [*first, base]
    sys.path[:] = []
    sys.path_hooks[:] = []
    sys.path_importer_cache.clear()
    # An enclave writes no bytecode into the installation that it shares with all others.
    sys.dont_write_bytecode = True


def install(files: Files, libraries: Libraries, base: BaseFinder) -> None:
    """From now on what the image carries, too."""
    confine(base)
    sys.meta_path[2:] = [ImageFinder(), base, PathFinder]
    sys.path[:] = [MOUNT, SITE_MOUNT] if files.is_folder(SITE) else [MOUNT]
    sys.path_hooks[:] = [lambda path: ImageFolder(files, libraries, path)]


def forget_carried(files: Files) -> None:
    """Drop what the base imported under names that the image carries: the next import finds the image's.

    So are those that only this package's own code needs, which has them: no image can import them from here.
    """
    for name in list(sys.modules):
        top = name.partition(".")[0]
        if top == "__main__" or top in sys.builtin_module_names or FrozenImporter.find_spec(top) is not None:
            continue
        if top in _OURS or carries(files, top):
            del sys.modules[name]


def carries(files: Files, top: str) -> bool:
    """Has the image a module or package of that name in one of its two folders?"""
    for folder in ("", f"{SITE}/"):
        for stem in (f"{folder}{top}/__init__", f"{folder}{top}"):
            if any(stem + suffix in files.extents for suffix in (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)):
                return True
    return False
