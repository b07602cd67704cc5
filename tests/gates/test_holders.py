"""Whoever dies: an access that sleeps on a page is not let through, and nothing outlives the host."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from enturbo import Enclave, EnclaveImage, EnturboError, Runtime
from enturbo.shm.layout import PAGE_SIZE

WAIT = float(os.environ.get("ENTURBO_TEST_WAIT", "30"))  # seconds; a bound, never a measure
GENUINE, STORED = 0x11, 0xEE
PAGES = 80  # more than the host measures alone without a look at its workers
Raw = Callable[..., EnclaveImage]

STORE = f"""
def handler(event, context):
    data = data_address(context)
    load(data)
    store(data, {STORED})
    return load(data)
"""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Blocked:
    """An enclave whose store sleeps: all is copied, and nobody measures."""

    def __init__(self, runtime: Runtime, image: EnclaveImage) -> None:
        self.runtime = runtime
        self.workers = [psutil.Process(pid) for pid in runtime._pool.pids().values()]
        for worker in self.workers:
            worker.suspend()
        self.enclave: Enclave = runtime.launch(image, expected=image.measure())
        self.future = self.enclave.submit(None)
        region = next(index for index, each in enumerate(image.regions) if each.flags & 2 and each.chunks)
        before = sum(each.page_count for each in image.regions[:region])
        self.page = self.enclave._start.place.first_page + before
        until(lambda: self.enclave._guard is not None and self.enclave._guard._gated is not None)
        gated = self.enclave._guard._gated  # type: ignore[union-attr]
        until(lambda: any(wait.protected for wait in gated._waits))  # type: ignore[union-attr]
        process = self.enclave._session.process  # type: ignore[union-attr]
        assert process is not None
        self.process = psutil.Process(process.pid)

    def byte(self) -> int:
        return self.runtime.memory.epc.pages(self.page, 1)[0]


@pytest.fixture
def blocked(raw: Raw, measuring: threading.Event) -> Iterator[Blocked]:
    image = raw(STORE, data=bytes([GENUINE]) * PAGES * PAGE_SIZE)
    image.backing = None  # the host copies: its workers are stopped
    with Runtime(epc="16MiB", workers=2, require_enforcement=True, progress_timeout=WAIT) as runtime:
        assert runtime.wait_workers()
        blocked = Blocked(runtime, image)
        yield blocked
        measuring.set()
        for worker in blocked.workers:
            if worker.is_running():
                worker.kill()


def test_a_dead_zygote(blocked: Blocked) -> None:
    """The kernel kills the enclave with it, and until then the host holds the gate."""
    os.kill(blocked.runtime._zygote.pid, signal.SIGKILL)
    while is_alive(blocked.process):
        assert blocked.byte() == GENUINE
    assert blocked.byte() == GENUINE


def test_dead_workers(blocked: Blocked, measuring: threading.Event) -> None:
    """Nothing is let through by their death; those that are started instead measure, and then it is."""
    for worker in blocked.workers:
        worker.kill()
        worker.wait(WAIT)
        time.sleep(0.05)
        if not blocked.runtime.memory.epcm.is_released(blocked.page, blocked.enclave.generation):
            assert blocked.byte() == GENUINE
    measuring.set()
    assert blocked.future.result(WAIT) == STORED
    assert blocked.byte() == STORED
    assert blocked.enclave.mrenclave is not None


def test_a_closed_enclave(blocked: Blocked) -> None:
    blocked.enclave._guard.reject()  # type: ignore[union-attr]
    closing = threading.Thread(target=blocked.enclave.close)
    closing.start()
    while is_alive(blocked.process):
        assert blocked.byte() in (GENUINE, 0)
    closing.join(WAIT)
    with pytest.raises(EnturboError):
        blocked.future.result(WAIT)


HOST = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from enturbo import EnclaveImage, Runtime
from enturbo.workers.measure import Measurer
Measurer.step = lambda *arguments: time.sleep(1000)
import os, signal, threading
image = EnclaveImage.from_function(sys.argv[1], data=bytes([{GENUINE}]) * {PAGES * PAGE_SIZE}, heap="64KiB")
image.backing = None
runtime = Runtime(epc="16MiB", workers=2, require_enforcement=True, progress_timeout=1000)
assert runtime.wait_workers()
workers = list(runtime._pool.pids().values())
for pid in workers:
    os.kill(pid, signal.SIGSTOP)
enclave = runtime.launch(image, allow_unsigned=True)
enclave.submit(None)
while enclave._guard is None or enclave._guard._gated is None or not enclave._guard._gated._waits \\
        or not enclave._guard._gated._waits[-1].protected:
    time.sleep(0.001)
before = 0
for region in image.regions:
    if region.flags & 2 and region.chunks:
        break
    before += region.page_count
print(runtime.memory.epc_segment.fd, enclave._start.place.first_page + before, runtime._warden._scratch,
      runtime._zygote.pid, enclave._session.process.pid, *workers, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("also", ["nobody", "workers"])
def test_a_dead_host(raw: Raw, tmp_path: Any, also: str) -> None:
    """Its zygote holds the gate until it has killed the enclave; then nothing is left of any of it."""
    raw(STORE)  # writes the folder
    folder = next(path for path in tmp_path.iterdir() if path.name.startswith("function"))
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert host.stdout is not None
    processes: list[psutil.Process] = []
    scratch = ""
    try:
        line = host.stdout.readline().split()
        fd, page, scratch, *pids = int(line[0]), int(line[1]), line[2], *map(int, line[3:])
        processes = [psutil.Process(pid) for pid in pids]
        segment = os.open(f"/proc/{host.pid}/fd/{fd}", os.O_RDONLY)
        epc = mmap.mmap(segment, 0, prot=mmap.PROT_READ)
        os.close(segment)
        at = page * PAGE_SIZE
        assert epc[at] == GENUINE
        assert os.path.isdir(scratch)
        if also == "workers":
            for process in processes[2:]:
                process.kill()
        zygote = processes[0]
        zygote.suspend()  # so that there is time to see that it holds the gate
        host.kill()
        host.wait(WAIT)
        until(lambda: not any(is_alive(process) for process in processes[2:]))
        for _ in range(100):
            assert epc[at] == GENUINE
            time.sleep(1e-3)
        assert is_alive(processes[1])
        zygote.resume()
        deadline = time.monotonic() + WAIT
        while any(is_alive(process) for process in processes):
            assert epc[at] == GENUINE
            assert time.monotonic() < deadline
        assert epc[at] == GENUINE
        epc.close()
        until(lambda: not os.path.exists(scratch))
    finally:
        host.kill()
        host.wait(WAIT)
        host.stdout.close()
        for process in processes:
            if process.is_running():
                process.kill()
        shutil.rmtree(scratch or "/nowhere", ignore_errors=True)  # where the zygote did not come to that
