"""The tests themselves, tried: each rule of the protocol taken away in a copy of the package must be noticed.

``table.toml`` names the rule, the text that carries it and a test. The copy is of the package that runs here
(installed or from the tree), the test is run on it in a process of its own, and has to fail. What does it is
``tests/rules.py``, for these rules and for those of the formats.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


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
TABLE = rules.load(*(Path(__file__).parent / f"{name}.toml" for name in ("table", "enforcement")))


@pytest.mark.parametrize("mutation", rules.cases(TABLE))
def test_a_rule_taken_away_is_noticed(mutation: Any, tmp_path: Path) -> None:
    rules.must_be_noticed(mutation, tmp_path)


def test_the_copy_is_what_is_tested(tmp_path: Path) -> None:
    """Without a mutation: it is the copy that is imported, and a test on it passes."""
    package = rules.copy_package(tmp_path)
    done = rules.run(package, "-c", "import enturbo; print(enturbo.__file__)")
    assert done.stdout.strip() == str(package / "__init__.py"), done.stderr
    done = rules.run_test(package, "test_measure.py::test_a_closed_launch_is_not_worked_on")
    assert done.returncode == 0, done.stdout + done.stderr
