"""Frames, limits, deadlines: what may pass between host, zygote and enclave."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enturbo.runtime.mailbox import Mailbox
from enturbo.runtime.messages import (
    MAX_DEPTH,
    MAX_FRAME,
    MAX_ITEMS,
    MessageError,
    MessageTimeout,
    Stream,
    StreamClosed,
    decode,
    encode,
)

Pair = tuple[Stream, Stream]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = (Stream(sock, descriptors=True) for sock in socket.socketpair())
    yield one, other
    one.close()
    other.close()


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=20,
)


@given(_VALUES)
def test_round_trip(value: Any) -> None:
    assert decode(encode(value)) == value


@given(st.binary(max_size=200))
def test_hostile_bytes_give_one_error(data: bytes) -> None:
    try:
        value = decode(data)
    except MessageError:
        return
    assert decode(encode(value)) == value or value != value


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def itself() -> Any:
    value: list[Any] = []
    value += [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ({1, 2}, "builtins.set"),
        (object(), "builtins.object"),
        ([{"a": (1, 2j)}], "builtins.complex"),
        (1 << 64, "out of range"),
        ("\ud800", "surrogates"),
        ({(1, 2): 3}, "key of type tuple"),
        (msgpack.Timestamp(1), "Timestamp"),
        ([msgpack.ExtType(4, b"x")], "ExtType"),
        (bytes(MAX_FRAME), f"{MAX_FRAME} bytes, this one has {MAX_FRAME + 5}"),
        ([0] * (MAX_ITEMS + 1), f"found {MAX_ITEMS + 1}"),
        (nested(MAX_DEPTH + 1), f"{MAX_DEPTH} levels"),
        (itself(), f"{MAX_DEPTH} levels"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_carried(value: Any, fact: str) -> None:
    with pytest.raises(MessageError, match=fact):
        encode(value)


def test_the_limits_themselves_pass() -> None:
    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    assert len(decode(encode([0] * MAX_ITEMS))) == MAX_ITEMS
    assert len(decode(encode(bytes(MAX_FRAME - 5)))) == MAX_FRAME - 5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x01",
        b"\xa1\xff",
        b"\x81\x90\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x00\x20\x00\x00",
        b"\xd4\x05a",
        b"\xc7\x00\x05",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\x91" * MAX_DEPTH + b"\x90",
        b"\x91" * 5000,
    ],
)
def test_what_is_not_a_message(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


def test_messages_that_arrive_in_pieces(pair: Pair) -> None:
    one, other = pair
    frames = b"".join(struct.pack("<I", len(body)) + body for body in (encode({"a": 1}), encode({"b": 2})))
    for piece in (frames[:2], frames[2:5]):
        one.sock.send(piece)
        with pytest.raises(MessageTimeout):
            other.recv(0.0)
        assert other.pump() == []
    one.sock.send(frames[5:])
    assert other.recv(5) == {"a": 1}
    assert other.pump() == [{"b": 2}]


def test_the_end_of_a_stream(pair: Pair) -> None:
    one, other = pair
    one.send({"last": 1}, 5)
    one.sock.shutdown(socket.SHUT_WR)
    assert other.pump() == [{"last": 1}]
    with pytest.raises(StreamClosed):
        other.recv(5)
    with pytest.raises(StreamClosed):
        other.pump()
    other.sock.close()
    with pytest.raises(StreamClosed):
        one.send({"more": 1}, 5)


def test_an_end_inside_a_message(pair: Pair) -> None:
    one, other = pair
    one.sock.send(struct.pack("<I", 10) + b"12345")
    one.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(MessageError, match="after 9 bytes") as caught:
        other.recv(5)
    assert not isinstance(caught.value, StreamClosed)


def test_a_length_over_the_limit_is_refused_at_once(pair: Pair) -> None:
    one, other = pair
    one.sock.send(struct.pack("<I", MAX_FRAME + 1))
    with pytest.raises(MessageError, match=f"announces {MAX_FRAME + 1}"):
        other.recv(5)


def test_a_send_that_nobody_reads(pair: Pair) -> None:
    one, _ = pair
    with pytest.raises(MessageTimeout):
        one.send(bytes(MAX_FRAME // 2), 0.01)
    # Half a frame is out: anything that followed would be read as its rest.
    with pytest.raises(MessageError, match="in part"):
        one.send({}, 5)


def test_a_refused_message_leaves_the_stream_as_it_was(pair: Pair) -> None:
    one, other = pair
    with pytest.raises(MessageError):
        one.send({"value": {1}}, 5)
    one.send({"value": 1}, 5)
    assert other.recv(5) == {"value": 1}


def test_large_messages_pass_while_the_other_side_reads(pair: Pair) -> None:
    one, other = pair
    body = os.urandom(1 << 20) * 8
    sender = threading.Thread(target=one.send, args=({"body": body}, 20))
    sender.start()
    assert other.recv(20) == {"body": body}
    sender.join()


def test_descriptors_stay_with_their_message(pair: Pair) -> None:
    one, other = pair
    pipes = [os.pipe() for _ in range(2)]
    for number, (read, write) in enumerate(pipes):
        one.send({"number": number, "fds": 1}, 5, (read,))
        os.write(write, bytes([number]))
    for number in range(2):
        assert other.recv(5)["number"] == number
        (fd,) = other.take_fds(1)
        assert os.read(fd, 1) == bytes([number])
        assert not os.get_inheritable(fd)
        os.close(fd)
    with pytest.raises(MessageError, match="0 arrived"):
        other.take_fds(1)
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_a_mailbox_gives_each_thread_its_own(pair: Pair) -> None:
    one, other = pair
    mailbox = Mailbox(other, lambda message: message["to"])
    got: dict[int, list[int]] = {number: [] for number in range(4)}

    def wait(number: int) -> None:
        for _ in range(3):
            got[number].append(mailbox.wait(number, 20)["value"])

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for value in range(3):
        for number in (3, 1, 0, 2):
            one.send({"to": number, "value": value}, 5)
    for thread in threads:
        thread.join()
    assert got == {number: [0, 1, 2] for number in range(4)}
    with pytest.raises(MessageTimeout):
        mailbox.wait(9, 0.01)
    one.sock.shutdown(socket.SHUT_WR)
    for _ in range(2):
        with pytest.raises(StreamClosed):
            mailbox.wait(9, 5)
