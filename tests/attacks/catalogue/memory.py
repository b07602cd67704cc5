"""Attacks on an enclave's own memory, by the enclave. This is the image's program, and runs inside it.

The image's genuine pages hold comments. Of a tampered image one page holds a line of code instead, which runs
an attack that tries to put the comment back, so that what is measured (or what is read afterwards) is not
what ran. Attackers know everything: addresses, descriptors and process numbers of the host are in the event.

The attacks stand in ``memory_pages`` and ``memory_kernel``. Each step is written down in the heap, where the
observer reads it from outside, whatever becomes of us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterator
from typing import Any, Final

PAGE: Final = 4096
GENUINE: Final = b"#" * PAGE

READ, WRITE, EXEC = 1, 2, 4
SHARED, PRIVATE, FIXED, ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAYMOVE, MOVE_FIXED = 1, 2
CLONE_VM, CLONE_VFORK = 0x100, 0x4000

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Attack:
    """What an attack knows and can do. ``at``: the page that it is about; ``data``: writable pages, of which
    the first is the target if that is a writable one; the others are the enclave's as well."""

    def __init__(self, event: dict[str, Any], context: Any) -> None:
        self.event = event
        self.numbers: dict[str, int] = event["numbers"]
        gate = context.data._gate
        base = address_of(gate._memory) - gate._base
        self.kind: str = event["kind"]
        self.at: int = base + event["offset"]
        self.data: int = base + event["data"]
        self.entry: int = address_of(gate._words) + 4 * event["word"]
        self._heap = base + event["heap"]
        self._steps: list[str] = []
        self._seen = ""

    # -------------------------------------------------------------------------------------- what is told

    def note(self, step: str) -> None:
        self._steps.append(step)
        self._tell(done=False)

    def end(self) -> None:
        self._tell(done=True)

    def in_child(self) -> None:
        """From now on write to memory of this process: it has none of the enclave's."""
        self._own = ctypes.create_string_buffer(1 << 16)
        self._heap = ctypes.addressof(self._own)

    def look(self) -> None:
        """What the enclave itself now finds in its page."""
        found = ctypes.string_at(self.at, PAGE)
        self._seen = "genuine" if found == GENUINE else "other"

    def _tell(self, *, done: bool) -> None:
        report = {"steps": self._steps, "seen": self._seen, "done": done}
        text = json.dumps(report).encode() + b"\0"
        ctypes.memmove(self._heap, text, len(text))

    # -------------------------------------------------------------------------------------------- steps

    def call(self, name: str, *arguments: int | None) -> int:
        """A system call; -1 if it fails."""
        self.note(name)
        ctypes.set_errno(0)
        plain = [ctypes.c_long(argument or 0) for argument in arguments]
        result = int(libc.syscall(ctypes.c_long(self.numbers[name]), *plain))
        outcome = errno.errorcode.get(ctypes.get_errno(), "?") if result == -1 else "done"
        self._steps[-1] = f"{name}: {outcome}"
        self._tell(done=False)
        return result

    def result(self, what: str, value: int) -> None:
        """What came of something that is not told by errno: below 0 minus an errno."""
        self.note(f"{what}: {'done' if value >= 0 else errno.errorcode.get(-value, '?')}")

    def open(self, path: str, flags: int) -> int:
        self.note("open")
        try:
            fd = os.open(path, flags)
        except OSError as error:
            self._steps[-1] = f"open: {errno.errorcode[error.errno or 0]}"
            self._tell(done=False)
            return -1
        self._steps[-1] = "open: done"
        return fd

    def store(self, at: int | None = None, data: bytes = GENUINE) -> None:
        """An ordinary store, which asks nobody."""
        self.note("store")
        ctypes.memmove(self.at if at is None else at, data, len(data))
        self._steps[-1] = "store: done"
        self._tell(done=False)

    def map(self, at: int, size: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        return self.call("mmap", at, size, protection, flags, fd, offset)

    def genuine(self) -> int:
        """A page of our own with the genuine bytes."""
        at = self.map(0, PAGE, READ | WRITE, PRIVATE | ANONYMOUS)
        ctypes.memmove(at, GENUINE, PAGE)
        return at

    def genuine_memfd(self) -> int:
        fd = os.memfd_create("page")
        os.write(fd, GENUINE)
        return fd


class _Buffer(ctypes.Structure):
    """The beginning of Py_buffer; its true size is 80 bytes."""

    _fields_ = (("buf", ctypes.c_void_p), ("rest", ctypes.c_byte * 128))


def address_of(view: memoryview) -> int:
    """Also of one that Python would not let us write to."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return int(buffer.buf)


def handler(event: dict[str, Any], context: Any) -> str:
    """Run the code of the page that the event names."""
    if event["kind"] == "R":
        code = bytes(context.view("plugin"))
    elif event["kind"] == "X":
        code = bytes(context.data._gate.read_view(event["offset"], PAGE))
    else:
        code = context.data.read(0, PAGE)
    exec(code, {"strike": lambda: strike(event, context)})
    return "genuine"


def strike(event: dict[str, Any], context: Any) -> None:
    attack = Attack(event, context)
    try:
        from . import memory_kernel, memory_pages

        means = vars(memory_pages) | vars(memory_kernel)
        means[event["means"]](attack)
        attack.look()
    except (OSError, ValueError) as error:
        attack.note(f"{type(error).__name__}: {error}")
    attack.end()


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
