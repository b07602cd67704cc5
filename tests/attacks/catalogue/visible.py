"""What a sealed process still shows. None of this is held back."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
from typing import Any

from .kit import libc, note


def block_signals(to: dict[str, Any]) -> None:
    """Everyone can read which ones."""
    signal.pthread_sigmask(signal.SIG_SETMASK, to["signals"])
    note("blocked")
    time.sleep(60)


def take_addresses(to: dict[str, Any]) -> None:
    """Pages that are never touched count as size."""
    room = mmap.mmap(-1, to["size"], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    note("taken")
    time.sleep(60)
    room.close()


def take_time(to: dict[str, Any]) -> None:
    """Of the processor."""
    while True:
        pass


def start_threads(to: dict[str, Any]) -> None:
    """A number of them."""
    for _ in range(to["number"]):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    note("started")
    time.sleep(60)


def read_a_file(to: dict[str, Any]) -> None:
    """One that it may read, and somebody watches."""
    with open(to["path"], "rb") as file:
        file.read(1)


def fault(to: dict[str, Any]) -> None:
    """Its end comes at once."""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.memset(1, 1, 1)


def time_out(to: dict[str, Any]) -> None:
    """The same by a timer."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    time.sleep(60)


def look_up(to: dict[str, Any]) -> None:
    """Ask for a name, which is a message where a process serves the file system."""
    os.path.exists(to["path"])
    libc.access(to["path"].encode(), 0)
