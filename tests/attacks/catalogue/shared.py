"""Attacks through things that the kernel keeps for several processes, and through other ways to call it."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from .kit import SECRET, call, note

IPC_CREAT = 0o1000
USER_KEYRING = -4


def open_shared_memory(to: dict[str, Any]) -> None:
    """As shm_open does it."""
    os.open("/dev/shm/" + to["name"], os.O_RDWR | os.O_CREAT)


def make_shared_memory(to: dict[str, Any]) -> None:
    """As the standard library does it."""
    setattr(resource_tracker, "register", lambda *_: None)  # noqa: B010 - it would start a process
    SharedMemory(to["name"], create=True, size=4096)


def system_v_memory(to: dict[str, Any]) -> None:
    """By a key."""
    call("shmget", to["key"], 4096, IPC_CREAT | 0o600)


def system_v_queue(to: dict[str, Any]) -> None:
    """A message by a key."""
    queue = call("msgget", to["key"], IPC_CREAT | 0o600)
    call("msgsnd", queue, struct.pack("<q", 1) + SECRET, len(SECRET), 0)


def system_v_semaphore(to: dict[str, Any]) -> None:
    """A number by a key."""
    call("semget", to["key"], 1, IPC_CREAT | 0o600)


def message_queue(to: dict[str, Any]) -> None:
    """POSIX message queue; the system call's name has no slash."""
    queue = call("mq_open", to["name"].encode(), os.O_RDWR | os.O_CREAT, 0o600, None)
    call("mq_timedsend", queue, SECRET, len(SECRET), 0, None)


def keyring(to: dict[str, Any]) -> None:
    """A key in the ring of the user, which all his processes have."""
    call("add_key", b"user", to["name"].encode(), SECRET, len(SECRET), USER_KEYRING)


def ring(to: dict[str, Any]) -> None:
    """io_uring: the kernel makes a folder for whoever puts a request into shared memory."""
    parameters = ctypes.create_string_buffer(120)
    fd = call("io_uring_setup", 1, ctypes.addressof(parameters))
    entries = struct.unpack_from("<2I", parameters, 0)[0]
    (tail, array) = (struct.unpack_from("<I", parameters, 40 + at)[0] for at in (4, 24))
    queue = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
    requests = mmap.mmap(fd, 64 * entries, offset=0x1000_0000)
    path = ctypes.create_string_buffer(to["path"].encode())
    # IORING_OP_MKDIRAT: opcode, flags, ioprio, fd, offset, address, length (the mode).
    struct.pack_into("<BBHiQQI", requests, 0, 37, 0, 0, -100, 0, ctypes.addressof(path), 0o700)
    struct.pack_into("<I", queue, array, 0)
    struct.pack_into("<I", queue, tail, 1)
    call("io_uring_enter", fd, 1, 1, 1, None, 0)


def fault_handler(to: dict[str, Any]) -> None:
    """A userfaultfd of its own: whoever reads its memory would wait for as long as it likes."""
    call("userfaultfd", 1)
    note("made")


def futex_of_a_library(to: dict[str, Any]) -> None:
    """Sleep at a word of a file that all map: whoever wakes there is told of it."""
    address, value = _word_of(to)
    call("futex", address, 0, value, None, None, 0)


def futex_of_a_library_to_wake(to: dict[str, Any]) -> None:
    """Or wake who sleeps there."""
    address, _ = _word_of(to)
    while True:
        call("futex", address, 1, 1, None, None, 0)
        time.sleep(0.001)


def end_of_a_thread(to: dict[str, Any]) -> None:
    """When a thread ends the kernel wakes whom that has said: at a word of such a file."""
    address, _ = _word_of(to)
    room = mmap.mmap(-1, 8192, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # clone(flags, stack, 0, ctid = our fifth, 0); in the new thread exit(0).
    code = "b838000000 4d89c2 0f05 85c0 7509 b83c000000 31ff 0f05 c3"
    room.write(bytes.fromhex(code))
    at = ctypes.addressof(ctypes.c_char.from_buffer(room))
    run = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 5)(at)
    # CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, CHILD_CLEARTID
    for _ in range(200):
        run(0x0025_0F00, at + 8192, 0, 0, address)
        time.sleep(0.005)


def _word_of(to: dict[str, Any]) -> tuple[int, int]:
    """A word of a file, mapped: its address and value."""
    fd = os.open(to["path"], os.O_RDONLY)
    address = call("mmap", 0, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0) + to["word"]
    return address, ctypes.c_uint32.from_address(address).value
