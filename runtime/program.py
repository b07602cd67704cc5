"""The program manifest: what the enclave's side finds at enclave offset 0, in measured pages.

It names the handler and tells where files, distributions, data and heap stand, so that nothing about what
runs comes from outside the measurement. ``EnclaveImage.from_function`` writes it; the enclave's importer and
context read it. Standard library and msgpack only: the enclave side imports this module.

Form: see :mod:`enturbo.runtime.manifests`; the map is::

    {"handler":   "module:function",
     "files":     {file name: [offset, size]},            of the function's folder
     "libraries": {file name: [soname, [needed names]]},  those of them that are native
     "bundles":   [[distribution, version, offset, size]],
     "data":      [offset, size] | None,
     "heap":      [offset, size] | None}

Offsets are bytes from the enclave's base. A bundle holds one distribution (:mod:`enturbo.runtime.bundle`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ..shm.errors import ImageFormatError
from .manifests import MAX_NAME, Buffer, Extent, Form, Library

MAGIC: Final = b"ENTURBOF"
VERSION: Final = 2
FORM: Final = Form(
    MAGIC,
    VERSION,
    ("handler", "files", "libraries", "bundles", "data", "heap"),
    "program manifest",
)

_HANDLER: Final = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


class BundleAt(NamedTuple):
    """A distribution in the image: its name and version, and where its pages stand, bytes."""

    name: str
    version: str
    offset: int
    size: int


@dataclass(frozen=True)
class Program:
    """What runs in an enclave; extents are (offset, size) in bytes.

    ``files`` maps each name in the function's folder to its extent, ``libraries`` tells of the native ones;
    ``bundles`` are the distributions that come along; ``data`` is the measured writable region, ``heap`` the
    zero one.
    """

    handler: str
    files: Mapping[str, Extent] = field(default_factory=dict)
    libraries: Mapping[str, Library] = field(default_factory=dict)
    bundles: tuple[BundleAt, ...] = ()
    data: Extent | None = None
    heap: Extent | None = None


def split_handler(handler: str) -> tuple[str, str]:
    """``"module:function"`` as (module, function). Raises ImageFormatError."""
    match = _HANDLER.fullmatch(handler)
    if match is None:
        raise ImageFormatError("handler", expected="module:function", found=repr(handler))
    return match[1], match[2]


def module_files(module: str) -> tuple[str, str]:
    """The names of the source files that ``module`` may come from: as a package, and as a module."""
    path = module.replace(".", "/")
    return f"{path}/__init__.py", f"{path}.py"


def encode(program: Program) -> bytes:
    """Header and manifest of ``program``. Raises ImageFormatError for what :func:`decode` would refuse."""
    encoded = FORM.encode(
        {
            "handler": program.handler,
            "files": FORM.packed_files(program.files),
            "libraries": FORM.packed_libraries(program.libraries),
            "bundles": [list(bundle) for bundle in program.bundles],
            "data": None if program.data is None else list(program.data),
            "heap": None if program.heap is None else list(program.heap),
        }
    )
    decode(encoded)
    return encoded


def peek_length(data: Buffer) -> int:
    """Bytes of the whole manifest, header included, told by its first 16 bytes. Raises ImageFormatError."""
    return FORM.length(data)


def decode(data: Buffer) -> Program:
    """Read a program manifest; ``data`` may go on behind it. Raises ImageFormatError, nothing else."""
    value = FORM.decode(data)
    files = FORM.files(value["files"])
    program = Program(
        handler=_handler(value["handler"]),
        files=files,
        libraries=FORM.libraries(value["libraries"], files),
        bundles=_bundles(value["bundles"]),
        data=_optional_extent("data", value["data"]),
        heap=_optional_extent("heap", value["heap"]),
    )
    module = split_handler(program.handler)[0]
    if not any(name in files for name in module_files(module)):
        raise FORM.odd("handler", "a module among the files", program.handler)
    return program


def _handler(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise FORM.odd("handler", "module:function", type(value).__name__)
    split_handler(value)
    return value


def _bundles(value: object) -> tuple[BundleAt, ...]:
    if not isinstance(value, tuple):
        raise FORM.odd("bundles", "an array", type(value).__name__)
    bundles = []
    for entry in value:
        match entry:
            case [name, version, offset, size]:
                name, version = FORM.text("distribution", name), FORM.text("version", version)
                bundles.append(BundleAt(name, version, *FORM.extent("bundles", (offset, size))))
            case _:
                raise FORM.odd("bundles", "[name, version, offset, size]", entry)
    names = [bundle.name for bundle in bundles]
    if sorted(set(names)) != names:
        raise FORM.odd("bundles", "names in order, each once", names)
    return tuple(bundles)


def _optional_extent(what: str, value: object) -> Extent | None:
    return None if value is None else FORM.extent(what, value)
