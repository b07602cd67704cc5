"""The store: layers of images on disk, each once, named by their content.

::

    objects/ab/abcd…    an immutable file of whole pages; its name is the SHA-256 of its content
    index/KEY           the name of an object, and a line break: what somebody wants to find again
    partial/            files that are being written; those of a writer that died go after a day

An object is complete when it has its name, and the name says what is in it. So writers need not know of each
other, and who opens one finds damage. All of it is a cache: an object that is gone is built again, or comes
with a self-contained file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final
from weakref import WeakValueDictionary

from ..shm.errors import ImageFormatError
from ..shm.layout import PAGE_SIZE
from ..shm.mapping import map_shared
from .backing import Backing
from .region import Buffer

if TYPE_CHECKING:
    from .image import PathLike

PARTIAL_SECONDS: Final = 86400.0  # without a write to it: its writer is dead

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_LINE: Final = re.compile(rf"({_DIGEST.pattern})\n")
_KEY: Final = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,199}")

# What this process knows of objects, by path. A file with the same identity has the content that was checked.
_Identity = tuple[int, int, int, int]
_lock: Final = threading.Lock()
_checked: Final[dict[Path, _Identity]] = {}
_opened: Final[WeakValueDictionary[Path, Backing]] = WeakValueDictionary()


class Store:
    """A folder of objects; it is made when something is put there. Any number of processes may use it.

    Digests are 64 hexadecimal digits. Raises ImageFormatError for any other, and for objects that are
    missing or damaged; OSError, with the folder's name, where the folder cannot be used.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder: Final = Path(os.path.abspath(folder))

    @classmethod
    def default(cls) -> Store:
        """The one of this user: ``$ENTURBO_STORE``, else ``enturbo/store`` in ``$XDG_CACHE_HOME`` or
        ``~/.cache``."""
        if folder := os.environ.get("ENTURBO_STORE"):
            return cls(folder)
        cache = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(cache):
            cache = os.path.expanduser("~/.cache")
        return cls(Path(cache, "enturbo", "store"))

    def path(self, digest: str) -> Path:
        """Where an object is, or would be."""
        if _DIGEST.fullmatch(digest) is None:
            raise ImageFormatError("digest", expected="64 hexadecimal digits", found=repr(digest[:100]))
        return self.folder / "objects" / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Whether the object is there. Its content is looked at when it is opened."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of an object."""
        try:
            return self.path(digest).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(digest) from None

    def put(self, content: Iterable[Buffer]) -> str:
        """Keep ``content``, the pieces one after another; the object's digest. All of it must be whole pages.

        What is there already is not written again.
        """
        hasher, size = hashlib.sha256(), 0
        with self._writing() as (file, temporary):
            for piece in content:
                with memoryview(piece) as view:
                    hasher.update(view)
                    file.write(view)
                    size += view.nbytes
            if not size or size % PAGE_SIZE:
                raise ImageFormatError(
                    "object of a store", expected=f"a multiple of {PAGE_SIZE} bytes", found=size
                )
            file.flush()
            os.fsync(file.fileno())
            digest = hasher.hexdigest()
            if not (self.has(digest) and self.size(digest) == size):
                _move(temporary, self.path(digest))
        return digest

    def open(self, digest: str) -> Backing:
        """An object, mapped. All users in this process have the same one; it closes with the last of them.

        Its content is compared with its name when this process opens it for the first time, and again when
        it has become another file.
        """
        path = self.path(digest)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "rb", buffering=0, opener=_nonblocking))
            except (FileNotFoundError, NotADirectoryError):
                raise self._missing(digest) from None
            stack.enter_context(_lock)
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            if _checked.get(path) != identity:
                self._check(digest, file, status)
            elif (known := _opened.get(path)) is not None:
                return known
            mapping = map_shared(
                file.fileno(), status.st_size, writable=False
            )  # mmap.mmap keeps a descriptor
            backing = _opened[path] = Backing(os.dup(file.fileno()), mapping, digest)
            _checked[path] = identity
            return backing

    def _check(self, digest: str, file: FileIO, status: os.stat_result) -> None:
        """Compare an object's size and content with what they must be."""
        expected, found = f"whole pages, SHA-256 {digest}", f"{status.st_size} bytes"
        if stat.S_ISREG(status.st_mode) and status.st_size and status.st_size % PAGE_SIZE == 0:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual == digest:
                return
            found = f"SHA-256 {actual}"
        raise ImageFormatError(
            f"object {digest}",
            file=str(self.folder),
            expected=expected,
            found=f"{found}: it is damaged. Remove {self.path(digest)}, and build the image again",
        )

    def _missing(self, digest: str) -> ImageFormatError:
        return ImageFormatError(
            f"object {digest}",
            file=str(self.folder),
            expected="that it is in this store",
            found="nothing. Build the image on this machine, or elsewhere with --whole: a self-contained "
            "file, saved without a store",
        )

    # -------------------------------------------------------------------------------------------- the index

    def remember(self, key: str, digest: str) -> None:
        """Have ``key`` lead to an object from now on. Raises ValueError for what is no key: at most 200
        letters, digits, ``.``, ``_``, ``-``, and no dot in front."""
        target, line = self._entry(key), f"{self.path(digest).name}\n"
        with self._writing() as (file, temporary):
            file.write(line.encode())
            file.flush()
            _move(temporary, target)

    def lookup(self, key: str) -> str | None:
        """The object to which ``key`` leads; None if it leads nowhere: no entry, a damaged one, no object."""
        try:
            with open(self._entry(key), "rb") as file:
                found = _LINE.fullmatch(file.read(100).decode("ascii", "replace"))
            return found[1] if found is not None and self.has(found[1]) else None
        except OSError:
            return None

    def _entry(self, key: str) -> Path:
        if _KEY.fullmatch(key) is None:
            raise ValueError(f"key {key!r}: expected 1..200 letters, digits, '.', '_', '-', no '.' in front")
        return self.folder / "index" / key

    # ---------------------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file, to be moved to its place when it is written; else it goes away."""
        temporary = self.folder / "partial" / secrets.token_hex(16)
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            _sweep(temporary.parent)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            try:
                with os.fdopen(fd, "wb") as file:
                    yield file, temporary
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            what = f"the store cannot be written: {error.strerror or error}"
            raise OSError(error.errno, what, str(self.folder)) from error


def _nonblocking(name: str, flags: int) -> int:
    """A FIFO of that name would block the caller for ever."""
    return os.open(name, flags | os.O_NONBLOCK)


def _move(temporary: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(target)


def _sweep(partial: Path) -> None:
    """Remove what writers that died have left."""
    before = time.time() - PARTIAL_SECONDS
    with os.scandir(partial) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another sweeper, another user's
                if entry.stat().st_mtime < before:
                    os.unlink(entry)
