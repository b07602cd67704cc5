"""One chain, measured in several plain ways, and SHA-256 of as many bytes without any records.

All ways that know records return MRENCLAVE of scheme ``sgx``, so that they can be checked against each other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import numpy as np

from enturbo import EnclaveImage
from enturbo.shm.dtypes import EPCM_DTYPE
from enturbo.shm.layout import ALL_CHUNKS, CHUNK_SIZE, PAGE_SIZE
from enturbo.workers.records import ecreate
from enturbo.workers.sha256 import Hasher, Pages, Span

from .material import FLAGS

EADD = "<8sQQ40x"
EEXTEND = "<8sQ48x"


def record_by_record(image: EnclaveImage) -> bytes:
    """One ``hashlib`` update for each header and each chunk, as fast as a Python loop gets.

    Headers stand ready and only their offsets are written; the chunks are views.
    """
    hashed = hashlib.sha256(ecreate(image.ssa_frame_size, image.size))
    update, put = hashed.update, struct.Struct("<Q").pack_into
    eadd, eextend = (
        bytearray(struct.pack(EADD, b"EADD", 0, FLAGS)),
        bytearray(struct.pack(EEXTEND, b"EEXTEND", 0)),
    )
    with _content(image) as view:
        for page in range(0, len(view), PAGE_SIZE):
            put(eadd, 8, page)
            update(eadd)
            for at in range(page, page + PAGE_SIZE, CHUNK_SIZE):
                put(eextend, 8, at)
                update(eextend)
                update(view[at : at + CHUNK_SIZE])
    return hashed.digest()


def function_by_record(image: EnclaveImage) -> bytes:
    """The same as signing tools do it (Gramine's, for one): a function a record, its header packed anew."""
    hashed = hashlib.sha256(ecreate(image.ssa_frame_size, image.size))

    def add(offset: int, flags: int) -> None:
        if offset >= image.size:
            raise ValueError(f"page at {offset:#x} of an enclave of {image.size:#x} bytes")
        hashed.update(struct.pack(EADD, b"EADD", offset, flags))

    def extend(offset: int, chunk: bytes) -> None:
        if offset >= image.size:
            raise ValueError(f"chunk at {offset:#x} of an enclave of {image.size:#x} bytes")
        if len(chunk) != CHUNK_SIZE:
            raise ValueError(f"a chunk of {len(chunk)} bytes")
        hashed.update(struct.pack(EEXTEND, b"EEXTEND", offset))
        hashed.update(chunk)

    def add_page(offset: int, page: bytes) -> None:
        add(offset, FLAGS)
        for at in range(0, PAGE_SIZE, CHUNK_SIZE):
            extend(offset + at, page[at : at + CHUNK_SIZE])

    with _content(image) as view:
        for offset in range(0, len(view), PAGE_SIZE):
            add_page(offset, bytes(view[offset : offset + PAGE_SIZE]))
    return hashed.digest()


def exact_chain(image: EnclaveImage, hasher: Hasher) -> Callable[[], bytes]:
    """One call of ``hasher`` over all pages where they lie: an exact chain with nothing around it."""
    view = _content(image)
    count = len(view) // PAGE_SIZE
    entries = np.zeros(count, EPCM_DTYPE)
    entries["flags"], entries["chunks"], entries["linear"] = FLAGS, ALL_CHUNKS, np.arange(count)
    span = Span(Pages(entries.data, view), 0, count, count, 1, count)

    def work() -> bytes:
        chain = hasher.start()
        chain.update(ecreate(image.ssa_frame_size, image.size))
        hasher.extend([chain], [span])
        return chain.digest()

    return work


def raw_openssl(data: bytes | memoryview, size: int) -> None:
    """``hashlib``'s SHA-256 of ``size`` bytes: those of ``data``, again and again."""
    hashed = hashlib.sha256()
    _feed(hashed.update, data, size)
    hashed.digest()


def raw_own(hasher: Hasher, data: bytes | memoryview, size: int) -> None:
    """The same by one lane of ``hasher``."""
    chain = hasher.start()
    _feed(chain.update, data, size)
    chain.digest()


def _feed(update: Callable[[memoryview], None], data: bytes | memoryview, size: int) -> None:
    with memoryview(data) as view:
        for at in range(0, size, len(view)):
            update(view[: min(len(view), size - at)])


def _content(image: EnclaveImage) -> memoryview:
    """The bytes of an image that is one region of whole measured pages at offset 0."""
    (region,) = image.regions
    assert region.content is not None
    assert (region.offset, region.flags, region.chunks) == (0, FLAGS, ALL_CHUNKS)
    return memoryview(region.content).cast("B")
