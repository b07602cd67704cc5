"""Native code among the files of an image: told by its content, and what the dynamic loader will ask for.

At build time everything that a library needs must be in the image, or belong to the platform: of what wheels
for manylinux may take for granted (PEP 600) the part that a machine without screen has. Otherwise the build
fails and says which file needs what, instead of an import that fails in an enclave.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Final

from ..shm.errors import ImageFormatError
from .formats.elf import MAGIC, PT_LOAD, Elf
from .manifests import MAX_NAME, Library

# The C library's parts, the compiler's run-time libraries, and what interpreters link to themselves. Not
# measured: the platform, like the interpreter.
_PLATFORM: Final = """
libc.so.6 libm.so.6 libmvec.so.1 libdl.so.2 libpthread.so.0 librt.so.1 libutil.so.1 libresolv.so.2
libnsl.so.1 libanl.so.1 libgcc_s.so.1 libstdc++.so.6 libatomic.so.1 libz.so.1 libexpat.so.1
ld-linux-x86-64.so.2 ld-linux-aarch64.so.1
"""
PLATFORM: Final = frozenset(_PLATFORM.split())
_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
_ET_DYN: Final = b"\3\0"
_DT_NEEDED: Final = 1
_DT_STRTAB: Final = 5
_DT_STRSZ: Final = 10
_DT_SONAME: Final = 14
SHORTEST: Final = len("/proc/self/fd/1000")
_DT_STANDS_IN: Final = {0x7FFFFFFF: "DT_FILTER", 0x7FFFFFFD: "DT_AUXILIARY"}


def is_native(content: bytes | memoryview) -> bool:
    """Is this a shared object of ELF: an extension module, a library?"""
    return bytes(content[:4]) == MAGIC and bytes(content[16:18]) == _ET_DYN


def read_library(content: bytes | memoryview, name: str) -> Library:
    """What the dynamic table says. Raises ImageFormatError: another machine's code, a damaged file."""
    elf = Elf(memoryview(content), name, machine=_MACHINES.get(platform.machine(), 62))
    entries = elf.dynamic_entries
    table = dict(entries)
    if _DT_STRTAB not in table or _DT_STRSZ not in table:
        return Library("", ())
    strings = elf.slice("dynamic strings", _file_offset(elf, table[_DT_STRTAB]), table[_DT_STRSZ])

    def text(at: int) -> str:
        found, end, _ = bytes(strings[at : at + MAX_NAME]).partition(b"\0")
        if not end:
            raise elf.error("dynamic string", None, f"a text below {MAX_NAME} bytes at {at}", "none")
        return found.decode("utf-8", "backslashreplace")

    for tag, value in entries:
        if tag in _DT_STANDS_IN:
            raise elf.error(
                "dynamic table",
                None,
                "a library of its own",
                f"{_DT_STANDS_IN[tag]}: it stands for {text(value)}",
            )
    needed = tuple(text(value) for tag, value in entries if tag == _DT_NEEDED)
    return Library(text(table[_DT_SONAME]) if _DT_SONAME in table else "", needed)


def _file_offset(elf: Elf, address: int) -> int:
    for segment in elf.segments:
        if segment.type == PT_LOAD and segment.vaddr <= address < segment.vaddr + segment.filesz:
            return segment.offset + address - segment.vaddr
    raise elf.error("dynamic string table", None, "an address inside a segment", hex(address))


def check_needed(libraries: Mapping[str, Library], whose: Mapping[str, str]) -> None:
    """Every needed library is in the image, under the name it is needed by, or the platform's.

    ``whose`` says which distribution a file is from. Raises ImageFormatError, which names file and library.
    """
    sonames = {library.soname for library in libraries.values()}
    files = {name.rpartition("/")[2]: name for name in libraries}
    for name, library in sorted(libraries.items()):
        for needed in library.needed:
            if "/" not in needed and (needed in sonames or needed in PLATFORM):
                continue
            if "/" in needed:
                expected, found = "the name of a library", "a path: the loader would open it on the host"
            elif needed in files:
                expected = f"a library that calls itself {needed} (DT_SONAME)"
                found = f"{files[needed]}, which calls itself {libraries[files[needed]].soname or 'nothing'}"
            else:
                expected = "a library in the image, or one of the platform (libc, libm, libstdc++, …)"
                found = "neither; take a wheel that brings it along, or leave the file out (--exclude)"
            raise ImageFormatError(
                f"{whose.get(name, 'the function')} needs {needed}", file=name, expected=expected, found=found
            )
    _check_circles(libraries, whose)


def _check_circles(libraries: Mapping[str, Library], whose: Mapping[str, str]) -> None:
    """Libraries that need each other are loaded under other names, which are written over their own ones.

    See ``enturbo.runtime.libraries``; a name that is too short for that is refused.
    """
    providers = {library.soname: name for name, library in libraries.items() if library.soname}
    for name, library in sorted(libraries.items()):
        for needed in library.needed:
            other = providers.get(needed)
            if (
                other in (None, name)
                or len(needed) >= SHORTEST
                or name not in _reached(needed, libraries, providers)
            ):
                continue
            raise ImageFormatError(
                f"{whose.get(name, 'the function')}: libraries that need each other",
                file=name,
                expected=f"names of at least {SHORTEST} characters, as auditwheel gives them",
                found=needed,
            )


def _reached(soname: str, libraries: Mapping[str, Library], providers: Mapping[str, str]) -> set[str]:
    """The files that a library needs, and those that they need."""
    found: set[str] = set()
    left = [providers[soname]]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += [providers[each] for each in libraries[name].needed if each in providers]
    return found


def natives(files: Iterable[tuple[str, bytes]]) -> dict[str, Library]:
    """The native ones among these files, by name. Raises ImageFormatError."""
    return {name: read_library(content, name) for name, content in files if is_native(content)}
