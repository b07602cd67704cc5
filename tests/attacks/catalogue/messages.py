"""Attacks on whoever reads the launch socket: bytes that are no message, or one that was not asked for."""

from __future__ import annotations

import os
import struct
from typing import Any

from .kit import launch_socket


def write(to: dict[str, Any]) -> None:
    """These bytes, as they are."""
    data, sent = memoryview(to["data"]), 0
    while sent < len(data):
        sent += os.write(launch_socket(), data[sent:])


def write_framed(to: dict[str, Any]) -> None:
    """These bytes in a frame."""
    write({"data": struct.pack("<I", len(to["data"])) + to["data"]})
