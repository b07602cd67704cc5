"""SGXS streams (Fortanix, ``*.sgxs``): the measurement records themselves, one after another, in a file.

::

    ECREATE     64 bytes                 first and once
    EADD        64 bytes                 a page
    EEXTEND     64 bytes, 256 of data    a chunk of the last EADD's page
    UNMEASRD    64 bytes, 256 of data    a chunk that is loaded and not measured: no part of MRENCLAVE

MRENCLAVE is SHA-256 of the stream without its UNMEASRD parts. An image gives that value only if its records
are the stream's, so what no image could say is refused: chunks or pages out of order, padding that is not
zero. The rest is what ``CanonicalSgxsReader`` of fortanix/rust-sgx demands (intel-sgx/sgxs/src/sgxs.rs).

:mod:`enturbo.runtime.formats.sgxs_stream` reads the records. Only when all of them are sound, the chunks,
which stand between headers, are moved together into a memfd.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ...shm.layout import ALL_CHUNKS, CHUNK_SIZE, CHUNKS_PER_PAGE, PAGE_SIZE
from ...shm.mapping import map_shared
from ...workers.records import EEXTEND_SIZE, HEADER_SIZE
from ..backing import SEALS, Backing
from ..region import Region
from .sgxs_stream import BATCH, Run, Stream

if TYPE_CHECKING:
    from ..image import EnclaveImage


def load(file: BinaryIO, name: str) -> EnclaveImage:
    """The image of a stream. Raises ImageFormatError, with the offset of the wrong record, and OSError."""
    from ..image import EnclaveImage

    stream = Stream(file.fileno(), name)
    ssa_frame_size, size = stream.ecreate()
    runs = list(stream.runs(size))
    regions, backing = _regions(stream, runs)
    return EnclaveImage(
        regions,
        size=size,
        ssa_frame_size=ssa_frame_size,
        backing=backing,
        details={
            "format": "sgxs",
            "stream_bytes": stream.size,
            "eextend_records": sum(run.pages * run.measured.bit_count() for run in runs),
            "unmeasrd_records": sum(run.pages * run.unmeasured.bit_count() for run in runs),
        },
    )


def _contents(stream: Stream, run: Run) -> Iterator[bytes]:
    """The contents of a run's pages, some megabytes at a time; chunks without data are zero."""
    batch = BATCH // run.page_bytes
    for first in range(0, run.pages, batch):
        count = min(batch, run.pages - first)
        data = stream.read(run.at + first * run.page_bytes, count * run.page_bytes)
        records = np.frombuffer(data, np.uint8).reshape(count, -1)[:, HEADER_SIZE:]
        pages = np.zeros((count, CHUNKS_PER_PAGE, CHUNK_SIZE), np.uint8)
        pages[:, run.chunks] = records.reshape(count, -1, EEXTEND_SIZE)[:, :, HEADER_SIZE:]
        yield pages.tobytes()


def _regions(stream: Stream, runs: Sequence[Run]) -> tuple[list[Region], Backing | None]:
    """A region a run; those with data have it in one sealed memfd, where workers can read it, too."""
    total = sum(run.pages for run in runs if run.chunks)
    if not total:
        return [_region(run, None, None) for run in runs], None
    fd = os.memfd_create("enturbo-sgxs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        at = 0
        for run in runs:
            for data in _contents(stream, run) if run.chunks else ():
                _write(fd, data, at)
                at += len(data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        backing = Backing(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(fd)
    view = map_shared(backing.fd, total * PAGE_SIZE, writable=False)
    regions, page = [], 0
    for run in runs:
        if run.chunks:
            content = view[page * PAGE_SIZE : (page + run.pages) * PAGE_SIZE]
            regions.append(_region(run, content, page))
            page += run.pages
        else:
            regions.append(_region(run, None, None))
    return regions, backing


def _region(run: Run, content: memoryview | None, page: int | None) -> Region:
    measured = bool(run.measured) if run.measured in (0, ALL_CHUNKS) else run.measured
    label = f"records from {run.at:#x} on"
    return Region(run.offset, run.pages, run.flags, content, measured=measured, file_page=page, label=label)


def _write(fd: int, data: bytes, at: int) -> None:
    """All of it: a write may be short."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
