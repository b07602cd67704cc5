"""The tests themselves, tried: each rule of the protocol taken away in a copy of the package must be noticed.

``table.toml`` names the rule, the text that carries it and a test. The copy is of the package that runs here
(installed or from the tree), the test is run on it in a process of its own, and has to fail. What does it is
``tests/rules.py``, for these rules and for those of the formats.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# A test that the copy is what is imported, by itself and by those that it starts.
WHERE = """
import subprocess, sys, enturbo

def test_where():
    code = "import enturbo; print(enturbo.__file__)"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert enturbo.__file__ == started.stdout.strip() == {!r}
"""


def load_rules() -> ModuleType:
    """``tests/rules.py``, which is no test module and cannot be imported by name."""
    path = Path(__file__).resolve().parents[1] / "rules.py"
    spec = importlib.util.spec_from_file_location("enturbo_test_rules", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


rules = load_rules()
TABLES = ("table", "enforcement", "functions")
TABLE = rules.load(*(Path(__file__).parent / f"{name}.toml" for name in TABLES))


@pytest.fixture(scope="module")
def tried(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[None]]]:
    """All rules that this session is to try, tried at once: they mostly wait."""
    with rules.tried(test_a_rule_taken_away_is_noticed, request.session, tmp_path_factory) as futures:
        yield futures


@pytest.mark.parametrize("rule", rules.cases(TABLE))
def test_a_rule_taken_away_is_noticed(rule: Any, tried: dict[Any, Future[None]]) -> None:
    tried[rule].result()


def test_the_copy_is_what_is_tested(tmp_path: Path) -> None:
    """Without a mutation: the copy is imported, also by what a test starts, and a test on it passes."""
    where = tmp_path / "test_where.py"
    with rules.Warm() as warm:
        for folder in (tmp_path / "one", tmp_path / "other"):
            package = rules.copy_package(folder)
            where.write_text(WHERE.format(str(package / "__init__.py")))
            code, output = warm.run_test(package, where)
            assert code == 0, output
        code, output = warm.run_test(package, "test_measure.py::test_a_closed_launch_is_not_worked_on")
        assert code == 0, output


def test_a_run_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rule's absence leads to, and the next one is run."""
    test = tmp_path / "test_endless.py"
    package = rules.copy_package(tmp_path)
    with rules.Warm() as warm:
        test.write_text("import signal\n\ndef test_it():\n    signal.pause()\n")
        with monkeypatch.context() as patch:
            patch.setattr(rules, "SECONDS", 0.5)
            assert warm.run_test(package, test)[0] == -9
        test.write_text("def test_it():\n    pass\n")
        assert warm.run_test(package, test)[0] == 0
