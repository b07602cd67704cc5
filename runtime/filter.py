"""The system-call filter of a sealed process, as a program in classic BPF.

    call ─► other architecture, x32 ─────────► an error     (to kill for it would leave a line in a log)
         ─► computes, reads, own descriptors ─► runs        what stays inside, or goes to a quarantined pipe
         ─► would undo the seal ──────────────► an error     at once
         ─► everything else ──────────────────► held        sleeps until the listener's holder answers

Only numbers decide: what a pointer points to may change after the look at it. Pages below
:data:`LOWEST` are the enclave's own (and the image and heap of an interpreter that is linked to a fixed
address): no call changes how they are mapped.

Source: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/bpf_common.h. x86-64.
Standard library only; the zygote imports this module.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable
from typing import Final

from ..shm import libc
from .syscalls import HIGHEST, NUMBERS

LOWEST: Final = 0x2000_0000_0000  # the lowest address that munmap, mprotect and madvise may be given
SENDERS: Final = (1000, 1001)  # descriptors on which sendmsg may run

# Actions.
ALLOW: Final = 0x7FFF_0000
HOLD: Final = 0x7FC0_0000  # SECCOMP_RET_USER_NOTIF
ERRNO: Final = 0x0005_0000

_ARCH_X86_64: Final = 0xC000_003E
_X32: Final = 0x4000_0000

_RUN: Final = """
read readv pread64 preadv preadv2 write writev pwrite64 close lseek fadvise64 ftruncate memfd_create
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getcwd
getdents getdents64 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
epoll_pwait epoll_pwait2 eventfd eventfd2 pipe pipe2 timerfd_create timerfd_settime
timerfd_gettime signalfd signalfd4 dup dup2 dup3 brk mincore msync membarrier
sched_yield get_robust_list rseq sched_getparam sched_getscheduler sched_get_priority_max
sched_get_priority_min sched_rr_get_interval sched_getaffinity sched_getattr getcpu rt_sigaction
rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall getitimer
setitimer alarm pause nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage
getrlimit getrandom uname sysinfo getpid getppid gettid getuid getgid geteuid getegid getresuid getresgid
getgroups getpgrp getpgid getsid recvfrom recvmsg recvmmsg getsockopt getsockname getpeername shutdown
"""
_MISSING: Final = """
clone3 openat2 userfaultfd seccomp io_uring_setup io_uring_enter io_uring_register bpf mseal
landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""


class _Code:
    """Classic BPF under construction. Jumps go forward, to labels; -1 is the next instruction."""

    def __init__(self) -> None:
        self._items: list[tuple[int, int, int, int]] = []
        self._at: dict[int, int] = {}
        self._labels = 0

    def label(self) -> int:
        self._labels += 1
        return self._labels

    def place(self, label: int) -> None:
        self._at[label] = len(self._items)

    def load(self, offset: int) -> None:
        """Of ``struct seccomp_data``: 0 the number, 4 the architecture, 16 the first argument."""
        self._items.append((0x20, -1, -1, offset))

    def low(self, argument: int) -> None:
        self.load(16 + 8 * argument)

    def high(self, argument: int) -> None:
        self.load(20 + 8 * argument)

    def keep(self, mask: int) -> None:
        self._items.append((0x54, -1, -1, mask))

    def equal(self, value: int, yes: int = -1, no: int = -1) -> None:
        self._items.append((0x15, yes, no, value))

    def at_least(self, value: int, yes: int = -1, no: int = -1) -> None:
        self._items.append((0x35, yes, no, value))

    def any_bit(self, mask: int, yes: int = -1, no: int = -1) -> None:
        self._items.append((0x45, yes, no, mask))

    def go(self, label: int) -> None:
        self._items.append((0x05, label, -1, 0))

    def end(self, action: int) -> None:
        self._items.append((0x06, -1, -1, action))

    def split(self, bound: int, below: Callable[[], None], above: Callable[[], None]) -> None:
        """``above`` from ``bound`` on, else ``below``. A far jump, as near ones reach 255 instructions."""
        lower, upper = self.label(), self.label()
        self.at_least(bound, no=lower)
        self.go(upper)
        self.place(lower)
        below()
        self.place(upper)
        above()

    def build(self) -> bytes:
        out = bytearray()
        for index, (op, yes, no, k) in enumerate(self._items):
            jt, jf = (0 if label < 0 else self._at[label] - index - 1 for label in (yes, no))
            if op == 0x05:
                jt, k = 0, jt
            out += struct.pack("<HBBI", op, jt, jf, k)
        return bytes(out)


_Rule = Callable[[_Code], None]


def _one_of(argument: int, values: Iterable[int], hit: int = ALLOW, miss: int = HOLD) -> _Rule:
    """``hit`` for an int argument (the kernel looks at its low half only) with one of the values."""

    def rule(code: _Code) -> None:
        yes = code.label()
        code.low(argument)
        for value in values:
            code.equal(value & 0xFFFF_FFFF, yes)
        code.end(miss)
        code.place(yes)
        code.end(hit)

    return rule


def _without(argument: int, mask: int) -> _Rule:
    """Runs if none of the bits is set, else held."""

    def rule(code: _Code) -> None:
        held = code.label()
        code.low(argument)
        code.any_bit(mask, held)
        code.end(ALLOW)
        code.place(held)
        code.end(HOLD)

    return rule


def _null(argument: int, code: _Code, held: int) -> None:
    """Go on if a pointer is NULL, else to ``held``."""
    code.low(argument)
    code.equal(0, no=held)
    code.high(argument)
    code.equal(0, no=held)


def _own(then: _Rule) -> _Rule:
    """EPERM for the enclave's pages: the call would change how they are mapped."""

    def rule(code: _Code) -> None:
        outside = code.label()
        code.high(0)
        code.at_least(LOWEST >> 32, outside)
        code.end(ERRNO | errno.EPERM)
        code.place(outside)
        then(code)

    return rule


def _allow(code: _Code) -> None:
    code.end(ALLOW)


def _mmap(code: _Code) -> None:
    """A hint, too, could put pages between the enclave's; a fixed 0 with a great length would replace all."""
    kind, refused, allowed = code.label(), code.label(), code.label()
    code.high(0)
    code.at_least(LOWEST >> 32, kind)
    code.equal(0, no=refused)
    code.low(0)
    code.equal(0, no=refused)
    code.low(3)
    code.any_bit(libc.MAP_FIXED | libc.MAP_FIXED_NOREPLACE, refused)
    code.place(kind)
    code.low(3)
    code.any_bit(libc.MAP_ANONYMOUS, allowed)
    code.keep(0xF)
    code.equal(libc.MAP_PRIVATE, allowed)
    code.end(HOLD)
    code.place(refused)
    code.end(ERRNO | errno.EPERM)
    code.place(allowed)
    code.end(ALLOW)


def _clone(code: _Code) -> None:
    """A thread, in no new namespace."""
    held = code.label()
    code.low(0)
    code.any_bit(0x7E02_0000, held)  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
    code.any_bit(0x0001_0000, no=held)  # CLONE_THREAD
    code.end(ALLOW)
    code.place(held)
    code.end(HOLD)


def _prctl(code: _Code) -> None:
    """A name can be read by everyone, so it is never set; to the caller it looks as if it had been."""
    named, allowed = code.label(), code.label()
    code.low(0)
    code.equal(libc.PR_SET_NAME, named)
    code.equal(0x5356_4D41, allowed)  # PR_SET_VMA
    code.end(HOLD)
    code.place(named)
    code.end(ERRNO)
    code.place(allowed)
    code.end(ALLOW)


def _sendto(code: _Code) -> None:
    held = code.label()
    _null(4, code, held)
    code.end(ALLOW)
    code.place(held)
    code.end(HOLD)


def _prlimit(code: _Code) -> None:
    held = code.label()
    code.low(0)
    code.equal(0, no=held)
    _null(2, code, held)
    code.end(ALLOW)
    code.place(held)
    code.end(HOLD)


def _futex(argument: int) -> _Rule:
    """What stays in this process.

    A shared futex may lie in any file that is mapped, for instance a library: to wait on it, or to wake it,
    is seen by everyone who maps the same file. For the same reason the end of a thread is held: the kernel
    wakes a futex of the thread's choice then.
    """

    def rule(code: _Code) -> None:
        allowed = code.label()
        code.low(argument)
        code.any_bit(128, allowed)  # FUTEX_PRIVATE_FLAG, FUTEX2_PRIVATE
        code.end(HOLD)
        code.place(allowed)
        code.end(ALLOW)

    return rule


_NOT_TO_READ: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
# NORMAL to WILLNEED, DONTNEED, FREE, huge pages, DONTDUMP, WIPEONFORK, guard pages: with their opposites.
_ADVICES: Final = (0, 1, 2, 3, 4, 8, 14, 15, 16, 17, 18, 19, 102, 103)
# TCGETS, TCGETS2, TIOCGWINSZ, FIONBIO, FIOCLEX, FIONCLEX, FIONREAD
_IOCTLS: Final = (0x5401, 0x802C_542A, 0x5413, 0x5421, 0x5451, 0x5450, 0x541B)
# F_DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, ADD_SEALS, GET_SEALS
_FCNTLS: Final = (0, 1, 2, 3, 4, 1030, 1033, 1034)
# ARCH_GET_FS, GET_GS, GET_XCOMP_SUPP, GET_XCOMP_PERM, REQ_XCOMP_PERM. Never ENABLE_TAGGED_ADDR, which would
# let an address of the enclave's pages look like a high one.
_ARCH: Final = (0x1003, 0x1004, 0x1021, 0x1022, 0x1023)

_RULES: Final[dict[str, _Rule]] = {
    "open": _without(1, _NOT_TO_READ),
    "openat": _without(2, _NOT_TO_READ),
    "mmap": _mmap,
    "munmap": _own(_allow),
    "mprotect": _own(_allow),
    "pkey_mprotect": _own(_allow),
    "madvise": _own(_one_of(2, _ADVICES)),
    "clone": _clone,
    "prctl": _prctl,
    "arch_prctl": _one_of(0, _ARCH),
    "ioctl": _one_of(1, _IOCTLS),
    "fcntl": _one_of(1, _FCNTLS),
    "close_range": _one_of(2, (0, 4)),  # nothing, CLOEXEC
    "sendto": _sendto,
    "sendmsg": _one_of(0, SENDERS),
    "socketpair": _one_of(0, (1,)),  # AF_UNIX
    "setsockopt": _one_of(1, (1, 6)),  # SOL_SOCKET, IPPROTO_TCP
    "prlimit64": _prlimit,
    "futex": _futex(1),
    "futex_wake": _futex(3),
    "futex_wait": _futex(3),
}


def _actions() -> list[int | _Rule]:
    """What happens to each number: an action, or a rule on its arguments."""
    actions: list[int | _Rule] = [HOLD] * (HIGHEST + 1)
    for number in range(NUMBERS["rseq"] + 1, NUMBERS["pidfd_send_signal"]):
        actions[number] = ERRNO | errno.ENOSYS
    for names, action in ((_RUN, ALLOW), (_MISSING, ERRNO | errno.ENOSYS)):
        for name in names.split():
            actions[NUMBERS[name]] = action
    actions[NUMBERS["mremap"]] = ERRNO | errno.ENOMEM
    # Looks done. A dying thread wakes the futex that its list says is pending, in whatever file it is mapped.
    actions[NUMBERS["set_robust_list"]] = ERRNO
    for name, rule in _RULES.items():
        actions[NUMBERS[name]] = rule
    return actions


def program() -> bytes:
    """The filter as an array of ``struct sock_filter``, at most 4096 of them."""
    runs: list[tuple[int, int | _Rule]] = []
    # A number that is not known here fails as on an older kernel, which libraries are prepared for.
    for number, action in enumerate([*_actions(), ERRNO | errno.ENOSYS]):
        if not runs or runs[-1][1] != action:
            runs.append((number, action))
    runs.append((_X32, ERRNO | errno.ENOSYS))
    code = _Code()
    right = code.label()
    code.load(4)
    code.equal(_ARCH_X86_64, right)
    code.end(ERRNO | errno.ENOSYS)
    code.place(right)
    code.load(0)
    _search(code, runs)
    return code.build()


def _search(code: _Code, runs: list[tuple[int, int | _Rule]]) -> None:
    if len(runs) > 1:
        middle = len(runs) // 2
        lower, upper = runs[:middle], runs[middle:]
        code.split(upper[0][0], lambda: _search(code, lower), lambda: _search(code, upper))
    elif isinstance(action := runs[0][1], int):
        code.end(action)
    else:
        action(code)
