"""The kernel's part by itself: what sleeps, what wakes it, what goes wrong when the holder is gone."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator

import pytest

from enturbo.shm import libc, uffd
from enturbo.shm.layout import PAGE_SIZE

WAIT = 20.0
PAGES = 16
ADDRESS = 0x3000_0000_0000


class Mapping:
    """Pages of a memfd that hold their own number, mapped a second time under userfaultfd."""

    def __init__(self, *, private: bool = False, user_mode_only: bool = True) -> None:
        self.fd = os.memfd_create("pages")
        os.ftruncate(self.fd, PAGES * PAGE_SIZE)
        for page in range(PAGES):
            os.pwrite(self.fd, bytes([page + 1]), page * PAGE_SIZE)
        flags = libc.MAP_PRIVATE if private else libc.MAP_SHARED
        self.at = libc.mmap(
            ADDRESS, PAGES * PAGE_SIZE, libc.PROT_READ | libc.PROT_WRITE, flags | libc.MAP_FIXED, self.fd
        )
        features = uffd.probe(user_mode_only=user_mode_only)
        wanted = features & (uffd.NEEDED | uffd.FEATURE_POISON)
        self.uffd = uffd.Userfaultfd.create(wanted, user_mode_only=user_mode_only)
        mode = uffd.MODE_MISSING | uffd.MODE_WP | uffd.MODE_MINOR
        self.uffd.register(self.at, PAGES * PAGE_SIZE, mode)
        self.threads: list[threading.Thread] = []
        self.done: list[tuple[str, int, int]] = []

    def start(self, what: str, page: int, value: int = 0) -> threading.Thread:
        """Touch a page on a thread of its own; ``done`` tells when it came back, and with what."""

        def touch() -> None:
            if what == "store":
                ctypes.memset(self.at + page * PAGE_SIZE, value, 1)
                self.done.append((what, page, value))
            else:
                out = ctypes.create_string_buffer(1)
                ctypes.memmove(out, self.at + page * PAGE_SIZE, 1)
                self.done.append((what, page, out.raw[0]))

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def fault(self) -> uffd.Fault:
        """The next sleeper."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            faults = self.uffd.faults()
            if faults:
                return faults[0]
            time.sleep(1e-3)
        raise AssertionError("nobody sleeps")

    def byte(self, page: int) -> int:
        return os.pread(self.fd, 1, page * PAGE_SIZE)[0]

    def close(self) -> None:
        self.uffd.close()  # lets everybody through
        for thread in self.threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        libc.munmap(self.at, PAGES * PAGE_SIZE)
        os.close(self.fd)


@pytest.fixture(params=[False, True], ids=["shared", "private"])
def mapping(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    mapping = Mapping(private=request.param)
    yield mapping
    mapping.close()


def test_a_read_sleeps_until_the_page_is_mapped(mapping: Mapping) -> None:
    thread = mapping.start("load", 3)
    fault = mapping.fault()
    assert (fault.address - mapping.at) // PAGE_SIZE == 3
    assert not fault.protected
    assert mapping.done == []
    assert mapping.uffd.map(mapping.at + 2 * PAGE_SIZE, 2 * PAGE_SIZE, protect=True)
    thread.join(WAIT)
    assert mapping.done == [("load", 3, 4)]
    mapping.start("load", 2).join(WAIT)  # mapped with it: nobody sleeps
    assert mapping.done[-1] == ("load", 2, 3)


def test_a_store_sleeps_until_the_protection_is_off(mapping: Mapping) -> None:
    assert mapping.uffd.map(mapping.at, PAGES * PAGE_SIZE, protect=True)
    mapping.start("load", 5).join(WAIT)
    thread = mapping.start("store", 5, 99)
    fault = mapping.fault()
    assert fault.protected
    assert mapping.byte(5) == 6
    assert mapping.done == [("load", 5, 6)]
    assert mapping.uffd.allow_stores(mapping.at + 5 * PAGE_SIZE, PAGE_SIZE)
    thread.join(WAIT)
    assert mapping.done[-1] == ("store", 5, 99)


def test_a_private_mapping_never_writes_through() -> None:
    mapping = Mapping(private=True)
    assert mapping.uffd.map(mapping.at, PAGES * PAGE_SIZE, protect=False)
    mapping.start("store", 1, 77).join(WAIT)
    mapping.start("load", 1).join(WAIT)
    assert mapping.done[-1] == ("load", 1, 77)
    assert mapping.byte(1) == 2
    mapping.close()


def test_mapping_passes_over_what_is_mapped(mapping: Mapping) -> None:
    for page in (1, 4, 5, 15):
        assert mapping.uffd.map(mapping.at + page * PAGE_SIZE, PAGE_SIZE, protect=True)
    assert mapping.uffd.map(mapping.at, PAGES * PAGE_SIZE, protect=True)
    for page in range(PAGES):
        mapping.start("load", page).join(WAIT)
        assert mapping.done[-1] == ("load", page, page + 1)


def test_unregistering_lets_everybody_through(mapping: Mapping) -> None:
    assert mapping.uffd.map(mapping.at, PAGE_SIZE, protect=True)
    threads = [mapping.start("store", 0, 50), mapping.start("load", 9)]
    mapping.fault()
    mapping.uffd.unregister(mapping.at, PAGES * PAGE_SIZE)
    for thread in threads:
        thread.join(WAIT)
    assert sorted(mapping.done) == [("load", 9, 10), ("store", 0, 50)]


def test_closing_the_last_descriptor_lets_everybody_through(mapping: Mapping) -> None:
    """Why two processes hold it: see enturbo.runtime.pager."""
    other = os.dup(mapping.uffd.fd)
    thread = mapping.start("load", 9)
    mapping.fault()
    mapping.uffd.close()
    thread.join(0.2)
    assert thread.is_alive()
    os.close(other)
    thread.join(WAIT)
    assert mapping.done == [("load", 9, 10)]


def test_what_is_gone_is_no_error(mapping: Mapping) -> None:
    libc.munmap(mapping.at, PAGES * PAGE_SIZE)
    assert not mapping.uffd.map(mapping.at, PAGE_SIZE, protect=True)
    assert not mapping.uffd.allow_stores(mapping.at, PAGE_SIZE)
    assert not mapping.uffd.poison(mapping.at, PAGE_SIZE)
    mapping.uffd.unregister(mapping.at, PAGE_SIZE)
    libc.mmap(mapping.at, PAGES * PAGE_SIZE, libc.PROT_READ, libc.MAP_SHARED | libc.MAP_FIXED, mapping.fd)


POISONED = """
import ctypes, os, sys
sys.path[:0] = {path!r}
from enturbo.shm import libc, uffd
fd = os.memfd_create("pages")
os.write(fd, bytes(8192))
at = libc.mmap(None, 8192, 3, libc.MAP_SHARED, fd)
gate = uffd.Userfaultfd.create(uffd.NEEDED | uffd.FEATURE_POISON, user_mode_only=True)
gate.register(at, 8192, 7)
assert gate.map(at, 4096, protect=True)
assert gate.poison(at, 8192)
ctypes.string_at(at, 1)
os.write(1, b"mapped")
ctypes.string_at(at + 4096, 1)
os.write(1, b"poisoned")
"""


def test_poison_is_sigbus_for_what_is_not_mapped() -> None:
    import signal
    import subprocess
    import sys

    code = POISONED.format(path=sys.path)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=WAIT)
    assert ran.stdout == b"mapped", ran.stderr
    assert ran.returncode == -signal.SIGBUS
