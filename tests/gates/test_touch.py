"""A handler that runs before the copy ends: what it touches is there first, and nothing else has to be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from enturbo import EnclaveImage, Runtime
from enturbo.shm.layout import PAGE_SIZE

WAIT = float(os.environ.get("ENTURBO_TEST_WAIT", "30"))  # seconds; a bound, never a measure
PAGES = 4096
Raw = Callable[..., EnclaveImage]

READ = """
def handler(event, context):
    data = data_address(context)
    return [load(data + page * 4096) for page in event]
"""


def test_touched_blocks_are_copied_first(raw: Raw, measuring: threading.Event) -> None:
    """All workers are stopped: manifest, code and four pages of data come because they are touched."""
    content = b"".join(bytes([page % 251]) * PAGE_SIZE for page in range(PAGES))
    image = raw(READ, data=content)
    touched = [PAGES - 1, 2000, 17, 3000]
    with Runtime(epc="32MiB", workers=2, require_enforcement=True, progress_timeout=WAIT) as runtime:
        assert runtime.wait_workers()
        workers = [psutil.Process(pid) for pid in runtime._pool.pids().values()]
        for worker in workers:
            worker.suspend()
        with runtime.launch(image, expected=image.measure(), prefer="start") as enclave:
            place = enclave._start.place
            future = enclave.submit(touched)
            deadline = time.monotonic() + WAIT
            offset = image.page_count - PAGES - image.regions[-1].page_count
            first = place.first_page + offset
            epcm = runtime.memory.epcm
            while not all(epcm.is_valid(first + page, place.generation) for page in touched):
                assert time.monotonic() < deadline
                time.sleep(1e-3)
            valid = int(epcm.valid_mask(place.first_page, image.page_count, place.generation).sum())
            assert valid < PAGES // 4
            for worker in workers:
                worker.resume()
            measuring.set()
            assert future.result(WAIT) == [page % 251 for page in touched]
            copies = [span for span in enclave.timeline.spans if span.track == "pager"]
            assert sum(span.pages for span in copies) <= valid
            assert enclave.timeline.gate_waits >= len(touched)


WALK = """
def handler(event, context):
    data = data_address(context)
    return sum(load(data + page * 4096) for page in range(*event))
"""


@pytest.mark.parametrize("pages", [(0, PAGES, 1), (PAGES - 1, -1, -1)], ids=["upwards", "downwards"])
def test_accesses_in_order_are_met_ahead(
    raw: Raw, measuring: threading.Event, pages: tuple[int, int, int]
) -> None:
    """In either direction: some ten waits for 16 MiB, where 64 would come one piece at a time."""
    image = raw(WALK, data=bytes([1]) * PAGES * PAGE_SIZE)
    image.backing = None  # the host copies, and nobody measures before it is told to
    with (
        Runtime(epc="32MiB", workers=0, require_enforcement=True, progress_timeout=WAIT) as runtime,
        runtime.launch(image, expected=image.measure()) as enclave,
    ):
        future = enclave.submit(pages)
        deadline = time.monotonic() + WAIT
        while True:
            gated = enclave._guard and enclave._guard._gated
            if gated and all(mapped.all() for mapped in gated._mapped):
                break
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        # The copy may still be under way at first: then a piece ends where it does.
        assert 0 < enclave.timeline.gate_waits < 40
        measuring.set()
        assert future.result(WAIT) == PAGES
