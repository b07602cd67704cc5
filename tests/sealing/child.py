"""Processes that seal themselves and do as they are told, and the one that forks them.

    conftest.py ── socket ──► nursery ──fork──► sealed process ── 1000, 1001 ──► conftest.py

conftest.py runs this file as a program. The nursery has one thread and has imported what the processes need,
as the zygote has; it neither ends nor reaps them but when it is told to. Standard library only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import marshal
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
import types
from typing import Any, NoReturn

from enturbo.runtime.sealing import Base, hide_arguments, seal
from enturbo.runtime.syscalls import NUMBERS
from enturbo.shm import libc

CONTROL = 1000
GIFT = 1001
PAGES = 0x1000_0000_0000  # where an enclave's pages begin
PAGES_BYTES = 16 * 4096
CONTENT = 0x5A

_LENGTH = struct.Struct("<I")
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def send(sock: socket.socket, message: Any) -> None:
    data = marshal.dumps(message)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket) -> Any:
    """The next message. Raises EOFError at the end of the stream."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    return marshal.loads(_exactly(sock, length))


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def call(name: str | int, *arguments: int | bytes) -> tuple[int, int]:
    """A system call: its result and errno. Bytes are passed as the address of a copy that may be written."""
    number = NUMBERS[name] if isinstance(name, str) else name
    kept = [each if isinstance(each, int) else ctypes.create_string_buffer(each) for each in arguments]
    numbers = [ctypes.c_long(each if isinstance(each, int) else ctypes.addressof(each)) for each in kept]
    ctypes.set_errno(0)
    result = int(_syscall(ctypes.c_long(number), *numbers))
    return result, ctypes.get_errno() if result == -1 else 0


def _leave(control: socket.socket, gift: socket.socket, output: int, base: Base, uid: int | None) -> int:
    """Become a process of its own, with the descriptors of an enclave's. Returns its memory."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        libc.prctl(4, 1)  # PR_SET_DUMPABLE: as if it had been started by that user, and so the nursery
        base.capabilities = type(base.capabilities)()
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.mmap(
        PAGES,
        PAGES_BYTES,
        libc.PROT_READ | libc.PROT_WRITE,
        libc.MAP_SHARED | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE,
    )
    ctypes.memset(PAGES, CONTENT, PAGES_BYTES)
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    os.dup2(output, 1)
    os.dup2(output, 2)
    for fd, number in ((control.detach(), CONTROL), (gift.detach(), GIFT)):
        os.dup2(fd, number, inheritable=False)
    assert 3 not in (memory, *base.fds)
    kept = {0, 1, 2, CONTROL, GIFT, memory, *base.fds}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue  # the listing's own
    os.dup2(0, 3, inheritable=False)
    return memory


def _sealed(
    order: dict[str, Any], control: socket.socket, gift: socket.socket, output: int, base: Base
) -> NoReturn:
    status = 70
    try:
        gifts = [_leave(control, gift, output, base, order.pop("uid"))]
        given = socket.socket(fileno=GIFT)
        stream = socket.socket(fileno=CONTROL)
        if order.pop("sealed"):
            gifts.insert(0, seal(base, null=(0, 3), **order))
        socket.send_fds(given, [b"gift"], gifts)
        given.close()
        for fd in gifts:
            os.close(fd)
        _serve(stream)
        status = 0
    except BaseException:  # noqa: BLE001  nothing may unwind into the nursery's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(stream: socket.socket) -> None:
    """Carry out orders, one at a time, until the other end is closed."""
    while True:
        try:
            what, *rest = receive(stream)
        except EOFError:
            return
        main = os.getpid()
        try:
            if what == "call":
                reply: tuple[Any, ...] = ("value", call(*rest))
            else:
                code, arguments = rest
                reply = ("value", types.FunctionType(code, globals())(call, *arguments))
        except BaseException as error:  # noqa: BLE001  told to the test
            number = error.errno if isinstance(error, OSError) else None
            reply = ("error", type(error).__name__, number, traceback.format_exc())
        if os.getpid() != main:
            os._exit(71)  # a child that came back
        send(stream, reply)


def _nursery(control: socket.socket, modules: list[str]) -> None:
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.disable()  # it would answer a fault by a call, and not die of it
    for name in modules:
        importlib.import_module(name)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    with open("/proc/self/stat", "rb") as file:
        start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])  # arg_start, arg_end
    base = Base()
    send(control, {"hidden": hide_arguments(), "arguments": (start, end)})
    while True:
        select.select([control], [], [])
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 8)
        if not data:
            return
        order = marshal.loads(data)
        if "reap" in order:
            pid = order["reap"]
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            send(control, status)
            continue
        base.prepare()
        pid = os.fork()
        if pid == 0:
            ours, gift, output = fds
            _sealed(order, socket.socket(fileno=ours), socket.socket(fileno=gift), output, base)
        base.used()
        for fd in fds:
            os.close(fd)
        send(control, pid)


if __name__ == "__main__":
    os.dup2(int(sys.argv[1]), 3, inheritable=False)  # the place of what a sealed process has as /dev/null
    os.close(int(sys.argv[1]))
    with socket.socket(fileno=3) as sock:
        _nursery(sock, sys.argv[2:])
