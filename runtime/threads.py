"""Threads that are used again: a start is over in less time than a new thread costs.

A :class:`Task` looks like a thread that runs once. The threads are daemons, as a start that hangs must not
keep the interpreter from exiting; idle ones wait for work and end with their :class:`Threads`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

IDLE_THREADS: Final = 8  # that wait for work at most; further ones end with their task


class Task:
    """One call on some thread."""

    def __init__(self, threads: Threads, target: Callable[[], None], name: str) -> None:
        self._threads, self._target, self.name = threads, target, name
        self._done = threading.Event()
        self._ident: int | None = None
        self.started = False

    def start(self) -> None:
        """Run it, once; returns at once."""
        self.started = True
        self._threads.give(self)

    def run(self) -> None:
        """On the thread that takes it."""
        self._ident = threading.get_ident()
        try:
            self._target()
        finally:
            self._ident = None
            self._done.set()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in this task."""
        return self._ident == threading.get_ident()

    def is_alive(self) -> bool:
        """Begun and not ended."""
        return self.started and not self._done.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most ``timeout`` seconds."""
        self._done.wait(timeout)


class Threads:
    """Takes tasks; starts a thread where none is idle."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._idle = 0  # threads that wait, less the tasks that they have been given
        self._closed = False

    def give(self, task: Task) -> None:
        """Have ``task`` run."""
        with self._lock:
            waiting = self._idle > 0
            if waiting:
                self._idle -= 1
        if waiting:
            self._tasks.put(task)
        else:
            threading.Thread(target=self._work, args=(task,), name=self._name, daemon=True).start()

    def _work(self, task: Task | None) -> None:
        while task is not None:
            task.run()
            del task  # what it held must not live as long as this thread
            with self._lock:
                if self._closed or self._idle >= IDLE_THREADS:
                    return
                self._idle += 1
            task = self._tasks.get()

    def close(self) -> None:
        """End the threads that are idle; others end with their task."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._tasks.put(None)
