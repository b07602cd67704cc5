"""Attacks through sockets of all kinds."""

from __future__ import annotations

import socket
import time
from typing import Any

from .kit import SECRET


def connect_tcp(to: dict[str, Any]) -> None:
    """A connection is a message, before anything is sent."""
    socket.create_connection((to["host"], to["port"])).sendall(SECRET)


def listen_tcp(to: dict[str, Any]) -> None:
    """Or somebody finds that the port is open."""
    with socket.create_server((to["host"], to["port"])):
        time.sleep(60)


def send_udp(to: dict[str, Any]) -> None:
    """A datagram by address."""
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(SECRET, (to["host"], to["port"]))


def connect_unix(to: dict[str, Any]) -> None:
    """By a path."""
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(to["path"])


def connect_abstract(to: dict[str, Any]) -> None:
    """By a name that is no path."""
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect("\0" + to["name"])


def bind_abstract(to: dict[str, Any]) -> None:
    """A name that is taken can be seen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind("\0" + to["name"])
        sock.listen()
        time.sleep(60)


def send_unix(to: dict[str, Any]) -> None:
    """A datagram by path."""
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(SECRET, to["path"])


def send_from_a_pair(to: dict[str, Any]) -> None:
    """A pair is the process's own, and yet a datagram may be sent elsewhere from it."""
    pair, _other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    pair.sendto(SECRET, to["path"])


def send_message_from_a_pair(to: dict[str, Any]) -> None:
    """The same where the address stands behind a pointer."""
    pair, _other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    pair.sendmsg([SECRET], [], 0, to["path"])


def connect_a_pair(to: dict[str, Any]) -> None:
    """Or it is connected to another, and then written to."""
    pair, _other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    pair.connect(to["path"])
    pair.send(SECRET)
