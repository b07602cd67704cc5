"""The cooperative gate, against entries that the test writes as copier and measurer."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enturbo.runtime.gate import Gate
from enturbo.runtime.spec import EnclaveSpec, GateMode, Run
from enturbo.shm.errors import GateTimeout
from enturbo.shm.layout import EPCM_ENTRY, PAGE_SIZE

GENERATION = 9
R, RW = 0x201, 0x203
# Linear pages 4..7 and 8..11 follow each other, 12 is a gap, 13..14 may not be read at all.
RUNS = (
    Run(linear=4, index=0, count=4, flags=R, dynamic=False, chunks=0xFFFF),
    Run(linear=8, index=4, count=4, flags=RW, dynamic=False, chunks=0xFFFF),
    Run(linear=13, index=8, count=2, flags=0x100, dynamic=False, chunks=0),
)
PAGES = 10


class Double:
    """An enclave's memory and entries in private memory."""

    def __init__(
        self,
        *,
        gate: GateMode = "write",
        timeout: float = 0.0,
        runs: tuple[Run, ...] = RUNS,
        pages: int = PAGES,
    ) -> None:
        last = max(run.linear + run.count for run in runs)
        self.memory = bytearray((last - runs[0].linear) * PAGE_SIZE)
        self.entries = bytearray(pages * EPCM_ENTRY.size)
        spec = EnclaveSpec(GENERATION, 0, pages, pages, runs, gate, timeout)
        self.gate = Gate(spec, memoryview(self.memory), memoryview(self.entries).toreadonly(), runs[0].linear)
        for page in range(pages):
            self.set(page, generation=GENERATION, chunks=0xFFFF, flags=RW)

    def set(self, page: int, **fields: int) -> None:
        for name, value in fields.items():
            at = page * EPCM_ENTRY.size + EPCM_ENTRY.offset(name)
            EPCM_ENTRY.struct(name).pack_into(self.entries, at, value)

    def open(self, access: str, first: int, count: int) -> bool:
        """Is the access to ``count`` pages from linear page ``first`` allowed now?"""
        try:
            getattr(self.gate, access)(first * PAGE_SIZE, count * PAGE_SIZE)
        except GateTimeout:
            return False
        return True


def test_a_read_needs_valid() -> None:
    double = Double()
    assert not double.open("readable", 4, 1)
    double.set(0, valid=GENERATION)
    assert double.open("readable", 4, 1)
    assert not double.open("readable", 4, 2)


def test_another_generation_is_not_valid() -> None:
    double = Double()
    double.set(0, valid=GENERATION - 1)
    assert not double.open("readable", 4, 1)
    double.set(0, valid=GENERATION, generation=GENERATION + 1)
    assert not double.open("readable", 4, 1)


def test_a_write_needs_the_release_too() -> None:
    double = Double()
    double.set(4, valid=GENERATION)
    assert double.open("readable", 8, 1)
    assert not double.open("writable", 8, 1)
    double.set(4, released=GENERATION - 1)
    assert not double.open("writable", 8, 1)
    double.set(4, released=GENERATION)
    assert double.open("writable", 8, 1)


def test_a_release_without_valid_opens_nothing() -> None:
    double = Double()
    double.set(4, released=GENERATION)
    assert not double.open("writable", 8, 1)
    double.set(5, chunks=0)
    assert not double.open("writable", 9, 1)


def test_unmeasured_pages_have_no_write_lock() -> None:
    double = Double(gate="execute")
    double.set(4, valid=GENERATION, chunks=0)
    double.set(5, valid=GENERATION, chunks=0, flags=0x200)
    assert double.open("writable", 8, 2)
    assert double.open("readable", 8, 2)


def test_execute_reads_only_what_was_measured() -> None:
    double = Double(gate="execute")
    double.set(0, valid=GENERATION)
    assert not double.open("readable", 4, 1)
    double.set(0, released=GENERATION)
    assert double.open("readable", 4, 1)


def test_flags_and_bounds() -> None:
    gate = Double().gate
    for offset in (0, 3 * PAGE_SIZE, 12 * PAGE_SIZE, 15 * PAGE_SIZE, 1 << 40):
        with pytest.raises(ValueError, match="no page of the enclave"):
            gate.readable(offset, 1)
    with pytest.raises(ValueError, match="negative"):
        gate.readable(-1, 1)
    with pytest.raises(ValueError, match="negative"):
        gate.write_view(8 * PAGE_SIZE, -1)
    with pytest.raises(PermissionError, match="0x4000 may not be written"):
        gate.writable(4 * PAGE_SIZE, 1)
    with pytest.raises(PermissionError, match="0xd000 may not be read"):
        gate.readable(13 * PAGE_SIZE, 1)


def test_an_access_into_a_gap_fails_even_behind_open_pages() -> None:
    double = Double()
    for page in range(PAGES):
        double.set(page, valid=GENERATION)
    with pytest.raises(ValueError, match="0xc000"):
        double.gate.readable(11 * PAGE_SIZE, PAGE_SIZE + 1)


def test_views() -> None:
    double = Double()
    for page in range(PAGES):
        double.set(page, valid=GENERATION, released=GENERATION)
    double.memory[4 * PAGE_SIZE - 3 : 4 * PAGE_SIZE + 3] = b"abcdef"
    view = double.gate.read_view(8 * PAGE_SIZE - 3, 6)
    assert bytes(view) == b"abcdef"
    assert view.readonly
    double.gate.write_view(8 * PAGE_SIZE, 3)[:] = b"DEF"
    assert bytes(view) == b"abcDEF"
    assert len(double.gate.read_view(8 * PAGE_SIZE, 0)) == 0


def test_a_timeout_tells_page_and_reason() -> None:
    double = Double(timeout=0.01)
    double.set(4, valid=GENERATION)
    with pytest.raises(GateTimeout, match=r"write at enclave offset 0x8000: its page was not released"):
        double.gate.writable(8 * PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(GateTimeout, match=r"read at enclave offset 0x9000: its page was not VALID"):
        double.gate.readable(8 * PAGE_SIZE, 2 * PAGE_SIZE)


def test_a_reader_sees_the_bytes_that_were_there_before_valid() -> None:
    double = Double(timeout=20)
    seen: list[bytes] = []
    reader = threading.Thread(
        target=lambda: seen.append(bytes(double.gate.read_view(4 * PAGE_SIZE, 4 * PAGE_SIZE)))
    )
    reader.start()
    for page in range(4):
        double.memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([page + 1]) * PAGE_SIZE
        double.set(page, valid=GENERATION)
    reader.join(20)
    assert seen == [b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(4))]


def test_a_large_span_is_checked_whole() -> None:
    pages = 10_000
    runs = (Run(0, 0, pages, RW, False, 0),)
    double = Double(runs=runs, pages=pages)
    for page in range(pages):
        double.set(page, valid=GENERATION, chunks=0)
    double.set(pages - 1, valid=0)
    assert not double.open("writable", 0, pages)
    assert double.open("writable", 0, pages - 1)
    double.set(pages - 1, valid=GENERATION)
    assert double.open("writable", 0, pages)


_STATE = st.fixed_dictionaries(
    {
        "generation": st.sampled_from([0, GENERATION, GENERATION, GENERATION]),
        "valid": st.sampled_from([0, GENERATION - 1, GENERATION, GENERATION, GENERATION]),
        "released": st.sampled_from([0, GENERATION - 1, GENERATION, GENERATION]),
        "chunks": st.sampled_from([0, 0, 1, 0xFFFF]),
        "flags": st.sampled_from([R, RW]),
    }
)


@given(
    st.lists(_STATE, min_size=8, max_size=8),
    st.lists(
        st.tuples(st.sampled_from(["readable", "writable"]), st.integers(0, 7), st.integers(1, 8)), max_size=6
    ),
    st.sampled_from(["write", "execute"]),
)
def test_any_entries(states: list[dict[str, int]], accesses: list[Any], mode: GateMode) -> None:
    """The gate opens exactly when each page by itself may be used, in whatever order one asks."""
    double = Double(gate=mode, runs=(Run(4, 0, 8, RW, False, 0),), pages=8)
    for page, state in enumerate(states):
        double.set(page, **state)

    def allowed(access: str, state: dict[str, int]) -> bool:
        valid = state["generation"] == GENERATION == state["valid"]
        unlocked = state["chunks"] == 0 or state["released"] == GENERATION
        return valid and (unlocked or (access == "readable" and mode == "write"))

    for access, first, count in accesses:
        span = states[first : first + count]
        assert double.open(access, 4 + first, len(span)) == all(allowed(access, state) for state in span)
