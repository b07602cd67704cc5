"""What an enclave may import: modules in its own measured pages, then the listed standard library.

In an enclave, ``sys.meta_path`` is exactly BuiltinImporter, FrozenImporter, :class:`EPCFinder`,
:class:`BaseFinder`, and the search path, its hooks and its cache are empty: no folder, no .pth hook and no
finder of the embedding process decides what runs. A name that the image carries is the image's, as in a
script's own folder, even if the base had been imported before. Standard library only.
"""

from __future__ import annotations

import fnmatch
import importlib.abc
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    BuiltinImporter,
    ExtensionFileLoader,
    FrozenImporter,
    ModuleSpec,
    SourceFileLoader,
)
from importlib.util import decode_source, spec_from_file_location
from types import CodeType, ModuleType
from typing import Any, Final

from .program import Program

ORIGIN: Final = "epc:/"  # what __file__ begins with; never a path of the host

_Path = Sequence[str] | None


class EPCFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of a program manifest. ``read(offset, size)`` returns bytes through the gate."""

    def __init__(self, program: Program, read: Callable[[int, int], bytes]) -> None:
        self._program = program
        self._read = read

    def find_spec(self, fullname: str, path: _Path, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's spec, or None if the image carries no such module."""
        entry = self._program.modules.get(fullname)
        if entry is None:
            return None
        file, is_package = entry
        spec = ModuleSpec(fullname, EPCLoader(self, fullname), origin=ORIGIN + file, is_package=is_package)
        spec.has_location = True
        if is_package:
            spec.submodule_search_locations = [ORIGIN + file.rpartition("/")[0]]
        return spec

    def file_of(self, fullname: str) -> str:
        """Name of the module's file. Raises ImportError."""
        entry = self._program.modules.get(fullname)
        if entry is None:
            raise ImportError(f"the enclave carries no module {fullname}", name=fullname)
        return entry[0]

    def is_package(self, fullname: str) -> bool:
        """Is the module a package? Raises ImportError."""
        self.file_of(fullname)
        return self._program.modules[fullname][1]

    def contents(self, file: str) -> bytes:
        """The bytes of a file of the image, waiting for their pages. Raises FileNotFoundError."""
        extent = self._program.files.get(file)
        if extent is None:
            raise FileNotFoundError(f"the enclave carries no file {file!r}")
        return self._read(*extent)


class EPCLoader(importlib.abc.InspectLoader):
    """Runs a module from its source in EPC pages. ``get_source`` serves tracebacks, ``get_data`` pkgutil."""

    def __init__(self, finder: EPCFinder, fullname: str) -> None:
        self._finder = finder
        self._name = fullname

    def is_package(self, fullname: str) -> bool:
        """Is the module a package?"""
        return self._finder.is_package(fullname)

    def get_filename(self, fullname: str) -> str:
        """What the module's ``__file__`` says."""
        return ORIGIN + self._finder.file_of(fullname)

    def get_data(self, path: str) -> bytes:
        """The bytes of the file that ``path`` names, an ORIGIN path. Raises OSError."""
        if not path.startswith(ORIGIN):
            raise FileNotFoundError(f"not a file of the enclave: {path!r}")
        return self._finder.contents(path[len(ORIGIN) :])

    def get_source(self, fullname: str) -> str:
        """The module's source text."""
        return decode_source(self._finder.contents(self._finder.file_of(fullname)))

    def get_code(self, fullname: str) -> CodeType:
        """The module's code, compiled from the bytes in the EPC; no cached bytecode is ever looked for."""
        file = self._finder.file_of(fullname)
        code: CodeType = compile(self._finder.contents(file), ORIGIN + file, "exec", dont_inherit=True)
        return code


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


def install(*finders: EPCFinder | BaseFinder) -> None:
    """From now on only what is built in, and what ``finders`` find, can be imported in this process."""
    first: list[Any] = [BuiltinImporter, FrozenImporter]
    sys.meta_path[:] = [*first, *finders]
    sys.path[:] = []
    sys.path_hooks[:] = []
    sys.path_importer_cache.clear()
    # An enclave writes no bytecode into the installation that it shares with all others.
    sys.dont_write_bytecode = True


def forget_carried(program: Program) -> None:
    """Drop what the base imported under names that the image carries: the next import finds the image's."""
    carried = {name.partition(".")[0] for name in program.modules} - {"__main__"}
    for name in list(sys.modules):
        top = name.partition(".")[0]
        if top in carried and top not in sys.builtin_module_names and FrozenImporter.find_spec(top) is None:
            del sys.modules[name]
