"""Rules as data: rule → switch (an edit that takes it away) → the test that then has to fail.

A table is a TOML file of ``[[mutation]]`` with ``name``, ``file`` (in the package), ``test`` (in here) and
one or more ``[[mutation.edit]]`` with ``old``, which stands in the file exactly once, and ``new``.
``quick = true``: tried with every run of the suite, not with the slow tests alone.

Test modules cannot import one another: each loads this one from its path.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

import enturbo

TESTS = Path(__file__).resolve().parent
SECONDS = 100


class Edit(NamedTuple):
    """A text of a module and what stands there instead."""

    old: str
    new: str


class Rule(NamedTuple):
    """A rule, the edits that switch it off, and the test that notices."""

    name: str
    table: str
    file: str
    test: str
    edits: tuple[Edit, ...]
    quick: bool = False


def load(*tables: Path) -> list[Rule]:
    """The rules of TOML tables, in order."""
    return [
        Rule(
            row["name"],
            table.stem,
            row["file"],
            row["test"],
            tuple(Edit(edit["old"], edit["new"]) for edit in row["edit"]),
            row.get("quick", False),
        )
        for table in tables
        for row in tomllib.loads(table.read_text(encoding="utf-8"))["mutation"]
    ]


def cases(rules: Sequence[Rule]) -> list[Any]:
    """What ``parametrize`` takes; rules that are not quick are slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(rule, id=f"{rule.table}-{rule.name}", marks=() if rule.quick else slow) for rule in rules
    ]


def switched_off(rule: Rule, package: Path) -> str:
    """The source of the rule's file without the rule. Fails where an edit does not stand in it once."""
    file = package / rule.file
    source = file.read_text(encoding="utf-8")
    for edit in rule.edits:
        # The first line break after ''' is TOML's, so both texts end where the source's lines do.
        assert source.count(edit.old) == 1, f"{edit.old!r} does not stand in {file.name} exactly once"
        source = source.replace(edit.old, edit.new)
    compile(source, str(file), "exec")
    return source


def copy_package(folder: Path) -> Path:
    """A copy of the package that runs here, with the built extension and without links."""
    target = folder / "enturbo"
    shutil.copytree(Path(enturbo.__file__).parent, target, ignore=shutil.ignore_patterns("examples"))
    (target / "examples").mkdir()
    return target


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the copy in front of everything that is installed."""
    # Told that it is in CI, pytest writes out in full how page lists differ, which takes minutes.
    unwanted = ("ENTURBO_", "PYTEST_", "CI", "BUILD_NUMBER")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    try:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=package.parent,
            # What waits in vain for the rule need not do so for long.
            env=kept | {"PYTHONPATH": str(package.parent), "ENTURBO_TEST_WAIT": "4"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    finally:
        _end_strays(package.parent)


def _end_strays(folder: Path) -> None:
    """Without a rule a test may end with a worker that is stopped, and cannot see that its host is gone."""
    for process in psutil.process_iter(["cmdline"]):
        if f"enturbo={folder}" in (process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def run_test(package: Path, test: str) -> subprocess.CompletedProcess[str]:
    """One test, on the copy."""
    # Not pytest's numbered folders: sessions that tidy those up at the same time trip over each other.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout=45", "--tb=line"]
    options.append(f"--basetemp={package.parent / 'pytest'}")
    return run(package, "-m", "pytest", *options, str(TESTS / test))


def must_be_noticed(rule: Rule, folder: Path) -> None:
    """Switch the rule off in a copy of the package; its test has to fail."""
    package = copy_package(folder)
    source = switched_off(rule, package)
    (package / rule.file).write_text(source, encoding="utf-8")
    done = run_test(package, rule.test)
    # 1: tests were run and some failed. An error elsewhere (2 to 5), or in a teardown alone, is no proof.
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"\b1 failed\b", done.stdout), done.stdout + done.stderr
