"""Builds for the packaging tests: sdist, wheels and environments, each made once a session.

Nothing is downloaded. setuptools' own build hooks run in a child process, in a copy of the source tree, and a
new environment finds the dependencies where this one has them, through a ``.pth`` file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so"
)

Build = Callable[..., "subprocess.CompletedProcess[str]"]
Install = Callable[..., Path]


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This environment with ``settings``, and without what would reach into a build."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ENTURBO_", "PYTHON", "MAKE", "MFLAGS")) and key not in ("CC", "CFLAGS")
    }
    return kept | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(settings)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree with its symlinks, where a build may leave what it likes."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no source tree beside these tests")
    copy = tmp_path_factory.mktemp("source") / "enturbo"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
    return copy


@pytest.fixture(scope="session")
def build() -> Build:
    """``build(hook, tree, out, NAME=value, …)`` calls setuptools' hook ``build_sdist`` or ``build_wheel``."""

    def run(hook: str, tree: Path, out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(
            tree / "build", ignore_errors=True
        )  # what an earlier build compiled would be taken again
        code = f"import sys, setuptools.build_meta as hooks; hooks.{hook}(sys.argv[1])"
        return subprocess.run(
            [sys.executable, "-c", code, str(out)],
            cwd=tree,
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def built(done: subprocess.CompletedProcess[str], out: Path, pattern: str) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob(pattern)
    return found


@pytest.fixture(scope="session")
def sdist(tree: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .tar.gz, built where no compiler works: an sdist compiles nothing."""
    out = tmp_path_factory.mktemp("sdist")
    done = build("build_sdist", tree, out, ENTURBO_NATIVE="require", CC="false")
    return built(done, out, "*.tar.gz")


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="session")
def tree_wheel(tree: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the tree, with the C extension."""
    out = tmp_path_factory.mktemp("wheel")
    return built(build("build_wheel", tree, out, ENTURBO_NATIVE="require"), out, "*.whl")


@pytest.fixture(scope="session")
def sdist_wheel(unpacked: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, with the C extension."""
    out = tmp_path_factory.mktemp("sdist-wheel")
    return built(build("build_wheel", unpacked, out, ENTURBO_NATIVE="require"), out, "*.whl")


@pytest.fixture(scope="session")
def pure_wheel(unpacked: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist with ``auto``, where no compiler works."""
    out = tmp_path_factory.mktemp("pure-wheel")
    return built(build("build_wheel", unpacked, out, ENTURBO_NATIVE="auto", CC="false"), out, "*.whl")


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """``install(wheel)`` or ``install("--editable", tree)`` into a new environment; gives its python."""

    def run(*what: str | Path) -> Path:
        venv = tmp_path_factory.mktemp("venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
        python = venv / "bin" / "python"
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip()
        # A .pth in a folder that a .pth adds is not read, so an editable enturbo there stays unseen; one that
        # is installed there comes after the new environment's own.
        folders = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        Path(site, "dependencies.pth").write_text("".join(f"{folder}\n" for folder in folders))
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", python, "install", *options, *what],
            env=environment({"ENTURBO_NATIVE": "require"}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return python

    return run


@pytest.fixture(scope="session")
def tree_python(tree_wheel: Path, install: Install) -> Path:
    """The python of an environment that has the wheel built from the tree."""
    return install(tree_wheel)


@pytest.fixture(scope="session")
def sdist_python(sdist_wheel: Path, install: Install) -> Path:
    """The python of an environment that has the wheel built from the sdist."""
    return install(sdist_wheel)


@pytest.fixture(scope="session")
def editable_python(tree: Path, install: Install) -> Path:
    """The python of an environment that has the tree installed editable."""
    return install("--editable", tree)


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """What a wheel holds: name → bytes."""

    def read(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    return read
