"""Attacks on the hold: a handler of an image that will be REJECTED tries to be noticed outside.

Each attack is a function of the catalogue, and each has an observer: this process, or another one, that looks
at whatever the attack would change. It is run where nothing enforces, where the observer must see it before
the verdict: else the attack would show nothing. And it is run in a sealed process, where nobody may see
anything, before or after the verdict. ``by`` says how it ends there:

    held: …     it sleeps in that system call, which nobody answers
    refused: …  the call fails at once: by the filter, or by Landlock where it is the one that decides
    done        it runs, and stays inside

Where even the cooperative level does not let it out, ``closed`` says what does not.
What no seal closes is shown, too, at the end of this file.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest

from enturbo import EnclaveDestroyed, EnclaveImage, Runtime
from enturbo.runtime.policy import Policy
from enturbo.runtime.syscalls import NUMBERS
from enturbo.shm.layout import PAGE_SIZE

WAIT: Final = 30.0  # seconds; a bound on every wait here, never a measure
CHANCE: Final = 0.25  # seconds that an attack has at least, from its launch on
AFTER: Final = 0.1  # and at least that many after it was stopped
MODULES: Final = ("kit", "descriptors", "files", "sockets", "processes", "shared", "messages", "victim")
SECRET: Final = b"secret"
INSIDE: Final = b"inside"  # a word in an enclave's heap that another one wants to read
# Files that a sealed process may read, as everyone may. One is taken by chance, and a word in it: others may
# run the same attacks at the same time, and what goes through such a file reaches them.
LIBRARY: Final = [path for path in Path(os.__file__).parent.glob("*.py") if path.stat().st_size >= 8192]

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def system(name: str, *arguments: int | bytes) -> int:
    """A system call of this process; -1 if it fails."""
    plain = [each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    return int(libc.syscall(ctypes.c_long(NUMBERS[name]), *plain))


def until(condition: Callable[[], Any], tell: Callable[[], Any] = str) -> Any:
    """Look again and again, for a bounded time; the first value that is true. ``tell``: if there is none."""
    deadline = time.monotonic() + WAIT
    while not (value := condition()):
        assert time.monotonic() < deadline, tell()
        time.sleep(1e-3)
    return value


# ------------------------------------------------------------------------------------------- observers


@dataclass(frozen=True)
class Scene:
    """Where an attack takes place: an empty folder, the runtime, and a way to launch another enclave."""

    folder: Path
    runtime: Runtime
    stderr: Path
    launch: Callable[..., Any]
    image: EnclaveImage
    name: str = field(default_factory=lambda: f"enturbo-{secrets.token_hex(6)}")
    key: int = field(default_factory=lambda: secrets.randbelow(1 << 30) + 1)


@dataclass(frozen=True)
class Watch:
    """What the attack is told, and whether it was noticed; ``seen`` gets the attack's launch."""

    to: dict[str, Any]
    seen: Callable[[Any], bool]


Observer = Callable[[Scene], AbstractContextManager[Watch]]


@contextmanager
def anything_appears(scene: Scene) -> Iterator[Watch]:
    """In a folder where there is one file."""
    (source := scene.folder / "source").write_bytes(b"something")
    (folder := scene.folder / "folder").mkdir()
    to = {"path": str(folder / "mark"), "source": str(source), "folder": str(folder)}
    yield Watch(to, lambda _: any(folder.iterdir()))


@contextmanager
def a_file_changes(scene: Scene) -> Iterator[Watch]:
    """In any way; its last access is long ago, so that another one is noted down."""
    (path := scene.folder / "file").write_bytes(b"something")
    os.utime(path, (0, path.stat().st_mtime))

    def look() -> object:
        with suppress(FileNotFoundError):
            return tuple(path.stat()), path.stat().st_atime_ns, path.stat().st_blocks, os.listxattr(path)
        return None

    before = look()
    yield Watch({"path": str(path)}, lambda _: look() != before)


@contextmanager
def a_lock_is_taken(scene: Scene) -> Iterator[Watch]:
    """By flock or as a record, on a file that all may read."""
    with open(secrets.choice(LIBRARY), "rb") as file:

        def seen(_: object) -> bool:
            request = struct.pack("<hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            found = fcntl.fcntl(file, 36, request)  # F_OFD_GETLK
            if struct.unpack_from("<h", found)[0] != fcntl.F_UNLCK:
                return True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False

        yield Watch({"path": file.name}, seen)


@contextmanager
def a_fifo_has_a_reader(scene: Scene) -> Iterator[Watch]:
    """Then its writer can open it."""
    os.mkfifo(path := scene.folder / "fifo")

    def seen(_: object) -> bool:
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    yield Watch({"path": str(path)}, seen)


@contextmanager
def a_fifo_is_written(scene: Scene) -> Iterator[Watch]:
    os.mkfifo(path := scene.folder / "fifo")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield Watch({"path": str(path)}, lambda _: _is_ready(fd))
    finally:
        os.close(fd)


@contextmanager
def a_pipe_of_ours_is_written(scene: Scene) -> Iterator[Watch]:
    read, write = os.pipe()
    try:
        yield Watch({"pid": os.getpid(), "fd": write}, lambda _: _is_ready(read))
    finally:
        os.close(read)
        os.close(write)


@contextmanager
def the_stderr_is_written(scene: Scene) -> Iterator[Watch]:
    """Of the zygote, which it has from the host."""
    yield Watch({}, lambda _: SECRET in scene.stderr.read_bytes())
    os.truncate(scene.stderr, 0)


def _is_ready(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def somebody_sends(family: int, kind: int, *, abstract: bool = False) -> Observer:
    """To a socket of ours: a connection, or a datagram."""

    @contextmanager
    def observe(scene: Scene) -> Iterator[Watch]:
        with socket.socket(family, kind) as sock:
            to: dict[str, Any] = {"name": scene.name, "path": str(scene.folder / "s")}
            if family == socket.AF_INET:
                sock.bind(("127.0.0.1", 0))
                to["host"], to["port"] = sock.getsockname()
            else:
                sock.bind("\0" + scene.name if abstract else to["path"])
            if kind == socket.SOCK_STREAM:
                sock.listen()
            yield Watch(to, lambda _: _is_ready(sock.fileno()))

    return observe


@contextmanager
def somebody_listens(scene: Scene) -> Iterator[Watch]:
    """At a port or a name to which we then can connect."""
    with socket.socket(socket.AF_INET) as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()

    def seen(_: object) -> bool:
        for family, address in ((socket.AF_INET, (host, port)), (socket.AF_UNIX, "\0" + scene.name)):
            with socket.socket(family) as sock:
                if sock.connect_ex(address) == 0:
                    return True
        return False

    yield Watch({"host": host, "port": port, "name": scene.name}, seen)


@contextmanager
def a_process() -> Iterator[int]:
    """One outside, which sleeps."""
    with subprocess.Popen(["/bin/sleep", "600"], stdin=subprocess.DEVNULL) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def _status(pid: int, name: str) -> str:
    """A line of /proc/PID/status, without its name; "" if there is none."""
    with suppress(OSError), open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return line.split(":", 1)[1].strip()
    return ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; [] if there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


@contextmanager
def a_process_changes(scene: Scene) -> Iterator[Watch]:
    """It ends, or is stopped, or runs with other rights to the processor."""
    with a_process() as pid:
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)

        def look() -> object:
            return (
                _stat(pid)[:1] in (["Z"], ["T"], ["t"]),
                _status(pid, "TracerPid"),
                os.getpriority(os.PRIO_PROCESS, pid),
                os.sched_getaffinity(pid),
                resource.prlimit(pid, resource.RLIMIT_NOFILE),
            )

        before = look()
        limit = min(hard, 1 << 20) - 1
        yield Watch({"pid": pid, "limit": limit}, lambda _: look() != before)


@contextmanager
def a_worker_is_traced(scene: Scene) -> Iterator[Watch]:
    (pid,) = scene.runtime._pool.pids().values()
    yield Watch({"pid": pid}, lambda _: _status(pid, "TracerPid") not in ("", "0"))


@contextmanager
def our_memory_is_written(scene: Scene) -> Iterator[Watch]:
    room = ctypes.create_string_buffer(64)
    to = {"pid": os.getpid(), "address": ctypes.addressof(room)}
    yield Watch(to, lambda _: SECRET in room.raw)


AT: Final = 4 * PAGE_SIZE  # where an enclave that is attacked has its word, from the heap's start on


def another_enclave(through: str) -> Observer:
    """A VERIFIED one, whose heap the attack reads or writes: in its process, or in that of the worker or of
    the host, who have it mapped."""

    @contextmanager
    def observe(scene: Scene) -> Iterator[Watch]:
        memory, runtime = scene.runtime.memory, scene.runtime
        event = {"module": "victim", "attack": "here", "to": {"at": AT, "word": INSIDE}}
        victim = scene.launch(runtime, scene.image, event, verified=True, late=False)
        assert victim.future.result(WAIT)
        offset = victim.heap_page * PAGE_SIZE + AT
        (worker,) = runtime._pool.pids().values()
        if through == "enclave":
            pid, address = victim.pid, int(next(n for n in victim.notes() if "at" in n).split()[1])
        else:
            pid, address = {"worker": worker, "host": os.getpid()}[through], 0
            if through == "worker":
                address = _mapped_at(worker, memory.epc_segment.fd, offset)
        to = {"pid": pid, "address": address, "fd": memory.epc_segment.fd, "offset": offset}

        def seen(attack: Any) -> bool:
            heap = memory.epc.pages(victim.heap_page, AT // PAGE_SIZE + 1)
            return bytes(heap[AT : AT + len(SECRET)]) == SECRET or "read inside" in attack.notes()

        yield Watch(to, seen)

    return observe


def _mapped_at(pid: int, fd: int, offset: int) -> int:
    """Where a process has mapped a byte of a file, writable."""
    inode = str(os.fstat(fd).st_ino)
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            addresses, rights, start, _, number, *_ = line.split()
            begin, end = (int(address, 16) for address in addresses.split("-"))
            if number == inode and rights == "rw-s" and 0 <= offset - int(start, 16) < end - begin:
                return begin + offset - int(start, 16)
    raise AssertionError(f"process {pid} has not mapped it")


@contextmanager
def it_has_a_child(scene: Scene) -> Iterator[Watch]:
    def seen(attack: Any) -> bool:
        with suppress(OSError):
            return bool(Path(f"/proc/{attack.pid}/task/{attack.pid}/children").read_text())
        return False

    yield Watch({}, seen)


def it_shows(look: Callable[[int], bool]) -> Observer:
    """Something of itself, by its number, that everyone can look at."""

    @contextmanager
    def observe(scene: Scene) -> Iterator[Watch]:
        def seen(attack: Any) -> bool:
            with suppress(OSError):
                return attack.pid > 0 and look(attack.pid)
            return False

        yield Watch({}, seen)

    return observe


def _names(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task")
    return any(SECRET in (task / "comm").read_bytes() for task in tasks.iterdir())


def it_ended_with(status: int) -> Observer:
    """As the kernel tells everyone of the same user while nobody has waited for it."""
    return it_shows(lambda pid: _stat(pid)[:1] == ["Z"] and int(_stat(pid)[-1]) == status)


def an_object_of_the_kernel(find: Callable[[Scene], int], remove: Callable[[Scene, int], object]) -> Observer:
    """That others can find by its name or key."""

    @contextmanager
    def observe(scene: Scene) -> Iterator[Watch]:
        try:
            yield Watch({"name": scene.name, "key": scene.key}, lambda _: find(scene) >= 0)
        finally:
            found = find(scene)
            if found >= 0:
                remove(scene, found)

    return observe


def _open(path: str) -> int:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        os.close(fd)
        return fd
    return -1


def _find_queue(scene: Scene) -> int:
    fd = system("mq_open", scene.name.encode(), os.O_RDONLY)
    if fd >= 0:
        os.close(fd)
    return fd


KEYCTL_UNLINK, KEYCTL_SEARCH, USER_KEYRING = 9, 10, -4

shared_memory = an_object_of_the_kernel(
    lambda scene: _open("/dev/shm/" + scene.name), lambda scene, _: os.unlink("/dev/shm/" + scene.name)
)
system_v_memory = an_object_of_the_kernel(
    lambda scene: system("shmget", scene.key, 0, 0), lambda _, found: system("shmctl", found, 0, 0)
)
system_v_queue = an_object_of_the_kernel(
    lambda scene: system("msgget", scene.key, 0), lambda _, found: system("msgctl", found, 0, 0)
)
system_v_semaphore = an_object_of_the_kernel(
    lambda scene: system("semget", scene.key, 0, 0), lambda _, found: system("semctl", found, 0, 0, 0)
)
message_queue = an_object_of_the_kernel(
    _find_queue, lambda scene, _: system("mq_unlink", scene.name.encode())
)
key = an_object_of_the_kernel(
    lambda scene: system("keyctl", KEYCTL_SEARCH, USER_KEYRING, b"user", scene.name.encode(), 0),
    lambda _, found: system("keyctl", KEYCTL_UNLINK, found, USER_KEYRING),
)


@contextmanager
def its_own_notes(scene: Scene) -> Iterator[Watch]:
    """Nobody outside sees it, but it must not get that far."""
    yield Watch({}, lambda attack: "made" in attack.notes())


@contextmanager
def _a_word_of_a_library() -> Iterator[tuple[int, dict[str, Any]]]:
    """Of a file that all may map: its address here, and what the attack is told."""
    path, word = secrets.choice(LIBRARY), 4 * secrets.randbelow(1024)
    with open(path, "rb") as file:
        mmap = libc.mmap
        mmap.restype = ctypes.c_void_p
        at = mmap(None, ctypes.c_size_t(PAGE_SIZE), 1, 1, file.fileno(), ctypes.c_long(0))
    try:
        yield at + word, {"path": str(path), "word": word}
    finally:
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(PAGE_SIZE))


@contextmanager
def somebody_sleeps_at_a_word(scene: Scene) -> Iterator[Watch]:
    with _a_word_of_a_library() as (at, to):
        yield Watch(to, lambda _: system("futex", at, 1, 1, 0, 0, 0) > 0)  # FUTEX_WAKE


@contextmanager
def somebody_wakes_a_word(scene: Scene) -> Iterator[Watch]:
    woken, over = threading.Event(), threading.Event()
    with _a_word_of_a_library() as (at, to):
        value = ctypes.c_uint32.from_address(at).value
        timeout = struct.pack("<qq", 0, 20_000_000)

        def sleep() -> None:
            while not over.is_set() and not woken.is_set():
                if system("futex", at, 0, value, timeout, 0, 0) == 0:  # FUTEX_WAIT
                    woken.set()

        thread = threading.Thread(target=sleep)
        thread.start()
        try:
            yield Watch(to, lambda _: woken.is_set())
        finally:
            over.set()
            thread.join()


class Bomb:
    """Makes a file in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


# What stands in a frame, or is no frame at all.
DEEP: Final = b"\x91" * 100_000 + b"\xc0"
MALFORMED: Final[dict[str, Callable[[Path], bytes]]] = {
    "a pickle": lambda folder: pickle.dumps(Bomb(folder / "mark")),
    "a pickle in a message": lambda folder: msgpack.packb(
        {"result": 1, "value": msgpack.ExtType(1, pickle.dumps(Bomb(folder / "mark")))}
    ),
    "no map": lambda folder: msgpack.packb([1, 2, 3]),
    "deep": lambda folder: DEEP,
    "a map that promises more": lambda folder: b"\xdf\xff\xff\xff\xff\xa1a\x01",
    "text that is none": lambda folder: b"\x81\xa6result\xa2\xff\xfe",
    "nothing": lambda folder: b"",
    "no length": lambda folder: b"\xff" * 64,
    "an answer that nobody waits for": lambda folder: msgpack.packb({"result": 77, "value": 1}),
    "times that are none": lambda folder: msgpack.packb({"result": 1, "value": 1, "first": "x"}),
    "an ocall without a name": lambda folder: msgpack.packb({"ocall": 1, "name": 7, "args": []}),
}


def somebody_believes(what: str) -> Observer:
    """A message that is none."""

    @contextmanager
    def observe(scene: Scene) -> Iterator[Watch]:
        data = MALFORMED[what](scene.folder)
        yield Watch({"data": data}, lambda _: any(scene.folder.iterdir()))

    return observe


# ---------------------------------------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Attack:
    """``name``: module and function of the catalogue; ``kind``: its class; ``by``: how the seal stops it;
    ``closed``: why it does not get out at the cooperative level either; ``at_death``: what is told when the
    process is killed, all the same."""

    kind: str
    name: str
    observer: Observer
    by: str
    closed: str = ""
    at_death: str = ""

    def __str__(self) -> str:
        return f"{self.kind.replace(' ', '-')}:{self.name.partition('.')[2]}"


QUARANTINE: Final = "output pipes and launch socket are not read before the verdict"
NEVER_PICKLE: Final = "messages are msgpack, and read after the verdict"
NO_CORE: Final = "the hard limit is 0, and to raise it takes CAP_SYS_RESOURCE; or cores go to a program"
WAKES: Final = "the kernel wakes for a thread that is killed as for one that ends"


def _has_cores() -> bool:
    capable = int(_status(os.getpid(), "CapEff"), 16) & 1 << 24
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    return bool(capable) and not pattern.startswith(("|", "/", "@"))


INET, UNIX = socket.AF_INET, socket.AF_UNIX
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
datagram = somebody_sends(UNIX, DGRAM)
in_its_process, in_the_worker = another_enclave("enclave"), another_enclave("worker")
is_nice = it_shows(lambda pid: os.getpriority(os.PRIO_PROCESS, pid) != os.getpriority(os.PRIO_PROCESS, 0))
is_batch = it_shows(lambda pid: os.sched_getscheduler(pid) == os.SCHED_BATCH)
has_arguments = it_shows(lambda pid: SECRET in Path(f"/proc/{pid}/cmdline").read_bytes())
has_no_huge_pages = it_shows(lambda pid: _status(pid, "THP_enabled") == "0")
has_umask = it_shows(lambda pid: _status(pid, "Umask") == "0135")

ATTACKS: Final = [
    Attack("descriptors", "descriptors.write_to_all", the_stderr_is_written, "done", QUARANTINE),
    Attack("descriptors", "descriptors.reopen_own", the_stderr_is_written, "held: openat", QUARANTINE),
    Attack("descriptors", "descriptors.reopen_those_of_the_parent", the_stderr_is_written, "held: openat"),
    Attack("descriptors", "descriptors.reopen_those_of_the_host", a_pipe_of_ours_is_written, "held: openat"),
    Attack("descriptors", "descriptors.take_those_of_the_host", a_pipe_of_ours_is_written,
           "held: pidfd_open"),
    Attack("descriptors", "descriptors.take_those_of_the_peer", a_pipe_of_ours_is_written,
           "held: pidfd_getfd"),
    Attack("captured numbers", "descriptors.capture_output", anything_appears, "held: openat"),
    Attack("captured numbers", "descriptors.capture_sender", datagram, "refused: EBADF"),
    Attack(
        "captured numbers",
        "descriptors.capture_sender_past_the_limit",
        datagram,
        "held: prlimit64",
    ),
    Attack("files", "files.create", anything_appears, "held: openat"),
    Attack("files", "files.create_the_old_way", anything_appears, "held: creat"),
    Attack("files", "files.create_the_new_way", anything_appears, "refused: ENOSYS"),
    Attack("files", "files.append", a_file_changes, "held: openat"),
    Attack("files", "files.truncate", a_file_changes, "held: truncate"),
    Attack("files", "files.truncate_by_opening", a_file_changes, "held: openat"),
    Attack("files", "files.rename", a_file_changes, "held: rename"),
    Attack("files", "files.unlink", a_file_changes, "held: unlink"),
    Attack("files", "files.mkdir", anything_appears, "held: mkdir"),
    Attack("files", "files.symlink", anything_appears, "held: symlink"),
    Attack("files", "files.link", anything_appears, "held: linkat"),
    Attack("files", "files.mknod", anything_appears, "held: mknodat"),
    Attack("files", "files.chmod", a_file_changes, "held: chmod"),
    Attack("files", "files.setxattr", a_file_changes, "held: setxattr"),
    Attack("fallocate", "files.fallocate", a_file_changes, "held: openat"),
    Attack("file times", "files.utime", a_file_changes, "held: utimensat"),
    Attack("file times", "files.read", a_file_changes, "refused: EACCES"),
    Attack("locks", "files.flock", a_lock_is_taken, "held: flock"),
    Attack("locks", "files.ofd_lock", a_lock_is_taken, "held: fcntl"),
    Attack("pipes", "files.read_a_fifo", a_fifo_has_a_reader, "refused: EACCES"),
    Attack("pipes", "files.write_to_a_fifo", a_fifo_is_written, "held: openat"),
    Attack("sockets", "sockets.connect_tcp", somebody_sends(INET, STREAM), "held: socket"),
    Attack("sockets", "sockets.listen_tcp", somebody_listens, "held: socket"),
    Attack("sockets", "sockets.send_udp", somebody_sends(INET, DGRAM), "held: socket"),
    Attack("sockets", "sockets.connect_unix", somebody_sends(UNIX, STREAM), "held: socket"),
    Attack("sockets", "sockets.send_unix", datagram, "held: socket"),
    Attack("sockets", "sockets.connect_abstract", somebody_sends(UNIX, STREAM, abstract=True),
           "held: socket"),
    Attack("sockets", "sockets.bind_abstract", somebody_listens, "held: socket"),
    Attack("sockets", "sockets.send_from_a_pair", datagram, "held: sendto"),
    Attack("sockets", "sockets.send_message_from_a_pair", datagram, "held: sendmsg"),
    Attack("sockets", "sockets.connect_a_pair", datagram, "held: connect"),
    Attack("signals", "processes.kill", a_process_changes, "held: kill"),
    Attack("signals", "processes.kill_a_thread", a_process_changes, "held: tgkill"),
    Attack("signals", "processes.queue_a_signal", a_process_changes, "held: rt_sigqueueinfo"),
    Attack("signals", "processes.kill_by_pidfd", a_process_changes, "held: pidfd_open"),
    Attack("signals", "processes.have_it_signalled", a_process_changes, "held: fcntl"),
    Attack("exit status", "processes.leave_with_a_status", it_ended_with(42 << 8), "held: exit_group"),
    Attack("exit status", "processes.end_the_last_thread", it_ended_with(42 << 8), "held: exit"),
    Attack("exit status", "processes.signal_itself", it_ended_with(signal.SIGTERM), "held: tgkill"),
    Attack("child process", "processes.fork_child", it_has_a_child, "held: clone"),
    Attack("child process", "processes.fork_the_old_way", it_has_a_child, "held: fork"),
    Attack("child process", "processes.fork_the_new_way", it_has_a_child, "refused: ENOSYS"),
    Attack("child process", "processes.run_a_program", anything_appears, "held: vfork"),
    Attack("exec", "processes.become_a_program", anything_appears, "held: execve"),
    Attack("a child that outlives", "processes.outlive", anything_appears, "held: clone"),
    Attack("threads across the verdict", "processes.go_on_in_threads", anything_appears,
           "held: openat or held: mkdir"),
    Attack("shared memory", "shared.open_shared_memory", shared_memory, "held: openat"),
    Attack("shared memory", "shared.make_shared_memory", shared_memory, "held: openat"),
    Attack("shared memory", "shared.system_v_memory", system_v_memory, "held: shmget"),
    Attack("shared memory", "shared.system_v_queue", system_v_queue, "held: msgget"),
    Attack("shared memory", "shared.system_v_semaphore", system_v_semaphore, "held: semget"),
    Attack("shared memory", "shared.message_queue", message_queue, "held: mq_open"),
    Attack("shared memory", "shared.keyring", key, "held: add_key"),
    Attack("another enclave's EPC", "processes.write_to_a_segment", another_enclave("host"), "held: openat"),
    Attack("another enclave's EPC", "processes.write_to_its_memory", in_its_process,
           "held: process_vm_writev"),
    Attack("another enclave's EPC", "processes.write_to_its_memory_file", in_its_process, "held: openat"),
    Attack("another enclave's EPC", "processes.read_its_memory", in_its_process, "held: process_vm_readv"),
    Attack("another enclave's EPC", "processes.read_its_memory_file", in_its_process, "refused: EACCES"),
    Attack("a worker", "processes.write_to_its_memory", in_the_worker, "held: process_vm_writev"),
    Attack("a worker", "processes.write_to_its_memory_file", in_the_worker, "held: openat"),
    Attack("a worker", "processes.trace", a_worker_is_traced, "held: ptrace"),
    Attack("other processes", "processes.trace", a_process_changes, "held: ptrace"),
    Attack("other processes", "processes.write_to_its_memory", our_memory_is_written,
           "held: process_vm_writev"),
    Attack("priorities", "processes.prioritise", a_process_changes, "held: setpriority"),
    Attack("priorities", "processes.pin", a_process_changes, "held: sched_setaffinity"),
    Attack("priorities", "processes.limit", a_process_changes, "held: prlimit64"),
    Attack("priorities", "processes.be_nice", is_nice, "held: setpriority"),
    Attack("priorities", "processes.schedule_itself", is_batch, "held: sched_setscheduler"),
    Attack("io_uring", "shared.ring", anything_appears, "refused: ENOSYS"),
    Attack("userfaultfd", "shared.fault_handler", its_own_notes, "refused: ENOSYS"),
    Attack("futexes", "shared.futex_of_a_library", somebody_sleeps_at_a_word, "held: futex"),
    Attack("futexes", "shared.futex_of_a_library_to_wake", somebody_wakes_a_word, "held: futex"),
    Attack("futexes", "shared.end_of_a_thread", somebody_wakes_a_word, "held: exit", at_death=WAKES),
    Attack("process name", "processes.name_itself", it_shows(_names), "done"),
    Attack("process name", "processes.name_a_thread", it_shows(_names), "done"),
    Attack("process name", "processes.name_itself_by_a_file", it_shows(_names), "held: openat"),
    Attack("process name", "processes.show_arguments", has_arguments, "refused: EACCES"),
    Attack("process state", "processes.set_a_flag", has_no_huge_pages, "held: prctl"),
    Attack("process state", "processes.set_umask", has_umask, "held: umask"),
    Attack("core dump", "processes.dump_core", anything_appears, "held: prlimit64",
           "" if _has_cores() else NO_CORE),
    Attack("pickle bomb", "messages.write_framed", somebody_believes("a pickle"), "done", NEVER_PICKLE),
    Attack("pickle bomb", "messages.write", somebody_believes("a pickle"), "done", NEVER_PICKLE),
    Attack("messages", "messages.write_framed", somebody_believes("deep"), "done", QUARANTINE),
    Attack("messages", "messages.write_framed", somebody_believes("a map that promises more"),
           "done", QUARANTINE),
    Attack("messages", "messages.write", somebody_believes("no length"), "done", QUARANTINE),
]  # fmt: skip


def plain(stopped: str) -> str:
    """Which of several calls of one kind a C library uses is its own business: openat is open."""
    return stopped.removesuffix("2").removesuffix("at")


@pytest.fixture(scope="module")
def needed() -> dict[str, float]:
    """Seconds from launch to leak, by attack, where nothing enforces."""
    return {}


@pytest.mark.parametrize("level", ["cooperative", "kernel"])
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(
    attack: Attack,
    level: str,
    runtimes: Any,
    catalogue: Callable[..., EnclaveImage],
    launch: Callable[..., Any],
    tmp_path: Path,
    needed: dict[str, float],
) -> None:
    runtime, image = runtimes(level), catalogue(*MODULES)
    module, _, function = attack.name.partition(".")
    with attack.observer(Scene(tmp_path, runtime, runtimes.stderr(level), launch, image)) as watch:
        begin = time.monotonic()
        attacker = launch(runtime, image, {"module": module, "attack": function, "to": watch.to})
        if level == "cooperative" and not attack.closed:
            until(lambda: watch.seen(attacker), attacker.notes)
            needed[str(attack)] = time.monotonic() - begin
            attacker.check_nothing_told()
            attacker.judge()
            return
        stopped = attacker.wait_stopped()
        if level == "kernel":
            assert plain(stopped) in map(plain, attack.by.split(" or ")), attacker.notes()
        chance = max(CHANCE, 2 * needed.get(str(attack), 0.0))
        deadline = max(begin + chance, time.monotonic() + AFTER)
        while time.monotonic() < deadline:
            assert not watch.seen(attacker)
            time.sleep(0.01)
        attacker.check_nothing_told()
        attacker.judge()
        assert attack.at_death or not watch.seen(attacker)


# ------------------------------------------------------------------ of an image that is what it should be


@pytest.mark.parametrize("level", ["cooperative", "kernel"])
def test_messages_that_are_none(
    level: str,
    runtimes: Any,
    catalogue: Callable[..., EnclaveImage],
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Read after VERIFIED they are the end of the enclave, and of nothing else; nothing is unpickled."""
    runtime, image = runtimes(level), catalogue(*MODULES)
    for what, make in MALFORMED.items():
        for function in ("write_framed", "write")[: 2 if what == "no length" else 1]:
            event = {"module": "messages", "attack": function, "to": {"data": make(tmp_path)}}
            attacker = launch(runtime, image, event, verified=True, late=False)
            with pytest.raises(EnclaveDestroyed):
                attacker.future.result(WAIT)
            attacker.enclave.close()
            assert list(tmp_path.iterdir()) == [], what
    event = {"module": "victim", "attack": "here", "to": {"at": AT, "word": INSIDE}}
    assert launch(runtime, image, event, verified=True, late=False).future.result(WAIT)


def test_what_was_held_comes_complete_and_in_order(
    runtimes: Any, catalogue: Callable[..., EnclaveImage], launch: Callable[..., Any], verdict: Any
) -> None:
    """Nothing of it before the verdict; then all of it, what one thread does in its order."""
    said: list[int] = []

    def say(word: int) -> int:
        said.append(word)
        return word

    to = {"writers": 4, "lines": 300, "words": 50}
    one = launch(
        runtimes("kernel"),
        catalogue("kit", "honest"),
        {"module": "honest", "attack": "work", "to": to},
        verified=True,
        ocalls={"say": say},
    )
    until(lambda: {f"comes {number}" for number in range(4)} <= set(one.notes()))
    scratch = Path(one.enclave._guard._scratch)
    deadline = time.monotonic() + CHANCE
    while time.monotonic() < deadline:
        assert not list(scratch.iterdir())
        assert not said
        assert one.enclave.stdout == b""
        assert not one.future.done()
        time.sleep(0.01)
    verdict.let()
    assert one.future.result(WAIT) == str(scratch)
    assert said == list(range(50))
    assert (scratch / "log").read_text().split() == [str(line) for line in range(50)]
    assert {path.name for path in scratch.iterdir()} == {"log", *(f"made {number}" for number in range(4))}
    until(lambda: one.enclave.stdout.count(b"\n") == 4 * 300)
    lines = [tuple(map(int, line.split())) for line in one.enclave.stdout.splitlines()]
    for writer in range(4):
        assert [line for number, line in lines if number == writer] == list(range(300))


@pytest.mark.parametrize("level", ["cooperative", "kernel"])
def test_a_path_that_changes_while_its_call_is_held(
    level: str,
    runtimes: Any,
    catalogue: Callable[..., EnclaveImage],
    launch: Callable[..., Any],
    verdict: Any,
    tmp_path: Path,
) -> None:
    """The kernel reads it again after the host said yes; where a file may be made is decided then."""
    (other := tmp_path / "other").mkdir()
    event: dict[str, Any] = {"path": str(other / "mark"), "enough": 20}
    if level == "cooperative":
        event |= {"allowed": str(tmp_path), "enough": 1 << 30}
    one = launch(
        runtimes(level),
        catalogue("kit", "races"),
        {"module": "races", "attack": "open_elsewhere", "to": event},
        verified=True,
    )
    one.wait_begun()
    if level == "cooperative":
        until(lambda: any(other.iterdir()))
        return
    time.sleep(0.05)
    verdict.let()
    done, refused = one.future.result(WAIT)
    assert done >= 20  # of either there were many: it did change
    assert refused >= 20
    assert list(other.iterdir()) == []


@pytest.fixture
def ports() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two listening sockets, one of which the policy names."""
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as other:
        allowed.listen(256)
        yield allowed, other


def connections(server: socket.socket) -> int:
    """How many there were, all of them closed by their other end."""
    count = 0
    while _is_ready(server.fileno()):
        server.accept()[0].close()
        count += 1
    return count


@pytest.fixture
def connecting(ports: tuple[socket.socket, socket.socket]) -> Iterator[Runtime]:
    """A runtime whose enclaves may connect to the first port."""
    policy = Policy(connect=(f"127.0.0.1:{ports[0].getsockname()[1]}",))
    with Runtime(epc="2MiB", workers=0, enforcement="kernel", policy=policy) as runtime:
        yield runtime


def test_an_address_that_changes_while_its_call_is_held(
    connecting: Runtime,
    ports: tuple[socket.socket, socket.socket],
    catalogue: Callable[..., EnclaveImage],
    launch: Callable[..., Any],
) -> None:
    """The host reads it once, and connects to what it has read."""
    to = {"host": "127.0.0.1", "enough": 20}
    to |= {"allowed": ports[0].getsockname()[1], "other": ports[1].getsockname()[1]}
    event = {"module": "races", "attack": "connect_elsewhere", "to": to}
    one = launch(connecting, catalogue("kit", "races"), event, verified=True, late=False)
    done, refused = one.future.result(WAIT)
    assert done >= 20
    assert refused >= 20
    assert connections(ports[0]) == done
    assert connections(ports[1]) == 0


def test_signals_while_calls_are_held(
    connecting: Runtime,
    ports: tuple[socket.socket, socket.socket],
    catalogue: Callable[..., EnclaveImage],
    launch: Callable[..., Any],
    verdict: Any,
) -> None:
    """A thousand a second, before the verdict and after it: each call is carried out once."""
    to = {"host": "127.0.0.1", "allowed": ports[0].getsockname()[1], "files": 50, "connections": 50}
    event = {"module": "races", "attack": "under_signals", "to": to}
    one = launch(connecting, catalogue("kit", "races"), event, verified=True)
    one.wait_begun()
    time.sleep(0.1)
    scratch = Path(one.enclave._guard._scratch)
    assert list(scratch.iterdir()) == []
    verdict.let()
    result = one.future.result(WAIT)
    assert one.notes() == ["begun", "done"]
    signals, files, connected = result
    assert signals > 0
    assert {file.name: file.read_bytes() for file in scratch.iterdir()} == {
        str(number): b"once" for number in range(files)
    }
    assert connections(ports[0]) == connected == 50


# ------------------------------------------------------------------------------------- what no seal closes


SIGNALS: Final = (40, 41, 50, 51)


@contextmanager
def an_opening_is_seen(scene: Scene) -> Iterator[Watch]:
    """By inotify, on a file that it may read."""
    fd, path = system("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC), str(secrets.choice(LIBRARY))
    try:
        assert system("inotify_add_watch", fd, path.encode(), 0x20) > 0  # IN_OPEN
        yield Watch({"path": path}, lambda _: _is_ready(fd))
    finally:
        os.close(fd)


def told(observer: Observer, **to: Any) -> Observer:
    """The same, with more that the attack is told."""

    @contextmanager
    def observe(scene: Scene) -> Iterator[Watch]:
        with observer(scene) as watch:
            yield Watch(watch.to | to, watch.seen)

    return observe


def _blocked(pid: int) -> bool:
    return int(_status(pid, "SigBlk") or "0", 16) == sum(1 << number - 1 for number in SIGNALS)


# When; how, is told to root alone.
it_died = it_shows(lambda pid: _stat(pid)[:1] == ["Z"])

OPEN: Final = {
    "visible.block_signals": told(it_shows(_blocked), signals=SIGNALS),
    "visible.take_addresses": told(it_shows(lambda pid: int(_stat(pid)[20]) > 1 << 40), size=1 << 40),
    "visible.take_time": it_shows(lambda pid: int(_stat(pid)[11]) > 10),
    "visible.start_threads": told(it_shows(lambda pid: int(_stat(pid)[17]) > 40), number=40),
    "visible.read_a_file": an_opening_is_seen,
    "visible.fault": it_died,
    "visible.time_out": it_died,
}


@pytest.mark.parametrize("name", OPEN)
def test_what_no_seal_closes(
    name: str,
    runtimes: Any,
    catalogue: Callable[..., EnclaveImage],
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """What /proc says, that files are read, that it dies. The host's API tells nothing."""
    runtime, image = runtimes("kernel"), catalogue("kit", "visible")
    module, _, function = name.partition(".")
    with OPEN[name](Scene(tmp_path, runtime, runtimes.stderr("kernel"), launch, image)) as watch:
        attacker = launch(runtime, image, {"module": module, "attack": function, "to": watch.to})
        until(lambda: watch.seen(attacker), attacker.notes)
        time.sleep(0.05)
        attacker.check_nothing_told()
        attacker.judge()
