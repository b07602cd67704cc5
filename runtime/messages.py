"""Messages between host, zygote and enclave: a u32 length and a msgpack map, with limits. Never pickle.

One frame is four bytes of little-endian length and that many bytes of msgpack. Both directions are checked
against the same limits, so what one side may send the other side can read: at most :data:`MAX_FRAME` bytes,
:data:`MAX_DEPTH` levels, :data:`MAX_ITEMS` items a container, no extension types. :class:`Stream` frames a
socket.

Standard library and msgpack only; the zygote imports it.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgpack

from ..shm.errors import EnturboError

MAX_FRAME: Final = 16 << 20
MAX_DEPTH: Final = 64
MAX_ITEMS: Final = 1 << 20
MAX_FDS: Final = 16

_LENGTH = struct.Struct("<I")
_CONTAINERS = (list, tuple, dict)
_SCALARS = frozenset({type(None), bool, int, float, str, bytes, bytearray, memoryview})
_BASES = (int, float, str, bytes, bytearray, memoryview)


class MessageError(EnturboError):
    """A message does not fit the limits, cannot be carried, or is not what it should be."""


class MessageTimeout(MessageError):
    """A message did not arrive, or could not be sent, within the deadline."""


class StreamClosed(MessageError):
    """The other side closed the stream between two messages."""


def _check(message: object) -> None:
    """Depth, number of items and types, level by level. Shared containers are looked at once a level, so a
    list that contains itself ends at the depth limit."""
    level: dict[int, Any] = {0: (message,)}
    for _ in range(MAX_DEPTH + 1):
        inner: dict[int, Any] = {}
        for container in level.values():
            if len(container) > MAX_ITEMS:
                raise MessageError(
                    f"a message carries at most {MAX_ITEMS} items in one {_name(container)}, "
                    f"found {len(container)}"
                )
            values: Iterable[Any] = container
            if isinstance(container, dict):
                values = container.values()
                for key in container:
                    if key.__class__ not in _SCALARS and not isinstance(key, _BASES):
                        raise MessageError(f"a message cannot carry a key of type {_name(key)}")
            for value in values:
                kind = value.__class__
                if kind in _SCALARS:
                    continue
                if isinstance(value, _CONTAINERS) and kind is not msgpack.ExtType:
                    inner[id(value)] = value
                elif not isinstance(value, _BASES):
                    raise MessageError(f"a message cannot carry {kind.__module__}.{kind.__qualname__}")
        if not inner:
            return
        level = inner
    raise MessageError(f"a message nests at most {MAX_DEPTH} levels")


def _name(value: object) -> str:
    return type(value).__name__


def encode(message: object) -> bytes:
    """``message`` as msgpack, without the length. Raises MessageError with the limit that it breaks."""
    _check(message)
    try:
        data: bytes = msgpack.packb(message, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, BufferError, MemoryError) as error:
        raise MessageError(f"a message cannot carry this: {error}") from None
    if len(data) > MAX_FRAME:
        raise MessageError(f"a message is at most {MAX_FRAME} bytes, this one has {len(data)}")
    return data


def _no_extensions(code: int, data: bytes) -> object:
    raise MessageError(f"a message carries no extension types, found type {code}")


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The message in ``data``, exactly. Raises MessageError."""
    if len(data) > MAX_FRAME:
        raise MessageError(f"a message is at most {MAX_FRAME} bytes, this one has {len(data)}")
    try:
        message = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
            ext_hook=_no_extensions,
        )
    except MessageError:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise MessageError(f"not a message: {_name(error)} {error}") from None
    _check(message)
    return message


class Stream:
    """Frames on a connected AF_UNIX stream socket, which stays in blocking mode and belongs to the stream.

    Times are seconds; None waits as long as the other side lives. A receive that times out loses nothing. A
    send that times out in the middle of a frame leaves the stream unusable, and says so from then on.
    ``descriptors=True`` accepts file descriptors: a message that carries n of them says ``{"fds": n}`` and
    finds them at the head of :attr:`fds`.
    """

    def __init__(self, sock: socket.socket, *, descriptors: bool = False) -> None:
        self.sock = sock
        self.fds: deque[int] = deque()
        self._descriptors = descriptors
        self._buffer = bytearray()
        self._sending = threading.Lock()
        self._broken = False
        self._ended = False

    def fileno(self) -> int:
        """The socket's descriptor, for poll."""
        return self.sock.fileno()

    def send(self, message: object, timeout: float | None = None, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises MessageError before a byte is sent if it cannot be carried."""
        data = encode(message)
        frame = memoryview(_LENGTH.pack(len(data)) + data)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        until = None if timeout is None else time.monotonic() + timeout
        with self._sending:
            if self._broken:
                raise MessageError("an earlier message was sent in part; this stream cannot be used any more")
            begun = False
            while frame:
                try:
                    # The descriptors travel with the first byte.
                    sent = self.sock.sendmsg([frame], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    if not _wait(self.sock, select.POLLOUT, until):
                        self._broken = begun
                        raise MessageTimeout(
                            f"a message of {len(data)} bytes could not be sent within {timeout} s"
                        ) from None
                    continue
                except OSError as error:
                    self._broken = True
                    raise StreamClosed(f"the other side is gone: {error}") from None
                begun = True
                control = []
                frame = frame[sent:]

    def recv(self, timeout: float | None = None) -> Any:
        """The next message. Raises MessageTimeout, StreamClosed at the end, MessageError otherwise."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            frame = self._take()
            if frame is not None:
                return decode(frame)
            if self._ended:
                raise self._end()
            if not self._fill() and not self._ended and not _wait(self.sock, select.POLLIN, until):
                raise MessageTimeout(f"no message within {timeout} s")

    def pump(self) -> list[Any]:
        """Every message that is complete now, without waiting. Raises StreamClosed once none is left."""
        while not self._ended and self._fill():
            pass
        messages = []
        while (frame := self._take()) is not None:
            messages.append(decode(frame))
        if not messages and self._ended:
            raise self._end()
        return messages

    def take_fds(self, count: int) -> list[int]:
        """The descriptors of the message just received. Raises MessageError when they are missing."""
        if len(self.fds) < count:
            raise MessageError(f"{count} descriptors expected with a message, {len(self.fds)} arrived")
        return [self.fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self.sock.close()
        while self.fds:
            os.close(self.fds.popleft())

    def _end(self) -> MessageError:
        if self._buffer:
            return MessageError(f"the stream ended inside a message, after {len(self._buffer)} bytes of it")
        return StreamClosed("the other side closed the stream")

    def _take(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME:
            raise MessageError(f"a message is at most {MAX_FRAME} bytes, this one announces {length}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        frame = bytes(memoryview(self._buffer)[_LENGTH.size : end])
        del self._buffer[:end]
        return frame

    def _fill(self) -> bool:
        """Read what is there, at most one buffer; False when there was nothing to read."""
        try:
            if self._descriptors:
                space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
                flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                data, ancillary, _, _ = self.sock.recvmsg(1 << 18, space, flags)
                for level, kind, payload in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        received = array.array("i")
                        received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                        self.fds.extend(received)
            else:
                data = self.sock.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self._ended = True
            return False
        self._buffer += data
        return True


def _wait(sock: socket.socket, events: int, until: float | None) -> bool:
    poll = select.poll()
    poll.register(sock, events)
    if until is None:
        poll.poll()
        return True
    left = until - time.monotonic()
    return left > 0 and bool(poll.poll(left * 1000 + 1))
