"""From a launch to its process: what it must know, and the host's ends to it."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from ..shm.layout import PAGE_SIZE
from .processes import EnclaveProcess, SealSpec, Zygote
from .session import SPAWN_SECONDS, Channel
from .spec import EnclaveSpec, GateMode, Run, WrlockMode

if TYPE_CHECKING:
    from .arena import Arena, Place
    from .image import EnclaveImage


def enclave_spec(
    image: EnclaveImage, place: Place, gate: GateMode, gate_timeout: float, wrlock: WrlockMode
) -> EnclaveSpec:
    """What the enclave process must know to map its pages."""
    runs: list[Run] = []
    index = 0
    for regions, dynamic in ((image.regions, False), (image.dynamic, True)):
        for region in regions:
            runs.append(
                Run(
                    region.offset // PAGE_SIZE,
                    index,
                    region.page_count,
                    region.flags,
                    dynamic,
                    region.chunks,
                    region.content is not None or bool(region.fill),
                )
            )
            index += region.page_count
    return EnclaveSpec(
        generation=place.generation,
        first_page=place.first_page,
        page_count=place.page_count,
        stream_pages=image.page_count,
        runs=tuple(runs),
        gate=gate,
        gate_timeout=gate_timeout,
        wrlock=wrlock,
    )


def shadow_pages(image: EnclaveImage, wrlock: WrlockMode) -> int:
    """EPC pages that the private copies of an enclave may take: as many as it has measured writable ones."""
    if wrlock != "shadow" or image.handler is None:
        return 0
    return sum(region.page_count for region in image.regions if region.chunks and region.flags & 2)


def spawn(
    zygote: Zygote, arena: Arena, spec: EnclaveSpec, seal: SealSpec | None
) -> tuple[EnclaveProcess, Channel]:
    """Fork an enclave process from the zygote and keep the host's ends of its channel.

    Raises EnturboError, ZygoteLost.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    out_r, out_w = os.pipe2(os.O_CLOEXEC)
    err_r, err_w = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(out_r, False)
    os.set_blocking(err_r, False)
    channel = Channel(ours, out_r, err_r)
    try:
        process = zygote.spawn(
            spec,
            arena.memory.epc_segment.fd,
            arena.epc_read_only,
            arena.epcm_read_only,
            theirs,
            out_w,
            err_w,
            SPAWN_SECONDS,
            seal,
        )
    except BaseException:
        channel.close()
        raise
    finally:
        theirs.close()
        os.close(out_w)
        os.close(err_w)
    return process, channel
