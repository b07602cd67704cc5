"""Sealed processes that do as they are told, without a Runtime: see child.py."""

from __future__ import annotations

import errno
import importlib.util
import marshal
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from enturbo.runtime.broker import Broker
from enturbo.runtime.policy import Policy
from enturbo.runtime.seccomp import Listener, Notification
from enturbo.runtime.syscalls import NUMBERS

WAIT: Final = 20.0  # seconds; a bound, never a measure
NOBODY: Final = 65534
# What a process of another user cannot import any more, where the interpreter is not for everybody.
PRELOAD: Final = ("asyncio", "concurrent.futures.thread", "datetime", "mmap", "random", "sqlite3")
CHILD: Final = Path(__file__).with_name("child.py")

_spec = importlib.util.spec_from_file_location("sealing_child", CHILD)
assert _spec is not None
assert _spec.loader is not None
child: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(child)


class Refused(Exception):
    """What a function raised in the sealed process: the name of its type, its errno and the traceback."""

    def __init__(self, kind: str, number: int | None, text: str) -> None:
        super().__init__(f"{kind} {number}\n{text}")
        self.kind, self.number = kind, number


class Nursery:
    """The process that forks sealed ones."""

    def __init__(self, *modules: str) -> None:
        ours, theirs = socket.socketpair()
        self.control = ours
        self.folder = tempfile.mkdtemp(prefix="sealing-", dir="/tmp")
        os.chmod(self.folder, 0o777)
        ours.settimeout(WAIT)
        with theirs:
            command = [sys.executable, "-X", "dev", "-W", "error", str(CHILD), str(theirs.fileno()), *modules]
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.about: dict[str, Any] = child.receive(ours)

    def fork(self, order: dict[str, Any], fds: list[int]) -> int:
        socket.send_fds(self.control, [marshal.dumps(order)], fds)
        pid: int = child.receive(self.control)
        return pid

    def reap(self, pid: int) -> int:
        """Kill it and those that it has forked; its wait status."""
        self.control.sendall(marshal.dumps({"reap": pid}))
        status: int = child.receive(self.control)
        return status

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(WAIT)
        finally:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.folder)


class Sealed:
    """One sealed process. Nobody answers its held calls before :meth:`serve`, but a test that does."""

    def __init__(self, nursery: Nursery, order: dict[str, Any]) -> None:
        self._nursery = nursery
        self.uid: int = os.geteuid() if order["uid"] is None else order["uid"]
        self.broker: Broker | None = None
        self.status: int | None = None
        self.ended: list[int] = []  # threads that nobody has let end
        self.control, theirs = socket.socketpair()
        gift, given = socket.socketpair()
        self.output, output = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.listener, self.memory = -1, -1
        try:
            self.pid = nursery.fork(order, [theirs.fileno(), given.fileno(), output])
        finally:
            theirs.close()
            given.close()
            os.close(output)
        self.pidfd = os.pidfd_open(self.pid)
        self.control.settimeout(WAIT)
        with gift:
            gift.settimeout(WAIT)
            _, fds, _, _ = socket.recv_fds(gift, 16, 8)
        if len(fds) != 1 + order["sealed"]:
            reason = self.printed().decode()
            self.close()
            pytest.fail(reason)
        *listener, self.memory = fds
        self.listener = listener[0] if listener else -1

    def printed(self) -> bytes:
        """What it has written since the last look."""
        out = b""
        while select.select([self.output], [], [], 0)[0] and (data := os.read(self.output, 1 << 16)):
            out += data
        return out

    # ------------------------------------------------------------------ orders

    def send(self, name: str | int, *arguments: int | bytes) -> None:
        """Order a system call, and do not wait."""
        child.send(self.control, ("call", name, *arguments))

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Order a function, and do not wait. It gets ``call``, then these, and no globals."""
        code: types.CodeType = function.__code__
        assert not code.co_freevars
        child.send(self.control, ("run", code, arguments))

    def result(self) -> Any:
        """What became of the order. Where nobody answers, no call was held meanwhile but ends of threads."""
        while self.broker is None and (event := self.wait()) != "reply":
            assert event == "held", event
            _, call = self.held()
            assert call.number == NUMBERS["exit"], call
            self.ended.append(call.pid)
        kind, *rest = child.receive(self.control)
        if kind == "error":
            raise Refused(*rest)
        return rest[0]

    def call(self, name: str | int, *arguments: int | bytes) -> tuple[int, int]:
        """Result and errno of a system call."""
        self.send(name, *arguments)
        result: tuple[int, int] = self.result()
        return result

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out a function in the process: what it returned."""
        self.start(function, *arguments)
        return self.result()

    def wait(self, seconds: float = WAIT) -> str:
        """What comes first: "reply", "held", "dead" or, in the end, "nothing"."""
        poll = select.poll()
        for fd in (self.control.fileno(), self.pidfd, self.listener):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + seconds
        while True:
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if ready.get(self.listener, 0) & select.POLLIN:
                return "held"
            if self.control.fileno() in ready and self.control.recv(1, socket.MSG_PEEK):
                return "reply"
            if self.pidfd in ready:
                return "dead"
            if not ready:
                return "nothing"
            for fd in ready:
                poll.unregister(fd)  # at its end: the process is about to be gone

    # ------------------------------------------------------- held calls, by hand

    def held(self) -> tuple[Listener, Notification]:
        """The call that is held now. The listener is for answers, and not to be closed."""
        listener = Listener(self.listener)
        call = None
        while call is None:  # a signal may have taken it back
            assert select.select([self.listener], [], [], WAIT)[0]
            call = listener.receive()
        return listener, call

    def outcome(self, name: str | int, *arguments: int | bytes) -> str:
        """What becomes of a system call: "runs", "held", the errno's name, or "dead".

        One that is held has not been carried out: what it returns is what it is answered.
        """
        self.send(name, *arguments)
        event = self.wait()
        if event in ("dead", "nothing"):
            return event
        if event == "held":
            listener, call = self.held()
            number = NUMBERS[name] if isinstance(name, str) else name
            assert (call.number, call.pid) == (number, self.pid)
            for given, seen in zip(arguments, call.args, strict=False):
                assert not isinstance(given, int) or given & (1 << 64) - 1 == seen
            listener.deny(call, errno.EUCLEAN)
            assert self.result() == (-1, errno.EUCLEAN)
            return "held"
        result, number = self.result()
        return "runs" if result >= 0 else errno.errorcode[number]

    # --------------------------------------------------------------------- ends

    def serve(self, policy: Policy | None = None) -> Broker:
        """Let a broker answer from now on."""
        assert self.broker is None
        self.broker = Broker(self.listener, self.memory, self.pid, policy or Policy())
        self.listener = self.memory = -1
        self.broker.start()
        return self.broker

    def end(self) -> int:
        """Kill it if it lives, and all that it has forked; its wait status."""
        if self.status is None:
            self.status = self._nursery.reap(self.pid)
        return self.status

    def close(self) -> None:
        """End all of it. May be called again."""
        self.end()
        if self.broker is not None:
            self.broker.close()
        self.control.close()
        for name in ("output", "pidfd", "listener", "memory"):
            fd: int = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


@pytest.fixture(scope="session")
def nursery(uid: int | None) -> Iterator[Nursery]:
    nursery = Nursery("tempfile", *(() if uid is None else PRELOAD))
    try:
        yield nursery
    finally:
        nursery.close()


@pytest.fixture(scope="session", params=["own"])
def uid(request: pytest.FixtureRequest) -> int | None:
    """The user that the process belongs to: the suite's. tests/unprivileged runs this as another one."""
    return NOBODY if request.param == "nobody" else None


@pytest.fixture
def folder(uid: int | None) -> Iterator[str]:
    """A folder of that user's, at a place that it may reach."""
    path = tempfile.mkdtemp(prefix="sealing-", dir="/tmp")
    if uid is not None:
        os.chown(path, uid, uid)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make(nursery: Nursery, uid: int | None) -> Iterator[Callable[..., Sealed]]:
    """Sealed processes; arguments are those of ``seal``. ``sealed=False``: one that is not."""
    made: list[Sealed] = []

    def make(**order: Any) -> Sealed:
        sealed = Sealed(nursery, {"uid": uid, "sealed": True, **order})
        made.append(sealed)
        return sealed

    try:
        yield make
    finally:
        for sealed in made:
            sealed.close()


@pytest.fixture
def sealed(make: Callable[..., Sealed]) -> Sealed:
    """One without a scratch folder."""
    return make()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for something, at most for :data:`WAIT`."""

    def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    return until
