"""The model follows the code: every transition in docs/model/startup.pml names a function that exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

MODEL = Path(__file__).parents[1] / "docs" / "model" / "startup.pml"
NAME = re.compile(r"\b(?:shm|workers|runtime)(?:\.[A-Za-z_]+){2,3}\b")


def names() -> set[str]:
    comments = (line.partition("//")[2] for line in MODEL.read_text(encoding="utf-8").splitlines())
    return {name for comment in comments for name in NAME.findall(comment)}


def exists(name: str) -> bool:
    floor, module, *attributes = name.split(".")
    found: object = importlib.import_module(f"enturbo.{floor}.{module}")
    for attribute in attributes:
        found = getattr(found, attribute, None)
    return callable(found)


def test_each_transition_names_an_existing_function() -> None:
    found = names()
    assert len(found) >= 20
    assert {name for name in found if not exists(name)} == set()


def test_a_missing_name_would_be_seen() -> None:
    assert not exists("workers.measure.Measurer.no_such_step")
    assert exists("workers.measure.Measurer.step")


def test_the_steps_that_matter_are_named() -> None:
    assert {
        "shm.launches.Claims.claim",
        "shm.smc.Smc.publish",
        "shm.smc.Smc.raise_released",
        "shm.epcm.Epcm.set_valid",
        "shm.epcm.Epcm.release_rows",
        "runtime.arena.Arena.reclaim",
        "runtime.startup.Start.verify",
        "runtime.gate.Gate.writable",
    } <= names()
