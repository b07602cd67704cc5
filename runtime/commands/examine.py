"""A file measured and its SIGSTRUCT checked: what ``measure`` and ``verify`` print. Prints nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...shm.errors import SignatureError
from ..measurement import DEFAULT_BLOCK, DEFAULT_DOMAINS, Measurement
from ..sigstruct import Sigstruct
from .common import find_sigstruct, load_image


@dataclass(frozen=True)
class Examined:
    """A file measured, and its SIGSTRUCT checked. ``problem`` tells what is wrong with the SIGSTRUCT."""

    file: Path
    format: str
    measured: Measurement
    pages_added: int
    pages_measured: int
    sigstruct: Sigstruct | None
    match: bool | None  # None: unsigned
    signature_valid: bool | None
    problem: str | None = None

    @property
    def good(self) -> bool:
        """Unsigned, or signed well and matching."""
        return self.match is not False and self.signature_valid is not False

    @property
    def mrsigner(self) -> str | None:
        """Who signed, as hexadecimal digits."""
        return None if self.sigstruct is None else self.sigstruct.mrsigner.hex()

    def row(self) -> dict[str, Any]:
        """The object that ``measure --json`` prints."""
        return {
            "file": str(self.file),
            "format": self.format,
            "scheme": self.measured.scheme,
            "mrenclave": self.measured.digest.hex(),
            "pages_added": self.pages_added,
            "pages_measured": self.pages_measured,
            "signed": self.sigstruct is not None,
            "match": self.match,
            "signature_valid": self.signature_valid,
            "mrsigner": self.mrsigner,
        }

    def facts(self) -> dict[str, object]:
        """The same for people."""
        if self.sigstruct is None:
            signature = "none"
        else:
            match = "matches" if self.match else "DOES NOT MATCH"
            valid = "valid" if self.signature_valid else "NOT VALID"
            signature = f"{match}, signature {valid}, MRSIGNER {self.mrsigner}"
        scheme = self.measured.scheme
        if scheme == "enturbo":
            scheme += f" ({self.measured.domains} domains, {self.measured.block} pages a block)"
        return {
            "MRENCLAVE": self.measured.digest.hex(),
            "scheme": scheme,
            "format": self.format,
            "pages": f"{self.pages_added} added, {self.pages_measured} measured",
            "SIGSTRUCT": signature,
        }


def examine(
    path: Path,
    sigstruct_file: Path | None = None,
    *,
    wanted: tuple[str, int, int] | None = None,
    edmm: bool = False,
    workers: int = 0,
) -> Examined:
    """Measure ``path`` as its SIGSTRUCT says, or as ``wanted`` (scheme, D, B), and check the SIGSTRUCT.

    ``match`` is always about the signed value under the scheme that was signed. Raises EnturboError for what
    cannot be read.
    """
    from ..formats import detect

    with load_image(path, edmm) as image:
        sigstruct = find_sigstruct(path, image, sigstruct_file)
        signed, problem, valid = _signed(sigstruct)
        how = wanted or _how(signed) or ("enturbo", DEFAULT_DOMAINS, DEFAULT_BLOCK)
        measured = image.measure(how[0], domains=how[1], block=how[2], workers=workers)
        match = None if sigstruct is None else False
        if signed is not None:
            same = (measured.scheme, measured.domains, measured.block)
            compared = measured
            if same != _how(signed):
                compared = image.measure(
                    signed.scheme, domains=signed.domains, block=signed.block, workers=workers
                )
            match = compared == signed
        return Examined(
            path,
            detect(path).name,
            measured,
            image.page_count,
            image.measured_pages,
            sigstruct,
            match,
            valid,
            problem,
        )


def _how(measurement: Measurement | None) -> tuple[str, int, int] | None:
    return None if measurement is None else (measurement.scheme, measurement.domains, measurement.block)


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
