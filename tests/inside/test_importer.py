"""What an enclave can import, and what it cannot, in a real enclave process."""

from __future__ import annotations

import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from enturbo.runtime.importer import base_names
from enturbo.runtime.processes import Zygote

EVAL = """
def handler(event, context):
    scope = {"context": context}
    exec(event, scope)
    return scope["result"]
"""


@pytest.fixture
def enclave(bench: Any) -> Any:
    return bench.enclave(EVAL)


def test_finders_and_paths(enclave: Any) -> None:
    code = """
import sys
names = [getattr(finder, '__name__', type(finder).__name__) for finder in sys.meta_path]
result = [names, sys.path, len(sys.path_hooks), list(sys.path_importer_cache), sys.argv]
"""
    expected = ["BuiltinImporter", "FrozenImporter", "ImageFinder", "BaseFinder", "PathFinder"]
    assert enclave.call(code) == [expected, ["/enclave"], 1, ["/enclave"], ["enclave"]]


@pytest.mark.parametrize("where", ["/tmp", "", ".", "/usr/lib/python3/dist-packages"])
def test_no_folder_of_the_host_is_searched(enclave: Any, tmp_path: Path, where: str) -> None:
    """Not even one that the handler puts on the path by itself."""
    folder = str(tmp_path) if where == "/tmp" else where
    (tmp_path / "outside.py").write_text("")
    reply = enclave.reply(f"import sys, os; sys.path.insert(0, {folder!r}); import outside")
    assert reply["type"] == "ModuleNotFoundError"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import datetime; result = datetime.datetime.strptime('2 Mar 2024', '%d %b %Y').day", 2),
        ("result = 'bücher.example'.encode('idna')", b"xn--bcher-kva.example"),
        ("from concurrent.futures import ThreadPoolExecutor as T; result = list(T(2).map(abs, [-1]))", [1]),
        ("import sqlite3; result = sqlite3.connect(':memory:').execute('select 6*7').fetchone()[0]", 42),
        ("import xml.etree.ElementTree as e; result = e.fromstring('<a><b/></a>')[0].tag", "b"),
        ("import decimal, fractions, tomllib; result = tomllib.loads('a = 1')", {"a": 1}),
        ("import email.mime.text, ctypes, multiprocessing, wsgiref.simple_server; result = 1", 1),
        ("import sysconfig; result = sysconfig.get_config_var('EXT_SUFFIX')[-3:]", ".so"),
        ("import asyncio\nasync def f(): return 5\nresult = asyncio.run(f())", 5),
    ],
)  # fmt: skip
def test_the_base_works(enclave: Any, code: str, expected: Any) -> None:
    assert enclave.call(code) == expected


def test_zoneinfo(enclave: Any) -> None:
    if not Path("/usr/share/zoneinfo/Europe/Paris").exists():
        pytest.skip("this system has no time zone database")
    code = """
import datetime, zoneinfo
result = str(datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo('Europe/Paris')))
"""
    assert enclave.call(code) == "2024-07-01 00:00:00+02:00"


def test_every_listed_module_of_this_python_can_be_found(enclave: Any) -> None:
    listed = {name for name in base_names() if "*" not in name}
    # What this interpreter was built without is missing outside too.
    present = sorted(name for name in listed & sys.stdlib_module_names if _found(name))
    code = f"""
from importlib.util import find_spec
def found(name):
    try:
        return find_spec(name) is not None
    except ValueError:
        return True
result = [name for name in {present} if not found(name)]
"""
    assert enclave.call(code) == []


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:
        return True  # loaded, without a spec


@pytest.mark.parametrize(
    "name",
    ["numpy", "pip", "setuptools", "pytest", "enturbo.runtime.image", "ensurepip", "tkinter", "idlelib"],
)
def test_nothing_else_can_be_imported(enclave: Any, name: str) -> None:
    reply = enclave.reply(f"import {name}; result = 1")
    assert (reply["kind"], reply["type"]) == ("raise", "ModuleNotFoundError")
    assert enclave.call("result = 'alive'") == "alive"


@pytest.mark.parametrize("shape", ["{}.py", "{}/__init__.py"])
def test_the_callers_folder_and_hooks_are_not_seen(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """A msgpack.py beside the script, a package installed editable, PYTHONPATH: all are the host's alone."""
    for name in ("msgpack", "editable", "random", "sitecustomize"):
        path = tmp_path / shape.format(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('seen')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOST_SECRET", "hunter2")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    zygote = Zygote()
    monkeypatch.setattr(bench, "zygote", zygote)
    try:
        enclave = bench.enclave(EVAL)
        assert enclave.reply("import editable")["type"] == "ModuleNotFoundError"
        # The platform's own one is for the platform alone.
        assert enclave.reply("import msgpack")["type"] == "ModuleNotFoundError"
        code = "import random, os; result = [random.__file__, dict(os.environ)]"
        where, environment = enclave.call(code)
        assert not where.startswith(str(tmp_path))
        assert not {"HOST_SECRET", "PYTHONPATH"} & environment.keys()
        assert enclave.end()
    finally:
        assert zygote.close(20)


def test_an_images_own_packages(bench: Any) -> None:
    enclave = bench.enclave(
        "from package.inner import value, whose\n"
        "import json, pkgutil, package\n"
        "def handler(event, context):\n"
        "    return [value, whose(), json.mine, package.__path__, package.__file__,\n"
        "            pkgutil.get_data('package', 'text.txt')]\n",
        modules={
            "package/__init__.py": "from . import inner",
            "package/inner.py": "value = 'ä'\nfrom .deep import whose",
            "package/deep.py": "def whose(): return __name__",
            # Imported by the zygote long before; an image's name is the image's, as in a script's folder.
            "json.py": "mine = True",
        },
        files={"package/text.txt": b"text"},
    )
    assert enclave.call() == [
        "ä", "package.deep", True, ["/enclave/package"], "/enclave/package/__init__.py", b"text"
    ]  # fmt: skip


def test_an_error_in_the_import_is_the_calls_error(bench: Any) -> None:
    enclave = bench.enclave("import helper\ndef handler(event, context): pass", modules={
        "helper.py": "\n\nraise RuntimeError('not today')"
    })  # fmt: skip
    reply = enclave.reply()
    assert (reply["kind"], reply["type"], reply["message"]) == ("raise", "RuntimeError", "not today")
    assert reply["first"] == 0
    assert 'File "/enclave/helper.py", line 3' in reply["traceback"]
    assert "raise RuntimeError('not today')" in reply["traceback"]
    assert enclave.reply()["type"] == "RuntimeError"


def test_a_missing_function(bench: Any) -> None:
    reply = bench.enclave("def other(): pass").reply()
    assert reply["type"] == "AttributeError"
    assert "handler" in reply["message"]


@pytest.mark.parametrize("gate", ["write", "execute"])
@pytest.mark.parametrize("seed", range(6))
def test_code_runs_as_it_was_when_its_page_opened(bench: Any, gate: str, seed: int) -> None:
    """Tampered code stands in the pages until they open; the genuine bytes come just before, page by page.

    With gate="execute" the pages are VALID from the start, and only their release may open them.
    """
    opens = "released" if gate == "execute" else "valid"
    genuine = "def handler(event, context): return 'genuine'  #" + "x" * 9000
    tampered = "def handler(event, context): return 'tampered' #" + "x" * 9000
    enclave = bench.enclave(tampered, gate=gate, **{opens: False})
    enclave.send(None)
    order = list(range(enclave.pages))
    chance = random.Random(seed)
    chance.shuffle(order)
    code = enclave.index(3)
    for page in order:
        time.sleep(chance.choice([0, 0, 0.0005, 0.02]))
        if page == code:
            enclave.page(page)[: len(genuine[:4096])] = genuine[:4096].encode()
        enclave.field(page, opens, enclave.generation)
    assert enclave.recv()["value"] == "genuine"


def test_no_bytecode_is_written(enclave: Any) -> None:
    assert enclave.call("import sys; result = sys.dont_write_bytecode") is True
