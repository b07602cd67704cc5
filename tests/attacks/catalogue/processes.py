"""Attacks through processes: new ones, other ones, and what this one shows of itself."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from typing import Any

from .kit import SECRET, call, fork, in_child, libc, note, numbers

PR_SET_NAME, PR_SET_MM, PR_SET_MM_MAP, PR_SET_THP_DISABLE = 15, 35, 14, 41

# ---------------------------------------------------------------------------------------- new processes


def fork_child(to: dict[str, Any]) -> None:
    """That it is there is enough."""
    if fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(60)


def fork_the_old_way(to: dict[str, Any]) -> None:
    """By fork itself."""
    if call("fork") == 0:
        in_child()
        time.sleep(60)
        os._exit(0)
    time.sleep(60)


def fork_the_new_way(to: dict[str, Any]) -> None:
    """By clone3, whose flags stand behind a pointer."""
    arguments = struct.pack("<8Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    if call("clone3", arguments, len(arguments)) == 0:
        in_child()
        time.sleep(60)
        os._exit(0)
    time.sleep(60)


def run_a_program(to: dict[str, Any]) -> None:
    """By vfork and exec, as the standard library does it."""
    subprocess.run(["/bin/sh", "-c", f"echo secret > {to['path']}"], check=True)


def become_a_program(to: dict[str, Any]) -> None:
    """By exec alone."""
    os.execv("/bin/sh", ["sh", "-c", f"echo secret > {to['path']}"])


def outlive(to: dict[str, Any]) -> None:
    """A child's child that has no parent, in a session of its own, goes on writing."""
    if fork() == 0:
        os.setsid()
        if fork() == 0:
            while True:
                with open(to["path"], "a") as file:
                    file.write("secret")
                time.sleep(0.001)
        while not os.path.exists(to["path"]):
            time.sleep(0.001)
        os._exit(0)  # the other one is an orphan now, and the zygote kills those that it sees
    time.sleep(60)


def go_on_in_threads(to: dict[str, Any]) -> None:
    """Threads that try again and again, across the verdict, whatever they are told."""

    def attack(number: int) -> None:
        while True:
            try:
                if number % 2:
                    os.mkdir(f"{to['path']}-{number}-{time.monotonic_ns()}")
                else:
                    open(f"{to['path']}-{number}", "a").close()
            except OSError:
                continue

    threads = [threading.Thread(target=attack, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -------------------------------------------------------------------------------------- other processes


def kill(to: dict[str, Any]) -> None:
    """A signal."""
    os.kill(to["pid"], signal.SIGUSR1)


def kill_a_thread(to: dict[str, Any]) -> None:
    """A signal by tgkill."""
    call("tgkill", to["pid"], to["pid"], signal.SIGUSR1)


def queue_a_signal(to: dict[str, Any]) -> None:
    """A signal that carries a number."""
    info = struct.pack("<iiixxxxiiQ", signal.SIGUSR1, 0, -1, os.getpid(), os.getuid(), 42).ljust(128, b"\0")
    call("rt_sigqueueinfo", to["pid"], signal.SIGUSR1, info)


def kill_by_pidfd(to: dict[str, Any]) -> None:
    """A signal by descriptor."""
    signal.pidfd_send_signal(os.pidfd_open(to["pid"]), signal.SIGUSR1)


def have_it_signalled(to: dict[str, Any]) -> None:
    """The kernel signals the owner of a descriptor when something arrives."""
    ours, theirs = socket.socketpair()
    fcntl.fcntl(ours, fcntl.F_SETOWN, to["pid"])
    fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)
    theirs.send(SECRET)


def prioritise(to: dict[str, Any]) -> None:
    """Of a process outside."""
    os.setpriority(os.PRIO_PROCESS, to["pid"], 7)


def pin(to: dict[str, Any]) -> None:
    """A process outside to one processor."""
    os.sched_setaffinity(to["pid"], {min(os.sched_getaffinity(to["pid"]))})


def limit(to: dict[str, Any]) -> None:
    """A process outside, by prlimit."""
    resource.prlimit(to["pid"], resource.RLIMIT_NOFILE, (to["limit"], to["limit"]))


def trace(to: dict[str, Any]) -> None:
    """Stop a process outside. PTRACE_SEIZE, PTRACE_INTERRUPT."""
    call("ptrace", 0x4206, to["pid"], 0, 0)
    call("ptrace", 0x4207, to["pid"], 0, 0)
    time.sleep(60)


def write_to_its_memory(to: dict[str, Any]) -> None:
    """Of a process outside, by process_vm_writev."""
    secret = ctypes.create_string_buffer(SECRET)
    here = struct.pack("<QQ", ctypes.addressof(secret), len(SECRET))
    there = struct.pack("<QQ", to["address"], len(SECRET))
    call("process_vm_writev", to["pid"], here, 1, there, 1, 0)


def write_to_its_memory_file(to: dict[str, Any]) -> None:
    """Of a process outside, by /proc."""
    os.pwrite(os.open(f"/proc/{to['pid']}/mem", os.O_RDWR), SECRET, to["address"])


def read_its_memory(to: dict[str, Any]) -> None:
    """Of another enclave."""
    room = ctypes.create_string_buffer(len(SECRET))
    here = struct.pack("<QQ", ctypes.addressof(room), len(SECRET))
    there = struct.pack("<QQ", to["address"], len(SECRET))
    call("process_vm_readv", to["pid"], here, 1, there, 1, 0)
    note(f"read {room.raw.decode('ascii', 'replace')}")


def read_its_memory_file(to: dict[str, Any]) -> None:
    """Of another enclave, by /proc."""
    found = os.pread(os.open(f"/proc/{to['pid']}/mem", os.O_RDONLY), len(SECRET), to["address"])
    note(f"read {found.decode('ascii', 'replace')}")


def write_to_a_segment(to: dict[str, Any]) -> None:
    """The memory of all enclaves, by a descriptor of the host's, or of a worker's."""
    os.pwrite(os.open(f"/proc/{to['pid']}/fd/{to['fd']}", os.O_RDWR), SECRET, to["offset"])


# ---------------------------------------------------------------------------------------- this process


def name_itself(to: dict[str, Any]) -> None:
    """PR_SET_NAME."""
    call("prctl", PR_SET_NAME, SECRET, 0, 0, 0)


def name_itself_by_a_file(to: dict[str, Any]) -> None:
    """/proc/self/comm."""
    with open("/proc/self/comm", "w") as file:
        file.write(SECRET.decode())


def name_a_thread(to: dict[str, Any]) -> None:
    """Every thread has a name of its own."""

    def run() -> None:
        libc.prctl(PR_SET_NAME, SECRET, 0, 0, 0)
        note("named")
        time.sleep(60)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.2)


def show_arguments(to: dict[str, Any]) -> None:
    """Say that the command line stands elsewhere, where there is something else."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start_code, end_code, start_stack = (int(fields[number - 3]) for number in (26, 27, 28))
    start_data, end_data, start_brk, _, _, env_start, env_end = (
        int(fields[number - 3]) for number in range(45, 52)
    )
    where = libc.mmap
    where.restype = ctypes.c_void_p
    text = where(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
    ctypes.memmove(text, SECRET, len(SECRET))
    layout = struct.pack(
        "<12QIi",
        *(start_code, end_code, start_data, end_data, start_brk, libc.syscall(numbers["brk"], 0)),
        *(start_stack, text, text + len(SECRET), env_start, env_end, 0, 0, -1),
    )
    call("prctl", PR_SET_MM, PR_SET_MM_MAP, layout, len(layout), 0)


def set_a_flag(to: dict[str, Any]) -> None:
    """One that /proc shows: no huge pages."""
    call("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)


def set_umask(to: dict[str, Any]) -> None:
    """/proc shows nine bits of it."""
    os.umask(0o135)


def be_nice(to: dict[str, Any]) -> None:
    """Its own priority can be seen, too."""
    os.setpriority(os.PRIO_PROCESS, 0, 5)


def schedule_itself(to: dict[str, Any]) -> None:
    """And the way it is scheduled."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def leave_with_a_status(to: dict[str, Any]) -> None:
    """Eight bits."""
    os._exit(42)


def end_the_last_thread(to: dict[str, Any]) -> None:
    """The same without exit_group, which tells of the process's end."""
    call("exit", 42)


def signal_itself(to: dict[str, Any]) -> None:
    """The number of the signal that ends it."""
    signal.raise_signal(signal.SIGTERM)


def dump_core(to: dict[str, Any]) -> None:
    """A file in a folder of its choice. (Of the memory nothing but what is always in it.)"""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with open("/proc/self/coredump_filter", "w") as file:
        file.write("0")
    os.chdir(to["folder"])
    os.abort()
