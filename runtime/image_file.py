"""A file of the image as a file object.

Standard library and msgpack only; the enclave's side imports this module.
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING

from .files import Files
from .libraries import MemoryFiles

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ImageFile(io.RawIOBase):
    """A file of the image: reading waits for the pages that are read, and for no others."""

    def __init__(self, name: str, path: str, files: Files, memory: MemoryFiles) -> None:
        """Raises FileNotFoundError."""
        super().__init__()
        self.name = path
        self.mode = "rb"
        self._name, self._files, self._memory = name, files, memory
        self._offset, self._size = files.extents[name]
        self._at = 0
        self._fd = -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check()
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check()
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}.get(whence)
        if start is None:
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = start + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._check()
        with memoryview(buffer).cast("B") as target:
            count = max(0, min(len(target), self._size - self._at))
            target[:count] = self._files.read_at(self._offset + self._at, count)
        self._at += count
        return count

    def fileno(self) -> int:
        """A descriptor of a copy in memory, made when it is first asked for; positions are not shared."""
        self._check()
        if self._fd < 0:
            self._fd = self._memory.copy(self._name)
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file.")
