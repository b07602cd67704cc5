"""What the two kinds of measured manifests have in common: their framing, and the checks of what they hold.

A manifest stands at the start of pages of the image: a 16-byte header (magic, version, length), then
``length`` bytes of one msgpack map in canonical form. :mod:`enturbo.runtime.program` says what runs in an
enclave, :mod:`enturbo.runtime.bundle` what a distribution in it consists of. Standard library and msgpack
only: the enclave's side imports this module.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgpack

from ..shm.errors import ImageFormatError

Buffer = bytes | bytearray | memoryview
Extent = tuple[int, int]  # offset and size, bytes

HEADER: Final = struct.Struct("<8sII")

# A hostile manifest costs at most about 90 bytes of Python objects for each of its own.
MAX_MANIFEST: Final = 1 << 20
MAX_NAMES: Final = 1 << 16
MAX_NAME: Final = 1024
MAX_ADDRESS: Final = 1 << 48

_DOTTED: Final = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


class Library(NamedTuple):
    """What the dynamic loader must know of a native library or extension module.

    ``soname``: the name that others need it by (DT_SONAME; empty: none); ``needed``: the names of what it
    needs (DT_NEEDED), in their order.
    """

    soname: str
    needed: tuple[str, ...]


class Form(NamedTuple):
    """One kind of manifest: its magic, its version, the keys of its map in order, its name for people."""

    magic: bytes
    version: int
    keys: tuple[str, ...]
    what: str

    def encode(self, values: Mapping[str, object]) -> bytes:
        """Header and body of a manifest with these values, which nobody has checked."""
        body: bytes = msgpack.packb({key: values[key] for key in self.keys})
        return HEADER.pack(self.magic, self.version, min(len(body), 0xFFFF_FFFF)) + body

    @staticmethod
    def packed_files(files: Mapping[str, Extent]) -> dict[str, list[int]]:
        """Files as a manifest has them; :meth:`files` reads them."""
        return {name: list(extent) for name, extent in files.items()}

    @staticmethod
    def packed_libraries(libraries: Mapping[str, Library]) -> dict[str, list[object]]:
        """Libraries as a manifest has them; :meth:`libraries` reads them."""
        return {name: [library.soname, list(library.needed)] for name, library in libraries.items()}

    def length(self, data: Buffer) -> int:
        """Bytes of the whole manifest, header included, told by its first 16. Raises ImageFormatError."""
        if len(data) < HEADER.size:
            raise ImageFormatError(f"{self.what}: too short", offset=0, expected=HEADER.size, found=len(data))
        magic, version, length = HEADER.unpack_from(data)
        if magic != self.magic:
            raise ImageFormatError(f"{self.what}: magic", offset=0, expected=self.magic, found=magic)
        if version != self.version:
            raise ImageFormatError(f"{self.what}: version", offset=8, expected=self.version, found=version)
        if length > MAX_MANIFEST:
            raise ImageFormatError(
                f"{self.what}: length", offset=12, expected=f"at most {MAX_MANIFEST}", found=length
            )
        return HEADER.size + int(length)

    def decode(self, data: Buffer) -> dict[str, Any]:
        """The map of a manifest; ``data`` may go on behind it. Raises ImageFormatError, nothing else."""
        total = self.length(data)
        if len(data) < total:
            raise ImageFormatError(f"{self.what}: cut short", offset=12, expected=total, found=len(data))
        body = bytes(memoryview(data)[HEADER.size : total])
        value = unpack_canonical(body, self.what, offset=HEADER.size, max_array=MAX_NAMES, max_map=MAX_NAMES)
        if not isinstance(value, dict) or tuple(value) != self.keys:
            raise self.odd("keys", ", ".join(self.keys), value)
        return value

    def odd(self, what: str, expected: str, found: object) -> ImageFormatError:
        """The error for a value that is not what it has to be."""
        text = repr(found)
        return ImageFormatError(
            f"{self.what}: {what}",
            offset=HEADER.size,
            expected=expected,
            found=text if len(text) <= 200 else text[:200] + "…",
        )

    def map(self, what: str, value: object) -> dict[object, object]:
        """A map, or ImageFormatError."""
        if not isinstance(value, dict):
            raise self.odd(what, "a map", type(value).__name__)
        return value

    def text(self, what: str, value: object) -> str:
        """A text that can be a name, or ImageFormatError."""
        if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or "\0" in value:
            raise self.odd(what, f"text of 1..{MAX_NAME} characters", value)
        return value

    def extent(self, what: str, value: object) -> Extent:
        """An extent, or ImageFormatError."""
        if type(value) is tuple and len(value) == 2:
            offset, size = value
            known = type(offset) is int and type(size) is int
            if known and offset >= 0 <= size and offset + size <= MAX_ADDRESS:
                return offset, size
        raise self.odd(what, "[offset, size]", value)

    def files(self, value: object) -> dict[str, Extent]:
        """File names and where they stand, or ImageFormatError."""
        return {
            self.text("file name", name): self.extent("files", extent)
            for name, extent in self.map("files", value).items()
        }

    def libraries(self, value: object, files: Mapping[str, Extent]) -> dict[str, Library]:
        """Native libraries among the files, or ImageFormatError."""
        libraries: dict[str, Library] = {}
        for name, entry in self.map("libraries", value).items():
            match entry:
                case [str(soname), [*needed]] if len(soname) <= MAX_NAME:
                    names = tuple(self.text("needed library", one) for one in needed)
                case _:
                    raise self.odd("libraries", "[name it is needed by, [names that it needs]]", entry)
            if not isinstance(name, str) or name not in files:
                raise self.odd("libraries", "one of the files", name)
            libraries[name] = Library(soname, names)
        return libraries


def is_module_name(name: str) -> bool:
    """Can ``name`` be imported: identifiers joined by dots?"""
    return _DOTTED.fullmatch(name) is not None


def unpack_canonical(data: Buffer, what: str, *, offset: int, max_array: int, max_map: int) -> object:
    """Decode one msgpack object (arrays as tuples) within limits, only in the form that packing it gives.

    So no two byte strings mean the same, and a key cannot occur twice. Raises ImageFormatError; costs at
    most about 90 bytes of memory a byte of ``data``. ``offset`` is where ``data`` stands, for the message.
    """
    try:
        value: object = msgpack.unpackb(
            data, use_list=False, max_array_len=max_array, max_map_len=max_map, max_ext_len=0
        )
        canonical: bytes = msgpack.packb(value)
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        msgpack.exceptions.UnpackException,
    ) as error:
        raise ImageFormatError(f"{what}: {error}", offset=offset) from None
    if canonical != data:
        raise ImageFormatError(f"{what}: not in its canonical form", offset=offset)
    return value
