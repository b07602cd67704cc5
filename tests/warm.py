"""pytest many times over, each time in a fork of this process, which has imported what takes long to import.

``rules.py`` starts it, since a test on a copy of the package takes a third of the time that its imports take.
Nothing of the package is imported here, so each fork imports its own copy of it, as a new process would.

A line of standard input asks for a run: ``[folder, seconds, arguments]`` as JSON. The folder, which holds the
copy, is where it runs, and its output goes to ``output`` in there. A line of standard output gives the exit
code, -9 for a run that was killed since it took longer.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Sequence

import pytest

IMPORTED = (
    "_pytest.doctest",
    "_pytest.unittest",
    "cryptography.hazmat.primitives.asymmetric.rsa",
    "cryptography.hazmat.primitives.serialization",
    "hypothesis.strategies",
    "msgpack",
    "numpy",
    "psutil",
    "pytest_benchmark.plugin",
    "pytest_timeout",
    "rich.console",
    "typer",
    "xxhash",
)


def run(folder: str, arguments: Sequence[str]) -> int:
    """In the fork: what ``python -m pytest`` does with the copy in front of everything that is installed."""
    with open(os.devnull) as nothing, open(os.path.join(folder, "output"), "w") as output:
        for file, standard in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(file.fileno(), standard)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = sys.path[0] = folder
    return pytest.main(list(arguments))


def wait(child: int, seconds: float) -> int:
    """The child's exit code; it is killed when it has none after so many seconds."""
    pidfd = os.pidfd_open(child)
    if not select.select([pidfd], [], [], seconds)[0]:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    for name in IMPORTED:
        importlib.import_module(name)
    assert "enturbo" not in sys.modules
    gc.freeze()  # collections in the forks need not look at all of this
    for line in sys.stdin:
        folder, seconds, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            return run(folder, arguments)
        print(wait(child, seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
