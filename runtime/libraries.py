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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        fd = os.memfd_create(_label(name), os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            places = range(0, size, _PIECE)
            _fill(fd, (self._files.read_at(offset + at, min(_PIECE, size - at)) for at in places))
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


def _label(name: str) -> str:
    """Of a memory file, for people who look at a process's mappings."""
    return os.fsencode(name)[-_MAX_NAME:].decode("utf-8", "replace")


def _fill(fd: int, pieces: Iterable[memoryview]) -> None:
    """Write the pieces, each when it may be read, and seal the file."""
    for piece in pieces:
        left = piece
        while left:
            left = left[os.write(fd, left) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


class Libraries:
    """The image's native code, as the dynamic loader is given it.

    A library counts as loaded when the loader has said so, and its name as taken from then on. So after a
    load that failed the next one starts from what is really there, and the loader never looks for a library
    of the image anywhere else.
    """

    def __init__(self, files: Files, memory: MemoryFiles) -> None:
        self._files, self._memory = files, memory
        self._by_soname: dict[str, list[str]] = {}
        for name, library in files.libraries.items():
            if library.soname:
                self._by_soname.setdefault(library.soname, []).append(name)
        self._paths: dict[str, str] = {}  # of loaded files, by which the loader knows them
        self._named: set[str] = set()  # their SONAMEs
        self._loads = 0
        # Threads that import at the same time may need the same libraries. Not held while a module's own code
        # runs: that imports others, under locks of its own.
        self._lock = threading.RLock()
        self._dlopen: Callable[..., int] = ctypes._dlopen  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[str]:
        """A path of the library ``name`` for the dynamic loader, after all that it needs has been loaded.

        Whoever leaves without an exception has loaded it. Raises ImportError for what cannot be loaded.
        """
        with self._lock:
            self._load_needed(name)
            path = self._paths.get(name)
        if path is not None:  # the loader goes by the path, and gives the same library again
            yield path
            return
        with self._copied(name) as path:
            yield path
            with self._lock:
                self._note(name, path)

    def dlopen(self, path: Any, mode: int = ctypes.DEFAULT_MODE) -> int:
        """What :class:`ctypes.CDLL` calls: paths of the image's libraries work, others as ever."""
        name = None if path is None else name_of(path)
        if name is None:
            return self._dlopen(path, mode)
        with self._lock, self.opened(name) as where:
            return self._dlopen(where, mode)

    def _load_needed(self, name: str, but: Sequence[str] = ()) -> None:
        """Depth first. What the image does not have is the platform's; the build has seen to that."""
        for soname, provider in self._providers(name):
            # Of two distributions that bring one library along the loader takes the first, as on disk.
            if soname in self._named or provider in but:
                continue
            self._must_be_new(soname, name)
            circle = self._circle(provider)
            try:
                if circle:
                    self._load_circle(circle)
                else:
                    self._load_needed(provider)
                    with self._copied(provider) as path:
                        self._dlopen(path, os.RTLD_NOW)
                        self._note(provider, path)
            except OSError as error:
                raise ImportError(f"{name} needs {provider}: {error}", name=name) from None

    def _load_circle(self, circle: Sequence[str]) -> None:
        """Libraries that need each other: the loader has to find all of them while it loads the first.

        It opens a needed name with a slash in it as a path. So in the copies the names of the others are
        replaced, in place, by the paths of their copies; those descriptors stay, and with them their numbers.
        """
        for member in circle:
            self._load_needed(member, but=circle)
        fds = {
            member: os.memfd_create(_label(member), os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            for member in circle
        }
        paths = {member: f"/proc/self/fd/{fd}" for member, fd in fds.items()}
        try:
            for member, fd in fds.items():
                content = self._files.read(member)
                for soname, provider in self._providers(member):
                    if provider in paths:
                        if len(soname) < len(paths[provider]):
                            raise ImportError(f"{member} and {provider} need each other", name=member)
                        written = os.fsencode(paths[provider]).ljust(len(os.fsencode(soname)), b"\0")
                        content = content.replace(b"\0%b\0" % os.fsencode(soname), b"\0%b\0" % written)
                _fill(fd, [memoryview(content)])
            self._dlopen(paths[circle[0]], os.RTLD_NOW)
        except BaseException:
            for fd in fds.values():
                os.close(fd)
            raise
        for member, path in paths.items():
            self._note(member, path)

    def _circle(self, name: str) -> Sequence[str]:
        """The libraries that need ``name`` and are needed by it, with it; none if it is in no circle."""
        reached = self._reached(name)
        return sorted(each for each in reached if name in self._reached(each)) if name in reached else ()

    def _reached(self, name: str) -> set[str]:
        found: set[str] = set()
        left = [name]
        while left:
            new = {provider for _, provider in self._providers(left.pop())} - found
            found |= new
            left += new
        return found

    def _providers(self, name: str) -> Iterator[tuple[str, str]]:
        """What ``name`` needs of the image: names and files."""
        library = self._files.libraries.get(name)
        for soname in () if library is None else library.needed:
            provider = self._provider(soname, name)
            if provider is not None and provider != name:
                yield soname, provider

    def _note(self, name: str, path: str) -> None:
        library = self._files.libraries.get(name)
        self._paths.setdefault(name, path)
        if library is not None and library.soname:
            self._named.add(library.soname)

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

    @contextlib.contextmanager
    def _copied(self, name: str) -> Iterator[str]:
        """A path that the loader has not seen before: it takes the same path for the same library, though the
        descriptor's number has been used for another one since. The mapping outlives the descriptor."""
        with self._lock:
            self._loads += 1
            detour = "".join("./" if bit == "1" else "/" for bit in f"{self._loads:b}")
        fd = self._memory.copy(name)
        try:
            yield f"/proc/self/{detour}fd/{fd}"
        finally:
            os.close(fd)
