"""An environment that an ordinary user can run: an interpreter, the project's wheel, a copy of the tests.

The interpreter behind this suite may stand where only root may look (a home folder), and so may its packages.
So an interpreter is looked for that the user can run, tried by running it as that user; the environment is
made of it, in a temporary folder that everybody may read and nobody but its owner may write.

Who finds nothing fails and says so: "not run" must not look like "passed".
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[2]
TESTS: Final = ROOT / "tests"
OLDEST: Final = (3, 11)
EXTRA: Final = "test"
NAME: Final = re.compile(r"python3(\.[0-9]+)?")

# Asked of each candidate: its version, and the tag of the extension modules that it loads.
ABOUT: Final = """
import ctypes, hashlib, json, lzma, sqlite3, ssl, sys, sysconfig, venv
print(json.dumps([sys.implementation.name, sys.version_info[:2], sysconfig.get_config_var("SOABI")]))
"""


@dataclass(frozen=True)
class Person:
    """A user that is not root, and what a child process needs to become that user."""

    name: str
    uid: int
    gid: int
    becoming: bool  # False when this process is that user already

    @property
    def credentials(self) -> dict[str, Any]:
        """Arguments for ``subprocess``: the user, its group and no other; all capabilities go with root."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.becoming else {}

    def run(
        self, *command: str | Path, cwd: Path, seconds: float, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it as this user, with this environment and nothing else; what overruns is killed.

        Standard error comes with the output. Raises TimeoutExpired, which holds the output so far.
        """
        child = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            umask=0o022,
            **self.credentials,
        )
        with child:
            try:
                output, _ = child.communicate(timeout=seconds)
            except BaseException:
                # Its group, and so its children: none of them outlives the test.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(child.args, child.returncode, output, "")


@dataclass(frozen=True)
class Interpreter:
    """A Python that the person can run. ``tag`` is that of its extension modules (SOABI)."""

    path: Path
    version: tuple[int, int]
    tag: str


@dataclass(frozen=True)
class Place:
    """The environment's python, a copy of the suite, and the one folder that the person may write."""

    person: Person
    python: Path
    suite: Path
    home: Path

    def run(self, *arguments: str | Path, seconds: float) -> subprocess.CompletedProcess[str]:
        """Run the environment's python as the person, in the suite's folder, which it can only read.

        What of it is left afterwards is killed: a test that was stopped cannot end the hosts that it started.
        """
        try:
            return self._run(*arguments, seconds=seconds)
        finally:
            for process in psutil.process_iter(["cmdline"]):
                if any(str(self.python.parent) in part for part in process.info["cmdline"] or ()):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    def _run(self, *arguments: str | Path, seconds: float) -> subprocess.CompletedProcess[str]:
        return self.person.run(
            self.python,
            *arguments,
            cwd=self.suite,
            seconds=seconds,
            HOME=str(self.home),
            TMPDIR=str(self.home / "tmp"),
            HYPOTHESIS_STORAGE_DIRECTORY=str(self.home / "hypothesis"),
            PYTHONDONTWRITEBYTECODE="1",
            PYTHONNOUSERSITE="1",
        )


def candidates() -> list[Path]:
    """Interpreters to try: the one behind this environment first, then what the system's folders hold."""
    base = Path(getattr(sys, "_base_executable", None) or sys.executable)
    found = [base]
    for folder in ("/usr/bin", "/usr/local/bin", *os.environ.get("PATH", "").split(os.pathsep)):
        with contextlib.suppress(OSError):
            found += sorted(file for file in Path(folder).glob("python3*") if NAME.fullmatch(file.name))
    # One in an environment (such as .venv) is what its base is, with packages that must not be seen.
    bases = [file for file in found if not (file.parent.parent / "pyvenv.cfg").exists()]
    return list({file.resolve(): file for file in reversed(bases)}.values())[::-1]


def look_at(file: Path, person: Person) -> Interpreter | str:
    """Try it as ``person``; the reason when it will not do."""
    try:
        done = person.run(file, "-I", "-c", ABOUT, cwd=Path("/"), seconds=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode:
        return (done.stdout.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    name, version, tag = json.loads(done.stdout)
    if name != "cpython" or tuple(version) < OLDEST or not tag:
        return f"{name} {'.'.join(map(str, version))}"
    return Interpreter(file, (version[0], version[1]), tag)


def find(person: Person) -> Interpreter:
    """The best interpreter: with the tag of this one, else the newest. Fails where there is none."""
    looked = {file: look_at(file, person) for file in candidates()}
    found = [one for one in looked.values() if isinstance(one, Interpreter)]
    if not found:
        reasons = "".join(f"\n  {file}: {why}" for file, why in looked.items())
        pytest.fail(
            f"no Python >= {'.'.join(map(str, OLDEST))} that {person.name!r} can run, so nothing was shown "
            f"about ordinary users; Debian's packages python3 and python3-venv bring one. Tried:{reasons}",
            pytrace=False,
        )
    own = sysconfig.get_config_var("SOABI")
    return max(found, key=lambda one: (one.tag == own, one.version))


def must(*command: str | Path, cwd: Path, seconds: float, **settings: str) -> None:
    """Run a step of the set-up as whoever this is. Fails with its output."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "MAKE", "MFLAGS")) and key not in ("CC", "CFLAGS")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        umask=0o022,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(folder: Path) -> Path:
    """The project's wheel. Its extension has the limited API: one wheel serves every interpreter here."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.fail("no source tree beside these tests, so there is no wheel to install", pytrace=False)
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so"
    )
    tree = folder / "source"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
    code = "import sys, setuptools.build_meta as hooks; hooks.build_wheel(sys.argv[1])"
    must(sys.executable, "-c", code, folder / "wheel", cwd=tree, seconds=200)
    (wheel,) = (folder / "wheel").glob("*.whl")
    shutil.rmtree(tree)
    return wheel


def requirements(project: str, extra: str) -> list[importlib.metadata.Distribution]:
    """What ``project[extra]`` needs, as it is installed here, without the project itself."""
    wanted = [Requirement(f"{project}[{extra}]")]
    found: dict[tuple[str, frozenset[str]], importlib.metadata.Distribution] = {}
    while wanted:
        requirement = wanted.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found[key] = importlib.metadata.distribution(requirement.name)
            for line in found[key].requires or []:
                needed = Requirement(line)
                extras = ("", *requirement.extras)
                if needed.marker is None or any(needed.marker.evaluate({"extra": one}) for one in extras):
                    wanted.append(needed)
    return list({name: each for (name, _), each in found.items() if name != project}.values())


def copy_requirements(site: Path) -> None:
    """Put this environment's packages into ``site``: nothing is downloaded, and no path leads back here."""
    for distribution in requirements("enturbo", EXTRA):
        assert distribution.files is not None, f"{distribution.name}: no list of its files"
        for file in distribution.files:
            source = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and source.is_file():
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)  # with its times, by which compiled modules are known


def make_environment(folder: Path, interpreter: Interpreter) -> Path:
    """An environment of ``interpreter`` with the wheel and what its tests need; gives its python."""
    wheel, venv = build_wheel(folder), folder / "venv"
    must(interpreter.path, "-m", "venv", "--without-pip", venv, cwd=folder, seconds=60)
    python = venv / "bin" / "python"
    pip: Sequence[str | Path] = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    if interpreter.tag == sysconfig.get_config_var("SOABI"):
        must(*pip, "--no-deps", "--no-index", wheel, cwd=folder, seconds=120)
        (site,) = venv.glob("lib/python3*/site-packages")
        copy_requirements(site)
    else:  # this environment's extension modules are of no use to it
        must(*pip, f"{wheel}[{EXTRA}]", cwd=folder, seconds=240)
    return python


def let_everybody_read(folder: Path) -> None:
    """Whatever this process's umask is, and whatever the copied files' modes were."""
    for where, _, names in os.walk(folder):
        os.chmod(where, 0o755)
        for name in names:
            file = Path(where, name)
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)


@pytest.fixture(scope="session")
def person() -> Person:
    """``nobody`` when this is root, else the user that runs this suite."""
    if os.geteuid():
        user = pwd.getpwuid(os.geteuid())
        return Person(user.pw_name, user.pw_uid, user.pw_gid, becoming=False)
    user = pwd.getpwnam("nobody")
    return Person(user.pw_name, user.pw_uid, user.pw_gid, becoming=True)


@pytest.fixture(scope="session")
def place(person: Person) -> Iterator[Place]:
    """The environment and the suite, in a folder that is removed afterwards."""
    interpreter = find(person)
    # pytest's own temporary folders are closed to other users.
    with tempfile.TemporaryDirectory(prefix="enturbo-") as name:
        folder = Path(name)
        python = make_environment(folder, interpreter)
        suite, home = folder / "suite", folder / "home"
        ignored = shutil.ignore_patterns("__pycache__", "packaging", "unprivileged")
        shutil.copytree(TESTS, suite / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", suite)  # pytest's settings
        shutil.copy(ROOT / "README.md", suite)
        shutil.copytree(ROOT / "docs", suite / "docs", ignore=shutil.ignore_patterns("build"))
        let_everybody_read(folder)
        (home / "tmp").mkdir(parents=True)
        for own in (home, home / "tmp"):
            os.chown(own, person.uid, person.gid)
            own.chmod(0o700)
        yield Place(person, python, suite, home)


@pytest.fixture
def find_interpreter() -> Callable[[Person], Interpreter]:
    """:func:`find`, for tests of what it does."""
    return find
