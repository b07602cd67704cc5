"""Every record that stands in shared memory, once, as a struct table.

Standard library only: the enclave side reads EPCM entries and may not import numpy. Elsewhere
:mod:`enturbo.shm.dtypes` derives numpy dtypes from these same tables, so there is one truth about
each offset. All integers are little-endian.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

PAGE_SIZE: Final = 4096
CHUNK_SIZE: Final = 256
CHUNKS_PER_PAGE: Final = 16
ALL_CHUNKS: Final = 0xFFFF

MAX_DOMAINS: Final = 32
MAX_BLOCK: Final = 1024
MAX_PAIRS: Final = MAX_DOMAINS // 2


class Field(NamedTuple):
    """One field: its name, its struct code (``"16s"`` for bytes) and its offset in the record."""

    name: str
    code: str
    offset: int


class Record:
    """A fixed-size record: named fields at fixed offsets, padded to ``size`` bytes."""

    def __init__(self, name: str, size: int, fields: tuple[tuple[str, str, int], ...]) -> None:
        self.name = name
        self.size = size
        self.fields = tuple(Field(*field) for field in fields)
        self._by_name = {field.name: field for field in self.fields}
        end = 0
        for field in self.fields:
            if field.offset < end:
                raise ValueError(f"{name}.{field.name} overlaps the field before it")
            end = field.offset + struct.calcsize("<" + field.code)
        if end > size:
            raise ValueError(f"{name} is {size} bytes, its fields need {end}")

    def offset(self, field: str) -> int:
        """Byte offset of ``field`` in the record."""
        return self._by_name[field].offset

    def struct(self, field: str) -> struct.Struct:
        """The compiled little-endian struct of one field."""
        return struct.Struct("<" + self._by_name[field].code)


EPCM_ENTRY = Record(
    "EPCM entry",
    32,
    (
        # Written by the host before VALID: what the page is and whose.
        ("flags", "H", 0),  # SECINFO.FLAGS: R 1, W 2, X 4, page type in bits 15:8
        ("chunks", "H", 2),  # bit i: chunk i (256 bytes) is measured
        ("hash_dom", "B", 4),
        ("linear", "I", 8),  # page offset from SECS.BASEADDR, in pages
        ("generation", "I", 12),  # the launch that owns the page; 0: free
        # Written by the page's copier, after the bytes.
        ("valid", "I", 16),  # VALID <=> generation != 0 and valid == generation
        # Written by the page's measurer, after its SMC result.
        ("released", "I", 20),  # WRLOCK <=> chunks != 0 and released != generation
        # Written by the host before the launch is opened: where the page's bytes come from.
        ("source", "Q", 24),  # see SOURCE_FILE and SOURCE_FILL
    ),
)
# A page's source: 0 (it stays zero), a page of a file, or a u32 to repeat.
SOURCE_FILE: Final = 1 << 62  # | the host's descriptor of the file << SOURCE_FD_SHIFT | page number in it
SOURCE_FD_SHIFT: Final = 40
MAX_SOURCE_FD: Final = (1 << 22) - 1
MAX_SOURCE_PAGE: Final = (1 << SOURCE_FD_SHIFT) - 2  # so the last one and the next file's page 0 are no run
SOURCE_FILL: Final = 1 << 63  # | the u32

SMC_SIZE: Final = 4096
SMC_MAGIC: Final = 0x31434D53424E5445  # "ETNBSMC1" read as u64, little-endian
SMC_VERSION: Final = 1
SMC_HEADER = Record(
    "SMC header",
    64,
    (
        ("magic", "Q", 0),
        ("version", "I", 8),
        ("scheme", "I", 12),
        ("domains", "I", 16),
        ("block", "I", 20),
        ("page_count", "Q", 24),
        ("generation", "I", 32),
    ),
)
SMC_PROGRESS = Record(
    "SMC progress",
    16,
    (
        ("worker", "I", 0),  # slot of the worker that worked last on the domain; 0xFFFFFFFF: the host
        ("incarnation", "I", 4),
        ("blocks_released", "I", 8),
        ("blocks_hashed", "I", 12),  # a sign of life where nothing can be released before the digest
    ),
)
SMC_RESULT = Record(
    "SMC result",
    48,
    (
        ("state", "32s", 0),  # eight u32 words of midstate, or the digest
        ("length", "Q", 32),  # bytes hashed; bit 63: final
        ("sequence", "I", 40),  # blocks included + 1; 0: never written
        ("checksum", "I", 44),  # xxh32 of the 44 bytes before it, seed = generation
    ),
)
SMC_PROGRESS_AT: Final = SMC_HEADER.size
SMC_RESULTS_AT: Final = SMC_PROGRESS_AT + MAX_DOMAINS * SMC_PROGRESS.size
FINAL_BIT: Final = 1 << 63

# One launch slot is a header page and the launch's SMC page.
LAUNCH_SLOT_SIZE: Final = PAGE_SIZE + SMC_SIZE
SCHEME_SGX: Final = 0
SCHEME_ENTURBO: Final = 1
LAUNCH = Record(
    "launch",
    256,
    (
        # Claim range held: everything is stored before `generation`, which opens the launch.
        ("generation", "I", 0),  # 0: closed
        ("scheme", "I", 4),
        ("domains", "I", 8),
        ("block", "I", 12),
        ("first_page", "Q", 16),  # EPC page of the image's page 0
        ("page_count", "Q", 24),  # pages in the record stream
        ("size", "Q", 32),  # SECS.SIZE, bytes
        ("ssa_frame_size", "I", 40),  # pages
        ("copy_mode", "I", 44),  # who copies, and when; never changes within a launch
        # Written by the host while the launch is open.
        ("measurers", "I", 52),  # workers with a slot below this may claim
        ("copy_aborted", "I", 56),  # = generation: the copy failed, wait for nothing
        ("group", "I", 60),  # pairs that one claim covers, neighbours; never changes within a launch
        # Where the host copies: all pages below are VALID; there may be more (see EPCM_ENTRY.valid).
        ("copy_front", "Q", 64),
        # Written by any measurer, `fault` last: the launch must be rejected.
        ("fault", "I", 72),  # = generation
        ("fault_reason", "I", 76),
        # Written by the holder of a claim, after VALID: of its pairs, how many rows from the first on are
        # copied. It may be too low, where a holder died, and is never too high.
        ("copied", "64s", 128),  # MAX_PAIRS u32
    ),
)
COPY_BY_HOST: Final = 0  # the host, in ascending order but for pages that somebody waits for
COPY_FIRST: Final = 1  # holders of claims: everything is copied before it is measured
COPY_FUSED: Final = 2  # holders of claims: each stripe directly before it is hashed
SCRUB: Final = 3  # no launch: the pages of one that has ended are zeroed by holders of claims
HOST_WORKER: Final = 0xFFFFFFFF
FAULT_SMC: Final = 1  # a result covers less than what was released
FAULT_SOURCE: Final = 2  # a file of the image ended before the image, or could not be read

# One page behind the launch slots: what concerns the whole arena.
ARENA = Record("arena", PAGE_SIZE, (("allocated", "Q", 0),))  # bytes of the EPC that may be touched
