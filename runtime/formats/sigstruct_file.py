"""A SIGSTRUCT in a file of its own (``.sig``, ``.css``): 1808 bytes that say what some enclave measures to.

It names no pages, so it is no image. It is a known format all the same: who takes one for an image is told
what it is, and :func:`read` is how the SIGSTRUCT beside an image is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

from ...shm.errors import ImageFormatError
from ..sigstruct import HEADER1, SIZE, Sigstruct

if TYPE_CHECKING:
    from ..image import EnclaveImage

MAGIC: Final = HEADER1


def load(file: BinaryIO, name: str) -> EnclaveImage:
    """Never an image: raises ImageFormatError that says what the file is."""
    del file
    raise ImageFormatError(
        "no image", file=name, offset=0, expected="an enclave's pages", found="a SIGSTRUCT, which has none"
    )


def read(file: BinaryIO, name: str) -> Sigstruct:
    """The SIGSTRUCT that is the whole file. Raises SignatureError (:meth:`Sigstruct.parse`) and OSError."""
    return Sigstruct.parse(file.read(SIZE + 1), file=name)
