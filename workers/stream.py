"""Measuring images without any EPC: their regions go through the hashers, nothing is ever materialised.

Here images become chains of SHA-256 and digests become MRENCLAVEs; the threads that hash in between are in
:mod:`enturbo.workers.crew`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..shm.layout import MAX_BLOCK, MAX_DOMAINS
from . import records
from .crew import Stream, digests_of
from .parts import StreamRegion
from .sha256 import Hasher


class StreamJob(NamedTuple):
    """An image to be measured.

    ``ssa_frame_size`` in pages, ``size`` (SECS.SIZE) in bytes, ``regions`` in the order in which they are
    added; ``domains`` and ``block`` are D and B of scheme ``enturbo`` and no part of ``sgx``.
    """

    ssa_frame_size: int
    size: int
    regions: Sequence[StreamRegion]
    scheme: str = "enturbo"
    domains: int = MAX_DOMAINS
    block: int = 16


def measure_stream(
    ssa_frame_size: int,
    size: int,
    regions: Sequence[StreamRegion],
    *,
    scheme: str = "enturbo",
    domains: int = MAX_DOMAINS,
    block: int = 16,
    workers: int = 0,
    hasher: str | Hasher | None = None,
) -> bytes:
    """MRENCLAVE, 32 bytes, of one image: what :class:`StreamJob` says, as :func:`measure_streams` does it."""
    job = StreamJob(ssa_frame_size, size, regions, scheme, domains, block)
    return measure_streams([job], workers=workers, hasher=hasher)[0]


def measure_streams(
    jobs: Sequence[StreamJob],
    *,
    workers: int = 0,
    hasher: str | Hasher | None = None,
    done: Callable[[int], None] | None = None,
) -> list[bytes]:
    """MRENCLAVEs, 32 bytes each, of several images, in the order of ``jobs``.

    Where there are more images of scheme ``sgx`` than threads, they are hashed side by side in the lanes of
    the hasher. ``workers`` threads in all, 0: the usable cores. ``done`` is told each job's number when its
    image has been hashed: in no particular order, by any of the threads, one at a time.

    Raises ValueError for an unknown scheme, odd parameters or an impossible region, EnturboError for an
    unknown hasher; the other images are given up then.
    """
    streams = [_stream(job) for job in jobs]
    found = digests_of(streams, workers=workers, hasher=hasher, done=done)
    return [
        _mrenclave(job, stream.page_count, digests)
        for job, stream, digests in zip(jobs, streams, found, strict=True)
    ]


def domain_digests(
    regions: Sequence[StreamRegion],
    domains: int,
    block: int,
    *,
    workers: int = 0,
    hasher: str | Hasher | None = None,
) -> list[bytes]:
    """The digests h_0 .. h_{D-1} of scheme ``enturbo``."""
    return digests_of([_domains(regions, domains, block)], workers=workers, hasher=hasher)[0]


def _stream(job: StreamJob) -> Stream:
    if job.scheme == "sgx":
        # One chain: how its pages are cut into blocks is of no account.
        return Stream(job.regions, [records.ecreate(job.ssa_frame_size, job.size)], MAX_BLOCK)
    if job.scheme != "enturbo":
        raise ValueError(f"scheme is enturbo or sgx, got {job.scheme!r}")
    return _domains(job.regions, job.domains, job.block)


def _domains(regions: Sequence[StreamRegion], domains: int, block: int) -> Stream:
    records.check_scheme_params(domains, block)
    return Stream(regions, [records.hashdom(domain, domains, block) for domain in range(domains)], block)


def _mrenclave(job: StreamJob, page_count: int, digests: Sequence[bytes]) -> bytes:
    if job.scheme == "sgx":
        return digests[0]
    opening = records.ecreate(job.ssa_frame_size, job.size)
    return records.merge(opening, page_count, job.domains, job.block, digests)
