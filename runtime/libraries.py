"""Native libraries of an image, loaded from memory files that are filled from EPC pages.

The dynamic loader opens paths, and the image's files have none that it could open. So each library is copied,
through the gate, to a sealed memory file, and the loader is given that one's path below /proc/self/fd. What a
library needs (DT_NEEDED) is loaded before it: the loader finds it again by its own name (DT_SONAME) among
what is loaded, and looks nowhere else. What nobody in the image has is the platform's, like the C library.

Standard library and msgpack only; the enclave's side imports this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import posixpath
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from .files import Files, name_of

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_PIECE: Final = 1 << 20
_MAX_NAME: Final = 200  # bytes of a memory file's name, which only people look at


class MemoryFiles:
    """Copies of the image's files as descriptors, for what cannot read through the gate."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._kept: dict[str, int] = {}
        self._lock = threading.Lock()

    def copy(self, name: str) -> int:
        """A new descriptor, open for reading, of a sealed copy of a file. Raises FileNotFoundError."""
        extent = self._files.extents.get(name)
        if extent is None:
            raise FileNotFoundError(f"the enclave carries no file {name!r}")
        offset, size = extent
        fd = os.memfd_create(
            os.fsencode(name)[-_MAX_NAME:].decode("utf-8", "replace"), os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
        )
        try:
            for at in range(0, size, _PIECE):
                data = self._files.read_at(offset + at, min(_PIECE, size - at))
                while data:
                    data = data[os.write(fd, data) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            # Another description, for reading: what has this descriptor cannot even ask to write.
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)

    def path(self, name: str) -> str:
        """A path by which anyone in this process can open the file ``name``. The copy stays until the end."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self.copy(name)
            return f"/proc/self/fd/{self._kept[name]}"


class Libraries:
    """The image's native code, as the dynamic loader is given it."""

    def __init__(self, files: Files, memory: MemoryFiles) -> None:
        self._files, self._memory = files, memory
        self._by_soname: dict[str, list[str]] = {}
        for name, library in files.libraries.items():
            if library.soname:
                self._by_soname.setdefault(library.soname, []).append(name)
        self._loaded: set[str] = set()
        self._named: set[str] = set()  # SONAMEs of those
        self._loads = 0
        # Imports of different modules may run in different threads, and need the same libraries.
        self._lock = threading.RLock()
        self._dlopen: Callable[..., int] = ctypes._dlopen  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[str]:
        """A path of the library ``name`` for the dynamic loader, after all that it needs has been loaded.

        Raises ImportError for a library that cannot be loaded.
        """
        with self._lock:
            self._load_needed(name)
            yield from self._path(name)
            self._loaded.add(name)

    def dlopen(self, path: Any, mode: int = ctypes.DEFAULT_MODE) -> int:
        """What :class:`ctypes.CDLL` calls: paths of the image's libraries work, others as ever."""
        name = None if path is None else name_of(path)
        if name is None:
            return self._dlopen(path, mode)
        with self.opened(name) as where:
            return self._dlopen(where, mode)

    def _load_needed(self, name: str) -> None:
        """Depth first. A library that is being loaded counts as loaded, so circles end."""
        self._loaded.add(name)
        library = self._files.libraries.get(name)
        for soname in () if library is None else library.needed:
            provider = self._provider(soname, name)
            # Of two distributions that bring one library along the loader takes the first, as on disk.
            if provider is not None and provider not in self._loaded and soname not in self._named:
                self._must_be_new(soname, name)
                self._named.add(soname)
                self._load_needed(provider)
                for path in self._path(provider):
                    try:
                        self._dlopen(path, os.RTLD_NOW)
                    except OSError as error:
                        raise ImportError(f"{name} needs {provider}: {error}", name=name) from None

    def _must_be_new(self, soname: str, user: str) -> None:
        """The loader takes the first of a name: one that the interpreter has loaded would be taken for the
        image's, and is not measured."""
        try:
            self._dlopen(soname, os.RTLD_LAZY | os.RTLD_NOLOAD)
        except OSError:
            return
        raise ImportError(
            f"{user} needs the image's {soname}, but the interpreter has loaded another library of that name",
            name=user,
        )

    def _provider(self, soname: str, user: str) -> str | None:
        """The file that has this name: of several the one that shares the longest path with its user."""
        return max(
            self._by_soname.get(soname, ()),
            key=lambda name: len(posixpath.commonpath((name, user))),
            default=None,
        )

    def _path(self, name: str) -> Iterator[str]:
        """A path that the loader has not seen before: it takes the same path for the same library, though the
        descriptor's number has been used for another one since. The mapping outlives the descriptor."""
        self._loads += 1
        detour = "".join("./" if bit == "1" else "/" for bit in f"{self._loads:b}")
        fd = self._memory.copy(name)
        try:
            yield f"/proc/self/{detour}fd/{fd}"
        finally:
            os.close(fd)
