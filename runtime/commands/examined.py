"""What ``measure`` and ``verify`` tell about a file: its values, what was signed, what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measurement import Measurement
from ..sigstruct import Sigstruct


@dataclass(frozen=True)
class ExaminedBlock:
    """One image of a file measured, and its SIGSTRUCT checked.

    ``version``: of the metadata block that describes it; ``problem`` tells what is wrong with the SIGSTRUCT.
    """

    version: str | None
    measured: Measurement
    sigstruct: Sigstruct | None
    match: bool | None  # None: unsigned
    signature_valid: bool | None
    problem: str | None = None


@dataclass(frozen=True)
class Examined:
    """A file measured by each of its metadata blocks; most formats have one. The first is the one to show."""

    file: Path
    format: str
    pages_added: int
    pages_measured: int
    blocks: tuple[ExaminedBlock, ...]

    @property
    def measured(self) -> Measurement:
        """The value to show."""
        return self.blocks[0].measured

    @property
    def sigstruct(self) -> Sigstruct | None:
        """The SIGSTRUCT to show."""
        return self.blocks[0].sigstruct

    @property
    def match(self) -> bool | None:
        """Whether all blocks measure to what their SIGSTRUCTs say; None: all are unsigned."""
        return _all(block.match for block in self.blocks)

    @property
    def signature_valid(self) -> bool | None:
        """Whether all signatures hold, Q1 and Q2 included; None: all blocks are unsigned."""
        return _all(block.signature_valid for block in self.blocks)

    @property
    def one_value(self) -> bool:
        """All metadata blocks measure to one value: every loader builds the same enclave."""
        return len({block.measured for block in self.blocks}) == 1

    @property
    def problem(self) -> str | None:
        """What is wrong, if it is not just that the value is another one than the signed."""
        if not self.one_value:
            return f"its metadata blocks measure differently: {self._values()}"
        return next((block.problem for block in self.blocks if block.problem is not None), None)

    @property
    def good(self) -> bool:
        """One value, and unsigned, or signed well and matching."""
        return self.one_value and self.match is not False and self.signature_valid is not False

    @property
    def mrsigner(self) -> str | None:
        """Who signed, as hexadecimal digits."""
        return None if self.sigstruct is None else self.sigstruct.mrsigner.hex()

    def _values(self) -> str:
        """Each distinct value with the versions of its blocks."""
        versions: dict[Measurement, list[str]] = {}
        for block in self.blocks:
            versions.setdefault(block.measured, []).append(block.version or "no version")
        return "; ".join(
            f"{measured.digest.hex()} ({', '.join(names)})" for measured, names in versions.items()
        )

    def row(self) -> dict[str, Any]:
        """The object that ``measure --json`` prints; ``variants`` only where a file has several blocks."""
        row = {
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
        if len(self.blocks) > 1:
            row["variants"] = [
                {
                    "metadata_version": block.version,
                    "mrenclave": block.measured.digest.hex(),
                    "match": block.match,
                    "signature_valid": block.signature_valid,
                }
                for block in self.blocks
            ]
        return row

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
        facts: dict[str, object] = {"MRENCLAVE": self.measured.digest.hex(), "scheme": scheme}
        facts["format"] = self.format
        versions = [block.version for block in self.blocks if block.version is not None]
        if versions:
            facts["metadata"] = ", ".join(versions)
            if len(self.blocks) > 1:
                facts["metadata"] = f"{facts['metadata']}: " + (
                    "one value" if self.one_value else f"DIFFERENT VALUES: {self._values()}"
                )
        facts["pages"] = f"{self.pages_added} added, {self.pages_measured} measured"
        facts["SIGSTRUCT"] = signature
        return facts


def _all(values: Any) -> bool | None:
    known = [value for value in values if value is not None]
    return all(known) if known else None
