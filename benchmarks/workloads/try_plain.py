"""Run the workloads in plain Python, without any enclave: ``python try_plain.py [NAME…]``.

It tells whether a handler answers as it should, whatever the runtime does. Each runs in a process of its own;
the site-packages of the running interpreter stand for those of an image. Prints a line for each workload and
exits with 1 if one of them answers otherwise.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from catalogue import CatalogueError, Workload, load_all

HEAP = 64 << 20  # bytes; no workload needs more
SECONDS = 600  # for one workload, what it builds first included
ONE = "--one"  # asks for a single workload in this very process


class Memory:
    """Stands for ``context.heap``."""

    def __init__(self, size: int) -> None:
        self._content = memoryview(bytearray(size))
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, offset: int = 0, n: int | None = None) -> bytes:
        """A copy."""
        return bytes(self.view(offset, n))

    def view(self, offset: int = 0, n: int | None = None) -> memoryview:
        """A writable view."""
        return self._content[offset : self.size if n is None else offset + n]

    def write(self, offset: int, data: bytes) -> int:
        """Store; the number of bytes."""
        self._content[offset : offset + len(data)] = data
        return len(data)


class Context:
    """Stands for the enclave's context. ``root`` is what an enclave sees as /enclave."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.heap = Memory(HEAP)

    @property
    def data(self) -> Memory:
        """No workload has any."""
        raise LookupError("the image has no data region")

    @property
    def names(self) -> tuple[str, ...]:
        """The files in the function's folder."""
        return tuple(path.name for path in self._root.iterdir() if path.is_file())

    def open(self, name: str) -> BinaryIO:
        """A file of the image. Raises FileNotFoundError."""
        return open(self.path(name), "rb")

    def view(self, name: str) -> memoryview:
        """A file's bytes, read-only. Raises FileNotFoundError."""
        return memoryview(Path(self.path(name)).read_bytes())

    def path(self, name: str) -> str:
        """Where C code finds a file. Raises FileNotFoundError."""
        path = self._root / name.removeprefix("/enclave/")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name!r}")
        return str(path)


def lay_out(workload: Workload, root: Path) -> None:
    """Make ``root`` look as /enclave does in the workload's enclave, with links."""
    for path in workload.folder.iterdir():
        if path.name != "__pycache__" and not any(fnmatchcase(path.name, one) for one in workload.exclude):
            root.joinpath(path.name).symlink_to(path)
    for name, path in workload.resolve_files().items():
        root.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        root.joinpath(name).symlink_to(path)
    root.joinpath("site-packages").symlink_to(sysconfig.get_path("platlib"))


def run(workload: Workload) -> list[str]:
    """Make all calls in this process. What was answered otherwise, one text each."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(workload, root)
        sys.path[0] = str(root)  # was this script's own folder, which no handler sees
        sys.dont_write_bytecode = True
        handler = importlib.import_module("handler").handler
        context = Context(root)
        answers = [(call, handler(call.event, context)) for call in workload.calls]
    return [
        f"  event     {_text(call.event)}\n  expected  {_text(call.expected)}\n  answered  {_text(answer)}"
        for call, answer in answers
        if answer != call.expected
    ]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def main(arguments: Sequence[str]) -> int:
    """Run the named workloads, or all."""
    known = {workload.name: workload for workload in load_all()}
    if arguments[:1] == [ONE]:
        return _one(known[arguments[1]])
    unknown = [name for name in arguments if name not in known]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = False
    for name in arguments or known:
        command = [sys.executable, __file__, ONE, name]
        failed |= subprocess.run(command, timeout=SECONDS, check=False).returncode != 0
    return int(failed)


def _one(workload: Workload) -> int:
    calls = len(workload.calls)
    try:
        wrong = run(workload)
        verdict = f"WRONG, {len(wrong)} of {calls}" if wrong else f"{calls} as expected"
    except CatalogueError as error:
        wrong, verdict = [f"  {error}"], "NOT RUN"
    except Exception:  # noqa: BLE001 - whatever a handler raises is what is to be told
        wrong, verdict = [traceback.format_exc()], "FAILED"
    print("\n".join((f"{workload.name:<14} {verdict}", *wrong)))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
