"""Handlers that fail in every way there is, and what the caller is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from enturbo import (
    Enclave,
    EnclaveDestroyed,
    EnclaveImage,
    EnclaveState,
    EnturboError,
    HandlerError,
    ImageFormatError,
    Runtime,
)

WAIT = 30.0  # seconds; a bound on every wait here, never a measure
Function = Callable[..., EnclaveImage]

HANDLER = """
import os, signal, stat, sys, threading, time

class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")

calls = 0

def launch_socket():
    return next(fd for fd in (3, 1000) if stat.S_ISSOCK(os.fstat(fd).st_mode))

def handler(event, context):
    global calls
    calls += 1
    what, *rest = event
    if what == "calls":
        return calls
    if what == "raise":
        raise ValueError("boo \\ud800 \\x00")
    if what == "odd":
        raise Odd
    if what == "group":
        raise ExceptionGroup("several", [ValueError(1), KeyError(2)])
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "sys.exit":
        sys.exit(rest[0])
    if what == "os._exit":
        os._exit(rest[0])
    if what == "signal":
        os.kill(os.getpid(), rest[0])
        time.sleep(600)
    if what == "hang":
        while True:
            time.sleep(1)
    if what == "spin":
        while True:
            pass
    if what == "deaf":
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        time.sleep(600)
    if what == "set":
        return {1, 2}
    if what == "object":
        return [1, {"deep": (1, Odd())}]
    if what == "huge number":
        return 1 << 64
    if what == "bytes":
        return bytes(rest[0])
    if what == "deep":
        value = []
        for _ in range(rest[0]):
            value = [value]
        return value
    if what == "cycle":
        value = []
        value.append(value)
        return value
    if what == "recursion":
        return handler(event, context)
    if what == "close":
        os.close(launch_socket())
        return 1
    if what == "garbage":
        os.write(launch_socket(), rest[0])
        return 1
    if what == "stdout closed":
        os.close(1)
        print("lost")
        return 1
    if what == "thread":
        threading.Thread(target=time.sleep, args=(600,)).start()
        return threading.active_count()
    if what == "child returns":
        return os.fork()
    if what == "child stays":
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        return child
    return event
"""


@pytest.fixture
def image(function: Function) -> EnclaveImage:
    return function(HANDLER)


@pytest.fixture
def enclave(runtime: Runtime, image: EnclaveImage) -> Iterator[Enclave]:
    with runtime.launch(image, expected=image.measure()) as enclave:
        yield enclave


@pytest.fixture(autouse=True)
def all_pages_come_back(runtime: Runtime) -> Iterator[None]:
    yield
    for _ in range(1000):
        if runtime.stats()["enclaves"] == 0:
            break
        time.sleep(0.01)
    stats = runtime.stats()
    assert stats["epc_pages_free"] == stats["epc_pages"]
    assert stats["epc_pages_quarantined"] == 0


def failure(enclave: Enclave, *event: Any) -> HandlerError:
    with pytest.raises(HandlerError) as caught:
        enclave.call(list(event), timeout=WAIT)
    return caught.value


def destroyed(enclave: Enclave) -> None:
    deadline = time.monotonic() + WAIT
    while enclave.state is not EnclaveState.DESTROYED:
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    with pytest.raises(EnturboError):
        enclave.call(["calls"])


@pytest.mark.parametrize(
    ("event", "kind", "message"),
    [
        (["raise"], "raise", r"ValueError: boo \\ud800"),
        (["odd"], "raise", "handler.Odd"),
        (["group"], "raise", r"ExceptionGroup: several \(2 sub-exceptions\)"),
        (["interrupt"], "raise", "KeyboardInterrupt"),
        (["sys.exit", 3], "exit", "SystemExit: 3"),
        (["sys.exit", "bye"], "exit", "SystemExit: bye"),
        (["set"], "result", "cannot carry builtins.set"),
        (["object"], "result", "cannot carry handler.Odd"),
        (["huge number"], "result", "cannot be sent"),
        (["bytes", 20 << 20], "result", "limit 16777216 bytes"),
        (["deep", 100], "result", "64 levels"),
        (["cycle"], "result", "64 levels"),
        (["recursion"], "raise", "RecursionError"),
    ],
)
def test_a_handler_that_fails_can_be_called_again(
    enclave: Enclave, event: list[Any], kind: str, message: str
) -> None:
    """The caller gets kind, type, text and the remote traceback; globals are what they were."""
    with pytest.raises(HandlerError, match=message) as caught:
        enclave.call(event, timeout=WAIT)
    assert caught.value.kind == kind
    assert type(caught.value.remote_traceback) is str
    if kind == "raise":
        assert "/enclave/handler.py" in caught.value.remote_traceback
    assert "/enturbo/" not in caught.value.remote_traceback
    assert enclave.call(["calls"], timeout=WAIT) >= 2
    assert enclave.state is EnclaveState.VERIFIED


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (["os._exit", 3], "exited with status 3"),
        (["os._exit", 0], "exited with status 0"),
        (["signal", 9], "killed by SIGKILL"),
        (["signal", 11], "killed by SIGSEGV"),
    ],
)
def test_a_handler_that_ends_its_process(enclave: Enclave, event: list[Any], message: str) -> None:
    future = enclave.submit(event)
    with pytest.raises(EnclaveDestroyed, match=message):
        enclave.submit(["calls"]).result(WAIT)  # either may raise
    with pytest.raises(EnclaveDestroyed, match=message):
        future.result(WAIT)
    destroyed(enclave)


@pytest.mark.parametrize("event", ["hang", "spin", "deaf"])
def test_a_handler_that_does_not_come_back(enclave: Enclave, event: str) -> None:
    """A call's timeout ends the enclave, whatever the handler does about signals."""
    with pytest.raises(HandlerError, match=r"longer than its 0.2 s") as caught:
        enclave.call([event], timeout=0.2)
    assert caught.value.kind == "timeout"
    destroyed(enclave)


def test_a_timeout_does_not_count_what_happens_before_the_verdict(
    runtime: Runtime, image: EnclaveImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from enturbo.runtime.startup import Start

    merge = Start.merge

    def late(start: Start) -> bytes:
        time.sleep(0.6)
        return merge(start)

    monkeypatch.setattr(Start, "merge", late)
    with runtime.launch(image, expected=image.measure()) as enclave:
        assert enclave.call(["calls"], timeout=0.5) == 1


def test_a_timed_out_call_fails_those_behind_it(enclave: Enclave) -> None:
    first, second = enclave.submit(["hang"], timeout=0.2), enclave.submit(["calls"])
    with pytest.raises(HandlerError, match="longer than"):
        first.result(WAIT)
    with pytest.raises(EnturboError):
        second.result(WAIT)
    destroyed(enclave)


def test_closing_ends_a_handler_that_hangs(enclave: Enclave) -> None:
    enclave.wait_verified(WAIT)
    future = enclave.submit(["deaf"])
    time.sleep(0.05)
    enclave.close()
    with pytest.raises(EnclaveDestroyed):
        future.result(0)


@pytest.mark.parametrize(
    "event",
    [
        ["close"],
        ["garbage", b"\xff\xff\xff\xff"],
        ["garbage", b"\x05\0\0\0hello"],
        ["garbage", b"\x01\0\0\0\xc1"],
        ["garbage", b"\x03\0\0\0\xd4\x01\x00"],
        ["garbage", b"\x01\0\0\0\x80"],
    ],
)
def test_a_handler_that_writes_into_the_launch_socket(enclave: Enclave, event: list[Any]) -> None:
    """Whatever it says there, the host gets an error of its own and nothing else."""
    with pytest.raises(EnturboError):
        enclave.call(event, timeout=WAIT)
    destroyed(enclave)


def test_an_answer_to_another_call(enclave: Enclave) -> None:
    import msgpack

    forged = msgpack.packb({"result": 77, "value": 1, "first": 1, "end": 2, "eaug": 0})
    with pytest.raises(EnclaveDestroyed):
        enclave.call(["garbage", len(forged).to_bytes(4, "little") + forged], timeout=WAIT)


def test_a_handler_without_its_stdout(enclave: Enclave) -> None:
    assert enclave.call(["stdout closed"], timeout=WAIT) == 1
    assert enclave.call(["calls"], timeout=WAIT) == 2
    assert enclave.stdout == b""


def test_a_handler_that_leaves_a_thread(enclave: Enclave) -> None:
    assert enclave.call(["thread"], timeout=WAIT) == 2
    assert enclave.call(["calls"], timeout=WAIT) == 2


def test_a_child_that_returns_answers_for_nobody(enclave: Enclave) -> None:
    assert enclave.call(["child returns"], timeout=WAIT) > 0
    assert enclave.call(["calls"], timeout=WAIT) == 2


def test_a_child_that_is_left_ends_with_the_enclave(enclave: Enclave) -> None:
    child = psutil.Process(enclave.call(["child stays"], timeout=WAIT))
    assert enclave.call(["calls"], timeout=WAIT) == 2
    assert child.is_running()
    enclave.close()
    assert not child.is_running()


@pytest.mark.parametrize("event", [{1}, object(), 1 << 64, [1, (2, {3: object()})], "\ud800"])
def test_an_event_that_cannot_be_carried(enclave: Enclave, event: Any) -> None:
    with pytest.raises(EnturboError, match="message"):
        enclave.submit(event)
    assert enclave.call(["calls"], timeout=WAIT) == 1


def test_large_events_and_results(enclave: Enclave) -> None:
    event = ["x", b"\1" * (8 << 20), {"a": [None, True, -1.5, "ä"]}]
    assert enclave.call(event, timeout=WAIT) == event
    with pytest.raises(EnturboError):
        enclave.submit(["x", bytes(20 << 20)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(event, context):\n    return 1\n", "handler"),
        ("import no_such_module\n", "no_such_module"),
        ("import numpy\n", "numpy"),
        ("raise RuntimeError('at import')\n", "at import"),
        ("def handler(:\n", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_used(
    runtime: Runtime, function: Function, source: str, message: str
) -> None:
    """Found when it is imported, inside; told only after VERIFIED, and at every call."""
    image = function(source)
    with runtime.launch(image, expected=image.measure()) as enclave:
        for _ in range(2):
            with pytest.raises(HandlerError, match=message):
                enclave.call(None, timeout=WAIT)
        assert enclave.state is EnclaveState.VERIFIED


def test_a_folder_without_the_handler_module(function: Function) -> None:
    with pytest.raises(ImageFormatError, match="nothing"):
        function("", handler="nothing:handler")
