"""Editable install, wheel and sdist → wheel behave alike, with the C extension and without it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import enturbo

# The fixtures' functions: see conftest.py.
Build = Callable[..., "subprocess.CompletedProcess[str]"]
Install = Callable[..., Path]
FilesOf = Callable[[Path], dict[str, bytes]]

FLOORS = ("shm", "workers", "runtime", "examples")

FALLBACK = """
import enturbo, importlib.util
assert importlib.util.find_spec("enturbo.workers._sha256") is None
from enturbo.workers.sha256 import get_hasher
print(get_hasher().name, enturbo.__file__)
"""
NATIVE = """
import enturbo.workers._sha256 as native
from enturbo.workers.sha256 import get_hasher
print(get_hasher("native").name, native.__file__)
"""

# What a user writes, and one line that is wrong: if types were lost on the way, it would pass.
USER = """
from enturbo import EnclaveImage, Measurement, Runtime, SigningKey


def answer(folder: str) -> bytes:
    key = SigningKey.generate()
    image = EnclaveImage.from_function(folder, heap="64MiB")
    sigstruct = key.sign(image, scheme="enturbo")
    measurement: Measurement = image.measure()
    with Runtime(epc="512MiB", signers=[key.mrsigner]) as runtime:
        with runtime.launch(image, sigstruct) as enclave:
            enclave.submit({"lat": 48.85, "lon": 2.35}).result(timeout=10)
    return measurement.digest
"""
WRONG = '\n\nkey: int = SigningKey.generate()\ndigest: str = answer("folder")\n'


def run(python: Path | str, *arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run ``python`` outside the tree, with nothing of this process's settings for it."""
    ours = ("ENTURBO_", "PYTHON", "MAKE", "MFLAGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env=kept | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def modules_of(tree: Path) -> set[str]:
    """Every file of the package that a wheel must hold, seen through the symlinks."""
    found = set()
    for folder, _, names in os.walk(tree / "src" / "enturbo", followlinks=True):
        if "__pycache__" not in folder:
            found |= {str(Path(folder, name).relative_to(tree / "src")) for name in names}
    return {name for name in found if not name.endswith((".c", ".h", ".so", ".pyc"))}


def test_version_is_told_once() -> None:
    assert importlib.metadata.version("enturbo") == enturbo.__version__


def test_version_is_in_the_changelog(tree: Path) -> None:
    assert re.search(
        rf"^## .*\b{re.escape(enturbo.__version__)}\b", (tree / "CHANGELOG.md").read_text(), re.M
    )


def test_sdist_holds_everything_once(tree: Path, sdist: Path, unpacked: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    links = [member.name for member in members if member.issym() or member.islnk()]
    assert links == [], "an sdist holds real files only"

    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert modules_of(tree) <= {name.removeprefix("src/") for name in names}
    sources = {path.name for path in (tree / "src/enturbo/workers").glob("*.[ch]")}
    assert sources
    assert {f"src/enturbo/workers/{name}" for name in sources} <= names
    assert {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "setup.py", ".ci/run", ".ci/apt.txt"} <= names
    assert {"tests/vectors/enturbo-v1.json", "tests/packaging/conftest.py", "tests/test_layout.py"} <= names
    for folder in ("tests", "benchmarks", "docs", "fuzz"):
        there = {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
        built = {name for name in there if name.startswith("docs/model/build/")}
        assert there - built <= names, folder
    assert {name for name in names if name.split("/")[0] in FLOORS} == set(), "the modules stand in it once"
    assert {name for name in names if name.endswith((".so", ".pyc", ".enclave", ".pem"))} == set()
    assert os.access(unpacked / ".ci" / "run", os.X_OK)
    assert sdist.stat().st_size < 1 << 20


def test_make_names_the_python_it_needs(tree: Path, tmp_path: Path) -> None:
    """With a python that is too old make stops before anything is set up, and says so."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi\n')
    old.chmod(0o755)
    done = run("make", "test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", cwd=tree)
    assert done.returncode != 0
    assert "EnTurbo needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("value", ["yes", "REQUIRE", ""])
def test_unknown_choice_of_native_is_refused(tree: Path, build: Build, tmp_path: Path, value: str) -> None:
    done = build("build_wheel", tree, tmp_path, ENTURBO_NATIVE=value)
    assert done.returncode != 0
    assert "expected one of auto, require, off" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_require_without_a_compiler_fails(unpacked: Path, build: Build, tmp_path: Path) -> None:
    done = build("build_wheel", unpacked, tmp_path, ENTURBO_NATIVE="require", CC="false")
    assert done.returncode != 0
    assert "ENTURBO_NATIVE=require" in done.stdout + done.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_sdist_to_wheel_with_the_extension(sdist_wheel: Path, sdist_python: Path, tmp_path: Path) -> None:
    assert "-cp311-abi3-linux_" in sdist_wheel.name
    done = run(sdist_python, "-c", NATIVE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hasher, file = done.stdout.split()
    assert hasher == "native"
    assert Path(file).is_relative_to(sdist_python.parents[1])


@pytest.mark.slow
def test_without_a_compiler_auto_falls_back(pure_wheel: Path, install: Install, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    python = install(pure_wheel)
    done = run(python, "-c", FALLBACK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hasher, file = done.stdout.split()
    assert hasher == "hashlib"
    assert Path(file).is_relative_to(python.parents[1])


@pytest.mark.slow
def test_native_off_makes_a_pure_wheel(
    tree: Path,
    pure_wheel: Path,
    build: Build,
    files_of: FilesOf,
    tmp_path: Path,
) -> None:
    done = build("build_wheel", tree, tmp_path, ENTURBO_NATIVE="off")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == pure_wheel.name
    assert files_of(wheel) == files_of(pure_wheel)


@pytest.mark.slow
def test_wheels_from_tree_and_sdist_are_equal(
    tree: Path, tree_wheel: Path, sdist_wheel: Path, files_of: FilesOf
) -> None:
    ours, theirs = files_of(tree_wheel), files_of(sdist_wheel)
    assert tree_wheel.name == sdist_wheel.name
    assert ours.keys() == theirs.keys()
    # Compilers may write the folder's name into what they make, and RECORD holds its checksum.
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert {name for name in differ if not name.endswith((".so", "/RECORD"))} == set()

    package = {name for name in ours if not name.startswith("enturbo-")}
    assert package - modules_of(tree) == {"enturbo/workers/_sha256.abi3.so"}
    assert modules_of(tree) - package == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["editable", "tree", "sdist"])
def test_a_users_file_type_checks(how: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The types reach a user by py.typed, whichever way the package was installed."""
    python: Path = request.getfixturevalue(f"{how}_python")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(USER)
    wrong.write_text(USER + WRONG)
    cache = request.config.cache
    assert cache is not None
    options = ("--strict", "--python-executable", str(python), "--cache-dir", str(cache.mkdir(f"mypy-{how}")))

    done = run(sys.executable, "-m", "mypy", *options, str(right), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(sys.executable, "-m", "mypy", *options, str(wrong), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(re.findall(r"Incompatible types in assignment", done.stdout)) == 2, done.stdout


@pytest.mark.slow
def test_console_script_is_installed(tree_python: Path, tmp_path: Path) -> None:
    done = run(tree_python.parent / "enturbo", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "measure", "run", "doctor"):
        assert command in done.stdout
