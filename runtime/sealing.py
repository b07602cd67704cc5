"""Sealing a process: from here on the kernel lets nothing out of it but what its host answers for.

    paths opened ─► no new privileges ─► Landlock ─► limits, capabilities ─► not dumpable ─► seccomp, last

A seal cannot be lifted. What is prepared once, in the zygote, is :class:`Base`; :func:`seal` is what each
enclave process does before any code of its image runs.

Standard library only; the zygote imports this module.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from typing import Final

from ..shm import libc
from . import filter as calls
from . import landlock, seccomp
from .syscalls import NUMBERS

DESCRIPTORS: Final = 1000  # RLIMIT_NOFILE: what has this number or a higher one is never replaced

_PR_SET_DUMPABLE: Final = 4
_PR_SET_MM: Final = 35
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_MM_MAP: Final = 14
_CAPABILITY_VERSION: Final = 0x2008_0522
_CAP_DAC_OVERRIDE: Final = 1
_ROBUST_LIST_HEAD: Final = 24  # its size, in bytes

_LOADER_CACHE: Final = "/etc/ld.so.cache"
# Where a loader looks that has no such file.
_LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
# What modules of the standard library, and the C library, open by themselves, where it exists.
_READ: Final = (
    _LOADER_CACHE,
    "/dev/urandom",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
    "/etc/localtime",
    "/etc/timezone",
    "/usr/share/zoneinfo",
    "/usr/lib/locale",
    "/usr/share/locale",
    "/etc/os-release",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/gai.conf",
    "/etc/ssl/openssl.cnf",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/pki/tls",
    "/etc/pki/ca-trust",
    "/usr/lib/ssl",
    "/usr/share/ca-certificates",
)
_READ_AND_WRITE: Final = ("/dev/null",)


class Base:
    """What every sealed process of one interpreter may read, opened once, and the filter.

    Descriptors of paths that are only a place (O_PATH), inherited by a fork and closed by :func:`seal`:
    whoever closes descriptors in between keeps :attr:`fds`. What can be prepared is, so that it costs a
    forked process no time: :meth:`prepare`, before each fork.
    """

    def __init__(self) -> None:
        self.program = calls.program()
        self.abi = landlock.abi()
        self.read = _open_all(readable())
        self.devices = _open_all(_READ_AND_WRITE)
        self.capabilities = _Capabilities()
        self.ruleset = -1

    @property
    def fds(self) -> tuple[int, ...]:
        """Every descriptor that a forked process needs."""
        return (self.ruleset,) if self.ruleset >= 0 else (*self.read, *self.devices)

    def prepare(self) -> None:
        """Have a ruleset ready. It is for one process: what that adds to it, others would have too."""
        if self.ruleset < 0:
            self.ruleset = landlock.create(self.abi, self.read, self.devices)

    def used(self) -> None:
        """A forked process has the ruleset: it is that one's."""
        fd, self.ruleset = self.ruleset, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Let go of them. May be called again."""
        self.used()
        for fd in (*self.read, *self.devices):
            os.close(fd)
        self.read = self.devices = ()


def readable() -> list[str]:
    """The paths that a Python needs to read, each once and none beneath another."""
    paths = {
        os.path.dirname(os.__file__),
        sysconfig.get_path("platstdlib"),
        sys.executable,
        *(path for path in sys.path if path.endswith((".zip", "lib-dynload"))),
        *_library_folders(),
        *_READ,
    }
    real = sorted({os.path.realpath(path) for path in paths if path and os.path.exists(path)})
    kept: list[str] = []
    for path in real:  # sorted: a folder comes before what is in it
        if not any(path.startswith(folder.rstrip("/") + "/") for folder in kept):
            kept.append(path)
    return kept


def _library_folders() -> set[str]:
    """Where the dynamic loader finds shared libraries."""
    folders = {folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder}
    folders.add(str(sysconfig.get_config_var("LIBDIR") or ""))
    try:
        with open(_LOADER_CACHE, "rb") as file:
            cached = re.findall(rb"/[^\0]+(?=/[^\0/]+\0)", file.read())
    except OSError:
        return folders.union(_LIBRARIES)
    return folders.union(os.fsdecode(folder) for folder in cached)


def seal(
    base: Base,
    *,
    scratch: str | None = None,
    read: Sequence[str] = (),
    write: Sequence[str] = (),
    null: Sequence[int] = (0,),
) -> int:
    """Seal this process, which has one thread, and return the listener of its held calls.

    ``read``: files and folders that it may read from now on; ``scratch`` and ``write``: folders in which it
    may do everything to files and folders once the listener's holder lets such calls run; temporary files go
    to ``scratch``. ``null``: descriptors that are replaced by a /dev/null of its own: an inherited one has
    flags in common with every process that has inherited it. Raises OSError.
    """
    fresh = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in null:
        os.dup2(fresh, fd, inheritable=False)
    os.close(fresh)
    base.prepare()
    for allow, paths in (
        (landlock.allow_reading, read),
        (landlock.allow_writing, _folders(scratch, write)),
    ):
        places = _open_all(paths, missing=True)
        try:
            allow(base.ruleset, base.abi, places)
        finally:
            for fd in places:
                os.close(fd)
    if scratch:
        _temporary_files_in(scratch)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    landlock.enforce(base.ruleset, base.abi)
    base.used()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    base.capabilities.drop()
    # The list of the thread that forked, at an address that it can write to (see the filter on the call).
    libc.syscall(NUMBERS["set_robust_list"], 0, _ROBUST_LIST_HEAD)
    # Last but one: what is opened below /proc/self after this belongs to root.
    libc.prctl(_PR_SET_DUMPABLE, 0)
    return seccomp.install(base.program)


def _folders(scratch: str | None, write: Sequence[str]) -> list[str]:
    return [*([scratch] if scratch else []), *write]


def _open_all(paths: Iterable[str], *, missing: bool = False) -> tuple[int, ...]:
    """Places of these paths; one that does not exist, or may not be reached, is an error if ``missing``."""
    fds = []
    for path in paths:
        try:
            fds.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
        except OSError:
            if missing:
                for fd in fds:
                    os.close(fd)
                raise
    return tuple(fds)


def _temporary_files_in(folder: str) -> None:
    os.environ["TMPDIR"] = folder
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile.tempdir = folder  # type: ignore[attr-defined]
    sqlite = sys.modules.get("_sqlite3")
    if sqlite is not None:
        _sqlite_files_in(str(sqlite.__file__), folder)


def _sqlite_files_in(module: str, folder: str) -> None:
    """SQLite has read TMPDIR when the zygote imported it, and looks at a variable of its own first.

    See sqlite3_temp_directory in its documentation: the text has to be of its own memory.
    """
    try:
        library = ctypes.CDLL(module)
        library.sqlite3_mprintf.restype = ctypes.c_void_p
        text = library.sqlite3_mprintf(b"%s", os.fsencode(folder))
        ctypes.c_void_p.in_dll(library, "sqlite3_temp_directory").value = text
    except (OSError, AttributeError, ValueError):
        return  # built in, or without such a variable: its files fail then, and say so


class _Capabilities:
    """Of root's, keep at most the one to write where a folder's mode would not allow it: Landlock decides."""

    def __init__(self) -> None:
        self._header = ctypes.create_string_buffer(struct.pack("<Ii", _CAPABILITY_VERSION, 0))
        self._sets = ctypes.create_string_buffer(24)
        self._addresses = ctypes.addressof(self._header), ctypes.addressof(self._sets)
        libc.syscall(NUMBERS["capget"], *self._addresses)
        kept = struct.unpack_from("<I", self._sets.raw, 4)[0] & 1 << _CAP_DAC_OVERRIDE
        struct.pack_into("<6I", self._sets, 0, kept, kept, 0, 0, 0, 0)

    def drop(self) -> None:
        """Of the calling process, which has one thread."""
        libc.syscall(NUMBERS["capset"], *self._addresses)


def hide_arguments() -> bool:
    """Make the command line of this process, and of its forks, empty for good. See PR_SET_MM_MAP, prctl(2).

    Everyone can read /proc/PID/cmdline, and it shows memory that the process can write. The environment
    stays: it is guarded as the memory is. False where the kernel refuses (CONFIG_CHECKPOINT_RESTORE).
    """
    try:
        with open("/proc/self/stat", "rb", buffering=0) as file:
            # The second field is a name in parentheses that may hold anything; counting goes on with 3.
            fields = file.readall().rpartition(b")")[2].split()
        start_code, end_code, start_stack = (int(fields[number - 3]) for number in (26, 27, 28))
        start_data, end_data, start_brk, arg_start, _, env_start, env_end = (
            int(fields[number - 3]) for number in range(45, 52)
        )
        brk = libc.syscall(NUMBERS["brk"], 0)
        # No other auxiliary vector (address and size 0), no other executable (-1).
        values = (start_code, end_code, start_data, end_data, start_brk, brk, start_stack)
        layout = struct.pack("<12QIi", *values, arg_start, arg_start, env_start, env_end, 0, 0, -1)
        where = ctypes.cast(ctypes.c_char_p(layout), ctypes.c_void_p).value or 0
        libc.syscall(NUMBERS["prctl"], _PR_SET_MM, _PR_SET_MM_MAP, where, len(layout), 0)
    except (OSError, ValueError, IndexError):
        return False
    return True
