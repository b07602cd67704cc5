"""Every offset and size of the records in shared memory, as plain numbers.

The tables in ``enturbo.shm.layout`` are read by several processes and by C code. So the numbers stand here a
second time, on purpose: a change of a layout must be made twice.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from enturbo.shm import dtypes, layout

# record: (table, dtype or None, size, {field: (offset, size)})
PINNED: dict[str, tuple[layout.Record, np.dtype[Any] | None, int, dict[str, tuple[int, int]]]] = {
    "EPCM_ENTRY": (
        layout.EPCM_ENTRY,
        dtypes.EPCM_DTYPE,
        32,
        {
            "flags": (0, 2),
            "chunks": (2, 2),
            "hash_dom": (4, 1),
            "linear": (8, 4),
            "generation": (12, 4),
            "valid": (16, 4),
            "released": (20, 4),
            "source": (24, 8),
        },
    ),
    "SMC_HEADER": (
        layout.SMC_HEADER,
        None,
        64,
        {
            "magic": (0, 8),
            "version": (8, 4),
            "scheme": (12, 4),
            "domains": (16, 4),
            "block": (20, 4),
            "page_count": (24, 8),
            "generation": (32, 4),
        },
    ),
    "SMC_PROGRESS": (
        layout.SMC_PROGRESS,
        dtypes.SMC_PROGRESS_DTYPE,
        16,
        {"worker": (0, 4), "incarnation": (4, 4), "blocks_released": (8, 4), "blocks_hashed": (12, 4)},
    ),
    "SMC_RESULT": (
        layout.SMC_RESULT,
        dtypes.SMC_RESULT_DTYPE,
        48,
        {"state": (0, 32), "length": (32, 8), "sequence": (40, 4), "checksum": (44, 4)},
    ),
    "LAUNCH": (
        layout.LAUNCH,
        dtypes.LAUNCH_DTYPE,
        256,
        {
            "generation": (0, 4),
            "scheme": (4, 4),
            "domains": (8, 4),
            "block": (12, 4),
            "first_page": (16, 8),
            "page_count": (24, 8),
            "size": (32, 8),
            "ssa_frame_size": (40, 4),
            "copy_mode": (44, 4),
            "measurers": (52, 4),
            "copy_aborted": (56, 4),
            "group": (60, 4),
            "copy_front": (64, 8),
            "fault": (72, 4),
            "fault_reason": (76, 4),
            "copied": (128, 64),
        },
    ),
    "ARENA": (layout.ARENA, None, 4096, {"allocated": (0, 8)}),
}

BYTES = ("state", "copied")  # fields that are no integers

CONSTANTS = {
    "PAGE_SIZE": 4096,
    "CHUNK_SIZE": 256,
    "CHUNKS_PER_PAGE": 16,
    "ALL_CHUNKS": 0xFFFF,
    "MAX_DOMAINS": 32,
    "MAX_BLOCK": 1024,
    "MAX_PAIRS": 16,
    "SMC_SIZE": 4096,
    "SMC_VERSION": 1,
    "SMC_PROGRESS_AT": 64,
    "SMC_RESULTS_AT": 576,
    "FINAL_BIT": 0x8000000000000000,
    "LAUNCH_SLOT_SIZE": 8192,
    "SCHEME_SGX": 0,
    "SCHEME_ENTURBO": 1,
    "COPY_BY_HOST": 0,
    "COPY_FIRST": 1,
    "COPY_FUSED": 2,
    "SCRUB": 3,
    "SOURCE_FILE": 1 << 62,
    "SOURCE_FD_SHIFT": 40,
    "MAX_SOURCE_FD": (1 << 22) - 1,
    "MAX_SOURCE_PAGE": (1 << 40) - 2,
    "SOURCE_FILL": 1 << 63,
    "FAULT_SMC": 1,
    "FAULT_SOURCE": 2,
    "HOST_WORKER": 0xFFFFFFFF,
}


@pytest.mark.parametrize("name", PINNED)
def test_table_is_pinned(name: str) -> None:
    record, _, size, fields = PINNED[name]
    found = {field.name: (field.offset, struct.calcsize("<" + field.code)) for field in record.fields}
    assert found == fields
    assert record.size == size
    assert {field: (record.offset(field), record.struct(field).size) for field in fields} == fields


@pytest.mark.parametrize("name", PINNED)
def test_integers_are_little_endian(name: str) -> None:
    record, _, _, fields = PINNED[name]
    for field, (_, size) in fields.items():
        if field in BYTES:
            continue
        low = record.struct(field).pack(1)
        assert low == b"\x01" + bytes(size - 1), field


@pytest.mark.parametrize("name", [name for name, pinned in PINNED.items() if pinned[1] is not None])
def test_dtype_is_pinned(name: str) -> None:
    _, dtype, size, fields = PINNED[name]
    assert dtype is not None
    assert dtype.fields is not None
    assert {key: (value[1], value[0].itemsize) for key, value in dtype.fields.items()} == fields
    assert dtype.itemsize == size
    for key, value in dtype.fields.items():
        assert value[0].kind in ("SV" if key in BYTES else "u"), key


@pytest.mark.parametrize("name", [name for name, pinned in PINNED.items() if pinned[1] is not None])
def test_table_and_dtype_read_the_same_bytes(name: str) -> None:
    """The bytes 1, 2, 3, … (none 0: numpy's ``S`` drops trailing ones) give the same values through both."""
    record, dtype, size, fields = PINNED[name]
    raw = bytes(1 + i % 251 for i in range(size))
    row = np.frombuffer(raw, dtype=dtype)[0]
    for field, (offset, _) in fields.items():
        (value,) = record.struct(field).unpack_from(raw, offset)
        assert value == (row[field].tobytes() if field in BYTES else row[field]), field


def test_every_table_is_pinned() -> None:
    tables = {name for name, value in vars(layout).items() if isinstance(value, layout.Record)}
    assert tables == set(PINNED)


def test_entries_divide_the_page_and_integers_are_aligned() -> None:
    """An EPCM entry never crosses a page, and an aligned integer is one load or store."""
    assert layout.PAGE_SIZE % layout.EPCM_ENTRY.size == 0
    for record, _, _, fields in PINNED.values():
        for field, (offset, size) in fields.items():
            if size in (2, 4, 8):
                assert offset % size == 0, f"{record.name}.{field}"


def test_smc_fits_its_page_with_two_copies_of_each_result() -> None:
    end = layout.SMC_RESULTS_AT + 32 * 2 * 48
    assert end == 3648
    assert end <= layout.SMC_SIZE
    assert layout.SMC_MAGIC.to_bytes(8, "little") == b"ETNBSMC1"


def test_constants_are_pinned() -> None:
    assert {name: getattr(layout, name) for name in CONSTANTS} == CONSTANTS


def test_record_refuses_overlap_and_overflow() -> None:
    with pytest.raises(ValueError, match=r"odd\.b overlaps"):
        layout.Record("odd", 16, (("a", "I", 0), ("b", "I", 2)))
    with pytest.raises(ValueError, match="odd is 4 bytes, its fields need 8"):
        layout.Record("odd", 4, (("a", "Q", 0),))
