"""What the fuzzer starts from is sound: a seed that no reader takes leads it nowhere. Needs no atheris."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from enturbo import EnclaveImage, Sigstruct
from enturbo.runtime.formats import FORMATS, detect

SEEDS = Path(__file__).resolve().parents[1] / "fuzz" / "seeds.py"


def test_seeds_reach_every_reader(tmp_path: Path) -> None:
    if not SEEDS.is_file():
        pytest.skip("no source tree beside these tests")
    spec = importlib.util.spec_from_file_location("enturbo_fuzz_seeds", SEEDS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reached = set()
    for name, data in module.seeds():
        path = tmp_path / name
        path.write_bytes(data)
        reached.add(detect(path).name)
        if name.startswith("sigstruct"):
            Sigstruct.parse(data).verify()
        elif name != "sgxs-unsized":
            with EnclaveImage.load(path) as image:
                assert image.page_count
    assert reached == {known.name for known in FORMATS}
