"""Distributions made by hand, as pip leaves them installed, in folders of their own."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

Make = Callable[..., Path]


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="session")
def make_distribution() -> Make:
    """``make(site, name, version, files, requires=…)`` installs a distribution into the folder ``site``."""

    def make(
        site: Path,
        name: str,
        version: str = "1.0",
        files: Mapping[str, str | bytes] | None = None,
        requires: Sequence[str] = (),
        extras: Sequence[str] = (),
        installer: str = "pip",
    ) -> Path:
        contents = {
            path: text.encode() if isinstance(text, str) else text
            for path, text in (files or {f"{name}.py": f"name = {name!r}\n"}).items()
        }
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        metadata += [f"Provides-Extra: {extra}" for extra in extras]
        metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
        contents[f"{info}/METADATA"] = "\n".join([*metadata, ""]).encode()
        contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        rows = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in contents.items()]
        contents[f"{info}/INSTALLER"] = installer.encode()
        contents[f"{info}/REQUESTED"] = b""
        contents[f"{name}/__pycache__/x.{sys.implementation.cache_tag}.pyc"] = installer.encode()
        rows += [f"{path},," for path in list(contents)[-3:]]
        rows += ["../../../bin/script,sha256=abc,5", f"{info}/RECORD,,"]
        contents[f"{info}/RECORD"] = "\n".join([*rows, ""]).encode()
        for path, content in contents.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_bytes(content)
        return site

    return make


@pytest.fixture
def function(tmp_path: Path) -> Callable[..., Path]:
    """``function(source, name=content …)`` writes a function's folder."""

    def write(source: str = "def handler(event, context): pass\n", **files: str) -> Path:
        folder = tmp_path / "function"
        folder.mkdir(exist_ok=True)
        (folder / "handler.py").write_text(source)
        for name, content in files.items():
            (folder / name).write_text(content)
        return folder

    return write
