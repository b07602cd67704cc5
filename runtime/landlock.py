"""Landlock: which files and folders a sealed process reaches, decided in the kernel at each access.

It cannot be lifted. Where a process may write it may do so for good; that nothing of it happens before
VERIFIED is the business of :mod:`enturbo.runtime.filter`, which holds the calls.

Source: Documentation/userspace-api/landlock.rst, landlock_create_ruleset(2). Standard library only; the
zygote imports this module.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from typing import Final

from ..shm import libc

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1

_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_MAKE_CHAR: Final = 1 << 6
_MAKE_SOCK: Final = 1 << 9
_MAKE_FIFO: Final = 1 << 10
_MAKE_BLOCK: Final = 1 << 11
_REFER: Final = 1 << 13  # from ABI 2
_TRUNCATE: Final = 1 << 14  # 3
_IOCTL_DEV: Final = 1 << 15  # 5
_ALL_IN_FIRST: Final = (1 << 13) - 1
_TCP: Final = 3  # bind and connect, from ABI 4
_SCOPES: Final = 3  # abstract Unix sockets and signals, from ABI 6
_LOG_OFF: Final = 1 | 4  # of this process and its children, from ABI 7

_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READING: Final = _READ_FILE | _READ_DIR
# Of what can be made, plain files, folders and links: nothing that another process could be waiting at.
_NEVER: Final = _EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _MAKE_FIFO | _IOCTL_DEV


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The version of the interface; 0 where the kernel has none, or it is off."""
    try:
        return libc.syscall(_CREATE_RULESET, 0, 0, _VERSION)
    except OSError:
        return 0


def _handled(version: int) -> int:
    handled = _ALL_IN_FIRST
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if version >= since:
            handled |= right
    return handled


def create(version: int, read: Iterable[int], devices: Iterable[int]) -> int:
    """A ruleset, as a descriptor. ``version``: from :func:`abi`; the others are O_PATH descriptors.

    What is beneath ``read`` may be read, ``devices`` may be read and written. Nothing may be executed, no TCP
    port bound or connected to, no abstract socket and no process outside reached by a signal. Raises OSError.
    """
    handled = _handled(version)
    rules = _Ruleset(handled, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.addressof(rules), size, 0)
    try:
        _add(ruleset, handled & _READING, read)
        _add(ruleset, handled & (_READ_FILE | _WRITE_FILE), devices)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def allow_reading(ruleset: int, version: int, fds: Iterable[int]) -> None:
    """What is beneath these may be read, too. Raises OSError."""
    _add(ruleset, _handled(version) & _READING, fds)


def allow_writing(ruleset: int, version: int, fds: Iterable[int]) -> None:
    """What is beneath these may be read, written, made, linked and removed. Raises OSError."""
    _add(ruleset, _handled(version) & ~_NEVER, fds)


def _add(ruleset: int, rights: int, fds: Iterable[int]) -> None:
    for fd in fds:
        of_kind = rights if stat.S_ISDIR(os.fstat(fd).st_mode) else rights & _OF_FILES
        rule = _Beneath(of_kind, fd)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.addressof(rule), 0)


def enforce(ruleset: int, version: int) -> None:
    """Bind the calling thread, and its children, for good. Raises OSError.

    Refusals are not logged: a log is something that others read.
    """
    libc.syscall(_RESTRICT_SELF, ruleset, _LOG_OFF if version >= 7 else 0)
