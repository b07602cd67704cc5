"""Installed distributions: which ones a function requires, and which of their files go into its image.

    "Pillow"  ─►  installed? right version?  ─►  what it requires in turn  ─►  files, as its RECORD lists them

What goes in is what the distribution shipped: each file is compared with the hash that its RECORD has. Left
out are what an installer adds (RECORD, INSTALLER and the like, scripts, compiled bytecode), and ``.pth``
files, which nobody runs in an enclave.

Source: PyPA specifications, "Recording installed projects" and "Dependency specifiers".
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import importlib.metadata
import json
import logging
import posixpath
import stat
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from ..shm.errors import ImageFormatError

log = logging.getLogger("enturbo.build")

# Written by whoever installs, so they differ between machines.
_INSTALLERS: Final = frozenset(
    ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "provenance_url.json", "uv_cache.json")
)
_HASHES: Final = frozenset(("sha256", "sha384", "sha512"))


@dataclass(frozen=True)
class SiteFile:
    """A file of a distribution: its path below site-packages, where it is, and what RECORD says of it."""

    name: str
    path: Path
    size: int
    modified: int  # ns
    algorithm: str
    digest: str  # in base64, as RECORD has it, or empty

    def read(self) -> bytes:
        """The bytes. Raises ImageFormatError if they are not what RECORD says, OSError."""
        content = self.path.read_bytes()
        if self.digest:
            found = (
                base64.urlsafe_b64encode(hashlib.new(self.algorithm, content).digest()).rstrip(b"=").decode()
            )
            if found != self.digest.rstrip("="):
                raise ImageFormatError(
                    "changed since it was installed",
                    file=str(self.path),
                    expected=f"{self.algorithm} {_hex(self.digest)}, as its RECORD has it",
                    found=_hex(found),
                )
        return content


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, with the files of it that go into an image, by name."""

    name: str
    version: str
    files: tuple[SiteFile, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find(
    requirements: Iterable[str], *, site: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[Distribution]:
    """The distributions that ``requirements`` name, and those that they require in turn, by name.

    Args:
        requirements: dependency specifiers, as pip takes them: ``"Pillow"``, ``"requests[socks]>=2.31"``.
        site: folders to look in; None: where the running interpreter looks (``sys.path``).
        exclude: ``fnmatch`` patterns of files that stay out, matched against a file's path below
            site-packages and its name.

    Raises ImageFormatError: not installed, another version, not installed from a wheel, changed files.
    """
    known = _Installed(site)
    named = (_parse(text, "the function") for text in requirements)
    wanted = deque((one, "the function") for one in named if _applies(one, "", "the function"))
    seen: set[tuple[str, str]] = set()
    found: dict[str, importlib.metadata.Distribution] = {}
    while wanted:
        requirement, whose = wanted.popleft()
        distribution = found[canonicalize_name(requirement.name)] = known.get(requirement, whose)
        name = distribution.metadata["Name"]
        for extra in ("", *sorted(requirement.extras)):
            if (canonicalize_name(name), extra) in seen:
                continue
            seen.add((canonicalize_name(name), extra))
            for text in distribution.requires or ():
                needed = _parse(text, name)
                if (needed.marker is not None or not extra) and _applies(needed, extra, name):
                    wanted.append((needed, name))
    return [_read(found[name], exclude) for name in sorted(found)]


def _applies(requirement: Requirement, extra: str, whose: str) -> bool:
    """Whether its marker says that this interpreter needs it."""
    try:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    except (UndefinedComparison, UndefinedEnvironmentName, InvalidVersion) as error:
        raise ImageFormatError(
            f"requirement of {whose}", expected="a marker that can be told", found=f"{requirement}: {error}"
        ) from None


class _Installed:
    def __init__(self, site: Sequence[str] | None) -> None:
        self._site = None if site is None else list(site)

    def get(self, requirement: Requirement, whose: str) -> importlib.metadata.Distribution:
        path = sys.path if self._site is None else self._site
        wanted = canonicalize_name(requirement.name)
        candidates = importlib.metadata.distributions(name=requirement.name, path=path)
        match = next(
            (one for one in candidates if canonicalize_name(str(one.metadata["Name"])) == wanted), None
        )
        if match is None:
            where = "" if self._site is None else f" in {', '.join(self._site)}"
            raise ImageFormatError(
                f"{whose} requires {requirement.name}",
                expected="an installed distribution",
                found=f"none of that name{where}; install it (pip install '{requirement}')",
            )
        if requirement.url is None and not requirement.specifier.contains(match.version, prereleases=True):
            raise ImageFormatError(
                f"{whose} requires {requirement.name}",
                expected=f"a version {requirement.specifier}",
                found=f"{match.version} is installed",
            )
        return match


def _parse(text: str, whose: str) -> Requirement:
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise ImageFormatError(
            f"requirement of {whose}", expected="a name, perhaps with versions", found=f"{text!r}: {error}"
        ) from None


def _read(distribution: importlib.metadata.Distribution, exclude: Sequence[str]) -> Distribution:
    whose = f"{distribution.metadata['Name']} {distribution.version}"
    _must_not_be_editable(distribution, whose)
    scripts = {f"bin/{entry.name}" for entry in distribution.entry_points}
    files = []
    for path, hashed in _record(distribution, whose):
        last = path.rpartition("/")[2]
        if _is_installers(path) or path in scripts:
            continue
        if any(fnmatchcase(path, pattern) or fnmatchcase(last, pattern) for pattern in exclude):
            continue
        if path.startswith("__editable__"):
            raise _editable(whose)
        if path.endswith(".pth") and "/" not in path:  # deeper ones are somebody's data
            log.warning("%s: %s is left out: nobody runs .pth files in an enclave", whose, path)
            continue
        files.append(_site_file(whose, path, Path(str(distribution.locate_file(path))), hashed))
    files.sort(key=lambda file: file.name)
    return Distribution(str(distribution.metadata["Name"]), distribution.version, tuple(files))


def _must_not_be_editable(distribution: importlib.metadata.Distribution, whose: str) -> None:
    """Its files are elsewhere, and may change. Source: PEP 610."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        editable = bool(origin.get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        editable = False  # damaged, and of no use to us
    if editable:
        raise _editable(whose)


def _editable(whose: str) -> ImageFormatError:
    return ImageFormatError(
        whose,
        expected="a distribution whose files are in site-packages",
        found="one that was installed as editable; install it from a wheel",
    )


def _record(distribution: importlib.metadata.Distribution, whose: str) -> list[tuple[str, str]]:
    """Path and hash of each file, as RECORD lists them. Raises ImageFormatError.

    ``Distribution.files`` will not do: later Pythons leave out what is not there.
    """
    try:
        text = distribution.read_text("RECORD")
    except UnicodeDecodeError as error:
        raise ImageFormatError(f"{whose}: RECORD", expected="UTF-8", found=str(error)) from None
    if not text:
        raise ImageFormatError(
            whose,
            expected="a distribution that was installed from a wheel, with a RECORD of its files",
            found="none: it belongs to the system's package manager, or is an egg; install it with pip",
        )
    try:
        table = list(csv.reader(text.replace("\r\n", "\n").rstrip("\n").split("\n")))
    except csv.Error as error:
        raise ImageFormatError(f"{whose}: RECORD", expected="path,hash,size", found=str(error)) from None
    rows = []
    for number, row in enumerate(table, 1):
        if len(row) < 2 or not row[0] or "\\" in row[0] or "\0" in row[0]:
            raise ImageFormatError(
                f"{whose}: RECORD, line {number}", expected="path,hash,size", found=repr(row)[:200]
            )
        rows.append((posixpath.normpath(row[0]), row[1]))
    return rows


def _is_installers(path: str) -> bool:
    folder, _, last = path.rpartition("/")
    if path.startswith(("../", "/")) or last.endswith((".pyc", ".pyo")):
        return True  # scripts, headers and manual pages outside of site-packages; bytecode
    return folder.endswith(".dist-info") and last in _INSTALLERS


def _site_file(whose: str, name: str, path: Path, hashed: str) -> SiteFile:
    try:
        status = path.stat()
    except OSError as error:
        raise ImageFormatError(
            f"{whose} lists a file", file=str(path), expected="a file", found=error.strerror
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ImageFormatError(f"{whose} lists a file", file=str(path), expected="a file", found="none")
    algorithm, _, digest = hashed.partition("=")
    if algorithm not in _HASHES:
        algorithm = digest = ""
    return SiteFile(name, path, status.st_size, status.st_mtime_ns, algorithm, digest)


def _hex(digest: str) -> str:
    try:
        return base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()
    except (binascii.Error, ValueError):
        return repr(digest)
