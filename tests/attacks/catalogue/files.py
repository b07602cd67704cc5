"""Attacks through files outside: their existence, names, contents, attributes, times and locks."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any

from .kit import SECRET, call, note


def create(to: dict[str, Any]) -> None:
    """An empty file is enough."""
    os.open(to["path"], os.O_WRONLY | os.O_CREAT)


def create_the_old_way(to: dict[str, Any]) -> None:
    """By creat, which has no flags to look at."""
    call("creat", to["path"].encode(), 0o600)


def create_the_new_way(to: dict[str, Any]) -> None:
    """By openat2, whose flags stand behind a pointer."""
    how = struct.pack("<3Q", os.O_WRONLY | os.O_CREAT, 0o600, 0)
    call("openat2", -100, to["path"].encode(), how, len(how))


def append(to: dict[str, Any]) -> None:
    """To a file that is there."""
    os.write(os.open(to["path"], os.O_WRONLY | os.O_APPEND), SECRET)


def truncate(to: dict[str, Any]) -> None:
    """By path, without a descriptor."""
    os.truncate(to["path"], 1)


def truncate_by_opening(to: dict[str, Any]) -> None:
    """O_TRUNC needs no right to write in the descriptor."""
    os.open(to["path"], os.O_RDONLY | os.O_TRUNC)


def rename(to: dict[str, Any]) -> None:
    """To a name beside it."""
    os.rename(to["path"], to["path"] + SECRET.decode())


def unlink(to: dict[str, Any]) -> None:
    """Gone says something, too."""
    os.unlink(to["path"])


def mkdir(to: dict[str, Any]) -> None:
    """A folder."""
    os.mkdir(to["path"])


def symlink(to: dict[str, Any]) -> None:
    """A link holds a text of one's choice."""
    os.symlink(SECRET.decode(), to["path"])


def link(to: dict[str, Any]) -> None:
    """A second name: the number of links of a file that may be read."""
    os.link(to["source"], to["path"])


def mknod(to: dict[str, Any]) -> None:
    """A FIFO's name."""
    os.mkfifo(to["path"])


def chmod(to: dict[str, Any]) -> None:
    """Nine bits."""
    os.chmod(to["path"], 0o640)


def setxattr(to: dict[str, Any]) -> None:
    """An attribute of one's choice."""
    os.setxattr(to["path"], "user.enturbo", SECRET)


def fallocate(to: dict[str, Any]) -> None:
    """Blocks without a byte."""
    os.posix_fallocate(os.open(to["path"], os.O_RDWR), 0, 1 << 16)


def utime(to: dict[str, Any]) -> None:
    """Two numbers of one's choice."""
    os.utime(to["path"], (4242, 4242))


def read(to: dict[str, Any]) -> None:
    """It changes the time of the last access."""
    with open(to["path"], "rb") as file:
        file.read()


def flock(to: dict[str, Any]) -> None:
    """Of a file that it may read."""
    fcntl.flock(os.open(to["path"], os.O_RDONLY), fcntl.LOCK_SH)
    note("locked")


def ofd_lock(to: dict[str, Any]) -> None:
    """A lock of the open file description; that of a reader needs no right to write."""
    fd = os.open(to["path"], os.O_RDONLY)
    fcntl.fcntl(fd, 37, struct.pack("<hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0))  # F_OFD_SETLK
    note("locked")


def read_a_fifo(to: dict[str, Any]) -> None:
    """To open it is enough to let its writer go on."""
    os.read(os.open(to["path"], os.O_RDONLY), 1)


def write_to_a_fifo(to: dict[str, Any]) -> None:
    """Somebody reads it."""
    os.write(os.open(to["path"], os.O_WRONLY), SECRET)
