"""Launching: values, trust, states, several at once, and what is refused.

Everything here goes through :class:`Runtime` with real workers and real enclave processes.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import functools
import json
import os
import random
import re
import signal
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from enturbo import (
    Enclave,
    EnclaveDestroyed,
    EnclaveImage,
    EnclaveState,
    EnturboError,
    EPCExhausted,
    GateTimeout,
    HandlerError,
    ImageFormatError,
    LaunchTableFull,
    LaunchTimeout,
    Measurement,
    MeasurementMismatch,
    NoHandler,
    Region,
    Runtime,
    SharedMemoryFull,
    SignatureError,
    SigningKey,
    Sigstruct,
    Timeline,
    UntrustedSigner,
)
from enturbo.runtime.startup import Start
from enturbo.shm.layout import PAGE_SIZE
from enturbo.shm.segment import room

WAIT = 30.0  # seconds; a bound on every wait here, never a measure
Startup = Literal["serial", "enturbo"]
STARTUPS: tuple[Startup, ...] = ("serial", "enturbo")
ECHO = "def handler(event, context):\n    return event\n"
Function = Callable[..., EnclaveImage]
MakeImage = Callable[..., EnclaveImage]


def until(condition: Callable[[], object]) -> None:
    """Look again and again, for a bounded time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@functools.cache
def vectors() -> list[dict[str, Any]]:
    text = (Path(__file__).parent / "vectors" / "enturbo-v1.json").read_text()
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


@functools.cache
def vector_image(
    pages: int, seed: int, measured_every: int, ssa_frame_size: int, chunk_mask: int, tcs: bool
) -> EnclaveImage:
    """The image that a vector stands for."""
    flags = (0x205, 0x201, 0x203, 0x100) if tcs else (0x205, 0x201, 0x203)
    offsets = np.arange(PAGE_SIZE, dtype=np.uint16)
    regions = []
    for page in range(pages):
        content = (((seed + 7 * page) % 251 + offsets) % 251).astype(np.uint8).tobytes()
        chunks = chunk_mask if page % measured_every == 0 else 0
        regions.append(Region(page * PAGE_SIZE, 1, flags[page % len(flags)], content, measured=chunks))
    size = 1
    while size < pages * PAGE_SIZE:
        size *= 2
    return EnclaveImage(regions, size=size, ssa_frame_size=ssa_frame_size)


def image_of(row: dict[str, Any]) -> EnclaveImage:
    names = ("pages", "seed", "measured_every", "ssa_frame_size", "chunk_mask", "tcs")
    return vector_image(*(row[name] for name in names))


def sample() -> list[dict[str, Any]]:
    """Every D, B, mask, stride, frame size and TCS with a small size, and some of each larger one."""
    chosen = [row for row in vectors() if row["pages"] == 33]
    rest = [row for row in vectors() if row["pages"] not in (0, 33)]
    empty = [row for row in vectors() if row["pages"] == 0][:4]
    return chosen + empty + random.Random(5).sample(rest, 8)


def check_vectors(runtime: Runtime, rows: list[dict[str, Any]], startups: tuple[Startup, ...]) -> None:
    done = set()
    for number, row in enumerate(rows):
        image = image_of(row)
        for scheme in ("enturbo", "sgx"):
            expected = Measurement(bytes.fromhex(row[scheme]), scheme, row["domains"], row["block"])
            if (id(image), expected) in done:
                continue
            done.add((id(image), expected))
            with runtime.launch(
                image, expected=expected, startup=startups[number % len(startups)]
            ) as enclave:
                assert enclave.wait_verified(WAIT) == expected.digest, row
                assert enclave.state is EnclaveState.VERIFIED
                assert enclave.mrenclave == expected.digest


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_vectors_with_each_pool(workers: int) -> None:
    """The same value for any number of workers, both schemes, both startups."""
    with Runtime(epc="16MiB", workers=workers) as runtime:
        assert runtime.wait_workers(WAIT)
        check_vectors(runtime, sample(), STARTUPS)
        assert runtime.stats()["worker_deaths"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("startup", STARTUPS)
def test_all_vectors(startup: Startup) -> None:
    with Runtime(epc="16MiB", workers=3) as runtime:
        assert runtime.wait_workers(WAIT)
        check_vectors(runtime, vectors(), (startup,))


@pytest.mark.parametrize("hasher", ["reference", "hashlib", "native"])
def test_each_hasher_gives_the_value(make_image: MakeImage, hasher: str) -> None:
    """Also those that cannot hand a midstate on: they keep a domain until its digest."""
    image = make_image(300, heap=20)
    with Runtime(epc="4MiB", workers=2, hasher=hasher) as runtime:
        assert runtime.wait_workers(WAIT)
        for startup in STARTUPS:
            for scheme in ("enturbo", "sgx"):
                expected = image.measure(scheme, domains=8, block=4, hasher="native")
                with runtime.launch(image, expected=expected, startup=startup) as enclave:
                    assert enclave.wait_verified(WAIT) == expected.digest


@pytest.mark.parametrize("startup", STARTUPS)
def test_a_finished_domain_beside_one_that_waits(make_image: MakeImage, startup: Startup) -> None:
    """Domain 0 has all its pages long before domain 1 has its last, and each page is copied by itself."""
    content = bytes(make_image(20).regions[0].content or b"")
    image = EnclaveImage(
        (Region(at, 1, 0x203, content[at : at + PAGE_SIZE]) for at in range(0, len(content), PAGE_SIZE)),
        size=1 << 17,
    )
    expected = image.measure(domains=2, block=16)
    with (
        Runtime(epc="1MiB", workers=0) as runtime,
        runtime.launch(image, expected=expected, startup=startup) as enclave,
    ):
        assert enclave.wait_verified(5) == expected.digest


@pytest.mark.parametrize("workers", [0, 2])
def test_launch_does_not_wait_for_workers(make_image: MakeImage, workers: int) -> None:
    image = make_image(512)
    with (
        Runtime(epc="4MiB", workers=workers) as runtime,
        runtime.launch(image, expected=image.measure()) as enclave,
    ):
        assert enclave.wait_verified(WAIT) == image.measure().digest


def test_an_image_by_eaug_measures_to_its_own_value(function: Function, runtime: Runtime) -> None:
    """SGXv2: the heap is no record, is zero and writable, and its first touches are counted."""
    image = function("def handler(event, context):\n    h = context.heap\n    h.write(0, b'x')\n"
                     "    return [len(h), h.read(1, 99).count(0)]\n", heap="256KiB")  # fmt: skip
    edmm = image.as_edmm()
    assert image.measure() != edmm.measure()
    for each in (image, edmm):
        with runtime.launch(each, expected=each.measure()) as enclave:
            assert enclave.call(None, timeout=WAIT) == [256 << 10, 99]
            assert (enclave.timeline.eaug_pages > 0) == bool(each.dynamic_pages)


# --------------------------------------------------------------------------------------------------- trust


@pytest.mark.parametrize("startup", STARTUPS)
@pytest.mark.parametrize("scheme", ["enturbo", "sgx"])
def test_any_startup_with_any_signed_scheme(
    runtime: Runtime, key: SigningKey, function: Function, startup: Startup, scheme: str
) -> None:
    image = function(ECHO)
    sigstruct = key.sign(image, scheme=scheme)
    with runtime.launch(image, sigstruct, startup=startup) as enclave:
        assert enclave.submit({"a": [1]}).result(WAIT) == {"a": [1]}
        assert enclave.mrenclave == image.measure(scheme).digest
    with runtime.launch(image, sigstruct.encode(), startup=startup) as enclave:
        assert enclave.call(1, timeout=WAIT) == 1


def test_trust_is_settled_before_a_page_is_taken(
    runtime: Runtime, key: SigningKey, function: Function, make_image: MakeImage
) -> None:
    image = function(ECHO)
    foreign = SigningKey.generate()
    bad = bytearray(key.sign(image).encode())
    bad[960] ^= 1  # in ENCLAVEHASH: the signature does not hold
    launches = runtime.stats()["launches"]
    signed = foreign.sign(image)
    with pytest.raises(UntrustedSigner, match=foreign.mrsigner.hex()):
        runtime.launch(image, signed)
    with pytest.raises(SignatureError):
        runtime.launch(image, bytes(bad))
    with pytest.raises(SignatureError):
        runtime.launch(image, b"\0" * 1808)
    with pytest.raises(UntrustedSigner, match="nothing else says"):
        runtime.launch(image)
    with pytest.raises(UntrustedSigner, match="svn"):
        runtime.launch(image, key.sign(image, svn=3), min_svn=4)
    with pytest.raises(UntrustedSigner, match="product id"):
        runtime.launch(image, key.sign(image, product_id=3), product_id=4)
    with pytest.raises(UntrustedSigner, match="not the expected one"):
        runtime.launch(image, key.sign(image), expected=make_image(1).measure())
    assert runtime.stats()["launches"] == launches
    assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]
    for trust in ({"signers": [foreign.mrsigner]}, {"any_signer": True}, {"signers": [], "any_signer": True}):
        with runtime.launch(image, signed, **trust) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest


def test_unsigned_is_measured_and_never_verified(runtime: Runtime, function: Function) -> None:
    image = function(ECHO)
    with runtime.launch(image, allow_unsigned=True) as enclave:
        assert enclave.call(7, timeout=WAIT) == 7
        assert enclave.wait_measured(WAIT) == image.measure().digest
        assert enclave.state is EnclaveState.MEASURED
        with pytest.raises(UntrustedSigner, match="never VERIFIED"):
            enclave.wait_verified(WAIT)
        assert enclave.timeline.verified is None


def test_what_is_signed_decides_scheme_and_geometry(
    runtime: Runtime, key: SigningKey, make_image: MakeImage
) -> None:
    """D and B come from the SIGSTRUCT; the same digest under another geometry is another statement."""
    image = make_image(40)
    digest = image.measure(domains=4, block=2).digest
    with runtime.launch(image, key.sign(image, domains=4, block=2)) as enclave:
        assert enclave.wait_verified(WAIT) == digest
    for domains, block in ((4, 4), (8, 2), (2, 2)):
        with runtime.launch(image, expected=Measurement(digest, "enturbo", domains, block)) as enclave:
            with pytest.raises(MeasurementMismatch) as caught:
                enclave.wait_verified(WAIT)
            assert caught.value.expected == digest
            assert caught.value.actual == image.measure(domains=domains, block=block).digest


# ------------------------------------------------------------------------------------- states and waiting


class States:
    """The states that an enclave of the runtime goes through, as they are set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from enturbo import Enclave

        self.seen: dict[int, list[str]] = {}
        set_state = Enclave._set_state

        def noting(enclave: Any, state: EnclaveState) -> None:
            self.seen.setdefault(enclave.generation, [str(enclave.state)]).append(str(state))
            set_state(enclave, state)

        monkeypatch.setattr(Enclave, "_set_state", noting)


@pytest.mark.parametrize("startup", STARTUPS)
def test_states_come_in_order(
    runtime: Runtime, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, startup: Startup
) -> None:
    states = States(monkeypatch)
    image = make_image(64)
    begin = ["CREATED", "COPYING", "MEASURING", "MEASURED"]
    with runtime.launch(image, expected=image.measure(), startup=startup) as good:
        good.wait_verified(WAIT)
    with runtime.launch(image, expected=make_image(63).measure(), startup=startup) as bad:
        with pytest.raises(MeasurementMismatch):
            bad.wait_verified(WAIT)
        assert bad.state is EnclaveState.REJECTED
    with runtime.launch(image, allow_unsigned=True, startup=startup) as unsigned:
        unsigned.wait_measured(WAIT)
    assert states.seen[good.generation] == [*begin, "VERIFIED", "DESTROYED"]
    assert states.seen[bad.generation] == [*begin, "REJECTED", "DESTROYED"]
    assert states.seen[unsigned.generation] == [*begin, "DESTROYED"]


def test_waiting_has_a_deadline(
    runtime: Runtime, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is held up: the verdict's waiters get LaunchTimeout, and it comes when the copy goes on."""
    image, go = make_image(200), threading.Event()
    copy = runtime.copy_bytes

    def held(target: memoryview, source: memoryview) -> None:
        assert go.wait(WAIT)
        copy(target, source)

    monkeypatch.setattr(runtime, "copy_bytes", held)
    with runtime.launch(image, expected=image.measure()) as enclave:
        with pytest.raises(LaunchTimeout, match="COPYING"):
            enclave.wait_verified(0.05)
        with pytest.raises(LaunchTimeout):
            enclave.wait_measured(0)
        assert enclave.mrenclave is None
        go.set()
        assert enclave.wait_verified(WAIT) == image.measure().digest


def test_closing_while_the_copy_runs(
    runtime: Runtime, function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiters and calls are told, the pages come back, and closing again is fine."""
    image, copying, go = function(ECHO), threading.Event(), threading.Event()
    copy = runtime.copy_bytes

    def held(target: memoryview, source: memoryview) -> None:
        copying.set()
        assert go.wait(WAIT)
        copy(target, source)

    monkeypatch.setattr(runtime, "copy_bytes", held)
    enclave = runtime.launch(image, expected=image.measure())
    future = enclave.submit(1)
    assert copying.wait(WAIT)
    threading.Timer(0.05, go.set).start()
    enclave.close()
    enclave.close()
    assert enclave.state is EnclaveState.DESTROYED
    with pytest.raises(EnclaveDestroyed):
        future.result(WAIT)
    with pytest.raises(EnclaveDestroyed):
        enclave.wait_verified(WAIT)
    late = enclave.submit(2)
    with pytest.raises(EnclaveDestroyed):
        late.result(WAIT)
    assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"]


def test_calls_run_in_order_and_globals_live_on(runtime: Runtime, function: Function) -> None:
    image = function("seen = []\ndef handler(event, context):\n    seen.append(event)\n    return seen\n")
    with runtime.launch(image, expected=image.measure()) as enclave:
        futures = [enclave.submit(number) for number in range(50)]
        for number, future in enumerate(futures):
            assert future.result(WAIT) == list(range(number + 1))


def test_a_call_that_was_cancelled_is_left_out(runtime: Runtime, function: Function) -> None:
    image = function(
        "import time\nseen = []\ndef handler(event, context):\n    seen.append(event)\n"
        "    time.sleep(0.2 if event == 0 else 0)\n    return seen\n"
    )
    with runtime.launch(image, expected=image.measure()) as enclave:
        futures = [enclave.submit(number) for number in range(4)]
        assert futures[2].cancel()
        assert futures[3].result(WAIT) == [0, 1, 3]


def test_await_a_call(runtime: Runtime, function: Function) -> None:
    image = function(ECHO)

    async def calls() -> list[Any]:
        with runtime.launch(image, expected=image.measure()) as enclave:
            return await asyncio.gather(*(enclave.acall(number) for number in range(5)))

    assert asyncio.run(calls()) == list(range(5))


def test_ocall_runs_on_the_host_after_the_verdict(runtime: Runtime, function: Function) -> None:
    image = function(
        "def handler(event, context):\n"
        "    try:\n"
        "        return context.ocall(*event)\n"
        "    except Exception as error:\n"
        "        return f'{type(error).__name__}: {error}'\n"
    )
    states: list[str] = []

    def add(one: int, two: int) -> int:
        states.append(str(enclave.state))
        return one + two

    ocalls: dict[str, Callable[..., Any]] = {"add": add, "set": lambda: {1}}
    with runtime.launch(image, expected=image.measure(), ocalls=ocalls) as enclave:
        assert enclave.call(["add", 1, 2], timeout=WAIT) == 3
        assert states == ["VERIFIED"]
        assert "OcallError" in enclave.call(["add", 1], timeout=WAIT)
        assert "no function 'sub'" in enclave.call(["sub"], timeout=WAIT)
        assert "OcallError" in enclave.call(["set"], timeout=WAIT)


# -------------------------------------------------------------------------------------- several at once


def test_several_launches_at_once(runtime: Runtime, function: Function, make_image: MakeImage) -> None:
    """Different images, startups and schemes side by side; launches are numbered, never twice."""
    plain = make_image(700)
    echo = function(f"{ECHO}\nX = {'x' * 3000!r}\n", heap="512KiB")
    enclaves, wanted = [], []
    results: list[Future[Any]] = []
    try:
        for number in range(12):
            image = (plain, echo, echo.as_edmm())[number % 3]
            expected = image.measure(("enturbo", "sgx")[number % 2])
            enclaves.append(runtime.launch(image, expected=expected, startup=STARTUPS[number // 2 % 2]))
            wanted.append(expected.digest)
            if image.handler:
                results.append(enclaves[-1].submit(number))
        assert [enclave.wait_verified(WAIT) for enclave in enclaves] == wanted
        assert [future.result(WAIT) for future in results] == [n for n in range(12) if n % 3]
        generations = [enclave.generation for enclave in enclaves]
        assert len(set(generations)) == 12
        assert 0 not in generations
    finally:
        for enclave in enclaves:
            enclave.close()
    stats = runtime.stats()
    assert stats["epc_pages_free"] == stats["epc_pages"]
    assert stats["enclaves"] == 0


def test_launches_from_several_threads(runtime: Runtime, make_image: MakeImage) -> None:
    image = make_image(200)
    expected, errors = image.measure(), []

    def work() -> None:
        try:
            for _ in range(5):
                with runtime.launch(image, expected=expected) as enclave:
                    enclave.wait_verified(WAIT)
        except Exception as error:  # noqa: BLE001  a thread's errors are the test's to raise
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)


def test_every_launch_slot_in_use(make_image: MakeImage) -> None:
    image = make_image(1)
    expected = image.measure()
    with Runtime(epc="1MiB", workers=0, slots=2) as runtime:
        first, second = (runtime.launch(image, expected=expected) for _ in range(2))
        with pytest.raises(LaunchTableFull):
            runtime.launch(image, expected=expected)
        assert runtime.stats()["epc_pages_free"] == runtime.stats()["epc_pages"] - 2
        first.wait_verified(WAIT)
        first.close()
        with runtime.launch(image, expected=expected) as third:
            third.wait_verified(WAIT)
            assert third.generation > second.generation > first.generation


def test_launch_numbers_are_never_used_again(make_image: MakeImage) -> None:
    image = make_image(1)
    with Runtime(epc="1MiB", workers=0) as runtime:
        runtime.arena.generation = 0xFFFF_FFFF - 2
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.generation == 0xFFFF_FFFE
            enclave.wait_verified(WAIT)
        with pytest.raises(EnturboError, match="launch numbers"):
            runtime.launch(image, expected=image.measure())


# ---------------------------------------------------------------------------------------------- bad input


def test_epc_too_small(make_image: MakeImage) -> None:
    image, half = make_image(257), make_image(100)
    with Runtime(epc="1MiB", workers=0) as runtime:
        with pytest.raises(EPCExhausted) as caught:
            runtime.launch(image, expected=image.measure())
        assert (caught.value.needed, caught.value.free, caught.value.largest) == (257, 256, 256)
        with runtime.launch(half, expected=half.measure()) as one:
            two = runtime.launch(half, expected=half.measure())
            one.wait_verified(WAIT)
            two.wait_verified(WAIT)
            one.close()
            with pytest.raises(EPCExhausted) as caught:
                runtime.launch(make_image(101), allow_unsigned=True)
            assert (caught.value.needed, caught.value.free, caught.value.largest) == (101, 156, 100)
        two.close()
        assert runtime.stats()["epc_pages_free"] == 256


def test_shared_memory_too_small() -> None:
    _, total = room()
    with pytest.raises(SharedMemoryFull) as caught:
        Runtime(epc=total + (1 << 30), workers=0)
    assert caught.value.needed >= total + (1 << 30)
    assert caught.value.total == total


def test_shared_memory_that_fills_up_meanwhile(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena is allocated in the background: a launch that needs what never came is refused."""
    from enturbo.shm.segment import Segment

    def full(segment: Segment) -> bool:
        if segment.size != 2 << 20:
            return allocate(segment)
        raise SharedMemoryFull(segment.size, 0, segment.size)

    allocate = Segment.allocate_step
    monkeypatch.setattr(Segment, "allocate_step", full)
    image = make_image(8)
    with (
        Runtime(epc="2MiB", workers=0) as runtime,
        runtime.launch(image, expected=image.measure()) as enclave,
        pytest.raises(SharedMemoryFull, match=str(2 << 20)),
    ):
        enclave.wait_verified(WAIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "exec"}, "gate: expected one of write, execute, found 'exec'"),
        ({"workers": -1}, "workers: expected a number from 0, found -1"),
        ({"epc": 0}, "at least one page"),
        ({"epc": "12 parsecs"}, "12 parsecs"),
        ({"hasher": "md5"}, "md5"),
    ],
)
def test_a_runtime_with_odd_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EnturboError, match=message):
        Runtime(**{"epc": "1MiB", "workers": 0, **options})


def test_a_launch_with_odd_options(runtime: Runtime, make_image: MakeImage) -> None:
    image = make_image(1)
    with pytest.raises(EnturboError, match="startup: expected one of serial, enturbo, found 'fast'"):
        runtime.launch(image, allow_unsigned=True, startup="fast")
    with pytest.raises(EnturboError, match="scheme"):
        image.measure("md5")
    with pytest.raises(ImageFormatError):
        EnclaveImage([Region(0, 2, 0x203), Region(4096, 1, 0x203)], size=1 << 14)
    with pytest.raises(ImageFormatError):
        EnclaveImage([Region(4096, 1, 0x203)], size=4096)
    with pytest.raises(ImageFormatError):
        Region(1, 1, 0x203)
    with pytest.raises(ImageFormatError):
        Region(0, 1, 0x603)


def test_an_image_without_a_handler_cannot_be_called(runtime: Runtime, make_image: MakeImage) -> None:
    image = make_image(3)
    with runtime.launch(image, expected=image.measure()) as enclave:
        with pytest.raises(NoHandler):
            enclave.submit(1)
        enclave.wait_verified(WAIT)
        assert enclave.stdout == b""


def test_a_closed_runtime(make_image: MakeImage, function: Function) -> None:
    image = function(ECHO)
    runtime = Runtime(epc="2MiB", workers=1)
    enclave = runtime.launch(image, expected=image.measure())
    assert enclave.call(1, timeout=WAIT) == 1
    runtime.close()
    runtime.close()
    assert enclave.state is EnclaveState.DESTROYED
    with pytest.raises(EnturboError, match="closed"):
        runtime.launch(image, expected=image.measure())
    with pytest.raises(EnclaveDestroyed):
        enclave.call(1)


def test_a_forked_child_cannot_use_its_parents_runtime(make_image: MakeImage) -> None:
    """Nor does it keep one of its descriptors, and the parent's runtime works on."""
    image = make_image(64)
    expected = image.measure()
    with Runtime(epc="2MiB", workers=1) as runtime:
        assert runtime.wait_workers(WAIT)
        mine = {runtime.memory.epc_segment.fd, runtime.memory.control_segment.fd}
        mine = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in mine}
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            verdict = b"launched"
            try:
                runtime.launch(image, expected=expected)
            except EnturboError as error:
                verdict = str(error).encode()
            inodes = set()
            for name in os.listdir("/proc/self/fd"):
                try:
                    inodes.add(os.stat(f"/proc/self/fd/{name}").st_ino)
                except OSError:
                    continue
            os.write(write, b"kept a descriptor" if inodes & mine else verdict)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read()
        os.waitpid(child, 0)
        assert b"belongs to the parent process" in told
        with runtime.launch(image, expected=expected) as enclave:
            assert enclave.wait_verified(WAIT) == expected.digest


def test_a_fork_while_another_thread_is_in_the_runtime() -> None:
    """The lock's holder does not exist in the child: it must end all the same, and say what is wrong."""
    with Runtime(epc="1MiB", workers=0) as runtime:
        with runtime._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                assert runtime.stats()["enclaves"] == 0
                runtime.close()
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_closing_while_others_launch(make_image: MakeImage, function: Function) -> None:
    """Each launch either works or is told that the runtime is closed; nothing is left of any of them."""
    images = [(image, image.measure()) for image in (make_image(100), function(ECHO))]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while True:
                image, expected = chance.choice(images)
                enclave = runtime.launch(image, expected=expected)
                if chance.random() < 0.5:
                    enclave.wait_verified(WAIT)
                enclave.close()
        except EnturboError as error:
            if not re.search("closed|destroyed", str(error)):
                errors.append(error)
        except BaseException as error:  # noqa: BLE001  a thread's errors are the test's to raise
            errors.append(error)

    for number in range(8):
        runtime = Runtime(epc="4MiB", workers=0)
        threads = [threading.Thread(target=work, args=(number * 3 + each,)) for each in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(random.Random(number).random() * 0.1)
        runtime.close()
        for thread in threads:
            thread.join(WAIT)
        assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_nobody_waits_for_a_page_longer_than_the_gate_timeout(
    function: Function, host_copies: Callable[[EnclaveImage], EnclaveImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is held up: the handler's own access fails with GateTimeout, and it may go on from that."""
    image = function(
        "def handler(event, context):\n"
        "    try:\n"
        "        return len(context.data.read())\n"
        "    except Exception as error:\n"
        "        return f'{type(error).__name__}: {error}'\n",
        data=64 * PAGE_SIZE,
    )
    image, go = host_copies(image), threading.Event()
    with Runtime(epc="4MiB", workers=0, gate_timeout=0.1, enforcement="cooperative") as runtime:
        set_valid = runtime.memory.epcm.set_valid

        def held(first: int, count: int, generation: int) -> None:
            if count == 64:
                assert go.wait(WAIT)
            set_valid(first, count, generation)

        monkeypatch.setattr(runtime.memory.epcm, "set_valid", held)
        with runtime.launch(image, expected=image.measure()) as enclave:
            future = enclave.submit(None)
            threading.Timer(0.6, go.set).start()
            assert "GateTimeout" in future.result(WAIT)
            assert GateTimeout.__name__ in future.result()
            assert enclave.call(None, timeout=WAIT) == 64 * PAGE_SIZE


# --------------------------------------------------------------------------------------------------- trace


def unread(enclave: Enclave) -> int:
    """How many bytes of its answers the host has not read yet."""
    session, count = enclave._session, array.array("i", [0])
    if session is not None and session._channel is not None:
        fcntl.ioctl(session._channel.sock, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("startup", STARTUPS)
def test_timeline_as_chrome_trace(
    cooperative: Runtime,
    function: Function,
    tmp_path: Path,
    startup: Startup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Spans of everything a start consists of, in an order that can be, in a file that viewers open."""
    answer, merge = 1 << 14, Start.merge
    image = function("def handler(event, context):\n    return bytes(event)\n", data=8 << 20)
    launched: list[Enclave] = []

    def late(start: Start) -> bytes:
        if startup == "enturbo":  # the verdict comes after the handler's end, so there is something to hold
            until(lambda: launched and unread(launched[0]) >= answer)
        return merge(start)

    monkeypatch.setattr(Start, "merge", late)
    with cooperative.launch(image, expected=image.measure(), startup=startup) as enclave:
        launched.append(enclave)
        assert enclave.call(answer, timeout=WAIT) == bytes(answer)
        timeline: Timeline = enclave.timeline
        # Workers tell what they did afterwards, so the last spans may come after the verdict.
        until(
            lambda: sum(each.pages for each in timeline.spans if each.name == "measure") == image.page_count
        )
        timeline.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {span["name"] for span in spans}
    assert {"copy", "measure", "merge", "verify", "execute"} <= names
    assert ("hold" in names) == (startup == "enturbo")
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {span["tid"] for span in spans} == set(threads)
    assert len(set(threads.values())) == len(threads)

    def reach(name: str) -> tuple[float, float]:
        chosen = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["name"] == name]
        return min(start for start, _ in chosen), max(end for _, end in chosen)

    assert reach("copy")[0] < reach("measure")[1]
    assert reach("measure")[1] <= reach("merge")[0]
    assert reach("merge")[1] <= reach("verify")[1]
    marks = {event["name"]: event["ts"] for event in events if event["ph"] == "i"}
    assert marks["copied"] <= marks["measured"] <= marks["verified"] <= marks["result"]
    assert marks["first_instruction"] == pytest.approx(reach("execute")[0])
    if startup == "serial":
        assert marks["first_instruction"] >= marks["verified"]
    else:
        assert reach("hold")[1] == pytest.approx(marks["verified"])
    measured = sum(span["args"].get("pages", 0) for span in spans if span["name"] == "measure")
    assert measured == image.page_count
    assert sum(span["args"]["pages"] for span in spans if span["name"] == "copy") == image.page_count


def test_a_handler_error_keeps_the_enclave(runtime: Runtime, function: Function) -> None:
    image = function("def handler(event, context):\n    return 1 // event\n")
    with runtime.launch(image, expected=image.measure()) as enclave:
        with pytest.raises(HandlerError, match="ZeroDivisionError"):
            enclave.call(0, timeout=WAIT)
        assert enclave.call(1, timeout=WAIT) == 1
        assert enclave.state is EnclaveState.VERIFIED


def test_sigstruct_of_another_image(runtime: Runtime, key: SigningKey, make_image: MakeImage) -> None:
    image, other = make_image(20, seed=1), make_image(20, seed=2)
    sigstruct: Sigstruct = key.sign(other)
    with runtime.launch(image, sigstruct) as enclave:
        with pytest.raises(MeasurementMismatch):
            enclave.wait_verified(WAIT)
        assert enclave.state is EnclaveState.REJECTED


@pytest.fixture(autouse=True)
def all_pages_come_back(runtime: Runtime) -> Iterator[None]:
    """Whatever a test did with the shared runtime, its EPC is free and zero afterwards."""
    yield
    stats = runtime.stats()
    assert stats["epc_pages_free"] == stats["epc_pages"]
    assert stats["epc_pages_quarantined"] == 0
    assert not runtime.memory.epc.bytes.any()
    assert not any(runtime.memory.epcm.buffer)
