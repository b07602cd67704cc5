"""What an enclave may do outside of itself, once it is VERIFIED. Before that it may do nothing.

The default: no network, and no writes but in a scratch folder of its own, which ends with it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Final

from ..shm.errors import EnturboError

Address = tuple[str, int] | str

_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@dataclass(frozen=True)
class Target:
    """Where a socket may connect to: a kind (``SOCK_STREAM``, ``SOCK_DGRAM``; 0: any) and a host and port, or
    the path of a Unix socket."""

    kind: int
    address: Address

    @classmethod
    def parse(cls, text: str) -> Target:
        """``host:port``, ``udp:host:port`` or ``unix:/path``; an IPv6 address stands in brackets."""
        name, _, rest = text.partition(":")
        if name == "unix":
            if not os.path.isabs(rest):
                raise _odd("connect", "unix:/absolute/path", text)
            return cls(0, os.path.normpath(rest))
        kind = "tcp"
        if name in _KINDS:
            kind, text = name, rest
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise _odd("connect", "host:port, udp:host:port or unix:/path", text)
        return cls(_KINDS[kind], (host, int(port)))

    def resolve(self) -> set[Address]:
        """The addresses that it stands for now: a name may have several. Raises OSError."""
        if isinstance(self.address, str):
            return {self.address}
        host, port = self.address
        found = socket.getaddrinfo(host, port, type=self.kind)
        return {(str(entry[4][0]), port) for entry in found}


@dataclass(frozen=True)
class Policy:
    """``scratch``: a folder of its own, where ``tempfile`` puts its files. ``read``: files and folders of
    the host that it may read (from the beginning: reading lets nothing out). ``write``: folders of the host
    in which it may make, change and remove plain files and folders. ``connect``: what it may connect to, see
    :meth:`Target.parse`; nothing can connect to it.

    Paths are absolute and exist. Raises EnturboError.
    """

    scratch: bool = True
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    connect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("read", "write", "connect"):
            given = getattr(self, name)
            if isinstance(given, str | bytes):
                raise _odd(name, "several texts", given)
            object.__setattr__(self, name, tuple(os.fspath(each) for each in given))
        for name in ("read", "write"):
            for path in getattr(self, name):
                if not os.path.isabs(path) or not os.path.exists(path):
                    raise _odd(name, "an absolute path that exists", path)
        for path in self.write:
            if not os.path.isdir(path):
                raise _odd("write", "a folder", path)
        _ = self.targets

    @property
    def targets(self) -> tuple[Target, ...]:
        """``connect``, parsed."""
        return tuple(map(Target.parse, self.connect))


def _odd(what: str, expected: str, found: object) -> EnturboError:
    return EnturboError(f"policy: {what}: expected {expected}, found {found!r}")
