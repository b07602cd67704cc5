"""An image is all that a function needs: it runs where none of its distributions is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import enturbo
from enturbo import EnclaveImage, SigningKey
from enturbo.runtime.distributions import find

WAIT = 120.0
FUNCTION = """
import io
import jsonschema
from PIL import Image

def handler(event, context):
    jsonschema.validate(event, {"type": "object", "required": ["size"]})
    photo = Image.open(context.open("photo.ppm"))
    out = io.BytesIO()
    photo.resize(event["size"]).save(out, "PNG")
    again = Image.open(io.BytesIO(out.getvalue()))
    return [again.size, again.format, again.getpixel((0, 0)), Image.__file__]
"""
PHOTO = b"P6 4 2 255\n" + bytes([200, 20, 20] * 8)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with this package and what it requires, and nothing else."""
    root = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True, timeout=WAIT)
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    metadata = enturbo_requirements()
    for distribution in find(metadata):
        for file in distribution.files:
            target = site / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file.path)
    (site / "enturbo").symlink_to(Path(enturbo.__file__).parent, target_is_directory=True)
    return root / "venv" / "bin" / "python"


def enturbo_requirements() -> list[str]:
    """What the package itself requires, without extras."""
    import importlib.metadata

    listed = importlib.metadata.requires("enturbo") or []
    return [requirement for requirement in listed if "extra ==" not in requirement]


def run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ENTURBO_"))}
    environment = kept | {"ENTURBO_STORE": str(folder / "another-store")}
    command = [str(python), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=WAIT, check=False
    )


@pytest.mark.parametrize("bytecode", [False, True])
def test_a_function_runs_where_nothing_is_installed(
    bare_python: Path, tmp_path: Path, bytecode: bool
) -> None:
    folder = tmp_path / "function"
    folder.mkdir()
    (folder / "handler.py").write_text(FUNCTION)
    (folder / "photo.ppm").write_bytes(PHOTO)
    image = EnclaveImage.from_function(
        folder, heap="1MiB", requirements=["Pillow", "jsonschema"], bytecode=bytecode
    )
    image.save(tmp_path / "f.enclave")
    key = SigningKey.generate()
    (tmp_path / "f.enclave.sig").write_bytes(key.sign(image).encode())
    missing = run(bare_python, "-c", "import PIL", folder=tmp_path)
    assert "No module named 'PIL'" in missing.stderr
    event = json.dumps({"size": [8, 4]})
    options = ["f.enclave", "--event", event, "--signer", key.mrsigner.hex()]
    done = run(bare_python, "-m", "enturbo.runtime.cli", "run", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [[8, 4], "PNG", [200, 20, 20], "/enclave/site-packages/PIL/Image.py"]
    assert json.loads(done.stdout) == expected
