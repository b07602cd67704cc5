"""The tests themselves, tried: each rule of the protocol taken away in a copy of the package must be noticed.

``table.toml`` names the rule, the text that carries it and a test. The copy is of the package that runs here
(installed or from the tree), the test is run on it in a process of its own, and has to fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import enturbo

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 100
TABLE: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "table.toml").read_text())["mutation"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, with the built extension and without links."""
    target = tmp_path / "enturbo"
    shutil.copytree(Path(enturbo.__file__).parent, target, ignore=shutil.ignore_patterns("examples"))
    (target / "examples").mkdir()
    return target


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the copy in front of everything that is installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ENTURBO_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package.parent,
        env=kept | {"PYTHONPATH": str(package.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def run_test(package: Path, test: str) -> subprocess.CompletedProcess[str]:
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout=45", "--tb=line"]
    return run(package, "-m", "pytest", *options, str(TESTS / test))


def cases() -> list[Any]:
    return [
        pytest.param(each, id=each["name"], marks=() if each.get("quick") else pytest.mark.slow)
        for each in TABLE
    ]


@pytest.mark.parametrize("mutation", cases())
def test_a_rule_taken_away_is_noticed(mutation: dict[str, Any], package: Path) -> None:
    file = package / mutation["file"]
    source = file.read_text()
    for edit in mutation["edit"]:
        # The first line break after ''' is TOML's, so both texts end where the source's lines do.
        assert source.count(edit["old"]) == 1, f"{edit['old']!r} does not stand in {file.name} exactly once"
        source = source.replace(edit["old"], edit["new"])
    compile(source, str(file), "exec")
    file.write_text(source)
    done = run_test(package, mutation["test"])
    # 1: tests were run and some failed. An error elsewhere (2 to 5), or in a teardown alone, is no proof.
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"\b1 failed\b", done.stdout), done.stdout + done.stderr


def test_the_copy_is_what_is_tested(package: Path) -> None:
    """Without a mutation: it is the copy that is imported, and a test on it passes."""
    done = run(package, "-c", "import enturbo; print(enturbo.__file__)")
    assert done.stdout.strip() == str(package / "__init__.py"), done.stderr
    done = run_test(package, "test_measure.py::test_a_closed_launch_is_not_worked_on")
    assert done.returncode == 0, done.stdout + done.stderr
