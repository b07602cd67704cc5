"""The workloads beside this module: what ``workload.toml`` in each folder says.

    title         one line
    requirements  distributions, as pip names them; what they require comes along
    heap          as ``EnclaveImage.from_function`` takes it
    exclude       patterns of files that stay out of the image (of the folder, and below site-packages)
    files         more files: name in the image = "package:path in it", of an installed package
    builder       files that are made first: name in the image = "module:function", which gives a path
    [[call]]      an event, and the answer that is expected; in this order, in one enclave

Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parent
FILE: Final = "workload.toml"
INSTALL: Final = 'pip install "enturbo[workloads]"'


class CatalogueError(ValueError):
    """A workload.toml that is not one, or a file that a workload needs and is not there."""


@dataclass(frozen=True)
class Call:
    """One event, and what the handler has to answer."""

    event: Any
    expected: Any


@dataclass(frozen=True)
class Workload:
    """A function, what it needs, and how to tell that it works."""

    name: str
    title: str
    folder: Path
    requirements: tuple[str, ...]
    heap: str
    exclude: tuple[str, ...]  # workload.toml among them: what is expected is no part of a function
    files: Mapping[str, str]
    builder: Mapping[str, str]
    calls: tuple[Call, ...]

    def resolve_files(self) -> dict[str, Path]:
        """The paths of ``files`` and ``builder``, by name in the image.

        Packages of ``files`` are not imported. Functions of ``builder`` are called; they may take a while the
        first time. Raises CatalogueError if a package, a file or a function is not there.
        """
        found = {name: package_file(where) for name, where in self.files.items()}
        return found | {name: _build(where) for name, where in self.builder.items()}


def load_all(folder: Path = FOLDER) -> list[Workload]:
    """All workloads below ``folder``, by name. Raises CatalogueError and OSError."""
    return [load(path.parent) for path in sorted(folder.glob(f"*/{FILE}"))]


def load(folder: Path) -> Workload:
    """The workload in ``folder``. Raises CatalogueError and OSError."""
    path = folder / FILE
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CatalogueError(f"{path}: not TOML: {error}") from None
    reader = _Reader(str(path), table)
    workload = Workload(
        name=folder.name,
        title=reader.text("title"),
        folder=folder,
        requirements=reader.texts("requirements"),
        heap=reader.text("heap"),
        exclude=(FILE, *reader.texts("exclude")),
        files=reader.places("files"),
        builder=reader.places("builder"),
        calls=tuple(reader.calls()),
    )
    reader.finish()
    return workload


def package_file(where: str) -> Path:
    """The file that ``"package:path"`` names. The package is found, and not imported.

    Raises CatalogueError if it is not installed, or has no such file.
    """
    package, _, inside = where.partition(":")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of a dotted name, the package above
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, inside)
        if path.is_file():
            return path
    what = "the package is not installed" if spec is None else "the package has no such file"
    raise CatalogueError(f"{where}: {what}; {INSTALL}")


def _build(where: str) -> Path:
    module, _, function = where.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CatalogueError(f"{where}: {error}") from None
    return Path(made())


class _Reader:
    """Takes values out of a table, each of the type that it must have; what is left over is unknown."""

    def __init__(self, where: str, table: dict[str, Any]) -> None:
        self._where = where
        self._table = table

    def text(self, key: str) -> str:
        return str(self._take(key, str, "a text"))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; none if the key is missing."""
        values = self._take(key, list, "a list of texts", [])
        if not all(isinstance(value, str) for value in values):
            raise self._error(key, "a list of texts", values)
        return tuple(values)

    def places(self, key: str) -> dict[str, str]:
        """A table of ``name = "left:right"``; none if the key is missing."""
        values: dict[str, str] = self._take(key, dict, "a table", {})
        for name, value in values.items():
            if not isinstance(value, str) or not all(value.partition(":")):
                raise self._error(f"{key}.{name}", 'a text of the kind "left:right"', value)
        return values

    def calls(self) -> Iterator[Call]:
        """The ``[[call]]`` tables, two at least."""
        tables = self._take("call", list, "a list of tables")
        if len(tables) < 2:
            raise self._error("call", "two or more", len(tables))
        for number, table in enumerate(tables, 1):
            if not isinstance(table, dict) or set(table) != {"event", "expected"}:
                raise self._error(f"call {number}", "event and expected", sorted(table))
            yield Call(table["event"], table["expected"])

    def finish(self) -> None:
        """Raises CatalogueError for keys that nobody has taken."""
        if self._table:
            raise CatalogueError(f"{self._where}: unknown: {', '.join(sorted(self._table))}")

    def _take(self, key: str, kind: type, what: str, default: Any = None) -> Any:
        value = self._table.pop(key, default)
        if value is None:
            raise CatalogueError(f"{self._where}: {key} is missing: expected {what}")
        if not isinstance(value, kind):
            raise self._error(key, what, value)
        return value

    def _error(self, key: str, expected: str, found: Any) -> CatalogueError:
        return CatalogueError(f"{self._where}: {key}: expected {expected}, found {found!r}")
