"""docs/security.md names every class of attack that is tried."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
SECURITY = HERE.parents[1] / "docs" / "security.md"


def test_the_document_lists_every_class() -> None:
    channels = re.findall(r'^    Attack\(\s*"([^"]+)", ', (HERE / "test_channels.py").read_text(), re.M)
    memory = (HERE / "test_memory.py").read_text().partition("CATALOGUE: Final")[2]
    classes = {*channels, *re.findall(r'^    "([^"]+)": \(', memory, re.M)}
    assert len(classes) > 30
    listed = set(re.findall(r"^\| ([^|]+?) \|", SECURITY.read_text(), re.M))
    assert classes - listed == set()
