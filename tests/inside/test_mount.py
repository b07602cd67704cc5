"""Paths below the mount, in a real enclave process: as the same files on disk would answer, but read-only."""

from __future__ import annotations

import gc
import os
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

EVAL = """
import os

def describe(value, mount):
    if isinstance(value, os.stat_result):
        return [value.st_mode & 0o170000, value.st_size if value.st_mode & 0o100000 else 0]
    if isinstance(value, bytes | int | bool | None):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(each, mount) for each in value]
    return str(value).replace(mount, "MOUNT")

def handler(event, context):
    code, mount = event
    scope = {"M": mount, "context": context}
    try:
        exec(code, scope)
    except Exception as error:
        number = getattr(error, "errno", None)
        return [type(error).__name__, number]
    return describe(scope["result"], mount)
"""
FILES = {
    "notes.txt": "zeile 1\nzeile ä 2\r\nlast".encode(),
    "empty": b"",
    "deep/down/data.bin": bytes(range(256)) * 40,
    "deep/more.txt": b"more",
    "pkg/__init__.py": b"import os\nhere = os.path.dirname(__file__)\n",
    "pkg/table.csv": b"a,b\n1,2\n",
    "spaces/folder/only/leaf": b"x",
}

# Each gives the same below the mount as on disk.
SAME = [
    line.replace(" ⏎ ", "\n")
    for line in Path(__file__).with_name("mount_calls.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def enclave(bench: Any) -> Any:
    return bench.enclave(EVAL, files=FILES)


def test_the_mount_answers_as_the_disk_does(enclave: Any, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # as in an enclave: what is imported stays as it is
    scope: dict[str, Any] = {}
    exec(EVAL, scope)
    (folder / "handler.py").write_text(EVAL)  # an image has it, too
    for code in SAME:
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # they leave files open
            expected = scope["handler"]((code, str(folder)), None)
            gc.collect()
        assert enclave.call([code, "/enclave"]) == _plain(expected), code


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("mode", ["w", "a", "r+", "x", "wb", "rb+"])
def test_nothing_can_be_opened_for_writing(enclave: Any, mode: str) -> None:
    code = f"open(M + '/notes.txt', {mode!r})"
    assert enclave.call([code, "/enclave"]) == ["OSError", 30]  # EROFS
    code = "import os; os.open(M + '/new', os.O_WRONLY | os.O_CREAT)"
    assert enclave.call([code, "/enclave"]) == ["OSError", 30]


def test_other_paths_are_the_systems(enclave: Any, tmp_path: Path) -> None:
    """Also those that look alike, and descriptors."""
    (tmp_path / "file").write_text("outside")
    code = f"""
import os
fd = os.open({str(tmp_path / "file")!r}, os.O_RDONLY)
result = [open({str(tmp_path / "file")!r}).read(), open(fd).read(), os.path.exists('/enclaves')]
result += [sorted(os.listdir({str(tmp_path)!r})), os.stat({str(tmp_path)!r}).st_ino]
result += [os.path.exists('enclave/notes.txt')]
"""
    expected = ["outside", "outside", False, ["file"], os.stat(tmp_path).st_ino, False]
    assert enclave.call([code, "/enclave"]) == expected


def test_descriptors_are_copies_that_nobody_can_change(enclave: Any) -> None:
    code = """
import os
fd = os.open(M + '/notes.txt', os.O_RDONLY)
result = []
again = os.open(f'/proc/self/fd/{fd}', os.O_RDWR)
for attempt in (lambda: os.write(fd, b'x'), lambda: os.write(again, b'x'), lambda: os.ftruncate(again, 0)):
    try:
        attempt()
        result.append('done')
    except OSError as error:
        result.append('refused')
"""
    assert enclave.call([code, "/enclave"]) == ["refused", "refused", "refused"]


def test_closing_gives_descriptors_back(enclave: Any) -> None:
    code = """
import gc, os
def count():
    gc.collect()
    return len(os.listdir('/proc/self/fd'))
before = count()
for _ in range(50):
    with open(M + '/notes.txt', 'rb') as file:
        file.fileno()
    fd = os.open(M + '/notes.txt', os.O_RDONLY)
    os.close(fd)
result = count() - before
"""
    assert enclave.call([code, "/enclave"]) == 0


def test_context_gives_paths_to_c_code(enclave: Any) -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
path = context.path('notes.txt')
fd = libc.open(path.encode(), os.O_RDONLY)
written = libc.write(libc.open(path.encode(), os.O_RDWR), b'x', 1)
same = context.path(M + '/notes.txt')
result = [os.read(fd, 7), written, path == same, path.startswith('/proc/self/fd/')]
os.close(fd)
"""
    assert enclave.call([code, "/enclave"]) == [b"zeile 1", -1, True, True]
    assert enclave.call(["context.path('nothing')", "/enclave"]) == ["FileNotFoundError", None]


def test_resources_and_pkgutil(bench: Any) -> None:
    enclave = bench.enclave(
        """
import importlib.resources, pkgutil
import pkg, space.inner
from importlib.resources import files

def handler(event, context):
    with importlib.resources.as_file(files("pkg") / "table.csv") as path:
        there = path.read_text()
    return [
        files("pkg").joinpath("table.csv").read_text(), there,
        files("space").joinpath("text.txt").read_bytes(),
        sorted(each.name for each in files("pkg").iterdir()), pkgutil.get_data("pkg", "table.csv"),
        sorted(pkgutil.iter_modules(["/enclave"]), key=lambda each: each.name).__len__(),
        sorted(each.name for each in pkgutil.iter_modules(pkg.__path__, "pkg.")),
        sorted(each.name for each in pkgutil.walk_packages(["/enclave"])),
        pkg.__file__, getattr(space, "__file__", None), list(space.__path__), space.inner.value,
    ]
""",
        modules={
            "pkg/__init__.py": "",
            "pkg/one.py": "",
            "pkg/sub/__init__.py": "",
            "space/inner.py": "value = 5",
        },
        files={"pkg/table.csv": b"a,b\n", "space/text.txt": b"text"},
    )
    table, there, text, names, data, count, inner, walked, file, no_file, path, value = enclave.call()
    assert (table, there, text, data, value) == ("a,b\n", "a,b\n", b"text", b"a,b\n", 5)
    assert names == ["__init__.py", "one.py", "sub", "table.csv"]
    assert (count, inner) == (2, ["pkg.one", "pkg.sub"])
    assert walked == ["handler", "pkg", "pkg.one", "pkg.sub"]
    assert (file, no_file, path) == ("/enclave/pkg/__init__.py", None, ["/enclave/space"])


def test_modes_say_read_only(enclave: Any) -> None:
    code = """
import os
result = [os.stat(M + '/notes.txt').st_mode, os.stat(M + '/deep').st_mode, os.stat(M).st_mtime_ns]
"""
    assert enclave.call([code, "/enclave"]) == [stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, 0]
