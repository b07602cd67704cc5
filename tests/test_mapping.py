"""Mappings at aligned addresses, huge pages and what happens without them, and an EPC made of either."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

from enturbo import EnclaveImage, Runtime
from enturbo.shm import libc, mapping
from enturbo.shm.mapping import HUGE_PAGE, address_of, map_shared, reserve
from enturbo.shm.segment import Segment

WAIT = 30.0


def mapped(address: int) -> bool:
    """Whether anything is mapped at ``address``."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        ranges = [line.split()[0].split("-") for line in maps]
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@pytest.fixture
def fd() -> Any:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 3 * HUGE_PAGE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [1, 4096, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 5, 3 * HUGE_PAGE])
def test_mapping_lives_as_long_as_its_views(fd: int, size: int) -> None:
    view = map_shared(fd, size)
    address = address_of(view)
    assert address % (HUGE_PAGE if size >= HUGE_PAGE else 4096) == 0
    part = view[size - 1 :]
    view.release()
    part[0] = 7
    assert os.pread(fd, 1, size - 1) == b"\7"
    assert mapped(address)
    del view, part
    gc.collect()
    assert not mapped(address)


def test_read_only_mapping_cannot_be_written(fd: int) -> None:
    view = map_shared(fd, 4096, writable=False)
    assert view.readonly
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        map_shared(read_only, 3 * HUGE_PAGE)
    os.close(read_only)


@pytest.mark.parametrize("remainder", [0, 4096, HUGE_PAGE - 4096])
def test_reservation_has_the_remainder_that_was_asked_for(remainder: int) -> None:
    for size in (4096, 5 * HUGE_PAGE + 4096):
        address = reserve(size, remainder)
        assert address % HUGE_PAGE == remainder
        assert mapped(address)
        assert mapped(address + size - 1)
        libc.munmap(address, size)
        assert not mapped(address)


def test_segment_without_huge_pages_is_allocated_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel, or one that grants none: ordinary pages, allocated before anybody touches them."""
    asked = []

    def refuse(address: int, length: int, advice: int) -> None:
        asked.append(advice)
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(libc, "madvise", refuse)
    segment = Segment.create(40 << 20)
    assert asked == [libc.MADV_COLLAPSE]  # once refused, not asked again
    assert segment.huge == 0
    assert segment.allocated == segment.size
    assert os.fstat(segment.fd).st_blocks * 512 >= segment.size
    assert not any(segment.view[::4096])
    segment.close()


def test_segment_counts_its_huge_pages() -> None:
    """All whole ones or none: what this kernel grants is not the test's to say."""
    segment = Segment.create(5 * HUGE_PAGE + 4096)
    assert segment.huge in (0, 5 * HUGE_PAGE)
    assert not any(segment.view[::512])
    segment.close()


def test_a_full_file_system_is_told_from_a_kernel_without_huge_pages(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    view = map_shared(fd, 3 * HUGE_PAGE)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="full"):
        mapping.allocate_huge(fd, view, 0, 3)


def test_runtime_works_where_nothing_can_be_mapped_ahead(
    make_image: Callable[..., EnclaveImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: int, length: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(libc, "madvise", refuse)
    image = make_image(300)
    with Runtime(epc="8MiB", workers=1) as runtime:
        assert runtime.warm(WAIT)
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.wait_verified(WAIT) == image.measure().digest


def test_warm_means_mapped_by_everybody(make_image: Callable[..., EnclaveImage]) -> None:
    with Runtime(epc="24MiB", workers=2) as runtime:
        assert runtime.warm(WAIT)
        assert runtime.memory.epc_allocated == 24 << 20
        for pid in ("self", *map(str, runtime._pool.pids().values())):
            assert resident(pid) >= 24 << 20, pid
        assert runtime.warm(0)
    with Runtime(epc="1MiB", workers=0) as alone:
        assert alone.warm(WAIT)


def resident(pid: str) -> int:
    """Bytes of the largest shared segment that are in the process's page tables."""
    found = [0]
    shared = False
    with open(f"/proc/{pid}/smaps", encoding="ascii") as smaps:
        for line in smaps:
            if "-" in line.split()[0]:
                shared = "/dev/shm/" in line
            elif shared and line.startswith("Rss:"):
                found.append(int(line.split()[1]) * 1024)
    return max(found)
