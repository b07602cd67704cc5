"""Compiled modules in images: the same bytes from every process, and only what this interpreter can run."""

from __future__ import annotations

import importlib.util
import marshal
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from enturbo import EnclaveImage, HandlerError, Runtime
from enturbo.runtime import bytecode

WAIT = 60.0
COMPILE = """
import hashlib, sys
from enturbo import EnclaveImage
kept = sys.argv[3:]  # what else is in memory must not matter
image = EnclaveImage.from_function(sys.argv[1], heap=0, bytecode=True, requirements=["typer"])
print(image.measure().digest.hex())
"""
SOURCE = """
names = {"alpha", "beta"}
def handler(event, context):
    if event in {"x", "y", "zz"} or event in ("alpha", 1.5, b"b", None, ...):
        return [handler.__code__.co_filename, sorted(names)]
    raise ValueError(event)
"""


def test_the_same_bytes_from_every_process(function: Callable[..., Path], tmp_path: Path) -> None:
    folder = function(SOURCE)
    digests = set()
    for seed, options in (("1", []), ("2", ["-O"]), ("3", ["-OO"])):
        command = [sys.executable, *options, "-c", COMPILE, str(folder), *(["alpha", "beta"] * int(seed))]
        environment = os.environ | {"PYTHONHASHSEED": seed, "ENTURBO_STORE": str(tmp_path / seed)}
        if seed == "2":
            environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "prefix")
        done = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=WAIT)
        digests.add(done.stdout)
    assert len(digests) == 1
    assert digests != {b""}


def test_an_interpreter_without_positions_is_refused(function: Callable[..., Path]) -> None:
    """What it compiles is another image, and would be kept for others."""
    command = [sys.executable, "-X", "no_debug_ranges", "-c", COMPILE, str(function(SOURCE))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 1
    assert "no_debug_ranges" in done.stderr


def test_compiled_modules_are_run(cooperative: Runtime, function: Callable[..., Path]) -> None:
    """Not the source beside it, and with the names that tracebacks need."""
    image = EnclaveImage.from_function(function(SOURCE), heap=0, bytecode=True)
    program = image.program
    assert program is not None
    cached = importlib.util.cache_from_source("handler.py", optimization="")
    assert set(program.files) == {"handler.py", cached}
    with cooperative.launch(image, allow_unsigned=True) as enclave:
        assert enclave.submit("x").result(WAIT) == ["/enclave/handler.py", ["alpha", "beta"]]
        with pytest.raises(HandlerError, match="raise ValueError") as caught:
            enclave.submit("other").result(WAIT)
        assert 'File "/enclave/handler.py", line 6' in caught.value.remote_traceback
    other = EnclaveImage.from_function(
        function("def handler(event, context): return 'source'"),
        heap=0,
        files={cached: bytecode.compiled({"handler.py": SOURCE.encode()}, "/enclave")[cached]},
    )
    with cooperative.launch(other, allow_unsigned=True) as enclave:
        assert enclave.submit("x").result(WAIT) == ["/enclave/handler.py", ["alpha", "beta"]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"\0\0\0\0" + content[4:],  # another interpreter's
        lambda content: content[:4] + b"\0\0\0\0" + content[8:],  # by time, not by hash
        lambda content: content[:-9],
        lambda content: content[:16] + marshal.dumps("no code"),
    ],
)
def test_what_cannot_be_run_is_compiled_from_source(
    cooperative: Runtime, function: Callable[..., Path], spoil: Callable[[bytes], bytes]
) -> None:
    cached = importlib.util.cache_from_source("handler.py", optimization="")
    content = bytecode.compiled({"handler.py": SOURCE.encode()}, "/enclave")[cached]
    assert bytecode.load(content) is not None
    assert bytecode.load(spoil(content)) is None
    image = EnclaveImage.from_function(
        function("def handler(event, context): return 'source'"), heap=0, files={cached: spoil(content)}
    )
    with cooperative.launch(image, allow_unsigned=True) as enclave:
        assert enclave.submit("x").result(WAIT) == "source"


def test_what_does_not_compile_is_left_to_the_import() -> None:
    assert bytecode.compiled({"odd.py": b"def (", "text.txt": b"a = 1"}, "/enclave") == {}
    found = bytecode.compiled({"a/b.py": b"'\\d'\n"}, "/enclave")  # a warning elsewhere
    assert list(found) == [f"a/__pycache__/b.{sys.implementation.cache_tag}.pyc"]
