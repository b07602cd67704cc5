"""Segments, extents, EPCM, SMC, launch table and claims, each by itself."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo import EPCExhausted, SharedMemoryFull
from enturbo.shm import layout
from enturbo.shm.epc import Extents
from enturbo.shm.epcm import Rows
from enturbo.shm.launches import Claims, Launch, holds_claim
from enturbo.shm.memory import Memory
from enturbo.shm.segment import Segment, room


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory.create(64, 4)
    while memory.allocate_step():
        pass
    yield memory
    memory.close()


def launch(generation: int = 7, domains: int = 4, pages: int = 64) -> Launch:
    return Launch(generation, layout.SCHEME_ENTURBO, domains, 2, 0, pages, 1 << 20, 1, layout.COPY_BY_HOST)


def opened(memory: Memory, slot: int = 0, generation: int = 7) -> Claims:
    claims = Claims(memory.control_segment.fd)
    assert claims.take_range(slot)
    memory.launches.open_launch(slot, launch(generation), claims)
    claims.give_range(slot)
    return claims


# ------------------------------------------------------------------------------------------------ segments


def test_segment_has_no_name_and_is_shared_by_descriptor() -> None:
    segment = Segment.create(10_000)
    with os.scandir("/dev/shm") as named:
        assert os.stat(segment.fd).st_ino not in {entry.inode() for entry in named}
    assert segment.size == 12_288
    assert segment.allocated == 12_288
    other = Segment.attach(segment.description(), segment.size)
    segment.view[5000] = 77
    assert other.view[5000] == 77
    for each in (segment, other):
        each.close()
        each.close()


def test_read_only_descriptor_cannot_be_mapped_for_writing() -> None:
    segment = Segment.create(4096)
    fd = segment.read_only()
    with pytest.raises(PermissionError):
        Segment.attach(fd, 4096)
    os.close(fd)
    segment.close()


def test_full_shared_memory_is_an_error_with_sizes() -> None:
    free, total = room()
    with pytest.raises(SharedMemoryFull) as caught:
        Segment.create(total + (1 << 30))
    assert caught.value.needed > total
    assert caught.value.total == total
    assert str(total) in str(caught.value)
    assert room()[0] == pytest.approx(free, abs=64 << 20)


# ------------------------------------------------------------------------------------------------- extents


def test_extents_exhausted_tells_needed_free_and_largest() -> None:
    extents = Extents(10)
    first, second, third = (extents.allocate(count) for count in (3, 4, 3))
    assert (first, second, third) == (0, 3, 7)
    extents.free(first, 3)
    extents.free(third, 3)
    with pytest.raises(EPCExhausted) as caught:
        extents.allocate(4)
    assert (caught.value.needed, caught.value.free, caught.value.largest) == (4, 6, 3)
    extents.free(second, 4)
    assert extents.allocate(10) == 0


def test_extents_refuse_a_double_free() -> None:
    extents = Extents(8)
    start = extents.allocate(4)
    extents.free(start, 4)
    with pytest.raises(ValueError, match="not all in use"):
        extents.free(start, 4)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_extents_never_overlap_and_coalesce(steps: list[tuple[bool, int]]) -> None:
    extents = Extents(40)
    held: dict[int, set[int]] = {}
    for allocate, number in steps:
        if allocate:
            try:
                start = extents.allocate(number)
            except EPCExhausted:
                continue
            if number:
                pages = set(range(start, start + number))
                assert pages <= set(range(40))
                assert not any(pages & other for other in held.values())
                held[start] = pages
        elif held:
            start = sorted(held)[number % len(held)]
            extents.free(start, len(held.pop(start)))
        assert extents.free_pages() == 40 - sum(map(len, held.values()))
    for start, pages in held.items():
        extents.free(start, len(pages))
    assert extents.allocate(40) == 0


# ---------------------------------------------------------------------------------------------------- EPCM


def test_epcm_valid_needs_an_owner(memory: Memory) -> None:
    epcm = memory.epcm
    assert not epcm.is_valid(3, 0) or int(epcm.entries["generation"][3]) == 0
    epcm.describe(3, 2, flags=0x203, chunks=0xFFFF, linear=9, generation=5)
    assert not epcm.is_valid(3, 5)
    epcm.set_valid(3, 1, 5)
    assert epcm.is_valid(3, 5)
    assert not epcm.is_valid(4, 5)
    assert not epcm.is_valid(3, 6)
    assert not epcm.is_released(3, 5)
    epcm.release_rows(Rows(0, 8, 3, 1, 8, 64), 0, 1, 5)
    assert epcm.is_released(3, 5)
    raw = bytes(epcm.buffer[3 * 32 : 4 * 32])
    assert struct.unpack_from("<HHB", raw) == (0x203, 0xFFFF, 0)
    assert struct.unpack_from("<IIII", raw, 8) == (9, 5, 5, 5)
    epcm.clear(3, 2)
    assert not any(epcm.buffer[3 * 32 : 5 * 32])


# ----------------------------------------------------------------------------------------------------- SMC


def test_smc_alternates_copies_and_keeps_the_newest(memory: Memory) -> None:
    opened(memory).close()
    smc = memory.launches.smc(0)
    result = None
    for blocks in range(5):
        state = bytes([blocks]) * 32
        result = smc.publish(3, 7, result, state, 64 * blocks, blocks=blocks, final=blocks == 4)
        assert smc.newest(3, 7) == (state, 64 * blocks, blocks == 4, blocks, blocks % 2)
    assert smc.newest(2, 7) is None
    assert smc.header()[2:] == (layout.SCHEME_ENTURBO, 4, 2, 64, 7)


@settings(max_examples=60)
@given(cut=st.integers(0, 47))
def test_smc_write_torn_at_any_byte_leaves_the_previous_result(cut: int) -> None:
    """A writer killed after ``cut`` bytes of the new copy: the reader takes the older one."""
    memory = Memory.create(1, 1)
    try:
        opened(memory).close()
        smc = memory.launches.smc(0)
        first = smc.publish(0, 7, None, b"a" * 32, 64, blocks=1, final=False)
        second = smc.publish(0, 7, first, b"b" * 32, 128, blocks=2, final=False)
        at = layout.PAGE_SIZE + layout.SMC_RESULTS_AT + first.copy * 48
        view = memory.control_segment.view
        before = bytes(view[at : at + 48])
        smc.publish(0, 7, second, b"c" * 32, 192, blocks=3, final=False)
        after = bytes(view[at : at + 48])
        view[at : at + 48] = after[:cut] + before[cut:]
        assert smc.newest(0, 7) == (second if after[:cut] + before[cut:] != after else smc.newest(0, 7))
    finally:
        memory.close()


def test_smc_result_of_another_generation_is_not_taken(memory: Memory) -> None:
    """The checksum's seed is the generation: a late write of an earlier launch does not count."""
    opened(memory).close()
    smc = memory.launches.smc(0)
    smc.publish(0, 6, None, b"x" * 32, 64, blocks=1, final=True)
    assert smc.newest(0, 7) is None
    assert smc.newest(0, 6) is not None


# ------------------------------------------------------------------------------------------ launches, claims


def test_opening_needs_the_range_and_resets_progress(memory: Memory) -> None:
    claims = opened(memory)
    table = memory.launches
    assert table.open_slots() == [(7, 0)]
    assert table.read(0) == launch()
    table.smc(0).raise_released(1, 5, 0, 1)
    table.fault[0] = 7
    with claims, pytest.raises(ValueError, match="is open"):
        table.open_launch(0, launch(8), claims)
    table.close_launch(0)
    assert table.open_slots() == []
    with Claims(memory.control_segment.fd) as other, pytest.raises(ValueError, match="without its range"):
        table.open_launch(0, launch(8), other)
    opened(memory, generation=8).close()
    assert table.smc(0).blocks_released(1) == 0
    assert int(table.fault[0]) == 0


def test_claims_exclude_between_descriptions(memory: Memory) -> None:
    fd = memory.control_segment.fd
    with Claims(fd) as one, Claims(fd) as two:
        assert one.claim(1, 3)
        assert not two.claim(1, 3)
        assert two.claim(1, 4)
        assert two.claim(2, 3)
        assert not one.take_range(1)
        two.give_back(1, 4)
        assert one.take_range(1)
        assert one.holds_range(1)
        one.give_range(1)
        assert two.claim(1, 3)


def test_a_claim_dies_with_its_holder(memory: Memory) -> None:
    """A killed process's claim is free, and while it lives its holder can be found by pid."""
    fd = memory.control_segment.description()
    code = f"""
import sys
from enturbo.shm.launches import Claims
claims = Claims({fd})
assert claims.claim(2, 5)
print("held", flush=True)
sys.stdin.read()
"""
    with (
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd]
        ) as holder,
        Claims(fd) as claims,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not claims.claim(2, 5)
        assert not claims.take_range(2)
        assert holds_claim(holder.pid, 2)
        assert not holds_claim(holder.pid, 1)
        assert not holds_claim(os.getpid(), 2)
        holder.kill()
        holder.wait()
        assert claims.take_range(2)
    os.close(fd)
