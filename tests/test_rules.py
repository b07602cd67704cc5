"""Every rule of the formats, switched off in a copy of the package: its test must notice.

The rules stand in ``rules/*.toml``, one table a format; :mod:`rules` reads them and does the work.
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

import enturbo

TESTS = Path(__file__).resolve().parent


def load_rules() -> ModuleType:
    """The module beside this one, which is no test module and cannot be imported by name."""
    spec = importlib.util.spec_from_file_location("enturbo_test_rules", TESTS / "rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


rules = load_rules()
RULES = rules.load(*sorted((TESTS / "rules").glob("*.toml")))
# One of each table is tried with every run of the suite.
TRIED = {rule.table: rule for rule in sorted(RULES, key=lambda rule: rule.quick)}
CASES = [rule._replace(quick=TRIED[rule.table] is rule) for rule in RULES]


@pytest.fixture(scope="module")
def tried(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[None]]]:
    """All rules that this session is to try, tried at once."""
    with rules.tried(test_a_rule_switched_off_is_noticed, request.session, tmp_path_factory) as futures:
        yield futures


@pytest.mark.parametrize("rule", rules.cases(CASES))
def test_a_rule_switched_off_is_noticed(rule: Any, tried: dict[Any, Future[None]]) -> None:
    tried[rule].result()


@pytest.mark.parametrize("table", sorted({rule.table for rule in RULES}))
def test_every_switch_fits_its_module(table: str) -> None:
    """Cheap enough for every run: each text stands in its module once, and what is left is Python."""
    package = Path(enturbo.__file__).parent
    for rule in RULES:
        if rule.table == table:
            changed = rules.switched_off(rule, package)
            assert changed != (package / rule.file).read_text(encoding="utf-8"), rule.name


def test_every_rule_names_a_test_that_is_there() -> None:
    for rule in RULES:
        file, _, name = rule.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (TESTS / file).read_text(encoding="utf-8"), rule.name


def test_names_are_told_apart() -> None:
    names = [(rule.table, rule.name) for rule in RULES]
    assert len(set(names)) == len(names)
