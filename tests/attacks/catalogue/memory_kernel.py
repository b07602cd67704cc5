"""Attacks by the enclave that have its page written by the kernel, or by somebody else. This runs inside it;
see ``memory.py``."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import struct
import threading
import time
from typing import Final

from .memory import (
    ANONYMOUS,
    CLONE_VFORK,
    CLONE_VM,
    EXEC,
    GENUINE,
    PAGE,
    PRIVATE,
    READ,
    WRITE,
    Attack,
    closing,
    libc,
)

# --------------------------------------------------------------------------- the kernel stores for somebody


def proc_self_mem(attack: Attack) -> None:
    fd = attack.open("/proc/self/mem", os.O_RDWR)
    if fd >= 0:
        at, data = attack.at, GENUINE
        if attack.kind == "EPCM":
            at, data = attack.entry, attack.event["word_value"]
        with closing(fd):
            os.pwrite(fd, data, at)


def writev_of(attack: Attack, pid: int, at: int, data: bytes = GENUINE) -> None:
    source = ctypes.create_string_buffer(data, len(data))
    local = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(source), len(data)))
    remote = ctypes.create_string_buffer(struct.pack("<QQ", at, len(data)))
    where = ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0
    attack.call("process_vm_writev", pid, *where)


def process_vm_writev(attack: Attack) -> None:
    writev_of(attack, os.getpid(), attack.at)


def process_vm_writev_worker(attack: Attack) -> None:
    data = attack.event["word_value"] if attack.kind == "EPCM" else GENUINE
    writev_of(attack, attack.event["worker"], attack.event["worker_at"], data)


def proc_worker_mem(attack: Attack) -> None:
    fd = attack.open(f"/proc/{attack.event['worker']}/mem", os.O_RDWR)
    if fd >= 0:
        with closing(fd):
            os.pwrite(fd, GENUINE, attack.event["worker_at"])


def poke(attack: Attack, pid: int, at: int) -> None:
    """By ptrace(2), word by word."""
    if attack.call("ptrace", 0x4206, pid, 0, 0) == -1:  # PTRACE_SEIZE
        return
    attack.call("ptrace", 0x4207, pid, 0, 0)  # PTRACE_INTERRUPT
    os.waitpid(pid, 0x40000000)  # __WALL
    word = int.from_bytes(GENUINE[:8], "little")
    attack.note("POKEDATA")
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)
    for offset in range(0, PAGE, 8):
        libc.ptrace(5, pid, at + offset, word)
    attack.call("ptrace", 17, pid, 0, 0)  # PTRACE_DETACH


def ptrace_worker(attack: Attack) -> None:
    poke(attack, attack.event["worker"], attack.event["worker_at"])


def ptrace_parent(attack: Attack) -> None:
    """A child of the enclave, of which the parent wants to be changed."""
    if attack.event["yama"]:
        libc.prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER: anyone
    attack.note("fork")
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        attack.in_child()
        with contextlib.suppress(BaseException):
            poke(attack, parent, attack.at)
        os._exit(0)
    os.waitpid(child, 0)
    attack.note("fork: done")


def ptrace_itself(attack: Attack) -> None:
    thread = threading.Thread(target=poke, args=(attack, os.getpid(), attack.at))
    thread.start()
    thread.join()


def read(attack: Attack) -> None:
    """From a pipe, to the page."""
    reading, writing = os.pipe()
    os.write(writing, GENUINE)
    attack.call("read", reading, attack.at, PAGE)
    os.close(reading)
    os.close(writing)


def futex_wake_op(attack: Attack) -> None:
    """Sets bits of a word of the page, from within the kernel."""
    own = ctypes.c_uint32()
    set_16 = 2 << 28 | 8 << 28 | 16 << 12  # FUTEX_OP_OR with 1 << 16
    attack.call("futex", ctypes.addressof(own), 5 | 128, 0, 0, attack.at, set_16)


def signal_frame(attack: Attack) -> None:
    """The kernel puts a signal's frame on whatever is said to be a stack."""
    stack = ctypes.create_string_buffer(struct.pack("<QiiQ", attack.data + PAGE, 0, 0, 3 * PAGE))
    attack.call("sigaltstack", ctypes.addressof(stack), 0)
    signal.signal(signal.SIGALRM, lambda *_: None)  # Python's handlers run on such a stack
    attack.note("signal")
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    time.sleep(0.05)
    attack.note("signal: done")
    none = ctypes.create_string_buffer(struct.pack("<QiiQ", 0, 2, 0, 0))  # SS_DISABLE
    attack.call("sigaltstack", ctypes.addressof(none), 0)


def aio(attack: Attack) -> None:
    """Asynchronous reading: a thread of the kernel, or a later moment, stores."""
    context = ctypes.c_uint64()
    if attack.call("io_setup", 1, ctypes.addressof(context)) == -1:
        return
    with closing(attack.genuine_memfd()) as fd:
        # IOCB_CMD_PREAD
        block = struct.pack("<QIIHhIQQqQII", 0, 0, 0, 0, 0, fd, attack.at, PAGE, 0, 0, 0, 0)
        request = ctypes.create_string_buffer(block)
        array = (ctypes.c_uint64 * 1)(ctypes.addressof(request))
        attack.call("io_submit", context.value, 1, ctypes.addressof(array))
        event = ctypes.create_string_buffer(32)
        attack.call("io_getevents", context.value, 1, 1, ctypes.addressof(event), 0)
        attack.result("aio", struct.unpack_from("<q", event, 16)[0])
    attack.call("io_destroy", context.value)


def io_uring(attack: Attack) -> None:
    """A read into the page, by a ring."""
    parameters = ctypes.create_string_buffer(120)
    ring = attack.call("io_uring_setup", 1, ctypes.addressof(parameters))
    if ring == -1:
        return
    tail_at, array_at, completed_at = (struct.unpack_from("<I", parameters, at)[0] for at in (44, 64, 100))
    with closing(attack.genuine_memfd()) as fd, closing(ring):
        queue = mmap.mmap(ring, PAGE, offset=0)
        entries = mmap.mmap(ring, PAGE, offset=0x1000_0000)
        struct.pack_into("<BBHiQQI", entries, 0, 22, 0, 0, fd, 0, attack.at, PAGE)  # IORING_OP_READ
        struct.pack_into("<I", queue, array_at, 0)
        struct.pack_into("<I", queue, tail_at, 1)
        attack.call("io_uring_enter", ring, 1, 1, 1, 0, 0)  # IORING_ENTER_GETEVENTS
        attack.result("io_uring", struct.unpack_from("<i", queue, completed_at + 8)[0])
        queue.close()
        entries.close()


# --------------------------------------------------------------------------------------------- processes

# clone(flags), and in the child, with nothing but registers, copy and exit:
_CLONE_AND_COPY: Final = bytes.fromhex(
    "4154"  # push r12
    "4989cc"  # mov r12, rcx       length
    "4989f0"  # mov r8, rsi        to
    "4989d1"  # mov r9, rdx        from
    "31f6"  # xor esi, esi       the same stack
    "31d2"  # xor edx, edx
    "4d31d2"  # xor r10, r10
    "b838000000"  # mov eax, 56        clone(rdi, ...)
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "7514"  # jnz parent
    "4c89c7"  # mov rdi, r8
    "4c89ce"  # mov rsi, r9
    "4c89e1"  # mov rcx, r12
    "f3a4"  # rep movsb
    "b83c000000"  # mov eax, 60        exit(0)
    "31ff"  # xor edi, edi
    "0f05"  # syscall
    "415c"  # parent: pop r12
    "c3"  # ret
)


def clone(attack: Attack, flags: int) -> None:
    """A child that stores, made with these flags."""
    source = attack.genuine()
    code = attack.map(0, PAGE, READ | WRITE | EXEC, PRIVATE | ANONYMOUS)
    ctypes.memmove(code, _CLONE_AND_COPY, len(_CLONE_AND_COPY))
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)
    attack.note("clone")
    child = kind(code)(flags | signal.SIGCHLD, attack.at, source, PAGE)
    if child > 0 and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0:
        attack.note("clone: child died")
    else:
        attack.result("clone", child)


def fork_child(attack: Attack) -> None:
    clone(attack, 0)


def fork_child_dofork(attack: Attack) -> None:
    """A child that inherits the pages after all: of its mapping no gate is known."""
    attack.call("madvise", attack.at, PAGE, 11)  # MADV_DOFORK
    clone(attack, 0)


def vfork_child(attack: Attack) -> None:
    clone(attack, CLONE_VM | CLONE_VFORK)


def clone_vm(attack: Attack) -> None:
    """Another process, in the same memory."""
    clone(attack, CLONE_VM)


# -------------------------------------------------------------------------------------------- userfaultfd

UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
UFFDIO_COPY, UFFDIO_WRITEPROTECT = 0xC028AA03, 0xC018AA06


def by_userfaultfd(attack: Attack, fd: int) -> None:
    """Register the page, have other bytes put into it, let go of it and store."""
    api = ctypes.create_string_buffer(struct.pack("<QQQ", 0xAA, 0, 0))
    attack.call("ioctl", fd, UFFDIO_API, ctypes.addressof(api))
    request = ctypes.create_string_buffer(struct.pack("<QQQQ", attack.at, PAGE, 1, 0))
    attack.call("ioctl", fd, UFFDIO_REGISTER, ctypes.addressof(request))
    attack.call("madvise", attack.at, PAGE, 4)  # MADV_DONTNEED
    source = attack.genuine()
    request = ctypes.create_string_buffer(struct.pack("<QQQQq", attack.at, source, PAGE, 0, 0))
    attack.call("ioctl", fd, UFFDIO_COPY, ctypes.addressof(request))
    request = ctypes.create_string_buffer(struct.pack("<QQ", attack.at, PAGE))
    attack.call("ioctl", fd, UFFDIO_UNREGISTER, ctypes.addressof(request))
    os.close(fd)


def own_userfaultfd(attack: Attack) -> None:
    fd = attack.call("userfaultfd", os.O_CLOEXEC | 1)
    if fd >= 0:
        by_userfaultfd(attack, fd)
    if attack.kind == "W":
        attack.store()


def dev_userfaultfd(attack: Attack) -> None:
    device = attack.open("/dev/userfaultfd", os.O_RDONLY)
    if device >= 0:
        fd = attack.call("ioctl", device, 0xAA00, os.O_CLOEXEC)
        os.close(device)
        by_userfaultfd(attack, fd)
    if attack.kind == "W":
        attack.store()


def unregister(attack: Attack) -> None:
    """Of whatever descriptor: one of them may be the gate's."""
    request = ctypes.create_string_buffer(struct.pack("<QQ", attack.at, PAGE))
    protect = ctypes.create_string_buffer(struct.pack("<QQQ", attack.at, PAGE, 0))
    for fd in range(1024):
        attack.call("ioctl", fd, UFFDIO_UNREGISTER, ctypes.addressof(request))
        attack.call("ioctl", fd, UFFDIO_WRITEPROTECT, ctypes.addressof(protect))
        attack._steps.clear()
    attack.store()


def close_descriptors(attack: Attack) -> None:
    """Whose last holder closes it, that gate is open. The launch socket's number is spared."""
    for fd in range(4, 1100):
        if fd != 1000:
            with contextlib.suppress(OSError):
                os.close(fd)
    attack.store()


def brk(attack: Attack) -> None:
    """Let the program break, or what is below it, reach the page."""
    for end in (attack.at, attack.at + PAGE):
        if attack.call("brk", end) != end:
            attack.result("brk", -errno.ENOMEM)
    attack.store()
