"""The three floors, read from the source: ``shm`` knows nothing of ours, ``workers`` only ``shm``.

And the enclave's side: what the zygote's modules import, and so on, must be the standard library, msgpack
and one another. An image brings its own numpy, which cannot be loaded twice into one process, and whatever
the base has loaded is trusted without being measured.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import enturbo

PACKAGE = Path(enturbo.__file__).parent

# floor: the packages of ours that it may import from
FLOORS = {
    "shm": {"shm"},
    "workers": {"workers", "shm"},
    "runtime": {"runtime", "workers", "shm"},
}

# The one place that may reach up: `enturbo demo` runs the example.
REACHES_UP = {"enturbo.runtime.commands.machine": {"enturbo.examples"}}

# Where the enclave process's code begins; what these import counts as well.
ENCLAVE_SIDE = (
    "enturbo.runtime.context",
    "enturbo.runtime.gate",
    "enturbo.runtime.importer",
    "enturbo.runtime.messages",
    "enturbo.runtime.program",
    "enturbo.runtime.zygote",
)
ENCLAVE_BASE = sys.stdlib_module_names | {"msgpack"}


def source(module: str) -> Path | None:
    """The file of one of our modules; None for a name that is no module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def name_of(path: Path) -> str:
    """``enturbo.shm.layout`` of ``…/shm/layout.py``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("enturbo", *parts)).removesuffix(".__init__")


def for_types_only(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``, which never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, *, in_functions: bool) -> Iterator[ast.AST]:
    """The nodes under ``node`` that can run; without ``in_functions``, those that run on import."""
    for child in ast.iter_child_nodes(node):
        if for_types_only(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield other
                yield from statements(other, in_functions=in_functions)
            continue
        if not in_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from statements(child, in_functions=in_functions)


def imports(text: str, module: str, *, is_package: bool, in_functions: bool = True) -> set[str]:
    """The absolute names that the source of ``module`` imports; ``from x import y`` gives x and x.y."""
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in statements(ast.parse(text), in_functions=in_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*parent, *([base] if base else [])))
            if base != "enturbo":  # `from .. import shm` uses nothing of the package itself
                found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def imports_of(path: Path, *, in_functions: bool = True) -> set[str]:
    is_package = path.name == "__init__.py"
    return imports(path.read_text(), name_of(path), is_package=is_package, in_functions=in_functions)


def floor_of(module: str) -> str | None:
    """``shm`` of ``enturbo.shm.layout``; None for the standard library and other people's packages.

    The package itself, and the public names that it hands out, stand above all floors.
    """
    parts = module.split(".")
    return ".".join(parts[:2]).removeprefix("enturbo.") if parts[0] == "enturbo" else None


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_imports_only_what_is_below(floor: str) -> None:
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    allowed = {None, *FLOORS[floor]}
    wrong = {}
    for path in files:
        above = {name for name in imports_of(path) if floor_of(name) not in allowed} - {"enturbo.__version__"}
        for package in REACHES_UP.get(name_of(path), ()):
            above = {name for name in above if not name.startswith(package)}
        if above:
            wrong[name_of(path)] = sorted(above)
    assert wrong == {}


@pytest.mark.parametrize("module", ["enturbo.shm.layout", "enturbo.shm.errors", "enturbo.workers.records"])
def test_module_needs_the_standard_library_only(module: str) -> None:
    path = source(module)
    assert path is not None
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert roots - sys.stdlib_module_names <= {"enturbo"}


@pytest.mark.parametrize("module", ENCLAVE_SIDE)
def test_enclave_side_reaches_nothing_but_the_base(module: str) -> None:
    """All that importing ``module`` runs, and all that its functions import later."""
    assert source(module) is not None
    waiting, seen, wrong = [module], set[str](), {}
    while waiting:
        name = waiting.pop()
        path = source(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # importing a module runs its packages first
        # The packages hand out their public names lazily, by functions that the enclave's side never calls.
        found = imports_of(path, in_functions=path.name != "__init__.py")
        waiting.extend(found)
        foreign = {root for root in (other.partition(".")[0] for other in found) if root != "enturbo"}
        if foreign - ENCLAVE_BASE:
            wrong[name] = sorted(foreign - ENCLAVE_BASE)
    assert wrong == {}


def test_the_reader_of_imports_sees_what_it_must() -> None:
    """A check that finds nothing proves nothing: this one finds each way to import."""
    text = """
from __future__ import annotations
import os.path, numpy as np
from typing import TYPE_CHECKING
from . import layout
from ..runtime.image import Region
try:
    import xxhash
except ImportError:
    pass
if TYPE_CHECKING:
    import rich
else:
    import typer
def later():
    from .deep.er import x
class Body:
    import psutil
"""
    now = {
        *("__future__", "__future__.annotations", "os.path", "numpy", "typing", "typing.TYPE_CHECKING"),
        *("enturbo.shm", "enturbo.shm.layout", "enturbo.runtime.image", "enturbo.runtime.image.Region"),
        *("xxhash", "typer", "psutil"),
    }
    assert imports(text, "enturbo.shm.epc", is_package=False, in_functions=False) == now
    later = {"enturbo.shm.deep.er", "enturbo.shm.deep.er.x"}
    assert imports(text, "enturbo.shm.epc", is_package=False) == now | later
    assert imports("from . import a", "enturbo.shm", is_package=True) == {"enturbo.shm", "enturbo.shm.a"}
