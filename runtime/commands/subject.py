"""What ``inspect`` and ``diff`` look at: an enclave file with its SIGSTRUCT, or a SIGSTRUCT alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..image import EnclaveImage
from ..sigstruct import Sigstruct
from .common import find_sigstruct, load_image, reading

SIGSTRUCT_FORMAT = "sigstruct"


class Subject(NamedTuple):
    """``image`` is None for a file that is a SIGSTRUCT, ``sigstruct`` for an unsigned image."""

    file: Path
    format: str
    image: EnclaveImage | None
    sigstruct: Sigstruct | None


@contextmanager
def subject(path: Path, sigstruct: Path | None = None) -> Iterator[Subject]:
    """Open a file; closed at the end. Raises InputError and ImageFormatError."""
    from ..formats import detect, sigstruct_file

    with reading(path):
        name = detect(path).name
    if name == SIGSTRUCT_FORMAT:
        with reading(path), path.open("rb") as file:
            alone = sigstruct_file.read(file, str(path))
        yield Subject(path, name, None, alone)
        return
    with load_image(path) as image:
        yield Subject(path, name, image, find_sigstruct(path, image, sigstruct))
