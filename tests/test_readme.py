"""README's example runs as it stands: unguarded, in every way a program can be started, on every Python."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
# The versions that the package names; those that this machine has are tried.
VERSIONS = ("3.11", "3.12", "3.13")


def example() -> str:
    """The first Python block of README.md, which is the installed package's description, too."""
    file = ROOT / "README.md"
    text = file.read_text() if file.is_file() else importlib.metadata.metadata("enturbo").json["description"]
    assert isinstance(text, str)
    found = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert found is not None, "README.md has no Python block"
    return found[1]


def run(way: str, folder: Path, python: str = sys.executable) -> None:
    """Run the example and look at what it prints."""
    code, stdin = example(), None
    if way == "thread":
        code = "import threading\ndef main():\n" + textwrap.indent(code, "    ")
        code += "thread = threading.Thread(target=main)\nthread.start()\nthread.join()\n"
    if way == "-c":
        arguments = ["-c", code]
    elif way == "stdin":
        arguments, stdin = ["-"], code
    else:
        (folder / "script.py").write_text(code)
        arguments = ["script.py"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENTURBO_")}
    done = subprocess.run(
        [python, "-W", "error", *arguments],
        input="" if stdin is None else stdin,
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    result, verdict = done.stdout.splitlines()
    assert result == "6"
    assert re.match(r"[0-9a-f]{64} VERIFIED launch → .*verified .* ms", verdict)


@pytest.mark.parametrize("way", ["script", "-c", "stdin", "thread"])
def test_example_runs(way: str, tmp_path: Path) -> None:
    run(way, tmp_path)


def test_example_is_short_and_needs_no_guard() -> None:
    code = example()
    assert "__main__" not in code
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 16


def find_python(version: str) -> str | None:
    """An interpreter of this version that runs (a pyenv shim may stand for none)."""
    candidates = [shutil.which(f"python{version}")]
    candidates += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("version", [version for version in VERSIONS if version != RUNNING])
def test_example_runs_under_other_pythons(version: str, tmp_path: Path) -> None:
    """A new environment with the package built by that Python, and its dependencies."""
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    copy = tmp_path / "source"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "*.so", ".*_cache", "__pycache__"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ENTURBO_", "PYTHON"))}
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", str(copy)],
        env=kept,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "work"
    folder.mkdir()
    for way in ("script", "-c", "stdin", "thread"):
        run(way, folder, python)
