"""Several images measured at once: what ``EnclaveImage.measure`` and ``enturbo measure`` stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from .measurement import DEFAULT_BLOCK, DEFAULT_DOMAINS, Measurement, check_scheme

if TYPE_CHECKING:
    from .image import EnclaveImage


class MeasureJob(NamedTuple):
    """An image and how to measure it: scheme ``"enturbo"`` with D and B, or ``"sgx"``, which has neither."""

    image: EnclaveImage
    scheme: str = "enturbo"
    domains: int = DEFAULT_DOMAINS
    block: int = DEFAULT_BLOCK


def measure_images(
    jobs: Iterable[MeasureJob],
    *,
    workers: int = 0,
    hasher: str | None = None,
    done: Callable[[int], None] | None = None,
) -> list[Measurement]:
    """MRENCLAVEs of several images, in the order of ``jobs``, without any EPC.

    Faster than one after another: scheme ``sgx`` leaves nothing of one image to a second core or to the
    second lane of the native hasher, but another image can have them. Each value is that of
    ``image.measure()``.

    Args:
        jobs: images and schemes; an image may come more than once, and must stay open.
        workers: how many hash at the same time, in all; 0: as many as are of use. Never changes a value.
        hasher: ``"reference"``, ``"hashlib"`` or ``"native"``; None: the best there is.
        done: called with a job's number when its image has been hashed: in no particular order, from any
            thread, one call at a time. What it raises ends the measuring.

    Raises SchemeError, before anything is measured, and EnturboError (no such hasher).
    """
    jobs = list(jobs)
    for job in jobs:
        check_scheme(job.scheme, job.domains, job.block)
    from ..workers.stream import StreamJob, measure_streams

    digests = measure_streams(
        [
            StreamJob(image.ssa_frame_size, image.size, image.regions, scheme, domains, block)
            for image, scheme, domains, block in jobs
        ],
        workers=workers,
        hasher=hasher,
        done=done,
    )
    return [
        Measurement(digest, job.scheme, job.domains, job.block)
        for job, digest in zip(jobs, digests, strict=True)
    ]
