"""Attacks on whoever answers held calls: what pointers point to changes, and signals come."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .kit import call

MOST = 20_000  # tries

T = TypeVar("T")


@contextmanager
def _changing(first: bytes, second: bytes) -> Iterator[int]:
    """A place where one stands, then the other, and so on, as fast as it goes."""
    room = ctypes.create_string_buffer(max(len(first), len(second)) + 1)
    over = threading.Event()

    def change() -> None:
        at = ctypes.addressof(room)
        while not over.is_set():
            ctypes.memmove(at, first, len(first))
            ctypes.memmove(at, second, len(second))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield ctypes.addressof(room)
    finally:
        over.set()
        thread.join()


def open_elsewhere(to: dict[str, Any]) -> list[int]:
    """Make a file in the scratch folder; or is it the other one? How often that went well, and did not."""
    folder = to.get("allowed") or tempfile.gettempdir()
    allowed = os.path.join(folder, "mark").encode() + b"\0"
    done = refused = 0
    with _changing(allowed, to["path"].encode() + b"\0") as path:
        for _ in range(MOST):
            try:
                os.close(call("openat", -100, path, os.O_WRONLY | os.O_CREAT, 0o600))
                done += 1
            except OSError:
                refused += 1
            if done >= to["enough"] and refused >= to["enough"]:
                break
    return [done, refused]


def connect_elsewhere(to: dict[str, Any]) -> list[int]:
    """Connect to the port that the policy names; or is it the other one?"""
    done = refused = 0
    addresses = [_inet(to["host"], port) for port in (to["allowed"], to["other"])]
    with _changing(*addresses) as address:
        for _ in range(MOST):
            with socket.socket() as sock:
                try:
                    call("connect", sock.fileno(), address, 16)
                    done += 1
                except OSError:
                    refused += 1
            if done >= to["enough"] and refused >= to["enough"]:
                break
    return [done, refused]


def under_signals(to: dict[str, Any]) -> list[int]:
    """Held calls while signals come all the time: how many signals, files made, and connections.

    A call that a signal has interrupted is made again; had it been carried out, it would fail then.
    """
    signals = 0

    def count(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1

    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    scratch = tempfile.gettempdir()
    for number in range(to["files"]):
        fd = os.open(os.path.join(scratch, str(number)), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        os.write(fd, b"once")
        os.close(fd)
    address = _inet(to["host"], to["allowed"])
    connected = 0
    for _ in range(to["connections"]):
        with _unless_interrupted(socket.socket) as sock:
            _unless_interrupted(call, "connect", sock.fileno(), address, 16)
            connected += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [signals, to["files"], connected]


def _unless_interrupted(function: Callable[..., T], *arguments: Any) -> T:
    """A signal that comes before anybody has received the call interrupts it, also one that never is else."""
    while True:
        try:
            return function(*arguments)
        except InterruptedError:
            continue


def _inet(host: str, port: int) -> bytes:
    """A socket address."""
    family = struct.pack("<H", socket.AF_INET)
    return family + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
