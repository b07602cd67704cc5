"""A bundle: one distribution as pages that are the same in every image that carries it.

::

    table of contents │ files          │ guard │ native code, a page-aligned start each
    R                 │ R, packed      │       │ R X

Everything in it is told from its own start, so the same pages serve at any place of any image; a store keeps
them once (:mod:`enturbo.runtime.store`). The table is a manifest (:mod:`enturbo.runtime.manifests`)::

    {"name": distribution, "version": text,
     "files":     {path below site-packages: [offset, size]},
     "libraries": {path: [soname, [needed names]]}}

Standard library and msgpack only: the enclave side imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from .manifests import Buffer, Extent, Form, Library

MAGIC: Final = b"ENTURBOB"
VERSION: Final = 1
FORM: Final = Form(MAGIC, VERSION, ("name", "version", "files", "libraries"), "bundle's table of contents")


@dataclass(frozen=True)
class Bundle:
    """A distribution's table of contents. Extents are bytes from the bundle's start."""

    name: str
    version: str
    files: Mapping[str, Extent] = field(default_factory=dict)
    libraries: Mapping[str, Library] = field(default_factory=dict)


def encode(bundle: Bundle) -> bytes:
    """Header and table. Raises ImageFormatError for what :func:`decode` would refuse."""
    encoded = FORM.encode(
        {
            "name": bundle.name,
            "version": bundle.version,
            "files": FORM.packed_files(bundle.files),
            "libraries": FORM.packed_libraries(bundle.libraries),
        }
    )
    decode(encoded)
    return encoded


def peek_length(data: Buffer) -> int:
    """Bytes of the whole table, header included, told by its first 16 bytes. Raises ImageFormatError."""
    return FORM.length(data)


def decode(data: Buffer) -> Bundle:
    """Read a table of contents; ``data`` may go on behind it. Raises ImageFormatError, nothing else."""
    value = FORM.decode(data)
    files = FORM.files(value["files"])
    return Bundle(
        name=FORM.text("name", value["name"]),
        version=FORM.text("version", value["version"]),
        files=files,
        libraries=FORM.libraries(value["libraries"], files),
    )
