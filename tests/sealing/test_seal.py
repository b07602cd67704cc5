"""A sealed process: what it reaches, what was taken from it, and what it may do unseen."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from enturbo.runtime import landlock, seccomp
from enturbo.runtime.sealing import Base, readable
from enturbo.runtime.syscalls import NUMBERS

if TYPE_CHECKING:
    from tests.sealing.conftest import Nursery, Sealed

Call = Callable[..., tuple[int, int]]

DAC_OVERRIDE = 1 << 1


def test_the_kernel_has_what_is_needed() -> None:
    assert seccomp.probe()
    assert landlock.abi() >= 1


def test_readable_names_each_place_once() -> None:
    paths = readable()
    assert any(Path(os.__file__).is_relative_to(path) for path in paths)
    assert "/dev/urandom" in paths
    for path in paths:
        assert path == os.path.realpath(path)
        assert not any(path != other and Path(path).is_relative_to(other) for other in paths)
        assert not Path("/proc/self").is_relative_to(path)


def test_a_base_holds_places_alone() -> None:
    base = Base()
    fds = base.fds
    assert fds
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(fd, 1)  # O_PATH
        assert not os.get_inheritable(fd)
    base.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    base.close()


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def outside(folder: str) -> Iterator[str]:
    """A file that everybody may read and write, and Landlock does not name."""
    path = folder + "-outside"
    Path(path).write_text("secret")
    os.chmod(path, 0o666)
    yield path
    os.unlink(path)


@pytest.fixture
def inside(folder: str, uid: int | None) -> str:
    """A file in the scratch folder, of the same user."""
    path = os.path.join(folder, "inside")
    Path(path).write_text("inside")
    if uid is not None:
        os.chown(path, uid, uid)
    return path


def allowed(sealed: Sealed, name: str, *arguments: int | str | bytes) -> str:
    """What becomes of a call that is held, and then carried out. Texts are paths."""
    given = [os.fsencode(each) + b"\0" if isinstance(each, str) else each for each in arguments]
    sealed.send(name, *given)
    listener, call = sealed.held()
    assert call.number == NUMBERS[name]
    listener.allow(call)
    result, number = sealed.result()
    return "runs" if result >= 0 else errno.errorcode[number]


READ, WRITE = os.O_RDONLY, os.O_WRONLY


def opened(sealed: Sealed, path: str, flags: int = READ) -> str:
    return sealed.outcome("openat", -100, os.fsencode(path) + b"\0", flags, 0)


def test_what_may_be_read(make: Callable[..., Sealed], outside: str) -> None:
    sealed = make()
    for path in ("/dev/null", "/dev/urandom", "/etc/passwd"):
        assert opened(sealed, path) == "runs"
    if os.access(os.__file__, os.R_OK) and sealed.uid == os.geteuid():
        assert opened(sealed, os.__file__) == "runs"
        assert opened(sealed, os.path.dirname(os.__file__), os.O_DIRECTORY) == "runs"
    for path in (
        outside,
        "/proc/self/status",
        "/proc/self/mem",
        "/proc/1/stat",
        "/sys/kernel/mm",
        "/tmp",
        "/",
    ):
        assert opened(sealed, path) == "EACCES"
    assert sealed.outcome("readlink", b"/proc/self/exe\0", bytes(4096), 4096) == "runs"


def test_a_policy_s_paths(make: Callable[..., Sealed], outside: str, folder: str, inside: str) -> None:
    """What is named for reading may not be written, what is for writing may be both."""
    sealed = make(read=[outside], write=[folder])
    assert opened(sealed, outside) == "runs"
    assert opened(sealed, inside) == "runs"
    assert opened(sealed, folder, os.O_DIRECTORY) == "runs"
    assert allowed(sealed, "openat", -100, outside, WRITE) == "EACCES"
    assert allowed(sealed, "truncate", outside, 0) == "EACCES"
    assert allowed(sealed, "openat", -100, inside, WRITE) == "runs"
    assert opened(sealed, os.path.dirname(outside), os.O_DIRECTORY) == "EACCES"


def test_scratch(make: Callable[..., Sealed], outside: str, folder: str, inside: str) -> None:
    sealed = make(scratch=folder)
    assert opened(sealed, inside) == "runs"
    new = f"{folder}/new"
    # Writing is held, and has not happened.
    assert opened(sealed, new, WRITE | os.O_CREAT) == "held"
    assert opened(sealed, inside, WRITE | os.O_TRUNC) == "held"
    assert not os.path.exists(new)
    assert Path(inside).read_text() == "inside"
    # When it is let through it is possible there, and nowhere else.
    assert allowed(sealed, "openat", -100, new, WRITE | os.O_CREAT, 0o600) == "runs"
    assert os.stat(new).st_uid == sealed.uid
    assert allowed(sealed, "openat", -100, inside, WRITE | os.O_TRUNC) == "runs"
    assert Path(inside).read_text() == ""
    assert allowed(sealed, "mkdir", f"{folder}/below", 0o700) == "runs"
    assert allowed(sealed, "rename", new, f"{folder}/below/new") == "runs"
    assert allowed(sealed, "link", inside, f"{folder}/link") == "runs"
    assert allowed(sealed, "symlink", outside, f"{folder}/symlink") == "runs"
    assert allowed(sealed, "unlink", f"{folder}/link") == "runs"
    assert opened(sealed, f"{folder}/symlink") == "EACCES"
    for call in (
        ("openat", -100, f"{folder}/symlink", WRITE, 0),
        ("openat", -100, outside, WRITE | os.O_TRUNC, 0),
        ("openat", -100, f"{folder}-new", WRITE | os.O_CREAT, 0o600),
        ("open", f"{folder}/../{os.path.basename(outside)}", WRITE, 0),
        ("truncate", outside, 0),
        ("unlink", outside),
        ("mkdir", f"{folder}-new", 0o700),
        ("mknod", f"{folder}/fifo", stat.S_IFIFO | 0o600, 0),
        ("mknod", f"{folder}/socket", stat.S_IFSOCK | 0o600, 0),
        ("execve", inside, 0, 0),
    ):
        assert allowed(sealed, *call) == "EACCES", call
    # Out of the folder, or in: refused as between two file systems, or by the sticky folder around both.
    for way in (
        ("rename", inside, f"{folder}-new"),
        ("link", inside, f"{folder}-new"),
        ("link", outside, f"{folder}/link"),
        ("rename", outside, f"{folder}/new"),
    ):
        assert allowed(sealed, *way) in ("EACCES", "EXDEV", "EPERM"), way
    assert Path(outside).read_text() == "secret"
    assert not os.path.exists(f"{folder}-new")
    assert os.path.exists(inside)


def test_a_scratch_folder_that_is_not_there(make: Callable[..., Sealed]) -> None:
    """Nothing is sealed by halves: an error, and no descriptor is left."""
    unsealed = make(sealed=False)
    assert unsealed.run(sealed_in, "/nowhere", ["/dev/null"]) == (2, [])


def sealed_in(_: Call, scratch: str, read: list[str]) -> tuple[int, list[str]]:
    import os

    from enturbo.runtime.sealing import Base, seal

    base = Base()
    base.prepare()
    before = set(os.listdir("/proc/self/fd"))
    try:
        seal(base, scratch=scratch, read=read, null=())
    except OSError as error:
        return error.errno or 0, sorted(set(os.listdir("/proc/self/fd")) - before)
    return 0, []


def test_a_process_reaches_what_is_named_for_it_alone(
    make: Callable[..., Sealed], folder: str, inside: str, outside: str
) -> None:
    """All come from one that is prepared for them; what is added for one is not for the next."""
    first, second = make(scratch=folder, read=[outside]), make()
    for path in (inside, outside):
        assert opened(first, path) == "runs"
        assert opened(second, path) == "EACCES"
        assert allowed(second, "openat", -100, path, WRITE) == "EACCES"


def test_temporary_files_go_to_scratch(make: Callable[..., Sealed], folder: str) -> None:
    assert make(scratch=folder).run(temporary) == [folder, folder]


def temporary(_: Call) -> list[str]:
    import os
    import tempfile

    return [tempfile.gettempdir(), os.environ["TMPDIR"]]


def test_sockets_and_signals_end_at_the_process(make: Callable[..., Sealed]) -> None:
    """Landlock refuses them even where the calls are let through."""
    sealed = make()
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as abstract:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        name = b"\0sealing-%d" % os.getpid()
        abstract.bind(name)
        abstract.listen()
        port = listening.getsockname()[1]
        address = (
            struct.pack("<H", socket.AF_INET) + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
        )
        unix = struct.pack("<H", socket.AF_UNIX) + name

        def made(family: int) -> int:
            sealed.send("socket", int(family), int(socket.SOCK_STREAM), 0)
            listener, call = sealed.held()
            listener.allow(call)
            return int(sealed.result()[0])

        tcp, local = made(socket.AF_INET), made(socket.AF_UNIX)
        if landlock.abi() >= 4:
            assert allowed(sealed, "connect", tcp, address, len(address)) == "EACCES"
            assert allowed(sealed, "bind", tcp, address[:2] + bytes(14), 16) == "EACCES"
        if landlock.abi() >= 6:
            assert allowed(sealed, "connect", local, unix, len(unix)) == "EPERM"
            assert allowed(sealed, "kill", os.getpid(), 0) == "EPERM"
            assert allowed(sealed, "kill", os.getppid(), 0) == "EPERM"
        assert allowed(sealed, "kill", sealed.pid, 0) == "runs"


# ------------------------------------------------------------------------------------- what was taken


def status(sealed: Sealed) -> dict[str, str]:
    lines = Path(f"/proc/{sealed.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_limits_and_capabilities(sealed: Sealed) -> None:
    found = status(sealed)
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    assert found["CapInh"] == found["CapAmb"] == "0" * 16
    kept = DAC_OVERRIDE if sealed.uid == 0 else 0
    assert (int(found["CapPrm"], 16), int(found["CapEff"], 16)) == (kept, kept)
    assert sealed.run(limits) == ((0, 0), (1000, 1000))


def limits(_: Call) -> tuple[tuple[int, int], tuple[int, int]]:
    import resource

    return resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)


def test_no_descriptor_gets_a_high_number(sealed: Sealed) -> None:
    """What has one stays what it is: 1001 was closed, and nothing can be there again."""
    for number in (1000, 1001, 1023):
        assert sealed.outcome("dup2", 0, number) == "EBADF"
        assert sealed.outcome("dup3", 0, number, 0) == "EBADF"
        assert sealed.outcome("fcntl", 0, 0, number) == "EINVAL"
    assert sealed.outcome("dup2", 0, 999) == "runs"
    assert allowed(sealed, "setrlimit", resource.RLIMIT_NOFILE, struct.pack("QQ", 2000, 2000)) == "EPERM"


def test_the_low_descriptors_are_its_own(sealed: Sealed, nursery: Nursery) -> None:
    """Flags belong to what was opened, and are seen by all who have inherited it."""
    before = Path(f"/proc/{nursery.process.pid}/fdinfo/0").read_text()
    for fd in (0, 3):
        assert sealed.call("fcntl", fd, 4, os.O_NONBLOCK | os.O_APPEND) == (0, 0)
    assert Path(f"/proc/{nursery.process.pid}/fdinfo/0").read_text() == before
    assert sealed.run(descriptors) == ([0, 1, 2, 3, 1000], ["/dev/null", "/dev/null"])


def descriptors(call: Call) -> tuple[list[int], list[str]]:
    import os

    there = [fd for fd in range(1100) if call("fcntl", fd, 1)[0] >= 0]
    return there, [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 3)]


def test_nobody_else_looks_into_it(make: Callable[..., Sealed], uid: int | None) -> None:
    """Its memory is open to another process of its user before the seal, and then to root alone."""
    sealed, other, peer = make(), make(sealed=False), make(sealed=False)
    secrets = ("mem", "maps", "environ", "fd", "syscall", "stack")
    assert other.run(peeked, peer.pid, ["mem", "maps", "environ", "fd"]) == ["read"] * 4
    if uid is None and os.geteuid() == 0:
        assert allowed(sealed, "prctl", 3) == "runs"
        sealed.send("prctl", 3)  # PR_GET_DUMPABLE
        listener, call = sealed.held()
        listener.allow(call)
        assert sealed.result() == (0, 0)
    else:
        assert other.run(peeked, sealed.pid, list(secrets)) == ["PermissionError"] * len(secrets)


def peeked(_: Call, pid: int, names: list[str]) -> list[str]:
    import os

    found = []
    for name in names:
        try:
            path = f"/proc/{pid}/{name}"
            if name == "fd":
                os.listdir(path)
            else:
                with open(path, "rb") as file:
                    if name != "mem":
                        file.read(1)
            found.append("read")
        except OSError as error:
            found.append(type(error).__name__)
    return found


def test_no_core(sealed: Sealed, nursery: Nursery) -> None:
    sealed.start(fault)
    assert sealed.wait() == "dead"
    assert os.WTERMSIG(sealed.end()) == signal.SIGSEGV
    assert not os.WCOREDUMP(sealed.end())
    assert os.listdir(nursery.folder) == []


def fault(_: Call) -> None:
    import ctypes

    ctypes.string_at(8)


def test_the_command_line_is_empty(sealed: Sealed, nursery: Nursery) -> None:
    """In the process and its forks, whatever they write where it was."""
    assert nursery.about["hidden"]
    start, end = nursery.about["arguments"]
    assert end > start
    assert sealed.run(scribbled, start, end - start) == end - start
    sealed.start(forked)
    listener, call = sealed.held()
    listener.allow(call)  # fork
    listener, call = sealed.held()  # and then something that is held in the child, which stays there
    assert call.number == NUMBERS["umask"]
    assert call.pid != sealed.pid
    assert Path(f"/proc/{call.pid}/cmdline").read_bytes() == b""
    for pid in (sealed.pid, nursery.process.pid):
        assert Path(f"/proc/{pid}/cmdline").read_bytes() == b""
        assert Path(f"/proc/{pid}/comm").read_text().startswith("python")


def scribbled(_: Call, start: int, length: int) -> int:
    import ctypes

    ctypes.memset(start, ord("x"), length)
    return ctypes.string_at(start, length).count(b"x")


def forked(_: Call) -> None:
    import os

    if os.fork() == 0:
        os.umask(0)


# -------------------------------------------------------------------------------------------- unseen


def test_the_standard_library_can_be_imported(
    make: Callable[..., Sealed], uid: int | None, folder: str
) -> None:
    """No module of it needs what is held; where the interpreter is not for everybody, what there is."""
    sealed = make(scratch=folder)
    if uid is not None:
        assert sealed.run(imported, ["asyncio", "sqlite3", "tempfile"]) == {}
        return
    omitted = {"antigravity", "idlelib", "this", "turtle", "turtledemo", "tkinter", "lib2to3", "test"}
    names = [name for name in sorted(sys.stdlib_module_names - omitted) if not name.startswith("_")]
    failed = sealed.run(imported, names)
    assert {"decimal", "zoneinfo", "ssl", "ctypes", "sqlite3", "multiprocessing"} <= set(
        names
    ) - failed.keys()
    there = {name for name in names if name in failed and importlib.util.find_spec(name) is not None}
    assert {failed[name] for name in there} <= {"ImportError", "ModuleNotFoundError"}, failed


def imported(_: Call, names: list[str]) -> dict[str, str]:
    import importlib
    import warnings

    failed = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001  told to the test
                failed[name] = type(error).__name__
    return failed


def test_threads(sealed: Sealed) -> None:
    """Nothing of them is held but their ends, for which nobody waits."""
    assert sealed.run(threads) == [sum(range(1000))] * 8
    assert sealed.pid not in sealed.ended
    assert len(set(sealed.ended)) == len(sealed.ended) <= 8


def threads(_: Call) -> list[int]:
    import queue
    import threading
    import time

    results: queue.Queue[int] = queue.Queue()
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        time.sleep(0.001)
        results.put(sum(range(1000)))

    started = [threading.Thread(target=work) for _ in range(8)]
    for each in started:
        each.start()
    for each in started:
        each.join()
    return [results.get() for _ in started]


def test_asyncio(sealed: Sealed) -> None:
    assert sealed.run(asynchronous) == [1, 2, 3]


def asynchronous(_: Call) -> list[int]:
    import asyncio
    import time

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()

        def work(value: int) -> int:
            time.sleep(0.001)
            return value + 1

        await asyncio.sleep(0.001)
        return await asyncio.gather(*(loop.run_in_executor(None, work, value) for value in range(3)))

    return asyncio.run(main())


def test_a_library_from_memory(sealed: Sealed) -> None:
    """An image may carry native modules; they never touch a file system that others see."""
    library = importlib.util.find_spec("xxhash._xxhash")
    assert library is not None
    assert library.origin is not None
    assert sealed.run(loaded, Path(library.origin).read_bytes(), "PyInit__xxhash") is True


def loaded(_: Call, data: bytes, symbol: str) -> bool:
    import ctypes
    import os

    fd = os.memfd_create("module")
    os.write(fd, data)
    return bool(getattr(ctypes.CDLL(f"/proc/self/fd/{fd}"), symbol))


def test_a_database_in_memory(sealed: Sealed) -> None:
    assert sealed.run(database) == [(2, "b"), (3, "c")]


def database(_: Call) -> list[Any]:
    import sqlite3

    first = sqlite3.connect(":memory:")
    first.execute("create table t (n integer, s text)")
    first.executemany("insert into t values (?, ?)", [(1, "a"), (2, "b"), (3, "c")])
    first.commit()
    second = sqlite3.connect(":memory:")
    second.deserialize(first.serialize())
    rows = second.execute("select * from t where n > 1 order by n").fetchall()
    first.close()
    second.close()
    return rows


def test_what_computes_is_not_held(sealed: Sealed) -> None:
    assert sealed.run(computed) > 0


def computed(_: Call) -> int:
    import datetime
    import gc
    import os
    import random
    import select
    import signal
    import socket
    import sys
    import time

    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    time.sleep(0.005)
    large = bytearray(64 << 20)
    large[::4096] = b"x" * len(large[::4096])
    del large
    gc.collect()
    reading, writing = os.pipe()
    os.write(writing, b"x")
    os.read(reading, 1)
    one, two = socket.socketpair()
    one.sendall(b"x")
    two.settimeout(5)
    two.recv(1)
    epoll = select.epoll()
    epoll.register(two, select.EPOLLIN)
    epoll.poll(0.001)
    for each in (one, two, epoll):
        each.close()
    os.close(reading)
    os.close(writing)
    print("printed")
    sys.stdout.flush()
    os.times(), os.uname(), os.getcwd(), os.getloadavg, os.cpu_count(), os.sched_getaffinity(0)
    return len(datetime.datetime.now().astimezone().isoformat()) + len(os.urandom(8)) + random.randrange(9)


def test_what_it_writes_is_in_the_pipe(sealed: Sealed) -> None:
    assert sealed.run(wrote) is None
    assert sealed.printed() == b"out\nerr\n"


def wrote(_: Call) -> None:
    import sys

    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
