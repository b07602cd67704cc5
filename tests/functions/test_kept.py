"""Distributions are built once: kept in the store, found there by later builds, and never trusted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage, Runtime
from enturbo.runtime import bundling
from enturbo.runtime.store import Store

Make = Callable[..., Path]
FILES = {"pkg/__init__.py": "value = 1\n", "pkg/data": "x" * 20000}


@pytest.fixture
def site(make_distribution: Make, tmp_path: Path) -> Path:
    return make_distribution(tmp_path / "site", "pkg", files=FILES)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of distributions that are read and laid out, as it happens."""
    names: list[str] = []
    build = bundling._in_memory

    def watched(distribution: Any, *rest: Any) -> Any:
        names.append(distribution.name)
        return build(distribution, *rest)

    monkeypatch.setattr(bundling, "_in_memory", watched)
    return names


def test_a_distribution_is_built_once(
    function: Callable[..., Path], site: Path, store: Store, built: list[str]
) -> None:
    """Also for another function; anew when a file of it has another time, size or hash, or for bytecode."""
    options: dict[str, Any] = {"requirements": ["pkg"], "site": [site], "store": store, "heap": 0}
    first = EnclaveImage.from_function(function(), **options)
    second = EnclaveImage.from_function(function("def handler(event, context): return 1\n"), **options)
    assert built == ["pkg"]
    layers = [{region.layer for region in image.regions if region.layer} for image in (first, second)]
    assert layers[0] == layers[1]  # one mapping for both
    assert len(layers[0]) == 1
    os.utime(site / "pkg" / "data", (1, 1))
    third = EnclaveImage.from_function(function(), **options)
    assert built == ["pkg", "pkg"]
    assert {region.layer for region in third.regions if region.layer} != set()
    assert len(list(store.folder.glob("objects/*/*"))) == 1  # the same bytes
    EnclaveImage.from_function(function(), bytecode=True, **options)
    assert built == ["pkg", "pkg", "pkg"]
    assert len(list(store.folder.glob("objects/*/*"))) == 2


def test_a_damaged_object_is_built_again(
    function: Callable[..., Path], site: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"requirements": ["pkg"], "site": [site], "store": store, "heap": 0}
    expected = EnclaveImage.from_function(function(), **options).measure().digest
    (path,) = store.folder.glob("objects/*/*")
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "enturbo.build"):
        assert EnclaveImage.from_function(function(), **options).measure().digest == expected
    assert "built again" in caplog.text
    assert EnclaveImage.from_function(function(), **options).measure().digest == expected


def test_a_store_that_cannot_be_written(
    function: Callable[..., Path], site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Is done without: the image is the same."""
    (tmp_path / "file").write_text("no folder")
    options: dict[str, Any] = {"requirements": ["pkg"], "site": [site], "heap": 0}
    expected = EnclaveImage.from_function(function(), store=Store(tmp_path / "good"), **options)
    with caplog.at_level(logging.WARNING, "enturbo.build"):
        image = EnclaveImage.from_function(function(), store=Store(tmp_path / "file"), **options)
    assert "not kept" in caplog.text
    assert image.measure().digest == expected.measure().digest
    assert not any(region.layer for region in image.regions)


def test_an_image_of_layers_starts(
    cooperative: Runtime, function: Callable[..., Path], site: Path, store: Store
) -> None:
    """Its own file and a layer, copied by workers or the host; and the store may go once it is open."""
    source = "import pkg\ndef handler(event, context): return [pkg.value, pkg.__file__]\n"
    image = EnclaveImage.from_function(
        function(source), heap=0, requirements=["pkg"], site=[site], store=store, data=b"x" * (1 << 19)
    )
    (path,) = store.folder.glob("objects/*/*")
    path.unlink()
    for startup in ("enturbo", "serial"):
        with cooperative.launch(image, allow_unsigned=True, startup=startup) as enclave:
            assert enclave.submit(None).result(60) == [1, "/enclave/site-packages/pkg/__init__.py"]
            assert enclave.mrenclave == image.measure().digest
