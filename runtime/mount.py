"""The image's files for code that opens them by path.

Below :data:`~enturbo.runtime.files.MOUNT` the Python functions that open, look at and list files answer from
the image: ``open``, ``io.open``, ``os.open``, ``os.stat``, ``os.lstat``, ``os.access``, ``os.listdir``,
``os.scandir``, ``os.readlink``, and with them ``os.path``, ``pathlib``, ``glob``, ``os.walk``,
``importlib.resources``, ``importlib.metadata``. Any other path is the system's, as ever. It is all read-only.

C code that opens a path by itself does not come by here: it gets a path from
:meth:`enturbo.runtime.context.Context.path`. Standard library and msgpack only; the enclave's side imports
this module.
"""

from __future__ import annotations

import _io
import builtins
import ctypes
import errno
import functools
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..shm.layout import PAGE_SIZE
from .files import SITE, Files, name_of
from .image_file import ImageFile
from .libraries import Libraries, MemoryFiles

_FILE: Final = stat.S_IFREG | 0o644  # as on any read-only file system: who writes gets EROFS
_FOLDER: Final = stat.S_IFDIR | 0o755
_DEVICE: Final = 0xE7
_CERTIFICATES: Final = (".pem", ".crt", ".cer", ".key")
_FILE_ARGUMENTS: Final = frozenset(("cafile", "certfile", "keyfile"))
_TIMES: Final = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), 0.0) | dict.fromkeys(
    ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), 0
)
_BUFFER: Final = 1 << 16
_OURS: Final = {"open": "os_open"}  # by the system's name, where ours is another
# Names under which modules keep the built-in open; codecs.open and the like are other functions.
_KEPT_AS: Final = ("open", "_builtin_open", "bltn_open", "_open")


class Entry:
    """What ``os.scandir`` yields: as :class:`os.DirEntry`, which nobody but the system can make."""

    def __init__(self, mount: Mount, name: Any, path: Any) -> None:
        """Name and path are text, or bytes where the folder was given as bytes."""
        self._mount = mount
        self.name = name
        self.path = path

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def inode(self) -> int:
        """Its number."""
        return self.stat().st_ino

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """As ``os.stat`` has it."""
        return self._mount.stat(self.path)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Is it a folder?"""
        return stat.S_ISDIR(self.stat().st_mode)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Is it a file?"""
        return stat.S_ISREG(self.stat().st_mode)

    def is_symlink(self) -> bool:
        """No image has links."""
        return False

    def is_junction(self) -> bool:
        """Nor junctions."""
        return False


class _Entries:
    """An iterator that is a context manager, too."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries = entries

    def __iter__(self) -> _Entries:
        return self

    def __next__(self) -> Entry:
        return next(self._entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more comes."""
        self._entries = iter(())


class Mount:
    """The functions that stand in for the system's, each with the system's behind it."""

    def __init__(self, files: Files, memory: MemoryFiles, libraries: Libraries) -> None:
        self._files, self._memory, self._libraries = files, memory, libraries
        self._numbers: dict[str, int] = {}
        self._open, self._open_code = io.open, io.open_code
        self._system: dict[str, Callable[..., Any]] = {
            name: getattr(os, name)
            for name in ("open", "stat", "lstat", "access", "listdir", "scandir", "readlink", "listxattr")
        }

    def install(self) -> None:
        """Take the functions' places in this process, for good, also where modules have kept them."""
        ours = {system: getattr(self, _OURS.get(name, name)) for name, system in self._system.items()}
        for module in list(sys.modules.values()):
            names = vars(module)
            for kept in _KEPT_AS:
                if names.get(kept) is self._open and module is not sys.modules.get("_io"):
                    setattr(module, kept, self.open)
        builtins.open = io.open = self.open
        # What importlib's own loaders, and runpy, read files with.
        io.open_code = _io.open_code = self.open_code
        sys.modules["_frozen_importlib_external"].__dict__["_path_stat"] = self.stat
        if self._files.is_folder(SITE) or any(name.endswith(_CERTIFICATES) for name in self._files.extents):
            self._serve_ssl()
        for name, system in self._system.items():
            setattr(os, name, ours[system])
            for supported in (
                os.supports_dir_fd,
                os.supports_fd,
                os.supports_follow_symlinks,
                os.supports_effective_ids,
            ):
                if system in supported:
                    supported.add(ours[system])
        # pathlib's globbing has them as static methods of a class, from Python 3.13 on.
        for each in list(vars(sys.modules.get("glob", os)).values()):
            for name, kept_in_class in list(vars(each).items()) if isinstance(each, type) else ():
                function = getattr(kept_in_class, "__func__", None)
                if isinstance(kept_in_class, staticmethod) and function in ours:
                    setattr(each, name, staticmethod(ours[function]))
        ctypes._dlopen = self._libraries.dlopen  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------- opening

    def open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """As the built-in ``open``."""
        name = name_of(file)
        if name is None:
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if set(mode) & set("wxa+"):
            raise _error(errno.EROFS, file)
        binary = "b" in mode
        if sorted(mode.replace("b", "").replace("t", "")) != ["r"] or (binary and "t" in mode):
            raise ValueError(f"invalid mode: {mode!r}")
        if binary and (encoding or errors or newline):
            raise ValueError("binary mode doesn't take an encoding, errors or newline argument")
        if not binary and buffering == 0:
            raise ValueError("can't have unbuffered text I/O")
        self._must_be_file(name, file)
        raw = ImageFile(name, os.fspath(file), self._files, self._memory)
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw, buffering if buffering > 1 else _BUFFER)
        if binary:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline)
        text.mode = mode  # type: ignore[misc]
        return text

    def open_code(self, path: str) -> Any:
        """As ``io.open_code``."""
        return self._open_code(path) if name_of(path) is None else self.open(path, "rb")

    def _serve_ssl(self) -> None:
        """OpenSSL opens certificates by path: it gets that of a copy in memory."""
        try:
            import ssl
        except ImportError:
            return  # an interpreter without
        for name, paths in (("load_verify_locations", 1), ("load_cert_chain", 2)):
            setattr(ssl.SSLContext, name, self._with_paths(getattr(ssl.SSLContext, name), paths))

    def _with_paths(self, function: Callable[..., Any], count: int) -> Callable[..., Any]:
        """The same method, whose first ``count`` arguments, also by name, may be paths of the image."""

        @functools.wraps(function)
        def method(context: Any, *given: Any, **named: Any) -> Any:
            args = [self._for_c(each) for each in given[:count]]
            files = {key: self._for_c(named[key]) for key in named.keys() & _FILE_ARGUMENTS}
            return function(context, *args, *given[count:], **(named | files))

        return method

    def _for_c(self, path: Any) -> Any:
        name = None if path is None else name_of(path)
        if name is None:
            return path
        self._must_be_file(name, path)
        return self._memory.path(name)

    def os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """As ``os.open``: a descriptor of a copy in memory."""
        name = name_of(path)
        if name is None:
            return int(self._system["open"](path, flags, mode, dir_fd=dir_fd))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            raise _error(errno.EROFS, path)
        self._must_be_file(name, path)
        return self._memory.copy(name)

    def _must_be_file(self, name: str, path: Any) -> None:
        if not self._files.is_file(name):
            raise _error(errno.EISDIR if self._files.is_folder(name) else self._missing(name), path)

    def _missing(self, name: str) -> int:
        """Why nothing is there: what is beneath a file is an error of its own."""
        while name:
            name = name.rpartition("/")[0]
            if self._files.is_file(name):
                return errno.ENOTDIR
        return errno.ENOENT

    # ------------------------------------------------------------------------------------------- looking

    def stat(self, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        """As ``os.stat``. Images have no times: all are 0."""
        name = name_of(path)
        if name is None:
            result: os.stat_result = self._system["stat"](
                path, dir_fd=dir_fd, follow_symlinks=follow_symlinks
            )
            return result
        return self._stat(name, path)

    def lstat(self, path: Any, *, dir_fd: int | None = None) -> os.stat_result:
        """As ``os.lstat``."""
        name = name_of(path)
        if name is None:
            result: os.stat_result = self._system["lstat"](path, dir_fd=dir_fd)
            return result
        return self._stat(name, path)

    def _stat(self, name: str, path: Any) -> os.stat_result:
        extent = self._files.extents.get(name)
        if extent is None and not self._files.is_folder(name):
            raise _error(self._missing(name), path)
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        mode, size = (_FOLDER, 0) if extent is None else (_FILE, extent[1])
        values = (mode, number, _DEVICE, 1, 0, 0, size, 0, 0, 0)
        return os.stat_result(values, _TIMES | {"st_blksize": PAGE_SIZE, "st_blocks": -(-size // 512)})

    def access(
        self,
        path: Any,
        mode: int,
        *,
        dir_fd: int | None = None,
        effective_ids: bool = False,
        follow_symlinks: bool = True,
    ) -> bool:
        """As ``os.access``."""
        name = name_of(path)
        if name is None:
            options = {"dir_fd": dir_fd, "effective_ids": effective_ids, "follow_symlinks": follow_symlinks}
            return bool(self._system["access"](path, mode, **options))
        if mode & os.W_OK:
            return False
        return self._files.is_folder(name) or (self._files.is_file(name) and not mode & os.X_OK)

    def listdir(self, path: Any = ".") -> list[Any]:
        """As ``os.listdir``, in order."""
        name = name_of(path)
        if name is None:
            listed: list[Any] = self._system["listdir"](path)
            return listed
        names = list(self._folder(name, path))
        return [os.fsencode(each) for each in names] if isinstance(path, bytes) else names

    def scandir(self, path: Any = ".") -> Any:
        """As ``os.scandir``, in order."""
        name = name_of(path)
        if name is None:
            return self._system["scandir"](path)
        names = self.listdir(path)
        return _Entries(Entry(self, each, os.path.join(os.fspath(path), each)) for each in names)

    def _folder(self, name: str, path: Any) -> dict[str, None]:
        if not self._files.is_folder(name):
            raise _error(errno.ENOTDIR if self._files.is_file(name) else self._missing(name), path)
        return self._files.folders[name]

    def readlink(self, path: Any, *, dir_fd: int | None = None) -> Any:
        """As ``os.readlink``: there are no links."""
        name = name_of(path)
        if name is None:
            return self._system["readlink"](path, dir_fd=dir_fd)
        self._stat(name, path)
        raise _error(errno.EINVAL, path)

    def listxattr(self, path: Any = None, *, follow_symlinks: bool = True) -> list[str]:
        """As ``os.listxattr``: nothing has any."""
        name = name_of(path)
        if name is None:
            listed: list[str] = self._system["listxattr"](path, follow_symlinks=follow_symlinks)
            return listed
        self._stat(name, path)
        return []


def _error(number: int, path: Any) -> OSError:
    return OSError(number, os.strerror(number), path)
