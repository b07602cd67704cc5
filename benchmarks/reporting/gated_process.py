"""A process with gated pages, or a sealed one, that does what it is told: the other end of the benchmarks.

Run with a descriptor of a segment, its size, that of a socket (its userfaultfd goes out by it, once) and that
of a pipe's writing end. It answers each line of standard input with a number: seconds, or 0.

    gate            map the segment anew, all of its pages gated
    touch STEP      read a byte every STEP bytes, a negative STEP: from the end to the beginning
    store STEP      write one
    seal            fork a process that seals itself
    sealed          seal this process
    write COUNT     write so many lines to the pipe, one call each
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from enturbo.runtime.sealing import Base, seal
from enturbo.runtime.spec import EXTENT_BASE
from enturbo.shm import libc, uffd

LINE = b"sixteen bytes..\n"


def main(fd: int, size: int, channel: int, pipe: int) -> None:
    """Serve until standard input ends."""
    user_mode_only = not uffd.probe(user_mode_only=False)
    features = uffd.probe(user_mode_only=user_mode_only) & uffd.NEEDED
    gate = uffd.Userfaultfd.create(features, user_mode_only=user_mode_only)
    with socket.socket(fileno=channel) as sock:
        socket.send_fds(sock, [b"u"], [gate.fd])
    base = Base()
    memory = memoryview(b"")

    def gated() -> None:
        nonlocal memory
        protection, flags = libc.PROT_READ | libc.PROT_WRITE, libc.MAP_SHARED | libc.MAP_FIXED
        libc.mmap(EXTENT_BASE, size, protection, flags, fd)
        gate.register(EXTENT_BASE, size, uffd.MODE_MISSING | uffd.MODE_WP | uffd.MODE_MINOR)
        memory = libc.memory(EXTENT_BASE, size)

    def touch(step: int) -> None:
        for at in _places(size, step):
            memory[at]

    def store(step: int) -> None:
        for at in _places(size, step):
            memory[at] = 1

    def write(count: int) -> None:
        for _ in range(count):
            os.write(pipe, LINE)

    works: dict[str, Callable[[int], object]] = {
        "gate": lambda _: gated(),
        "touch": touch,
        "store": store,
        "sealed": lambda _: seal(base, null=()),
        "write": write,
    }
    for line in sys.stdin:
        name, _, argument = line.strip().partition(" ")
        if name == "seal":
            seconds = _forked(lambda: seal(base))
        else:
            begin = time.perf_counter()
            works[name](int(argument or "0"))
            seconds = time.perf_counter() - begin
        print(seconds, flush=True)


def _places(size: int, step: int) -> range:
    return range(0, size, step) if step > 0 else range(size + step, -1, step)


def _forked(work: Callable[[], object]) -> float:
    """Seconds of ``work`` in a fork of this process; what it does to that process ends with it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        begin = time.perf_counter()
        work()
        os.write(writing, repr(time.perf_counter() - begin).encode())
        signal.pause()  # its exit would be held
    os.close(writing)
    try:
        return float(os.read(reading, 64))
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
