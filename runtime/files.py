"""The image's files as a tree beneath one mount path, the same in every enclave.

    /enclave/…                  the function's folder
    /enclave/site-packages/…    the distributions that came along

Only names and extents: whoever wants bytes reads them through the gate. Standard library and msgpack only;
the enclave's side imports this module.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from typing import Any, Final

from . import bundle as bundles
from .manifests import HEADER, Extent, Library
from .program import Program

MOUNT: Final = "/enclave"
SITE: Final = "site-packages"
SITE_MOUNT: Final = f"{MOUNT}/{SITE}"

Read = Callable[[int, int], memoryview]  # offset and size in the enclave: a view, once it may be read


class Files:
    """Every file of an image by its name: the path beneath :data:`MOUNT`."""

    def __init__(self, program: Program, read: Read) -> None:
        """Reads each bundle's table of contents. Raises ImageFormatError."""
        self.read_at: Final = read
        self.extents: Final[dict[str, Extent]] = dict(program.files)
        self.libraries: Final[dict[str, Library]] = dict(program.libraries)
        for at in program.bundles:
            table = bundles.decode(read(at.offset, bundles.peek_length(read(at.offset, HEADER.size))))
            for name, (offset, size) in table.files.items():
                self.extents.setdefault(f"{SITE}/{name}", (at.offset + offset, size))
            for name, library in table.libraries.items():
                self.libraries.setdefault(f"{SITE}/{name}", library)
        self._folders: dict[str, dict[str, None]] | None = None

    @property
    def folders(self) -> dict[str, dict[str, None]]:
        """What each folder holds, by name, in order; the mount itself is ``""``. Made when asked for."""
        if self._folders is None:
            folders: dict[str, dict[str, None]] = {"": {}}
            for name in sorted(self.extents):
                while name:
                    folder, _, last = name.rpartition("/")
                    known = folder in folders
                    folders.setdefault(folder, {})[last] = None
                    if known:
                        break
                    name = folder
            self._folders = folders
        return self._folders

    def is_file(self, name: str) -> bool:
        """Is ``name`` a file of the image?"""
        return name in self.extents

    def is_folder(self, name: str) -> bool:
        """Is ``name`` a folder with files of the image beneath it?"""
        return name in self.folders

    def read(self, name: str) -> bytes:
        """A file's bytes, once their pages may be read. Raises FileNotFoundError."""
        extent = self.extents.get(name)
        if extent is None:
            raise FileNotFoundError(f"the enclave carries no file {name!r}")
        return bytes(self.read_at(*extent))


def name_of(path: Any) -> str | None:
    """The name of what ``path`` names beneath the mount (``""``: the mount itself), or None: another place.

    Takes what ``open`` takes. ``..`` and ``//`` are resolved as text: there are no links in an image.
    """
    if isinstance(path, int):
        return None
    try:
        text = os.fsdecode(path)
    except (TypeError, UnicodeError):
        return None  # whoever is asked next says what is wrong with it
    if not text.startswith(MOUNT) or "\0" in text:
        return None
    if "//" in text or "/." in text:
        text = posixpath.normpath(text)
    if text.rstrip("/") == MOUNT:
        return ""
    return text[len(MOUNT) + 1 :].rstrip("/") if text.startswith(MOUNT + "/") else None
