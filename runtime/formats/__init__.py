"""Readers of enclave files, one module a format, told apart by content and never by the file's name.

A reader takes an open file and its name (for messages) and gives an EnclaveImage of lazy regions, or raises
ImageFormatError with file, structure, offset, expected and found.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from ...shm.errors import ImageFormatError
from . import elf, enclave_file, intel_elf, open_enclave, sgxs, sgxs_stream, sigstruct_file

if TYPE_CHECKING:
    from ..image import EnclaveImage, PathLike
    from ..sigstruct import Sigstruct
    from ..store import Store


class Format(NamedTuple):
    """A known format: its name, the bytes that its files begin with, what tells it from others that begin
    so, and what reads one."""

    name: str
    magic: bytes
    load: Callable[[BinaryIO, str], EnclaveImage]
    is_it: Callable[[BinaryIO, str], bool] = lambda file, name: True


FORMATS: Final = (
    Format("enclave", enclave_file.MAGIC, enclave_file.load),
    Format("intel-sdk-elf", elf.MAGIC, intel_elf.load, intel_elf.is_it),
    Format("open-enclave-elf", elf.MAGIC, open_enclave.load, open_enclave.is_it),
    Format("sgxs", sgxs_stream.ECREATE, sgxs.load),
    Format("sgxs", sgxs_stream.UNSIZED, sgxs.load),
    Format("sigstruct", sigstruct_file.MAGIC, sigstruct_file.load),
)


def _open(path: PathLike) -> BinaryIO:
    """Open a regular file. O_NONBLOCK: a FIFO of that name would block the caller for ever."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise ImageFormatError("not a regular file", file=os.fspath(path))


def detect(path: PathLike) -> Format:
    """The format of a file. Raises ImageFormatError if it is none that is known, and OSError."""
    with _open(path) as file:
        return _detect(file, os.fspath(path))


def load(path: PathLike, store: Store | None = None) -> EnclaveImage:
    """Read an enclave file of any known format, its layers from ``store`` (None: the default store). Raises
    ImageFormatError and OSError."""
    name = os.fspath(path)
    with _open(path) as file:
        known = _detect(file, name)
        if known.load is enclave_file.load:  # the only one with layers
            return enclave_file.load(file, name, store)
        return known.load(file, name)


def load_sigstruct(path: PathLike) -> Sigstruct:
    """The SIGSTRUCT in a file of its own.

    Raises SignatureError, ImageFormatError for what is no regular file, and OSError.
    """
    with _open(path) as file:
        return sigstruct_file.read(file, os.fspath(path))


def _detect(file: BinaryIO, name: str) -> Format:
    head = file.read(max(len(known.magic) for known in FORMATS))
    file.seek(0)
    for known in FORMATS:
        if head.startswith(known.magic):
            fits = known.is_it(file, name)
            file.seek(0)
            if fits:
                return known
    expected = " or ".join(f"{known.name} ({known.magic!r})" for known in FORMATS)
    raise ImageFormatError("format", file=name, offset=0, expected=expected, found=head)
