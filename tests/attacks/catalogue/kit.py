"""What attacks have in common. This runs inside the enclave.

``handler`` calls the function that the event names: ``{"module": "files", "attack": "create", "to": {…}}``.
What it does is written down in the heap, a line a step, where the observer reads it from outside.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import signal
import stat
import threading
from typing import Any, Final

SECRET: Final = b"secret"

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

numbers: dict[str, int] = {}
context: Any = None
_heap: memoryview | None = None
_at = 0
_noting = threading.Lock()


def handler(event: dict[str, Any], of_the_call: Any) -> Any:
    """Run the attack; an error that it did not expect ends it, and is told."""
    global _heap, context
    numbers.update(event["numbers"])
    context = of_the_call
    _heap = context.heap.view()
    module = importlib.import_module(f".{event['module']}", __package__)
    note("begun")
    result = None
    try:
        result = getattr(module, event["attack"])(event["to"])
    except OSError as error:
        note(f"refused: {errno.errorcode.get(error.errno or 0, 'EUNKNOWN')}")
    except ValueError as error:  # what the standard library makes of some of them
        note(f"refused: {error}")
    else:
        note("done")
    return "secret as a result" if result is None else result


def note(line: str) -> None:
    """Write a step down, for the observer."""
    global _at
    if _heap is not None:
        data = line.encode("ascii", "replace") + b"\n"
        with _noting:
            _heap[_at : _at + len(data)] = data
            _at += len(data)


def in_child() -> None:
    """After a fork, in the child: it has none of the enclave's pages, and writes nothing down."""
    global _heap
    _heap = None


def call(name: str, *arguments: int | bytes | None) -> int:
    """A system call. Raises OSError."""
    plain: list[Any] = [
        ctypes.c_char_p(each) if isinstance(each, bytes) else ctypes.c_long(each or 0) for each in arguments
    ]
    ctypes.set_errno(0)
    result: int = libc.syscall(ctypes.c_long(numbers[name]), *plain)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def fork() -> int:
    """A child by the bare system call, which runs no hooks; 0 in the child."""
    child = call("clone", signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        in_child()
    return child


def launch_socket() -> int:
    """The descriptor of the socket to the host, whatever number it has."""
    for fd in range(3, 1100):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                return fd
        except OSError:
            continue
    raise OSError(errno.EBADF, "no socket")
