"""The broker's sockets: real listeners of the test, and what a sealed process reaches of them."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from enturbo.runtime.policy import Policy

if TYPE_CHECKING:
    from tests.sealing.conftest import Sealed

    from enturbo.runtime.broker import Broker

Call = Callable[..., tuple[int, int]]
Address = tuple[str, int] | str

WAIT = 20.0  # seconds; a bound, never a measure
HOST = "127.0.0.1"


class Listeners:
    """Of each kind one that the policy names, and of TCP and UDP one that it does not."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/listener"
        self.tcp, self.forbidden = self._listening(socket.AF_INET), self._listening(socket.AF_INET)
        self.udp, self.forbidden_udp = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
        for each in (self.udp, self.forbidden_udp):
            each.bind((HOST, 0))
        self.unix = self._listening(socket.AF_UNIX)
        self.all = (self.tcp, self.forbidden, self.udp, self.forbidden_udp, self.unix)
        for each in self.all:
            each.settimeout(WAIT)
        self.policy = Policy(
            connect=(f"{HOST}:{self.port}", f"udp:{HOST}:{self.udp.getsockname()[1]}", f"unix:{self.path}")
        )

    def _listening(self, family: socket.AddressFamily) -> socket.socket:
        listening = socket.socket(family)
        listening.bind(self.path if family == socket.AF_UNIX else (HOST, 0))
        listening.listen()
        return listening

    @property
    def port(self) -> int:
        port: int = self.tcp.getsockname()[1]
        return port

    def accept(self, listening: socket.socket) -> socket.socket:
        connection, _ = listening.accept()
        connection.settimeout(WAIT)
        return connection

    def nobody_came(self) -> bool:
        """To what the policy does not name."""
        for each in (self.forbidden, self.forbidden_udp):
            each.setblocking(False)
            try:
                each.accept() if each is self.forbidden else each.recv(1)
            except BlockingIOError:
                continue
            return False
        return True


@pytest.fixture
def listeners(folder: str) -> Iterator[Listeners]:
    listeners = Listeners(folder)
    try:
        yield listeners
    finally:
        for each in listeners.all:
            each.close()


@pytest.fixture
def sealed(make: Callable[..., Sealed], listeners: Listeners) -> Sealed:
    """One that may reach what is named."""
    sealed = make()
    sealed.serve(listeners.policy)
    return sealed


def talks(_: Call, family: int, kind: int, address: Address, timeout: float | None) -> bytes:
    import socket

    sock = socket.socket(family, kind)
    sock.settimeout(timeout)
    sock.connect(address)
    sock.sendall(b"ping")
    answer = sock.recv(100)
    sock.close()
    return answer


def talks_asynchronously(_: Call, address: Address) -> bytes:
    import asyncio

    async def main() -> bytes:
        if isinstance(address, str):
            reader, writer = await asyncio.open_unix_connection(address)
        else:
            reader, writer = await asyncio.open_connection(*address)
        writer.write(b"ping")
        await writer.drain()
        answer = await reader.read(100)
        writer.close()
        await writer.wait_closed()
        return answer

    return asyncio.run(main())


def answer(connection: socket.socket) -> None:
    """Of the peer: it sees the request, and then the end of what was closed there."""
    with connection:
        assert connection.recv(100) == b"ping"
        connection.sendall(b"pong")
        assert connection.recv(100) == b""


@pytest.mark.parametrize("how", ["plain", "timeout", "asyncio"])
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_stream(sealed: Sealed, listeners: Listeners, how: str, family: str) -> None:
    listening = listeners.tcp if family == "tcp" else listeners.unix
    address = listening.getsockname()
    for _ in range(3):
        if how == "asyncio":
            sealed.start(talks_asynchronously, address)
        else:
            timeout = WAIT if how == "timeout" else None
            sealed.start(talks, int(listening.family), int(listening.type), address, timeout)
        answer(listeners.accept(listening))
        assert sealed.result() == b"pong"


@pytest.mark.parametrize("timeout", [None, WAIT])
def test_datagrams(sealed: Sealed, listeners: Listeners, timeout: float | None) -> None:
    sealed.start(talks, 2, 2, listeners.udp.getsockname(), timeout)
    data, sender = listeners.udp.recvfrom(100)
    assert data == b"ping"
    listeners.udp.sendto(b"pong", sender)
    assert sealed.result() == b"pong"


def connects(_: Call, family: int, kind: int, address: Address) -> tuple[str, int]:
    """What fails first, and how: "socket" or "connect"; ("connect", 0) if nothing does."""
    import socket

    try:
        sock = socket.socket(family, kind)
    except OSError as error:
        return "socket", error.errno or 0
    with sock:
        return "connect", sock.connect_ex(address)


def test_what_is_not_named_is_refused(sealed: Sealed, listeners: Listeners, folder: str) -> None:
    tcp, udp = listeners.tcp.getsockname(), listeners.udp.getsockname()
    for family, kind, address in (
        (2, 1, listeners.forbidden.getsockname()),
        (2, 2, listeners.forbidden_udp.getsockname()),
        (2, 1, ("127.0.0.2", tcp[1])),
        (2, 1, ("0.0.0.0", tcp[1])),  # the same machine
        (2, 1, udp),
        (2, 2, tcp),
        (10, 1, ("::1", tcp[1])),
        (10, 1, ("::ffff:127.0.0.1", listeners.forbidden.getsockname()[1])),
        (1, 1, f"{folder}/other"),
        (1, 1, "\0abstract"),
        (1, 1, "listener"),
    ):
        assert sealed.run(connects, family, kind, address) == ("connect", errno.EPERM), address
    for family, kind in ((16, 3), (17, 3), (2, 3), (2, 5), (40, 1), (38, 5), (0, 1)):
        assert sealed.call("socket", family, kind, 0) == (-1, errno.EPERM)
    assert listeners.nobody_came()
    assert sealed.run(connects, 1, 1, f"{folder}/../{os.path.basename(folder)}/listener") == ("connect", 0)


def test_without_targets_there_are_no_sockets(make: Callable[..., Sealed]) -> None:
    sealed = make()
    sealed.serve(Policy())
    for family in (1, 2, 10):
        assert sealed.call("socket", family, 1, 0) == (-1, errno.EPERM)


def test_only_what_is_connected_sends(sealed: Sealed, listeners: Listeners) -> None:
    """Sending by address, binding, listening and accepting would be other ways in and out."""
    address = struct.pack("<H2s4s8x", 2, listeners.udp.getsockname()[1].to_bytes(2, "big"), b"\x7f\0\0\1")
    for kind in (1, 2):
        fd, number = sealed.call("socket", 2, kind, 0)
        assert (fd >= 0, number) == (True, 0)
        for name, arguments in (
            ("sendto", (fd, b"x", 1, 0, address, 16)),
            ("sendmsg", (fd, bytes(64), 0)),
            ("sendmmsg", (fd, bytes(64), 1, 0)),
            ("bind", (fd, address[:2] + bytes(14), 16)),
            ("listen", (fd, 1)),
            ("accept", (fd, 0, 0)),
            ("accept4", (fd, 0, 0, 0)),
        ):
            assert sealed.call(name, *arguments) == (-1, errno.EPERM), name


def test_a_failed_connect_may_be_tried_again(make: Callable[..., Sealed]) -> None:
    sealed = make()
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        address = listening.getsockname()
        sealed.serve(Policy(connect=(f"{HOST}:{address[1]}",)))
        reading, writing = os.pipe()
        fd, _ = sealed.call("socket", 2, 1, 0)
        packed = struct.pack("<H2s4s8x", 2, address[1].to_bytes(2, "big"), b"\x7f\0\0\1")
        assert sealed.call("connect", fd, packed, 16) == (-1, errno.ECONNREFUSED)
        listening.listen()
        assert sealed.call("connect", fd, packed, 16) == (0, 0)
        # It is theirs alone now: the host neither has it nor connects it anew.
        assert sealed.call("connect", fd, packed, 16) == (-1, errno.EPERM)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("family", [2, 10])
def test_an_address_of_another_family(make: Callable[..., Sealed], family: int) -> None:
    """An error as the kernel's own, not a number that nobody knows."""
    sealed = make()
    sealed.serve(Policy(connect=("127.0.0.1:9", "[::1]:9")))
    four = struct.pack("<H2s4s8x", 2, (9).to_bytes(2, "big"), b"\x7f\0\0\1")
    six = struct.pack("<H2sI16sI", 10, (9).to_bytes(2, "big"), 0, bytes(15) + b"\1", 0)
    fd, _ = sealed.call("socket", family, 1, 0)
    packed = six if family == 2 else four
    result, number = sealed.call("connect", fd, packed, len(packed))
    assert result == -1
    assert number in (errno.EAFNOSUPPORT, errno.EINVAL, errno.EPERM)


def test_pointers_that_lead_nowhere(sealed: Sealed) -> None:
    fd, _ = sealed.call("socket", 2, 1, 0)
    for pointer, length in ((0, 16), (8, 16), (-4096, 16), (0x1000_0000_0000, 0), (0x1000_0000_0000, 1)):
        result, number = sealed.call("connect", fd, pointer, length)
        assert result == -1
        assert number in (errno.EPERM, errno.EFAULT, errno.EIO, errno.EINVAL), pointer
    for length in (0, 1, 2, 7, 128, 1 << 31, -1):
        result, number = sealed.call("connect", fd, bytes(512), length)
        assert (result, number) == (-1, errno.EPERM)


def flips(_: Call, allowed: int, forbidden: int, rounds: int) -> dict[str, int]:
    """Connect again and again while another thread rewrites the address."""
    import ctypes
    import socket
    import struct
    import threading

    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.create_string_buffer(
        struct.pack("<H2s4s8x", 2, allowed.to_bytes(2, "big"), b"\x7f\0\0\1")
    )
    ports = [allowed.to_bytes(2, "big"), forbidden.to_bytes(2, "big")]
    ended = threading.Event()

    def rewrite() -> None:
        at = ctypes.addressof(address) + 2
        while not ended.is_set():
            for port in ports:
                ctypes.memmove(at, port, 2)

    writer = threading.Thread(target=rewrite)
    writer.start()
    found = {"connected": 0, "refused": 0, "other": 0}
    for _round in range(rounds):
        sock = socket.socket()
        if libc.connect(sock.fileno(), address, 16) == 0:
            found["connected" if sock.getpeername()[1] == allowed else "other"] += 1
        else:
            found["refused" if ctypes.get_errno() == 1 else "other"] += 1
        sock.close()
    ended.set()
    writer.join()
    return found


def test_a_rewritten_address_never_reaches_what_is_not_named(sealed: Sealed, listeners: Listeners) -> None:
    """What was looked at is what is connected to."""
    ended = threading.Event()

    def accept() -> None:
        while not ended.is_set():
            connection, _ = listeners.tcp.accept()
            connection.close()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        port = listeners.forbidden.getsockname()[1]
        found = sealed.run(flips, listeners.port, port, 400)
    finally:
        ended.set()
        socket.create_connection(listeners.tcp.getsockname(), WAIT).close()
        accepting.join(WAIT)
    assert found["other"] == 0
    assert found["connected"] > 0
    assert found["refused"] > 0
    assert listeners.nobody_came()


def forks_and_connects(_: Call, address: Any) -> int:
    import os
    import socket

    pid = os.fork()
    if pid == 0:
        number = 99
        try:
            sock = socket.socket()
            number = sock.connect_ex(address)
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_reaches_no_more(sealed: Sealed, listeners: Listeners) -> None:
    assert sealed.run(forks_and_connects, listeners.forbidden.getsockname()) == errno.EPERM
    assert listeners.nobody_came()


def test_a_fork_is_not_taken_for_its_parent(sealed: Sealed, listeners: Listeners) -> None:
    """What it asks for stands in its own memory; at the same place, its parent's may hold something else."""
    assert sealed.run(forks_and_rewrites, listeners.port, listeners.forbidden.getsockname()[1]) == errno.EPERM
    assert listeners.nobody_came()


def forks_and_rewrites(call: Call, allowed: int, forbidden: int) -> int:
    import ctypes
    import os
    import socket
    import struct

    packed = struct.pack("<H2s4s8x", 2, allowed.to_bytes(2, "big"), b"\x7f\0\0\1")
    address = ctypes.create_string_buffer(packed)
    pid = os.fork()
    if pid == 0:
        number = 99
        try:
            sock = socket.socket()
            ctypes.memmove(ctypes.addressof(address) + 2, forbidden.to_bytes(2, "big"), 2)
            number = call("connect", sock.fileno(), ctypes.addressof(address), 16)[1]
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("blocking", [True, False])
def test_what_was_set_before_the_connect_stays(sealed: Sealed, listeners: Listeners, blocking: bool) -> None:
    """Flags and options are the socket's, whoever connects it."""
    assert sealed.run(sets_options, listeners.tcp.getsockname(), blocking) == {
        "blocking": blocking,
        "nodelay": True,
        "keepalive": True,
        "timeout": (7, 0),
    }


def sets_options(_: Call, address: Any, blocking: bool) -> dict[str, Any]:
    import os
    import select
    import socket
    import struct

    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 7, 0))
    sock.setblocking(blocking)
    sock.connect_ex(address)
    select.select([], [sock], [])
    return {
        "blocking": os.get_blocking(sock.fileno()),
        "nodelay": bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)),
        "keepalive": bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)),
        "timeout": struct.unpack("ll", sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)),
    }


# ---------------------------------------------------------------------------------- what takes its time


class Full:
    """A listener whose backlog is full: who connects waits."""

    def __init__(self, address: Address) -> None:
        self.listening = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.listening.bind(address)
        self.listening.listen(0)
        self.address: Any = self.listening.getsockname()
        self.waiting: list[socket.socket] = []
        while not self._is_full():
            assert len(self.waiting) < 20

    def _is_full(self) -> bool:
        sock = socket.socket(self.listening.family)
        self.waiting.append(sock)
        sock.settimeout(0.3)
        try:
            sock.connect(self.address)
        except (TimeoutError, BlockingIOError):
            return True
        return False

    @property
    def policy(self) -> Policy:
        name = self.address
        return Policy(connect=(f"unix:{name}" if isinstance(name, str) else f"{name[0]}:{name[1]}",))

    def close(self) -> None:
        for each in (self.listening, *self.waiting):
            each.close()


@pytest.fixture(params=["tcp", "unix"])
def full(request: pytest.FixtureRequest, folder: str) -> Iterator[Full]:
    full = Full((HOST, 0) if request.param == "tcp" else f"{folder}/full")
    try:
        yield full
    finally:
        full.close()


def ends(broker: Broker, full: Full) -> bool:
    """Whether closing the broker ends in time; afterwards it has ended."""
    closing = threading.Thread(target=broker.close)
    closing.start()
    closing.join(WAIT)
    ended = not closing.is_alive()
    full.close()  # whoever still waits for it fails
    closing.join(WAIT)
    return ended


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for 10 s here."""
    monkeypatch.setattr("enturbo.runtime.broker.CONNECT_SECONDS", 1)


def test_others_are_served_while_a_connect_waits(
    make: Callable[..., Sealed], full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enturbo.runtime.broker.CONNECT_SECONDS", 1000)  # closing does not wait for it
    sealed = make()
    broker = sealed.serve(full.policy)
    sealed.start(waits_in_a_thread, int(full.listening.family), full.address)
    assert sealed.result() == 0o22
    assert ends(broker, full)


def waits_in_a_thread(call: Call, family: int, address: Any) -> int:
    import socket
    import threading
    import time

    sock = socket.socket(family)
    threading.Thread(target=sock.connect_ex, args=(address,), daemon=True).start()
    time.sleep(0.05)
    call("umask", 0o22)
    return call("umask", 0o22)[0]


def test_a_connect_that_waits_has_an_end(make: Callable[..., Sealed], full: Full) -> None:
    sealed = make()
    sealed.serve(full.policy)
    fails, number = sealed.run(connects, int(full.listening.family), 1, full.address)
    assert fails == "connect"
    assert number in (errno.ETIMEDOUT, errno.EINPROGRESS, errno.EAGAIN)


def test_a_connect_that_does_not_wait(make: Callable[..., Sealed], full: Full) -> None:
    """A socket that does not block is told so at once, as an event loop relies on."""
    sealed = make()
    sealed.serve(full.policy)
    expected = errno.EAGAIN if full.listening.family == socket.AF_UNIX else errno.EINPROGRESS
    assert sealed.run(does_not_wait, int(full.listening.family), full.address) == expected


def does_not_wait(_: Call, family: int, address: Any) -> int:
    import socket

    with socket.socket(family) as sock:
        sock.setblocking(False)
        return sock.connect_ex(address)


def test_many_that_connect_at_one_time(
    make: Callable[..., Sealed], full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not use up the host's threads and descriptors, which others need, too."""
    monkeypatch.setattr("enturbo.runtime.broker.CONNECT_SECONDS", 5)
    sealed = make()
    broker = sealed.serve(full.policy)
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    sealed.run(connects_in_threads, int(full.listening.family), full.address, 300)
    assert threading.active_count() - threads < 100
    assert len(os.listdir("/proc/self/fd")) - fds < 200
    assert ends(broker, full)


def connects_in_threads(call: Call, family: int, address: Any, count: int) -> None:
    import socket
    import threading

    sock = socket.socket(family)
    for _number in range(count):
        threading.Thread(target=sock.connect_ex, args=(address,), daemon=True).start()
    call("umask", 0o22)  # answered after them


def test_closing_while_a_connect_waits(make: Callable[..., Sealed], full: Full) -> None:
    sealed = make()
    broker = sealed.serve(full.policy)
    sealed.start(connects, int(full.listening.family), 1, full.address)
    assert sealed.wait(0.3) == "nothing"
    assert ends(broker, full)


def test_a_process_cannot_make_the_broker_wait_for_ever(
    make: Callable[..., Sealed], full: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket is theirs, too: they may take away a time limit that the broker has set."""

    def slow(sock: socket.socket, address: Any) -> int:
        time.sleep(0.05)  # what a busy machine may do there by itself
        return super(socket.socket, sock).connect_ex(address)

    monkeypatch.setattr(socket.socket, "connect_ex", slow)
    sealed = make()
    broker = sealed.serve(full.policy)
    sealed.start(waits_without_limit, int(full.listening.family), full.address)
    sealed.wait(2)
    assert ends(broker, full)


def waits_without_limit(_: Call, family: int, address: Any) -> int:
    import socket
    import threading

    sock = socket.socket(family)
    connecting = threading.Thread(target=sock.connect_ex, args=(address,), daemon=True)
    connecting.start()
    while connecting.is_alive():
        sock.setsockopt(socket.SOL_SOCKET, 21, bytes(16))  # SO_SNDTIMEO: none
        connecting.join(0.001)
    return 0


def test_a_number_that_is_used_again_while_a_connect_waits(
    make: Callable[..., Sealed], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the first connect does not take the second socket's place."""
    monkeypatch.setattr("enturbo.runtime.broker.CONNECT_SECONDS", int(WAIT))
    full = Full(f"{folder}/full")
    try:
        sealed = make()
        broker = sealed.serve(full.policy)
        sealed.start(uses_a_number_again, full.address)
        assert sealed.wait(0.3) == "nothing"
        for _ in full.waiting:
            full.listening.accept()[0].close()
        first, second = sealed.result()
        assert first in (0, errno.EBADF)
        assert second == 0
        assert ends(broker, full)
    finally:
        full.close()


def uses_a_number_again(call: Call, address: str) -> list[int]:
    import socket
    import struct
    import threading
    import time

    first = socket.socket(socket.AF_UNIX)
    number = first.detach()
    packed = struct.pack("<H", 1) + address.encode() + b"\0"
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(call("connect", number, packed, len(packed))[1]), daemon=True
    )
    waiting.start()
    time.sleep(0.1)
    socket.close(number)
    second = socket.socket(socket.AF_UNIX)
    assert second.fileno() == number
    waiting.join()
    found.append(call("connect", number, packed, len(packed))[1])
    second.close()
    return found
