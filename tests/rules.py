"""Rules as data: rule → switch (an edit that takes it away) → the test that then has to fail.

A table is a TOML file of ``[[mutation]]`` with ``name``, ``file`` (in the package), ``test`` (in here) and
one or more ``[[mutation.edit]]`` with ``old``, which stands in the file exactly once, and ``new``.
``quick = true``: tried with every run of the suite, not with the slow tests alone.
``tries = N``: a test that leaves something to chance may be run so often until it notices.

Test modules cannot import one another: each loads this one from its path.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
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
    tries: int = 1


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
            row.get("tries", 1),
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


def _end_strays(folder: Path) -> None:
    """Without a rule a test may end with a worker that is stopped, and cannot see that its host is gone."""
    for process in psutil.process_iter(["cmdline"]):
        if f"enturbo={folder}" in (process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Warm:
    """A process that runs pytest on copies of the package, for one thread at a time: see ``warm.py``."""

    def __init__(self) -> None:
        # Told that it is in CI, pytest writes out in full how page lists differ, which takes minutes.
        unwanted = ("ENTURBO_", "PYTEST_", "PYTHONPATH", "CI", "BUILD_NUMBER")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        # What waits in vain for the rule need not do so for long; what forks should have one thread.
        settings = {"ENTURBO_TEST_WAIT": "4", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "warm.py"],
            env=kept | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=SECONDS)
        finally:
            self._process.kill()

    def run_test(self, package: Path, test: str | Path) -> tuple[int, str]:
        """The exit code and output of one test on the copy, which is in front of everything installed."""
        folder = package.parent
        # Nobody reads more than which test failed, so asserts stay as they are. A folder of its own, not
        # pytest's numbered ones: sessions that tidy those up at the same time trip over each other.
        options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout=45", "--tb=line", "--assert=plain"]
        options.append(f"--basetemp={folder / 'pytest'}")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([str(folder), SECONDS, [*options, str(TESTS / test)]]), file=self._process.stdin)
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
        finally:
            _end_strays(folder)
        return code, (folder / "output").read_text(encoding="utf-8", errors="replace")


def must_be_noticed(rule: Rule, folder: Path, warm: Warm) -> None:
    """Switch the rule off in a copy of the package; its test has to fail."""
    package = copy_package(folder)
    source = switched_off(rule, package)
    (package / rule.file).write_text(source, encoding="utf-8")
    for _ in range(rule.tries):
        code, output = warm.run_test(package, rule.test)
        if code:
            break
    # 1: tests were run and some failed. An error elsewhere (2 to 5), or in a teardown alone, is no proof.
    assert code == 1, output
    assert re.search(r"\b1 failed\b", output), output


@contextlib.contextmanager
def tried(
    test: Callable[..., None], session: pytest.Session, folders: pytest.TempPathFactory
) -> Iterator[dict[Rule, Future[None]]]:
    """The rules that ``test`` is to try in this session, all at once: what each of them comes to."""
    wanted: list[Any] = [
        item.callspec.params["rule"]
        for item in session.items
        if isinstance(item, pytest.Function) and item.function is test
    ]
    count = max(1, min(len(wanted), len(os.sched_getaffinity(0))))
    with contextlib.ExitStack() as stack:
        free: SimpleQueue[Warm] = SimpleQueue()
        for _ in range(count):
            free.put(stack.enter_context(Warm()))
        pool = ThreadPoolExecutor(count, "rules")
        stack.callback(pool.shutdown, cancel_futures=True)

        def attempt(rule: Rule, folder: Path) -> None:
            warm = free.get()
            try:
                must_be_noticed(rule, folder, warm)
            finally:
                free.put(warm)

        yield {rule: pool.submit(attempt, rule, folders.mktemp("rule")) for rule in wanted}
