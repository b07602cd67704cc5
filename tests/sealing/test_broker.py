"""The broker: what of the held calls it lets through, what it does itself, and what it refuses."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from enturbo.runtime import landlock
from enturbo.runtime.broker import Broker
from enturbo.runtime.policy import Policy
from enturbo.runtime.syscalls import NUMBERS

if TYPE_CHECKING:
    from tests.sealing.conftest import Sealed

Call = Callable[..., tuple[int, int]]
Until = Callable[[Callable[[], object]], None]

HIGH = 1 << 32

# Written down once more: what may be let through at all. The rest of what is held is refused.
RELEASED = """
open openat creat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink
symlinkat truncate fsync fdatasync sync_file_range fallocate copy_file_range sendfile splice tee chdir
fchdir exit exit_group fork vfork wait4 waitid umask timer_create timer_settime timer_gettime
timer_getoverrun timer_delete mmap futex futex_wake futex_wait futex_waitv futex_requeue set_tid_address
kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo clone fcntl ioctl prctl prlimit64 setrlimit
sched_setaffinity setpriority socket connect
"""
# Refused when their arguments are -1, or they do not come back: by themselves, below.
BY_ARGUMENT = """
clone fcntl ioctl prctl prlimit64 sched_setaffinity setpriority socket connect exit exit_group fork vfork
kill tkill open openat creat mkdir mkdirat
"""


def named(number: int) -> str:
    return errno.errorcode.get(number, str(number))


def became(sealed: Sealed, name: str, *arguments: int | str | bytes) -> str:
    """What becomes of a call: "runs" or the errno's name. Texts are paths."""
    given = [os.fsencode(each) + b"\0" if isinstance(each, str) else each for each in arguments]
    result, number = sealed.call(name, *given)
    return "runs" if result >= 0 else named(number)


def test_every_held_call(make: Callable[..., Sealed]) -> None:
    """Those that a process without a broker is held in: released by the list, or EPERM."""
    held, served = make(), make()
    served.serve()
    count = 0
    for name, number in NUMBERS.items():
        if name in ("pause", "rt_sigreturn") or held.outcome(number, *(-1,) * 6) != "held":
            continue
        count += 1
        if name in RELEASED.split():
            if name not in BY_ARGUMENT.split():
                assert became(served, name, *(-1,) * 6) != "EPERM", name
        else:
            assert became(served, name, *(-1,) * 6) == "EPERM", name
    assert count > 200


# ------------------------------------------------------------------------------------------ arguments

SIGCHLD = int(signal.SIGCHLD)
EMPTY = bytes(256)
PAIR = struct.pack("QQ", 500, 500)


def test_clone(make: Callable[..., Sealed]) -> None:
    """What fork and vfork use; no namespace, nothing shared with the parent but its memory for a while."""
    sealed = make()
    sealed.serve()
    assert sealed.run(forks, SIGCHLD | 0x0120_0000) == "child"  # CHILD_CLEARTID | CHILD_SETTID
    assert sealed.run(forks, SIGCHLD) == "child"
    namespaces = [0x0002_0000, 0x0200_0000, *(1 << bit for bit in range(26, 31))]
    # FS, FILES, SIGHAND, PIDFD, PTRACE, PARENT, SYSVSEM, UNTRACED, IO, and what is no flag
    shared = [0x200, 0x400, 0x800, 0x1000, 0x2000, 0x8000, 0x40000, 0x800000, 0x8000_0000, HIGH]
    for flag in (*namespaces, *shared):
        assert became(sealed, "clone", SIGCHLD | flag) == "EPERM", hex(flag)
    for end in (0, int(signal.SIGKILL), int(signal.SIGUSR1)):
        assert became(sealed, "clone", end) == "EPERM"


def forks(call: Call, flags: int) -> str:
    import os

    reading, writing = os.pipe()
    pid, number = call("clone", flags, 0, 0, 0, 0)
    if pid == 0:
        os.write(writing, b"child")
        os._exit(0)
    assert pid > 0, number
    os.waitpid(pid, 0)
    os.close(writing)
    text = os.read(reading, 100).decode()
    os.close(reading)
    return text


def test_a_clone_that_is_not_a_fork_leaves_no_process(make: Callable[..., Sealed]) -> None:
    sealed = make()
    sealed.serve()
    assert became(sealed, "clone", 0x0002_0000 | SIGCHLD) == "EPERM"
    assert became(sealed, "wait4", -1, 0, 1, 0) == "ECHILD"


def test_plain_numbers(make: Callable[..., Sealed]) -> None:
    sealed = make()
    sealed.serve()
    me, other = sealed.pid, os.getpid()
    file = os.O_RDONLY
    rows: list[tuple[str, tuple[int | bytes, ...], str]] = [
        *(("fcntl", (3, command, EMPTY), "runs") for command in (5, 36)),  # GETLK, OFD_GETLK
        *(("fcntl", (3, command, EMPTY), "runs") for command in (6, 37)),  # a read lock, of its own /dev/null
        ("fcntl", (1, 1031, 1 << 16), "runs"),  # SETPIPE_SZ
        ("fcntl", (1, 1031 | HIGH, 1 << 16), "runs"),
        *(("fcntl", (3, command, me), "EPERM") for command in (8, 10, 15, 1024, 1026, 1032, 1036)),
        ("ioctl", (3, 0x5412, b"x"), "ENOTTY"),
        ("ioctl", (3, 0x8901, struct.pack("i", me)), "ENOTTY"),
        ("prctl", (2, EMPTY), "runs"),
        ("prctl", (3,), "runs"),
        ("prctl", (16, EMPTY), "runs"),
        *(("prctl", (option, 1), "EPERM") for option in (1, 4, 8, 22, 35, 36, 38, 47, 59, 62, 0x59616D61)),
        ("prlimit64", (0, 7, PAIR, 0), "runs"),
        ("prlimit64", (me, 7, PAIR, EMPTY), "runs"),
        ("prlimit64", (me, 7, struct.pack("QQ", 1000, 1000), 0), "EPERM"),  # the kernel's
        ("prlimit64", (other, 7, PAIR, 0), "EPERM"),
        ("prlimit64", (other, 7, 0, EMPTY), "EPERM"),
        ("setrlimit", (3, PAIR), "runs"),
        ("setrlimit", (4, PAIR), "EPERM"),  # RLIMIT_CORE: it cannot be raised
        ("sched_setaffinity", (0, 8, struct.pack("Q", 1)), "runs"),
        ("sched_setaffinity", (me, 8, struct.pack("Q", 1)), "runs"),
        ("sched_setaffinity", (other, 8, struct.pack("Q", 1)), "EPERM"),
        ("sched_setaffinity", (1, 8, struct.pack("Q", 1)), "EPERM"),
        ("setpriority", (0, 0, 5), "runs"),
        ("setpriority", (0, me, 5), "runs"),
        ("setpriority", (0, other, 5), "EPERM"),
        ("setpriority", (1, 0, 5), "EPERM"),
        ("setpriority", (2, 0, 5), "EPERM"),
        ("kill", (me, 0), "runs"),
        ("kill", (0, 0), "runs"),
        ("tkill", (me, 0), "runs"),
        ("tgkill", (me, me, 0), "runs"),
        ("umask", (0o22,), "runs"),
        ("socket", (2, 1, 0), "EPERM"),
        ("connect", (3, EMPTY, 16), "EPERM"),
        ("open", (b"/dev/null\0", file, 0), "runs"),
    ]
    for name, arguments, outcome in rows:
        assert became(sealed, name, *arguments) == outcome, (name, *arguments)
    assert os.sched_getaffinity(other) != {0} or os.cpu_count() == 1
    assert os.getpriority(os.PRIO_PROCESS, other) != 5
    assert os.getpriority(os.PRIO_PROCESS, me) == 5
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 500


def test_signals_reach_itself_and_its_children_alone(make: Callable[..., Sealed]) -> None:
    sealed, neighbour = make(), make()
    sealed.serve()
    assert landlock.abi() >= 6
    for pid in (os.getpid(), os.getppid(), neighbour.pid):
        for name, arguments in (
            ("kill", (pid, 0)),
            ("tkill", (pid, 0)),
            ("tgkill", (pid, pid, 0)),
            ("rt_sigqueueinfo", (pid, 0, struct.pack("iii", 0, 0, -1) + EMPTY)),
            ("rt_tgsigqueueinfo", (pid, pid, 0, struct.pack("iii", 0, 0, -1) + EMPTY)),
        ):
            assert became(sealed, name, *arguments) == "EPERM", (name, pid)
    assert sealed.run(kills) == (-9, 3)
    sealed.start(killed)
    assert sealed.wait() == "dead"
    assert os.WTERMSIG(sealed.end()) == signal.SIGTERM


def kills(_: Call) -> tuple[int, int]:
    """How a child ends that is killed, and one that ends by itself."""
    import os
    import signal
    import time

    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    return os.waitstatus_to_exitcode(status), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(_: Call) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def test_an_exit_is_released(make: Callable[..., Sealed]) -> None:
    """It is held like everything, and then the process is gone with its status."""
    sealed = make()
    sealed.send("exit_group", 5)
    assert sealed.wait() == "held"
    assert sealed.wait(0.1) == "held"
    sealed.serve()
    assert sealed.wait() == "dead"
    assert os.waitstatus_to_exitcode(sealed.end()) == 5


def test_nothing_is_executed(make: Callable[..., Sealed], folder: str) -> None:
    sealed = make(scratch=folder)
    sealed.serve()
    assert sealed.run(executes) == ["PermissionError", "PermissionError", "PermissionError"]
    assert sealed.call("getpid") == (sealed.pid, 0)


def executes(_: Call) -> list[str]:
    import os
    import subprocess

    found = []
    for attempt in (
        lambda: subprocess.run(["/bin/true"]),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
    ):
        try:
            attempt()
        except OSError as error:
            found.append(type(error).__name__)
    return found


# ---------------------------------------------------------------------------------------------- files


def test_files_in_scratch(make: Callable[..., Sealed], folder: str) -> None:
    sealed = make(scratch=folder)
    sealed.serve()
    assert sealed.run(temporary) == [b"text", True, b"spooled"]
    assert os.listdir(folder) == []
    assert sealed.run(on_disk, f"{folder}/data") == [(1,), (2,), (3,)]
    assert sealed.run(worked, folder) == {"renamed": b"abc", "copied": b"abc", "below/hard": b"abc"}
    assert Path(folder, "renamed").read_bytes() == b"abc"
    assert os.readlink(f"{folder}/soft") == "renamed"
    assert not os.path.exists(f"{folder}/gone")


def temporary(_: Call) -> list[Any]:
    import os
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(b"text")
        file.flush()
        with open(file.name, "rb") as again:
            text = again.read()
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "x"), "w") as inner:
            inner.write("x")
        there = os.path.exists(os.path.join(folder, "x"))
    with tempfile.TemporaryFile() as unnamed:
        unnamed.write(b"spooled")
        unnamed.seek(0)
        return [text, there, unnamed.read()]


def on_disk(_: Call, path: str) -> list[Any]:
    import sqlite3

    for mode in ("delete", "wal"):
        database = sqlite3.connect(path)
        database.execute(f"pragma journal_mode={mode}")
        database.execute("create table if not exists t (n integer)")
        database.execute("delete from t")
        database.executemany("insert into t values (?)", [(1,), (2,), (3,)])
        database.commit()
        rows = database.execute("select n from t order by n").fetchall()
        database.close()
    return rows


def worked(_: Call, folder: str) -> dict[str, bytes]:
    import os

    os.chdir(folder)
    os.mkdir("below", 0o1777)
    with open("first", "wb") as file:
        file.write(b"abcdef")
        file.truncate(3)
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    os.rename("first", "renamed")
    os.link("renamed", "below/hard")
    os.symlink("renamed", "soft")
    os.mkdir("gone")
    os.rmdir("gone")
    with open("gone", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100)
    os.truncate("gone", 10)
    os.unlink("gone")
    with open("renamed", "rb") as source, open("copied", "wb") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 2) == 2
        assert os.sendfile(target.fileno(), source.fileno(), 2, 5) == 1
    found = {}
    for name in ("renamed", "copied", "below/hard"):
        with open(name, "rb") as file:
            found[name] = file.read()
    return found


def test_what_landlock_does_not_govern_is_refused(make: Callable[..., Sealed], folder: str) -> None:
    """Even in scratch: modes, owners, times, attributes, locks; and modes that give a file's rights away."""
    sealed = make(scratch=folder)
    sealed.serve()
    path = f"{folder}/file"
    assert became(sealed, "open", path, os.O_CREAT | os.O_RDWR, 0o700) == "runs"
    fd = int(sealed.call("open", os.fsencode(path) + b"\0", os.O_RDWR, 0)[0])
    before = os.stat(path)
    for name, arguments in (
        ("chmod", (path, 0o777)),
        ("fchmod", (fd, 0o777)),
        ("fchmodat", (-100, path, 0o4777)),
        ("fchmodat2", (-100, path, 0o4777, 0)),
        ("chown", (path, 1, 1)),
        ("lchown", (path, 1, 1)),
        ("fchown", (fd, 1, 1)),
        ("fchownat", (-100, path, 1, 1, 0)),
        ("utime", (path, 0)),
        ("utimes", (path, 0)),
        ("futimesat", (-100, path, 0)),
        ("utimensat", (-100, path, 0, 0)),
        ("setxattr", (path, "user.x", b"x", 1, 0)),
        ("fsetxattr", (fd, "user.x", b"x", 1, 0)),
        ("flock", (fd, 1)),
        ("setsid", ()),
        ("setpgid", (0, 0)),
        ("execve", ("/bin/true", 0, 0)),
        ("execveat", (-100, "/bin/true", 0, 0, 0)),
        ("mknod", (f"{folder}/fifo", 0o10600, 0)),
        ("mknodat", (-100, f"{folder}/fifo", 0o10600, 0)),
        ("inotify_init1", (0,)),
        ("unshare", (0x1000_0000,)),
        ("ptrace", (0, 0, 0, 0)),
        ("memfd_secret", (0,)),
        ("shmget", (0, 4096, 0o1600)),
        ("pidfd_open", (sealed.pid, 0)),
        ("chroot", (folder,)),
        ("open", (f"{folder}/set", os.O_CREAT | os.O_WRONLY, 0o4755)),
        ("open", (f"{folder}/set", os.O_CREAT | os.O_WRONLY, 0o2755 | HIGH)),
        ("openat", (-100, f"{folder}/set", os.O_CREAT | os.O_WRONLY, 0o4755)),
        ("creat", (f"{folder}/set", 0o2755)),
        ("mkdir", (f"{folder}/set", 0o2777)),
        ("mkdirat", (-100, f"{folder}/set", 0o4777)),
    ):
        assert became(sealed, name, *arguments) == "EPERM", name
    after = os.stat(path)
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert os.listdir(folder) == ["file"]


def test_outside_of_scratch(make: Callable[..., Sealed], folder: str, tmp_path: Path) -> None:
    sealed = make(scratch=folder)
    sealed.serve()
    outside = f"{folder}-outside"
    try:
        Path(outside).write_text("secret")
        os.chmod(outside, 0o666)
        for name, arguments in (
            ("open", (outside, os.O_RDONLY, 0)),
            ("open", (outside, os.O_WRONLY | os.O_TRUNC, 0)),
            ("openat", (-100, f"{folder}/../{os.path.basename(outside)}", os.O_RDWR, 0)),
            ("open", (f"{folder}-new", os.O_CREAT | os.O_WRONLY, 0o600)),
            ("creat", (f"{folder}-new", 0o600)),
            ("mkdir", (f"{folder}-new", 0o700)),
            ("symlink", (outside, f"{folder}-new")),
            ("truncate", (outside, 0)),
            ("unlink", (outside,)),
            ("unlinkat", (-100, outside, 0)),
        ):
            assert became(sealed, name, *arguments) == "EACCES", name
        assert Path(outside).read_text() == "secret"
        assert not os.path.exists(f"{folder}-new")
    finally:
        os.unlink(outside)


def test_without_a_scratch_folder(make: Callable[..., Sealed], folder: str) -> None:
    sealed = make()
    sealed.serve()
    assert became(sealed, "open", f"{folder}/new", os.O_CREAT | os.O_WRONLY, 0o600) == "EACCES"
    assert became(sealed, "mkdir", f"{folder}/new", 0o700) == "EACCES"
    assert os.listdir(folder) == []


# ------------------------------------------------------------------------------------ order, signals, ends


def test_calls_are_answered_in_their_order(make: Callable[..., Sealed], folder: str, until: Until) -> None:
    """Each makes the same folder: who came first has made it."""
    for attempt in range(3):
        sealed = make(scratch=folder)
        sealed.start(makes_in_threads, f"{folder}/same{attempt}", 6)
        for count in range(6):
            sealed.control.sendall(b"\0")  # one more thread; all the others, and the main one, sleep
            until(partial(all_sleep, sealed, count + 2))
        sealed.serve()
        assert sealed.result() == [0] + [errno.EEXIST] * 5


def all_sleep(sealed: Sealed, count: int) -> bool:
    """Whether it has so many threads, and none of them runs for a while."""
    for _ in range(5):
        tasks = Path(f"/proc/{sealed.pid}/task").iterdir()
        states = [(task / "stat").read_text().rpartition(") ")[2][0] for task in tasks]
        if states != ["S"] * count:
            return False
        time.sleep(0.01)
    return True


def makes_in_threads(call: Call, path: str, count: int) -> list[int]:
    import os
    import threading

    found = [-1] * count

    def make(index: int) -> None:
        found[index] = call("mkdir", path.encode() + b"\0", 0o700)[1]

    threads = []
    for index in range(count):
        os.read(1000, 1)
        threads.append(threading.Thread(target=make, args=(index,)))
        threads[-1].start()
    for each in threads:
        each.join()
    return found


@pytest.mark.parametrize("restarting", [True, False])
def test_under_signals_each_call_happens_once(
    make: Callable[..., Sealed], folder: str, restarting: bool
) -> None:
    """Held for a while, and then 300 that are answered at once: none is repeated behind the caller's back."""
    sealed = make(scratch=folder)
    sealed.start(makes_under_signals, folder, 300, restarting)
    sealed.wait(0.3)
    sealed.serve()
    outcomes = sealed.result()
    if restarting:
        assert outcomes == [0] * 300
    else:  # EINTR says that nothing has happened, and it was called again
        assert set(outcomes) <= {0, errno.EINTR}
        assert outcomes.count(0) == 300
    assert sorted(os.listdir(folder)) == sorted(map(str, range(300)))


def makes_under_signals(call: Call, folder: str, count: int, restarting: bool) -> list[int]:
    import signal

    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, not restarting)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    found = []
    for index in range(count):
        path = f"{folder}/{index}".encode() + b"\0"
        while True:
            number = call("mkdir", path, 0o700)[1]
            found.append(number)
            if number != 4:
                break
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def test_closing_ends_what_is_held(make: Callable[..., Sealed]) -> None:
    """Nothing is let through by it, neither what waits nor what comes."""
    sealed = make()
    broker = sealed.serve()
    assert became(sealed, "umask", 0o22) == "runs"
    broker.close()
    broker.close()
    assert became(sealed, "umask", 0o22) == "ENOSYS"
    assert became(sealed, "socket", 2, 1, 0) == "ENOSYS"
    assert became(sealed, "getpid") == "runs"


def test_a_broker_that_never_starts(make: Callable[..., Sealed]) -> None:
    sealed = make()
    broker = Broker(sealed.listener, sealed.memory, sealed.pid, Policy())
    sealed.listener = sealed.memory = -1
    sealed.send("umask", 0o22)
    assert sealed.wait(0.2) == "nothing"
    broker.close()
    assert sealed.result() == (-1, errno.ENOSYS)


def test_starting_twice(make: Callable[..., Sealed]) -> None:
    sealed = make()
    before = threading.active_count()
    broker = sealed.serve()
    broker.start()
    assert threading.active_count() == before + 1
    assert became(sealed, "umask", 0o22) == "runs"


def test_a_forked_child_of_the_host_forgets(make: Callable[..., Sealed]) -> None:
    sealed = make()
    descriptors = sealed.listener, sealed.memory
    broker = Broker(*descriptors, sealed.pid, Policy())
    sealed.listener = sealed.memory = -1
    broker.forget()
    for fd in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    broker.close()


def test_a_process_that_is_killed_while_a_call_is_held(make: Callable[..., Sealed], until: Until) -> None:
    """The broker outlives it, ends by itself, and may be closed."""
    sealed = make()
    before = threading.active_count()
    sealed.send("umask", 0o22)
    assert sealed.wait() == "held"
    os.kill(sealed.pid, signal.SIGKILL)
    broker = sealed.serve()
    until(lambda: threading.active_count() == before)
    broker.close()


def test_what_a_broker_leaves(make: Callable[..., Sealed], folder: str) -> None:
    """No descriptor, no thread: after a hundred of them as after none."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        policy = Policy(connect=(f"127.0.0.1:{listening.getsockname()[1]}",))
        before = count()
        for _ in range(5):
            sealed = make(scratch=folder)
            sealed.serve(policy)
            assert sealed.run(leaves_sockets, listening.getsockname()) == 20
            sealed.close()
        assert count() == before


def leaves_sockets(_: Call, address: Any) -> int:
    import socket

    kept = [socket.socket() for _number in range(40)]
    for sock in kept[:20]:
        sock.connect(address)
    globals()["kept"] = kept
    return sum(sock.getpeername() == address for sock in kept[:20])


def test_sockets_that_were_closed_unconnected_are_not_kept(make: Callable[..., Sealed]) -> None:
    """An enclave that opens and closes sockets does not use up the host's descriptors."""
    sealed = make()
    sealed.serve(Policy(connect=("udp:127.0.0.1:9",)))
    before = len(os.listdir("/proc/self/fd"))
    assert sealed.run(opens_and_closes, 300) == 300
    assert len(os.listdir("/proc/self/fd")) - before < 100


def opens_and_closes(_: Call, count: int) -> int:
    import socket

    socks = [socket.socket(type=socket.SOCK_DGRAM) for _number in range(count)]
    for each in socks:
        each.close()
    return len(socks)


def test_a_call_that_cannot_be_answered_is_refused(
    make: Callable[..., Sealed], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong in the host: that call fails, it is told once, and the next is served."""
    sealed = make()

    def breaks(*_: object) -> None:
        raise RuntimeError("by a test")

    monkeypatch.setattr(Broker, "_runs", breaks)
    sealed.serve()
    assert became(sealed, "umask", 0o22) == "EPERM"
    assert "umask could not be answered" in caplog.text
    monkeypatch.undo()
    assert became(sealed, "umask", 0o22) == "runs"


def test_a_refusal_is_told_once(make: Callable[..., Sealed], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "enturbo.enclave")
    sealed = make()
    sealed.serve()
    for _ in range(3):
        assert became(sealed, "setsid") == "EPERM"
    assert caplog.text.count("setsid refused") == 1
