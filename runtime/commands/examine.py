"""Files measured and their SIGSTRUCTs checked: what ``measure`` and ``verify`` print. Prints nothing itself.

Files are read and their schemes decided first, then all images are measured at once.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...shm.errors import EnturboError, SignatureError
from ..image import EnclaveImage
from ..measurement import DEFAULT_BLOCK, DEFAULT_DOMAINS, Measurement, check_scheme
from ..measuring import MeasureJob, measure_images
from ..sigstruct import Sigstruct
from .common import find_sigstruct, load_image, reading
from .examined import Examined, ExaminedBlock

OPEN_FILES: Final = 64  # at once: each holds one or two descriptors, of which a process may have few

OWN_FORMAT: Final = "enclave"

How = tuple[str, int, int]
"""Scheme, D, B; of scheme sgx ("sgx", 1, 1), as in a Measurement."""


def examine(path: Path, sigstruct_file: Path | None = None, *, edmm: bool = False) -> Examined:
    """:func:`examine_all` for one file. Raises EnturboError if it cannot be read."""
    (found,) = examine_all([path], sigstruct_file, edmm=edmm)
    if isinstance(found, EnturboError):
        raise found
    return found


def examine_all(
    paths: Sequence[Path],
    sigstruct_file: Path | None = None,
    *,
    wanted: How | None = None,
    edmm: bool = False,
    step: Callable[[], None] = lambda: None,
) -> list[Examined | EnturboError]:
    """Measure files as their SIGSTRUCTs say, or as ``wanted``, and check the SIGSTRUCTs.

    ``match`` is always about the signed value under the scheme that was signed. A file that cannot be read
    has its error in its place. ``step`` is called once a file, from any thread. Raises SchemeError.
    """
    if wanted is not None:
        check_scheme(*wanted)
        wanted = wanted if wanted[0] != "sgx" else ("sgx", 1, 1)
    found: list[Examined | EnturboError] = []
    for first in range(0, len(paths), OPEN_FILES):
        # Reading a file checks its checksums, which takes every byte of it: worth a second core.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "enturbo-load") as threads:
            batch = paths[first : first + OPEN_FILES]
            opened = list(threads.map(lambda path: _open(path, sigstruct_file, wanted, edmm), batch))
        with contextlib.ExitStack() as stack:
            for case in opened:
                if isinstance(case, _Case):
                    for block in case.blocks:
                        stack.enter_context(block.image)
            found += _measure(opened, step)
    return found


@dataclass(frozen=True)
class _Block:
    """An image of a file and what its SIGSTRUCT says. ``hows``: first the one to show."""

    image: EnclaveImage
    version: str | None  # of the metadata block
    sigstruct: Sigstruct | None
    signed: Measurement | None
    problem: str | None
    signature_valid: bool | None
    hows: tuple[How, ...]

    def examined(self, measured: Mapping[How, Measurement]) -> ExaminedBlock:
        """What there is to tell when the image has been measured in all its ``hows``."""
        match = None if self.sigstruct is None else False
        if self.signed is not None:
            match = measured[_how(self.signed)] == self.signed
        return ExaminedBlock(
            self.version, measured[self.hows[0]], self.sigstruct, match, self.signature_valid, self.problem
        )


@dataclass(frozen=True)
class _Case:
    """A file whose images are open: one, or one for each of its metadata blocks."""

    file: Path
    format: str
    blocks: tuple[_Block, ...]

    def examined(self, blocks: Sequence[ExaminedBlock]) -> Examined:
        """What there is to tell when all have been measured."""
        image = self.blocks[0].image
        return Examined(self.file, self.format, image.page_count, image.measured_pages, tuple(blocks))


def _open(path: Path, sigstruct_file: Path | None, wanted: How | None, edmm: bool) -> _Case | EnturboError:
    """Read a file, and decide how it is measured."""
    from ..formats import detect

    try:
        image = load_image(path, edmm)
    except EnturboError as error:
        return error
    with contextlib.ExitStack() as stack:
        images = (image, *image.variants)
        for each in images:
            stack.enter_context(each)
        try:
            with reading(path):
                name = detect(path).name
            blocks = tuple(_block(path, each, name, sigstruct_file, wanted) for each in images)
        except EnturboError as error:
            return error
        stack.pop_all()  # whoever asked closes them
        return _Case(path, name, blocks)


def _block(
    path: Path, image: EnclaveImage, name: str, sigstruct_file: Path | None, wanted: How | None
) -> _Block:
    sigstruct = find_sigstruct(path, image, sigstruct_file)
    signed, problem, valid = _signed(sigstruct)
    hows = [] if wanted is None else [wanted]
    if signed is not None and _how(signed) not in hows:
        hows.append(_how(signed))
    if not hows:
        # Files of other tools are made for the hardware, whose scheme is sgx.
        hows = [("enturbo", DEFAULT_DOMAINS, DEFAULT_BLOCK) if name == OWN_FORMAT else ("sgx", 1, 1)]
    version = image.details.get("metadata_version")
    return _Block(
        image, None if version is None else str(version), sigstruct, signed, problem, valid, tuple(hows)
    )


def _measure(
    opened: Sequence[_Case | EnturboError], step: Callable[[], None]
) -> Iterator[Examined | EnturboError]:
    """All images at once, so that those of scheme sgx share the hasher's lanes; results in order."""
    jobs: list[MeasureJob] = []
    files: list[int] = []  # of each job
    for number, case in enumerate(opened):
        if isinstance(case, EnturboError):
            step()
        else:
            for block in case.blocks:
                jobs += (MeasureJob(block.image, *how) for how in block.hows)
                files += [number] * len(block.hows)
    left = Counter(files)

    def done(job: int) -> None:
        left[files[job]] -= 1
        if not left[files[job]]:
            step()

    measured = iter(measure_images(jobs, done=done))
    for case in opened:
        if isinstance(case, EnturboError):
            yield case
        else:
            yield case.examined(
                [block.examined({how: next(measured) for how in block.hows}) for block in case.blocks]
            )


def _how(measurement: Measurement) -> How:
    return measurement.scheme, measurement.domains, measurement.block


def _signed(sigstruct: Sigstruct | None) -> tuple[Measurement | None, str | None, bool | None]:
    """What is signed, what is wrong, and whether the signature holds."""
    if sigstruct is None:
        return None, None, None
    problem, valid = None, True
    try:
        sigstruct.verify()
    except SignatureError as error:
        problem, valid = str(error), False
    try:
        return sigstruct.measurement, problem, valid
    except SignatureError as error:
        return None, problem or str(error), valid
