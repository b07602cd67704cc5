"""The rest of the suite, copied out of the tree, against an installed wheel: ``make test-wheel``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SECONDS = 540
TESTS = Path(__file__).resolve().parents[1]
# Run against an installed wheel by tests/unprivileged, as another user; mutations are of a copy in any case.
# The workloads are no part of a wheel.
ELSEWHERE = ("gates", "sealing", "attacks", "unprivileged", "mutations", "workloads")


@pytest.mark.wheel
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_suite_passes_against_the_installed_wheel(tree: Path, sdist_python: Path, tmp_path: Path) -> None:
    """Every quick test but these and those of ELSEWHERE.

    With development mode, where warnings are errors from the first import on.

    Its output is shown when pytest does not capture, so that its closing line is seen.
    """
    left_out = shutil.ignore_patterns("__pycache__", "packaging", *ELSEWHERE)
    shutil.copytree(TESTS, tmp_path / "tests", ignore=left_out)
    shutil.copy(tree / "pyproject.toml", tmp_path)  # pytest's settings
    shutil.copy(tree / "README.md", tmp_path)  # its example is run
    shutil.copytree(tree / "docs", tmp_path / "docs")  # the model's names are looked up
    where = [str(sdist_python), "-c", "import enturbo; print(enturbo.__file__)"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ENTURBO_", "PYTHON"))}
    found = subprocess.run(
        where, cwd=tmp_path, env=kept, check=True, capture_output=True, text=True, timeout=60
    )
    assert Path(found.stdout.strip()).is_relative_to(sdist_python.parents[1])

    command = [str(sdist_python), "-X", "dev", "-W", "error", "-m", "pytest", "-m", "not slow"]
    # Not pytest's numbered folders: sessions that tidy those up at the same time trip over each other.
    command.append(f"--basetemp={tmp_path / 'pytest'}")
    done = subprocess.run(
        command, cwd=tmp_path, env=kept, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False
    )
    assert done.returncode == 0
