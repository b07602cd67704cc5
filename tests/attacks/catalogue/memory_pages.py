"""Attacks by the enclave on how its own pages are mapped. This runs inside it; see ``memory.py``."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable

from .memory import (
    ANONYMOUS,
    FIXED,
    GENUINE,
    MAYMOVE,
    MOVE_FIXED,
    PAGE,
    PRIVATE,
    READ,
    SHARED,
    WRITE,
    Attack,
    closing,
)

# ----------------------------------------------------------------------------------------- plain stores


def store(attack: Attack) -> None:
    attack.store()


def threads(attack: Attack) -> None:
    """Four at once, a quarter each."""
    quarter = PAGE // 4

    def one(number: int) -> None:
        ctypes.memmove(attack.at + number * quarter, GENUINE, quarter)

    attack.note("store")
    started = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


# --------------------------------------------------------------------------- own EPC through another mapping


def through_descriptor(attack: Attack, fd: int) -> bool:
    """If ``fd`` is the EPC: map the page once more, shared, and store to that."""
    if fd < 0:
        return False
    at = attack.map(0, PAGE, READ | WRITE, SHARED, fd, attack.event["file"])
    os.close(fd)
    if at == -1:
        return False
    attack.store(at)
    return True


def own_descriptors(attack: Attack) -> None:
    """Reopen, for writing, whatever descriptor may be left."""
    for number in [*range(64), 1000, 1001, 1002]:
        if through_descriptor(attack, attack.open(f"/proc/self/fd/{number}", os.O_RDWR)):
            return


def map_files(attack: Attack) -> None:
    """Reopen, for writing, what is mapped."""
    first, end = attack.at, attack.at + attack.event["size"]
    if attack.kind == "EPCM":
        first = attack.entry & -PAGE
        end = first + attack.event["size"]
    fd = attack.open(f"/proc/self/map_files/{first:x}-{end:x}", os.O_RDWR)
    if attack.kind != "EPCM":
        through_descriptor(attack, fd)
    elif fd >= 0:
        os.pwrite(fd, attack.event["word_value"], attack.event["file"])
        os.close(fd)


def descriptor_of_the_host(attack: Attack) -> None:
    path = f"/proc/{attack.event['host']}/fd/{attack.event['host_fd']}"
    through_descriptor(attack, attack.open(path, os.O_RDWR))


def pidfd_getfd(attack: Attack) -> None:
    pidfd = attack.call("pidfd_open", attack.event["host"], 0)
    if pidfd >= 0:
        through_descriptor(attack, attack.call("pidfd_getfd", pidfd, attack.event["host_fd"], 0))
        os.close(pidfd)


def remap_file_pages(attack: Attack) -> None:
    """Have a page of the writable mapping show another page of the same file, whoever owns it."""
    window = attack.data + PAGE
    if attack.call("remap_file_pages", window, PAGE, 0, attack.event["file"] // PAGE, 0) == 0:
        attack.store(window)


def mremap_duplicate(attack: Attack) -> None:
    """A size of 0 makes a second mapping of a shared one; as long as one likes, over what comes behind."""
    first = attack.data if attack.kind == "X" else attack.at
    behind = max(0, attack.event["file"] - attack.event["data_file"]) if attack.kind == "X" else 0
    at = attack.call("mremap", first, 0, behind + PAGE, MAYMOVE, 0)
    if at != -1:
        attack.store(at + behind)


# ------------------------------------------------------------------------------- moving and replacing pages


def mremap_away(attack: Attack) -> None:
    """A gate belongs to a place; somewhere else there is none."""
    at = attack.call("mremap", attack.at, PAGE, PAGE, MAYMOVE | MOVE_FIXED, 0x7000_0000_0000)
    if at == -1:
        return
    if attack.kind != "W":
        attack.call("mprotect", at, PAGE, READ | WRITE)
    attack.store(at)
    attack.call("mremap", at, PAGE, PAGE, MAYMOVE | MOVE_FIXED, attack.at)


def mremap_over(attack: Attack) -> None:
    attack.call("mremap", attack.genuine(), PAGE, PAGE, MAYMOVE | MOVE_FIXED, attack.at)


def map_fixed(attack: Attack) -> None:
    if attack.map(attack.at, PAGE, READ | WRITE, PRIVATE | ANONYMOUS | FIXED) != -1:
        attack.store()


def map_fixed_memfd(attack: Attack) -> None:
    with closing(attack.genuine_memfd()) as fd:
        attack.map(attack.at, PAGE, READ, SHARED | FIXED, fd)


def map_fixed_from_below(attack: Attack) -> None:
    """The first page is the unmapped one in front of the region."""
    if attack.map(attack.at - PAGE, 2 * PAGE, READ | WRITE, PRIVATE | ANONYMOUS | FIXED) != -1:
        attack.store()


def munmap(attack: Attack) -> None:
    if attack.call("munmap", attack.at, PAGE) == 0 and (
        attack.map(attack.at, PAGE, READ | WRITE, PRIVATE | ANONYMOUS) == attack.at
    ):
        attack.store()


def munmap_from_below(attack: Attack) -> None:
    if attack.call("munmap", attack.at - PAGE, 2 * PAGE) == 0 and (
        attack.map(attack.at, PAGE, READ | WRITE, PRIVATE | ANONYMOUS) == attack.at
    ):
        attack.store()


def shmat(attack: Attack) -> None:
    number = attack.call("shmget", 0, PAGE, 0o1600)
    if number < 0:
        return
    at = attack.call("shmat", number, 0, 0)
    ctypes.memmove(at, GENUINE, PAGE)
    attack.call("shmat", number, attack.at, 0o40000)  # SHM_REMAP
    attack.call("shmctl", number, 0, 0)  # IPC_RMID


# ----------------------------------------------------------------------------------- protection and advice


def mprotect(attack: Attack) -> None:
    attack.call("mprotect", attack.at, PAGE, READ | WRITE)
    attack.store()


def mprotect_from_below(attack: Attack) -> None:
    attack.call("mprotect", attack.at - PAGE, 2 * PAGE, READ | WRITE)
    attack.store()


def pkey_mprotect(attack: Attack) -> None:
    attack.call("pkey_mprotect", attack.at, PAGE, READ | WRITE, -1)
    attack.store()


def mprotect_entries(attack: Attack) -> None:
    attack.call("mprotect", attack.entry & -PAGE, PAGE, READ | WRITE)
    attack.store(attack.entry, attack.event["word_value"])


def advise(number: int) -> Callable[[Attack], None]:
    """The advice, and then the store."""

    def attack_by_advice(attack: Attack) -> None:
        attack.call("madvise", attack.at, PAGE, number)
        attack.store()

    return attack_by_advice


madvise_dontneed = advise(4)
madvise_free = advise(8)
madvise_remove = advise(9)
madvise_dofork = advise(11)
madvise_cold = advise(20)
madvise_pageout = advise(21)
madvise_populate_write = advise(23)
madvise_dontneed_locked = advise(24)
madvise_collapse = advise(25)


def madvise_guard(attack: Attack) -> None:
    """A guard takes the place of the page, and of what protects it; then it is removed."""
    attack.call("madvise", attack.at, PAGE, 102)
    attack.call("madvise", attack.at, PAGE, 103)
    attack.store()


def process_madvise(attack: Attack) -> None:
    vector = ctypes.create_string_buffer(struct.pack("<QQ", attack.at, PAGE))
    remove = ctypes.addressof(vector), 1, 9, 0
    # Without a descriptor (PIDFD_SELF_THREAD_GROUP, from Linux 6.15 on), else with one.
    if attack.call("process_madvise", -10001, *remove) == -1:
        pidfd = attack.call("pidfd_open", os.getpid(), 0)
        if pidfd >= 0:
            attack.call("process_madvise", pidfd, *remove)
            os.close(pidfd)
    attack.store()
