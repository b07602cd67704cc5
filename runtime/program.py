"""The program manifest: what the enclave's side finds at enclave offset 0, in measured pages.

It names the handler and tells where modules, files, data and heap stand, so that nothing about what runs
comes from outside the measurement. ``EnclaveImage.from_function`` writes it; the enclave's importer and
context read it. Standard library and msgpack only: the enclave side imports this module.

Form: a 16-byte header (magic, version, length), then ``length`` bytes of one msgpack map::

    {"handler": "module:function",
     "modules": {dotted name: [file name, is package]},
     "files":   {file name: [offset, size]},           modules' sources stand here too
     "data":    [offset, size] | None,
     "heap":    [offset, size] | None}

Offsets are bytes from the enclave's base.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgpack

from ..shm.errors import ImageFormatError

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"ENTURBOF"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sII")

# A hostile manifest costs at most about 90 bytes of Python objects for each of its own.
MAX_MANIFEST: Final = 1 << 20
MAX_NAMES: Final = 1 << 16
MAX_NAME: Final = 1024
MAX_ADDRESS: Final = 1 << 48

_DOTTED: Final = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_HANDLER: Final = re.compile(rf"({_DOTTED.pattern}):([^\W\d]\w*)")
_KEYS: Final = ("handler", "modules", "files", "data", "heap")

Extent = tuple[int, int]


@dataclass(frozen=True)
class Program:
    """What runs in an enclave; extents are (offset, size) in bytes.

    ``modules`` maps a dotted name to (name of its file, is it a package); ``files`` maps each name to its
    extent; ``data`` is the measured writable region, ``heap`` the zero one.
    """

    handler: str
    modules: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    files: Mapping[str, Extent] = field(default_factory=dict)
    data: Extent | None = None
    heap: Extent | None = None


def split_handler(handler: str) -> tuple[str, str]:
    """``"module:function"`` as (module, function). Raises ImageFormatError."""
    match = _HANDLER.fullmatch(handler)
    if match is None:
        raise ImageFormatError("handler", expected="module:function", found=repr(handler))
    return match[1], match[2]


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


def encode(program: Program) -> bytes:
    """Header and manifest of ``program``. Raises ImageFormatError for what :func:`decode` would refuse."""
    body: bytes = msgpack.packb(
        {
            "handler": program.handler,
            "modules": {name: list(entry) for name, entry in program.modules.items()},
            "files": {name: list(extent) for name, extent in program.files.items()},
            "data": None if program.data is None else list(program.data),
            "heap": None if program.heap is None else list(program.heap),
        }
    )
    encoded = HEADER.pack(MAGIC, VERSION, min(len(body), 0xFFFF_FFFF)) + body
    decode(encoded)
    return encoded


def peek_length(data: Buffer) -> int:
    """Bytes of the whole manifest, header included, told by its first 16 bytes. Raises ImageFormatError."""
    if len(data) < HEADER.size:
        raise ImageFormatError("program manifest: too short", offset=0, expected=HEADER.size, found=len(data))
    magic, version, length = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ImageFormatError("program manifest: magic", offset=0, expected=MAGIC, found=magic)
    if version != VERSION:
        raise ImageFormatError("program manifest: version", offset=8, expected=VERSION, found=version)
    if length > MAX_MANIFEST:
        raise ImageFormatError(
            "program manifest: length", offset=12, expected=f"at most {MAX_MANIFEST}", found=length
        )
    return HEADER.size + int(length)


def decode(data: Buffer) -> Program:
    """Read a program manifest; ``data`` may go on behind it. Raises ImageFormatError, nothing else."""
    total = peek_length(data)
    if len(data) < total:
        raise ImageFormatError("program manifest: cut short", offset=12, expected=total, found=len(data))
    body = bytes(memoryview(data)[HEADER.size : total])
    value = unpack_canonical(
        body, "program manifest", offset=HEADER.size, max_array=2, max_map=max(MAX_NAMES, len(_KEYS))
    )
    if not isinstance(value, dict) or tuple(value) != _KEYS:
        raise _odd("keys", ", ".join(_KEYS), value)
    files = {_name(name): _extent("files", extent) for name, extent in _map("files", value["files"]).items()}
    program = Program(
        handler=_handler(value["handler"]),
        modules=_modules(value["modules"], files),
        files=files,
        data=_optional_extent("data", value["data"]),
        heap=_optional_extent("heap", value["heap"]),
    )
    if split_handler(program.handler)[0] not in program.modules:
        raise _odd("handler", "one of the modules", program.handler)
    return program


def _odd(what: str, expected: str, found: object) -> ImageFormatError:
    text = repr(found)
    return ImageFormatError(
        f"program manifest: {what}",
        offset=HEADER.size,
        expected=expected,
        found=text if len(text) <= 200 else text[:200] + "…",
    )


def _map(what: str, value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise _odd(what, "a map", type(value).__name__)
    return value


def _handler(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise _odd("handler", "module:function", type(value).__name__)
    split_handler(value)
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or "\0" in value:
        raise _odd("file name", f"text of 1..{MAX_NAME} characters", value)
    return value


def _extent(what: str, value: object) -> Extent:
    match value:
        case [int(offset), int(size)] if (
            type(offset) is int
            and type(size) is int
            and offset >= 0
            and size >= 0
            and offset + size <= MAX_ADDRESS
        ):
            return offset, size
    raise _odd(what, "[offset, size]", value)


def _optional_extent(what: str, value: object) -> Extent | None:
    return None if value is None else _extent(what, value)


def _modules(value: object, files: Mapping[str, Extent]) -> dict[str, tuple[str, bool]]:
    modules: dict[str, tuple[str, bool]] = {}
    for name, entry in _map("modules", value).items():
        match entry:
            case [str(file), bool(is_package)] if file in files:
                pass
            case _:
                raise _odd("modules", "[name of a file, is it a package]", entry)
        if not isinstance(name, str) or len(name) > MAX_NAME or not is_module_name(name):
            raise _odd("modules", "a dotted name", name)
        modules[name] = (file, is_package)
    return modules
