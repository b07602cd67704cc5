"""Modules compiled while an image is built, so that an enclave need not.

A compiled module is a ``.pyc`` file as PEP 552 has it, with a hash that nobody checks: source and bytecode
are measured together. It stands where the interpreter would put it (PEP 3147), and another interpreter than
the one that built the image compiles the source instead.

The bytes depend on the interpreter alone. Its usual way of writing code is not reproducible (what it refers
back to depends on what else is in memory), so an older form is written, which never refers back.
"""

from __future__ import annotations

import importlib.util
import marshal
import struct
import sys
import warnings
from collections.abc import Mapping
from types import CodeType
from typing import Final

from ..shm.errors import EnturboError

_UNCHECKED: Final = 1  # PEP 552: a hash of the source follows, and is not compared
_HEADER: Final = struct.Struct("<4sI8s")
_PLAIN_FORM: Final = 2  # marshal's last form without references


def tag() -> str:
    """What compiled modules depend on besides their source: the interpreter and its exact version.

    Raises EnturboError for one that is told to leave positions out: nobody would get the same image again.
    """
    if all(column is None for _, _, column, _ in compile("a", "", "eval").co_positions()):
        raise EnturboError(
            "bytecode: expected an interpreter that keeps positions, found one with no_debug_ranges"
            " (PYTHONNODEBUGRANGES)"
        )
    return f"{sys.implementation.cache_tag}-{sys.hexversion:08x}"


def cache_name(name: str) -> str:
    """Where the compiled module of the source ``name`` stands, whatever this process's own prefix is."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}__pycache__/{last.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"


def compiled(contents: Mapping[str, bytes], folder: str) -> dict[str, bytes]:
    """Compiled modules for the sources among ``contents``, by name.

    ``folder`` is where the names begin in an enclave, for tracebacks. Left out is what does not compile, or
    cannot be written in that form: it is compiled when it is imported, and says then what is wrong.
    """
    found = {}
    for name, source in contents.items():
        if name.endswith(".py") and cache_name(name) not in contents:
            try:
                with warnings.catch_warnings(action="ignore"):
                    code = compile(source, f"{folder}/{name}", "exec", dont_inherit=True, optimize=0)
                body = marshal.dumps(code, _PLAIN_FORM)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            digest = importlib.util.source_hash(source)
            found[cache_name(name)] = _HEADER.pack(importlib.util.MAGIC_NUMBER, _UNCHECKED, digest) + body
    return found


def load(content: bytes | memoryview) -> CodeType | None:
    """The code in a compiled module; None if it is another interpreter's, or not of this form."""
    if len(content) < _HEADER.size:
        return None
    magic, flags, _ = _HEADER.unpack_from(content)
    if magic != importlib.util.MAGIC_NUMBER or flags != _UNCHECKED:
        return None
    try:
        code = marshal.loads(memoryview(content)[_HEADER.size :])
    except (ValueError, EOFError, TypeError):
        return None
    return code if isinstance(code, CodeType) else None
