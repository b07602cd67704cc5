"""What the filter does to each call: it runs, fails, or is held. None kills: that would be seen outside.

A call "runs" if the kernel carried it out, or refused it for a reason of its own: EBADF of a descriptor that
does not exist tells as much as success. One that is held has not happened: it returns what the test answers.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from enturbo.runtime.filter import LOWEST, program
from enturbo.runtime.syscalls import HIGHEST, NUMBERS

if TYPE_CHECKING:
    from tests.sealing.conftest import Sealed

Call = Callable[..., tuple[int, int]]

PAGES = 0x1000_0000_0000  # of the enclave: 16 are mapped, see child.py
CONTENT = b"\x5a"
PAGE = 4096
HIGH = 1 << 32  # a bit that the kernel does not look at where an argument is an int
NULL = b"/dev/null\0"
SIGCHLD, THREAD = 17, 0x10000
R, RW = 1, 3
SHARED, PRIVATE, FIXED, ANONYMOUS, NORESERVE, NOREPLACE = 1, 2, 0x10, 0x20, 0x4000, 0x100000
WORD = (1).to_bytes(4, "little")

# Written down once more, so that no call gets into the filter's list by one stroke.
RUN = """
read readv pread64 preadv preadv2 write writev pwrite64 close lseek fadvise64 ftruncate memfd_create
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getcwd
getdents getdents64 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
epoll_pwait epoll_pwait2 eventfd eventfd2 pipe pipe2 timerfd_create timerfd_settime timerfd_gettime
signalfd signalfd4 dup dup2 dup3 brk mincore msync membarrier get_robust_list
rseq sched_yield sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
sched_rr_get_interval sched_getaffinity sched_getattr getcpu rt_sigaction rt_sigprocmask rt_sigpending
rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall getitimer setitimer alarm nanosleep
clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage getrlimit getrandom uname
sysinfo getpid getppid gettid getuid getgid geteuid getegid getresuid getresgid getgroups getpgrp
getpgid getsid recvfrom recvmsg recvmmsg getsockopt getsockname getpeername shutdown
"""
MISSING = """
clone3 openat2 userfaultfd seccomp io_uring_setup io_uring_enter io_uring_register bpf mseal
landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
# They wait or do not come back: tests of their own.
BY_THEMSELVES = """
exit pause rt_sigreturn
"""
# By their arguments, in the table below, or always with one result.
BY_ARGUMENT = """
open openat mmap munmap mprotect pkey_mprotect madvise mremap clone prctl arch_prctl ioctl fcntl
close_range sendto sendmsg socketpair setsockopt prlimit64 futex futex_wake futex_wait set_robust_list
"""
NEWER = NUMBERS["epoll_pwait2"]  # Linux 5.11; what comes later may be missing where the tests run


def test_every_number(sealed: Sealed) -> None:
    nothing = (-1,) * 6
    for name, number in NUMBERS.items():
        if name in (BY_ARGUMENT + BY_THEMSELVES).split():
            continue
        outcome = sealed.outcome(number, *nothing)
        if name in RUN.split():
            missing = ("ENOSYS",) if number <= NEWER else ()
            assert outcome not in ("held", "EPERM", "EACCES", *missing), name
        else:
            assert outcome == ("ENOSYS" if name in MISSING.split() else "held"), name


def test_the_lists_name_every_call_once() -> None:
    names = (RUN + MISSING + BY_THEMSELVES + BY_ARGUMENT).split()
    assert len(set(names)) == len(names)
    assert set(names) <= NUMBERS.keys()
    assert len(program()) % 8 == 0
    assert len(program()) // 8 <= 4096  # BPF_MAXINSNS


@pytest.mark.parametrize(
    "number", [337, 423, HIGHEST + 1, HIGHEST + 2, 1000, 0x3FFF_FFFF], ids=lambda number: f"{number:#x}"
)
def test_an_unknown_number_fails_as_on_an_older_kernel(sealed: Sealed, number: int) -> None:
    """But 335 and 336, of uprobes, which no filter sees: the kernel kills who calls them elsewhere."""
    assert sealed.outcome(number, 0, 0, 0, 0, 0, 0) == "ENOSYS"


@pytest.mark.parametrize(
    "number",
    [0x4000_0000, 0x4000_0000 + 39, 0x4000_0000 + 520, 0xFFFF_FFFF],
    ids=lambda number: f"{number:#x}",
)
def test_x32_does_not_exist(sealed: Sealed, number: int) -> None:
    """A death would be seen from outside; an error is not."""
    assert sealed.outcome(number) == "ENOSYS"
    assert sealed.outcome("getpid") == "runs"


def test_another_architecture_does_not_exist(sealed: Sealed) -> None:
    """getpid by the call gate of 32-bit programs; a kernel without it kills with SIGSEGV."""
    sealed.start(call_as_32_bit)
    if sealed.wait() == "dead":
        assert os.WTERMSIG(sealed.end()) == signal.SIGSEGV
    else:
        assert sealed.result() == -38  # ENOSYS


def call_as_32_bit(_: Call) -> int:
    import ctypes
    import mmap

    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())


def test_what_does_not_come_back(sealed: Sealed) -> None:
    """The end of a thread wakes a futex of its choice, in whatever file that is mapped."""
    assert sealed.run(paused) == (-1, 4)  # EINTR, and rt_sigreturn has come back from the handler
    sealed.send("exit", 7)
    listener, call = sealed.held()
    assert call.number == NUMBERS["exit"]
    assert sealed.wait(0.1) == "nothing"
    listener.allow(call)
    assert sealed.wait() == "dead"
    assert os.waitstatus_to_exitcode(sealed.end()) == 7


def paused(call: Call) -> tuple[int, int]:
    import signal

    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    result = call("pause")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return result


OPEN = [
    (os.O_RDONLY, "runs"),
    (os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_APPEND, "runs"),
    (os.O_RDONLY | os.O_DIRECTORY, "ENOTDIR"),
    (os.O_PATH, "runs"),
    (os.O_RDONLY | HIGH, "runs"),
    (os.O_WRONLY, "held"),
    (os.O_RDWR, "held"),
    (os.O_WRONLY | os.O_RDWR, "held"),
    (os.O_CREAT, "held"),
    (os.O_TRUNC, "held"),
    (os.O_TMPFILE, "held"),
    (os.O_TMPFILE & ~os.O_DIRECTORY, "held"),
    (os.O_WRONLY | HIGH, "held"),
    (os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, "held"),
]


@pytest.mark.parametrize(("flags", "outcome"), OPEN)
def test_open(sealed: Sealed, flags: int, outcome: str) -> None:
    assert sealed.outcome("open", NULL, flags, 0o600) == outcome
    assert sealed.outcome("openat", -100, NULL, flags, 0o600) == outcome


Row = tuple[str, tuple[int | bytes, ...], str]


def each(name: str, at: int, values: list[int], outcome: str, *others: int) -> list[Row]:
    """Rows that differ in argument ``at``; the others as given, then zeros."""
    arguments = [*others, *(0,) * (6 - len(others))]
    return [(name, (*arguments[:at], value, *arguments[at + 1 :]), outcome) for value in values]


def mmap(address: int, flags: int, outcome: str, length: int = PAGE, fd: int = -1) -> Row:
    return "mmap", (address, length, RW, flags, fd, 0), outcome


HUGE = (1 << 47) - 2 * PAGE
ANON = PRIVATE | ANONYMOUS
ADDRESSES = [
    mmap(0, ANON, "runs"),
    mmap(0, ANON | NORESERVE | 0x20000, "runs"),  # MAP_STACK
    mmap(0, SHARED | ANONYMOUS, "runs"),
    mmap(0, PRIVATE, "EBADF"),
    mmap(0, SHARED, "held"),
    mmap(0, 3, "held"),  # MAP_SHARED_VALIDATE
    mmap(0, 0, "held"),
    mmap(0, SHARED | HIGH * ANONYMOUS, "held"),
    mmap(LOWEST, ANON, "runs"),
    mmap(LOWEST + PAGE, ANON | FIXED, "runs"),
    mmap(LOWEST + 2 * PAGE, ANON | NOREPLACE, "runs"),
    mmap(LOWEST + PAGE, SHARED | FIXED, "held"),
    mmap(PAGES, ANON, "EPERM"),
    mmap(PAGES, ANON | FIXED, "EPERM"),
    mmap(PAGES, SHARED | FIXED, "EPERM"),
    mmap(PAGES, ANON | NOREPLACE, "EPERM"),
    mmap(PAGES + 16 * PAGE, ANON, "EPERM"),
    mmap(LOWEST - PAGE, ANON, "EPERM"),
    mmap(LOWEST - 1, ANON, "EPERM"),
    mmap(LOWEST - PAGE, ANON | FIXED, "EPERM", 2 * PAGE),
    mmap(0x10000, ANON, "EPERM"),
    mmap(1, ANON, "EPERM"),
    mmap(HIGH, ANON, "EPERM"),
    mmap(0, ANON | FIXED | NORESERVE, "EPERM", HUGE),
    mmap(0, ANON | NOREPLACE | NORESERVE, "EPERM", HUGE),
    mmap(0, SHARED | FIXED, "EPERM", HUGE),
    mmap(0, ANON | FIXED, "EPERM"),
    mmap(0, ANON | NORESERVE, "ENOMEM", HUGE),
    mmap(1 << 63 | PAGES, ANON | FIXED, "ENOMEM"),
    ("munmap", (PAGES, PAGE), "EPERM"),
    ("munmap", (0, HUGE), "EPERM"),
    ("munmap", (0, PAGE), "EPERM"),
    ("munmap", (LOWEST - PAGE, 2 * PAGE), "EPERM"),
    ("munmap", (LOWEST, 8 * PAGE), "runs"),
    ("munmap", (1 << 63 | PAGES, PAGE), "EINVAL"),
    ("munmap", (1 << 57 | PAGES, PAGE), "EINVAL"),
    ("mprotect", (PAGES, PAGE, RW), "EPERM"),
    ("mprotect", (0, HUGE, 0), "EPERM"),
    ("mprotect", (LOWEST - PAGE, PAGE, R), "EPERM"),
    ("mprotect", (LOWEST, PAGE, R), "ENOMEM"),
    ("mprotect", (1 << 63 | PAGES, PAGE, RW), "ENOMEM"),
    ("pkey_mprotect", (PAGES, PAGE, RW, -1), "EPERM"),
    ("pkey_mprotect", (LOWEST, PAGE, R, -1), "ENOMEM"),
    ("mremap", (PAGES, PAGE, 2 * PAGE, 1, 0), "ENOMEM"),
    ("mremap", (LOWEST, PAGE, PAGE, 3, PAGES), "ENOMEM"),  # to there, MREMAP_MAYMOVE | MREMAP_FIXED
    ("madvise", (LOWEST - PAGE, PAGE, 4), "EPERM"),
    ("madvise", (0, HUGE, 4), "EPERM"),
    *each("madvise", 2, [0, 1, 2, 3, 4, 8, 9, 10, 14, 21, 23], "EPERM", PAGES, PAGE),
    # DONTDUMP 16 and WIPEONFORK 18 look for pages first; nothing is mapped there.
    *each("madvise", 2, [0, 1, 2, 3, 4, 8, 14, 15, 16, 17, 18, 19], "ENOMEM", LOWEST, PAGE),
    # REMOVE, (DONT|DO)FORK, (UN)MERGEABLE, COLD, PAGEOUT, POPULATE, DONTNEED_LOCKED, COLLAPSE, HWPOISON
    *each("madvise", 2, [9, 10, 11, 12, 13, 20, 21, 22, 23, 24, 25, 100, 101], "held", LOWEST, PAGE),
]


def test_addresses(sealed: Sealed) -> None:
    """No call changes how the enclave's pages are mapped; elsewhere memory may be had."""
    for name, arguments, outcome in ADDRESSES:
        assert sealed.outcome(name, *arguments) == outcome, (name, *arguments)
        assert os.pread(sealed.memory, 16 * PAGE, PAGES) == CONTENT * 16 * PAGE


def decision(number: int, *arguments: int, architecture: int = 0xC000_003E) -> int:
    """What the filter's program returns, carried out here: for what this kernel would refuse by itself."""
    code = list(struct.iter_unpack("<HBBI", program()))
    values = [each & (1 << 64) - 1 for each in (*arguments, *(0,) * 6)[:6]]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *values)
    accumulator = at = 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif op == 0x54:
            accumulator &= k
        elif op == 0x06:
            return int(k)
        elif op == 0x05:
            at += k
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[op]
            at += yes if taken else no


def test_the_program_by_itself() -> None:
    allow, error = 0x7FFF_0000, 0x0005_0000
    assert decision(NUMBERS["getpid"]) == allow
    for number in range(HIGHEST + 10):
        assert decision(0x4000_0000 + number) == error | errno.ENOSYS
    for architecture in (0x4000_0003, 0xC000_00B7, 0):  # i386, AArch64
        assert decision(NUMBERS["getpid"], architecture=architecture) == error | errno.ENOSYS
    for name, arguments, outcome in ADDRESSES:
        numbers = [each for each in arguments if isinstance(each, int)]
        decided = decision(NUMBERS[name], *numbers)
        if outcome == "EPERM":
            assert decided == error | errno.EPERM, (name, *arguments)
        elif outcome == "runs":
            assert decided == allow, (name, *arguments)


NAMESPACES = [0x0002_0000, 0x0200_0000, *(1 << bit for bit in range(26, 31))]
OWN, REALTIME = 128, 256  # FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
TABLE: list[Row] = [
    # A thread without what a thread shares: the kernel's refusal.
    *each("clone", 0, [THREAD, THREAD | SIGCHLD, THREAD | HIGH], "EINVAL"),
    *each("clone", 0, [THREAD | each for each in NAMESPACES], "held"),
    *each(
        "clone",
        0,
        [SIGCHLD, 0, 0x4100, 0x4100 | SIGCHLD, 0x0120_0000 | SIGCHLD, 0x100, HIGH * THREAD],
        "held",
    ),
    ("prctl", (15, b"told\0"), "runs"),  # it looks so: see below
    ("prctl", (15 | HIGH, b"told\0"), "runs"),
    ("prctl", (0x5356_4D41, 99, LOWEST, PAGE, 0), "EINVAL"),
    # SET_PDEATHSIG, GET_DUMPABLE, SET_DUMPABLE, SET_SECCOMP, CAPBSET_DROP, SET_TIMERSLACK, SET_MM,
    # SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS, CAP_AMBIENT, SET_SYSCALL_USER_DISPATCH, SCHED_CORE, SET_PTRACER
    *each("prctl", 0, [1, 3, 4, 22, 24, 29, 35, 36, 38, 47, 59, 62, 0x59616D61], "held"),
    ("arch_prctl", (0x1003, bytes(8)), "runs"),
    ("arch_prctl", (0x1004, bytes(8)), "runs"),
    *each("arch_prctl", 0, [0x1021, 0x1022], "EFAULT", 0, -1),
    ("arch_prctl", (0x1023, 99), "EINVAL"),
    # SET_GS, SET_FS, SET_CPUID, LAM, shadow stacks
    *each("arch_prctl", 0, [0x1001, 0x1002, 0x1012, 0x4001, 0x4002, 0x5001, 0x5003], "held"),
    *each("ioctl", 1, [0x5401, 0x802C_542A, 0x5413, 0x5421, 0x5451, 0x5450, 0x541B], "EBADF", -1),
    ("ioctl", (3, 0x5401, bytes(64)), "ENOTTY"),
    ("ioctl", (3, 0x5401 | HIGH, bytes(64)), "ENOTTY"),
    # TCSETS, TIOCSCTTY, TIOCSPGRP, TIOCSTI, FIOASYNC, FIOSETOWN, SIOCSIFFLAGS, FS_IOC_SETFLAGS, FICLONE, UFFD
    *each(
        "ioctl",
        1,
        [0x5402, 0x540E, 0x5410, 0x5412, 0x5452, 0x8901, 0x8914, 0x40086602, 0x40049409, 0xC018AA3F, 0],
        "held",
    ),
    *each("fcntl", 1, [0, 1, 2, 3, 4, 1030, 1033, 1034], "EBADF", -1),
    ("fcntl", (3, 3 | HIGH), "runs"),
    # record locks, SETOWN, SETSIG, SETOWN_EX, OFD locks, SETLEASE, NOTIFY, (SET|GET)PIPE_SZ, SET_RW_HINT
    *each("fcntl", 1, [5, 6, 7, 8, 10, 15, 36, 37, 38, 1024, 1026, 1031, 1032, 1036], "held", 3),
    ("close_range", (5000, 5001, 0), "runs"),
    ("close_range", (5000, 5001, 4), "runs"),
    ("close_range", (5000, 5001, 2), "held"),  # UNSHARE
    ("close_range", (5000, 5001, 6), "held"),
    ("sendto", (-1, b"x", 1, 0, 0, 0), "EBADF"),
    ("sendto", (3, b"x", 1, 0, 0, 0), "ENOTSOCK"),
    ("sendto", (3, b"x", 1, 0, bytes(16), 16), "held"),
    ("sendto", (3, b"x", 1, 0, HIGH, 16), "held"),
    ("sendto", (3, b"x", 1, 0, 1, 16), "held"),
    ("sendto", (1000, b"x", 1, 0, bytes(16), 16), "held"),
    ("sendmsg", (1000, 0, 0), "EFAULT"),
    ("sendmsg", (1000 | HIGH, 0, 0), "EFAULT"),
    ("sendmsg", (1001, 0, 0), "EBADF"),
    *each("sendmsg", 0, [-1, 0, 3, 999, 1002, 1000 * HIGH], "held"),
    ("sendmmsg", (1000, 0, 0, 0), "held"),
    ("socketpair", (1, 1, 0, bytes(8)), "runs"),
    ("socketpair", (1, 2, 0, bytes(8)), "runs"),
    *each("socketpair", 0, [0, 2, 10, 16, 30, 40], "held", 0, 1),  # INET, INET6, NETLINK, TIPC, VSOCK
    *each("setsockopt", 1, [1, 6], "EBADF", -1),
    *each("setsockopt", 1, [0, 17, 41, 132, 263, 270, HIGH], "held", -1),
    ("prlimit64", (0, 7, 0, bytes(16)), "runs"),
    ("prlimit64", (0, 7, bytes(16), 0), "held"),
    ("prlimit64", (0, 7, HIGH, 0), "held"),
    ("prlimit64", (1, 7, 0, bytes(16)), "held"),
    ("set_robust_list", (0, 24), "runs"),  # it looks so: see below
    ("set_robust_list", (-1, 99), "runs"),
    # Waiting is with a value that is not there any more.
    *(("futex", (WORD, op | OWN, 0, 0, 0, 1), "EAGAIN") for op in (0, 9, 9 | REALTIME)),
    *(("futex", (WORD, op | OWN, 1, 0, WORD, 1), "runs") for op in (1, 3, 10)),  # WAKE, REQUEUE, WAKE_BITSET
    *(("futex", (WORD, op, 1, 0, WORD, 1), "held") for op in (*range(14), 9 | REALTIME, 1 | REALTIME)),
    ("futex", (WORD, 1 | OWN * HIGH, 1, 0, WORD, 1), "held"),
    ("futex_wake", (WORD, 1, 1, 2 | OWN), "runs"),
    ("futex_wait", (WORD, 0, 1, 2 | OWN, 0, 1), "EAGAIN"),
    *((name, (WORD, 0, 1, 2, 0, 1), "held") for name in ("futex_wake", "futex_wait")),
    *((name, (WORD, 0, 1, 2 | OWN * HIGH, 0, 1), "held") for name in ("futex_wake", "futex_wait")),
]


def test_arguments(sealed: Sealed) -> None:
    for name, arguments, outcome in TABLE:
        found = sealed.outcome(name, *arguments)
        if NUMBERS[name] > NEWER and found == "ENOSYS":
            continue
        assert found == outcome, (name, *arguments)


def test_every_rule_is_in_a_table() -> None:
    named = {name for name, _, _ in (*TABLE, *ADDRESSES)} | {"open", "openat"}
    assert named == {*BY_ARGUMENT.split(), "sendmmsg"}


def test_a_shared_mapping_of_a_file_is_held(sealed: Sealed) -> None:
    """Whoever maps the same file would see the stores. A private one is a copy."""
    fd, _ = sealed.call("memfd_create", b"x\0", 0)
    assert sealed.call("ftruncate", fd, PAGE) == (0, 0)
    for _, (address, length, protection, flags, _, _), outcome in (
        mmap(0, PRIVATE, "runs"),
        mmap(LOWEST, PRIVATE | FIXED, "runs"),
        mmap(0, SHARED, "held"),
        mmap(LOWEST, SHARED | FIXED, "held"),
    ):
        assert sealed.outcome("mmap", address, length, protection, flags, fd, 0) == outcome


def test_a_name_is_never_set(sealed: Sealed) -> None:
    def comm() -> str:
        with open(f"/proc/{sealed.pid}/comm") as file:
            return file.read()

    before = comm()
    assert sealed.call("prctl", 15, b"told\0") == (0, 0)
    assert comm() == before
    # The other way to it, a file that Landlock does not name.
    assert sealed.outcome("openat", -100, b"/proc/self/comm\0", os.O_WRONLY, 0) == "held"


def test_a_held_call_sleeps_until_it_is_answered(sealed: Sealed, until: Callable[..., None]) -> None:
    """Nobody answers: it has not happened and does not return. Its thread dies in it."""
    sealed.send("kill", os.getpid(), 0)
    assert sealed.wait() == "held"
    with open(f"/proc/{sealed.pid}/stat") as file:
        assert file.read().rpartition(") ")[2][0] == "S"
    assert sealed.wait(0.2) == "held"
    os.kill(sealed.pid, signal.SIGKILL)
    listener = sealed.listener
    sealed.listener = -1
    assert sealed.wait() == "dead"
    os.close(listener)


def test_without_a_listener_calls_fail(sealed: Sealed) -> None:
    """The one that is held, and all later ones: nothing is let through by the listener's end."""
    sealed.send("setsid")
    assert sealed.wait() == "held"
    os.close(sealed.listener)
    sealed.listener = -1
    assert sealed.result() == (-1, 38)
    assert sealed.call("setsid") == (-1, 38)
    assert sealed.call("getpid") == (sealed.pid, 0)


def test_signals_do_not_repeat_a_held_call(sealed: Sealed) -> None:
    """A call that has been received is answered once, whatever signals come in between."""
    sealed.start(called_under_signals)
    listener, call = sealed.held()
    assert call.number == NUMBERS["setsid"]
    assert sealed.wait(0.3) == "nothing"
    listener.answer(call, 4321)
    assert sealed.result() == (4321, 0)


def called_under_signals(call: Call) -> Any:
    import signal

    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)  # before somebody has received it it begins anew
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    result = call("setsid")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return result
