"""The ceiling: two processes that hash, or copy, half of an image each, with nothing else to do.

No claims, no order, no results, no releases, and no copy before the hashing: what two cores can do at most.
They are started before the rounds, keep everything mapped and warm, and wait for a line each.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from enturbo import EnclaveImage

from .material import PAGE_SIZE, WORKERS

SECONDS = 10.0
TRIES = 3


class Ceiling:
    """The processes for one image, which must have a memfd behind it. A context manager."""

    def __init__(self, image: EnclaveImage) -> None:
        assert image.backing is not None
        fd, size = image.backing.fd, image.page_count * PAGE_SIZE
        half = size // WORKERS
        script = Path(__file__).with_name("hashing_process.py")
        self._processes = [
            subprocess.Popen(
                # -P: this folder must not stand in for modules of others.
                [sys.executable, "-P", str(script), *map(str, (fd, size, begin, begin + half))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(fd,),
                text=True,
                bufsize=1,
            )
            for begin in range(0, size, half)
        ]

    def hash(self) -> dict[str, float]:
        """Seconds in which two processes hash all records in two lanes each, and their CPU time.

        The fastest of a few tries: it is to bound what others do, and a neighbour may disturb any of them.
        """
        tries = [self._ask("hash", "ceiling", self._processes) for _ in range(TRIES)]
        return min(tries, key=lambda each: each["ceiling"])

    def hash_alone(self) -> dict[str, float]:
        """The same work done by one process while the other waits: twice its half."""
        found = self._ask("hash", "two_lanes_alone", self._processes[:1])
        return {name: value * WORKERS for name, value in found.items()}

    def copy(self) -> dict[str, float]:
        """Seconds in which two processes copy all pages into warm shared memory, and their CPU time."""
        return self._ask("copy", "copying", self._processes)

    @staticmethod
    def _ask(work: str, name: str, processes: Sequence[subprocess.Popen[str]]) -> dict[str, float]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(work + "\n")
        answers = []
        for process in processes:
            assert process.stdout is not None
            answers.append([float(word) for word in process.stdout.readline().split()])
        if not all(answers):
            raise RuntimeError("a hashing process ended")
        starts, ends, cpu = zip(*answers, strict=True)
        return {name: (max(ends) - min(starts)) / 1e9, f"{name}_cpu": sum(cpu)}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
