"""The workloads in benchmarks/workloads: real libraries on real data, with right answers in every start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = ROOT / "benchmarks" / "workloads"
NAMES = sorted(path.parent.name for path in WORKLOADS.glob("*/workload.toml"))
QUICK = "sentiment"
WAIT = 400.0
# Of each workload: the four combinations on the default gate, and one start behind each of the four others.
STARTS = 8


def report(*arguments: str, folder: Path) -> list[dict[str, Any]]:
    """What the report found, once all its answers were right."""
    out = folder / "report.json"
    command = [sys.executable, str(WORKLOADS / "report.py"), *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))
    assert done.stdout.count("\n| ") == len(found), done.stdout
    return found


def check(found: list[dict[str, Any]], names: list[str]) -> None:
    assert [each["name"] for each in found] == names
    for each in found:
        assert each["wrong"] == []
        assert each["starts"] == STARTS
        assert set(each["runs"]) == {"sgx1", "sgx2", "enturbo1", "enturbo2"}
        assert each["sizes"]["heap"] > 0
        assert each["sizes"]["measured_pages"] > 0


def test_one_workload_behind_every_gate(tmp_path: Path) -> None:
    check(report(QUICK, "--brief", "--rounds", "1", folder=tmp_path), [QUICK])


@pytest.mark.slow
@pytest.mark.timeout(WAIT + 60)
def test_all_workloads_behind_every_gate(tmp_path: Path) -> None:
    """At least eight, with right answers in all of them."""
    assert len(NAMES) >= 8
    check(report("--brief", "--rounds", "1", folder=tmp_path), NAMES)


def test_a_wrong_answer_is_told(tmp_path: Path) -> None:
    """Or nothing above would show anything: the same workload with another expectation."""
    folder = tmp_path / "workloads"
    for path in WORKLOADS.glob("*.py"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_text(path.read_text("utf-8"), "utf-8")
    for path in (WORKLOADS / QUICK).iterdir():
        if path.is_file():
            (folder / QUICK).mkdir(exist_ok=True)
            text = path.read_text("utf-8").replace("neutral = 1", "neutral = 2")
            (folder / QUICK / path.name).write_text(text, "utf-8")
    command = [sys.executable, str(folder / "report.py"), "--brief", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("WRONG") == STARTS
