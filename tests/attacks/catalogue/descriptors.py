"""Attacks through descriptors: those that were inherited, reopened, taken from others, captured."""

from __future__ import annotations

import os
import resource
import socket
from typing import Any

from .kit import SECRET, call, launch_socket, note


def write_to_all(to: dict[str, Any]) -> None:
    """Whatever stands behind a number, write to it."""
    for fd in range(1100):
        try:
            os.write(fd, SECRET)
        except OSError:
            continue


def reopen_own(to: dict[str, Any]) -> None:
    """A descriptor that was opened anew has other rights and a place of its own."""
    for fd in range(3):
        again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
        os.write(again, SECRET)


def reopen_those_of_the_parent(to: dict[str, Any]) -> None:
    """The zygote has the host's standard error."""
    os.write(os.open(f"/proc/{os.getppid()}/fd/2", os.O_WRONLY | os.O_APPEND), SECRET)


def reopen_those_of_the_host(to: dict[str, Any]) -> None:
    """A pipe to which the host has the writing end."""
    os.write(os.open(f"/proc/{to['pid']}/fd/{to['fd']}", os.O_WRONLY), SECRET)


def take_those_of_the_host(to: dict[str, Any]) -> None:
    """The same by pidfd_getfd."""
    os.write(call("pidfd_getfd", os.pidfd_open(to["pid"]), to["fd"], 0), SECRET)


def take_those_of_the_peer(to: dict[str, Any]) -> None:
    """The same, with a pidfd of the launch socket's other end (SO_PEERPIDFD), which opens no path."""
    sock = socket.socket(fileno=launch_socket())
    pidfd = sock.getsockopt(socket.SOL_SOCKET, 77)
    sock.detach()
    note("got a pidfd")
    os.write(call("pidfd_getfd", pidfd, to["fd"], 0), SECRET)


def capture_output(to: dict[str, Any]) -> None:
    """What is opened after 1 was closed gets its number, and what is printed."""
    os.close(1)
    os.open(to["path"], os.O_WRONLY | os.O_CREAT)
    print(SECRET.decode(), flush=True)


def capture_sender(to: dict[str, Any]) -> None:
    """Another socket under the number on which sending is free."""
    _send_as(launch_socket(), to["path"])


def capture_sender_past_the_limit(to: dict[str, Any]) -> None:
    """The same, after the limit was raised that keeps high numbers from being given again."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    _send_as(launch_socket(), to["path"])


def _send_as(number: int, path: str) -> None:
    pair, _other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    os.close(number)
    os.dup2(pair.fileno(), number)
    socket.socket(fileno=number).sendmsg([SECRET], [], 0, path)
