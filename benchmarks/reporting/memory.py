"""Memory of living enclaves: what one more of them costs, by who holds it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import psutil

from enturbo import Enclave, SigningKey

from .material import MIB, PAGE_SIZE, Signed, function_image, warm_runtime
from .rounds import Group, Say, Series
from .sizes import Sizes

SECONDS = 60.0
DATA_BYTES = 64 << 10
HEAP_BYTES = MIB
STEPS = 8  # looks on the way to the last enclave


def measure_memory(sizes: Sizes, say: Say) -> Group:
    """Bytes by number of living enclaves, each of which has answered one call.

    Sums of RSS over host, workers, zygote and enclave processes, of the last also PSS and USS. ``own``, with
    and without a name before it, is PSS without shared memory: the EPC is not in it.
    """
    key = SigningKey.generate()
    image = function_image(DATA_BYTES, HEAP_BYTES)
    signed = Signed(image, key.sign(image))
    series: Series = {}
    with (
        warm_runtime(sizes.enclaves * image.epc_pages * PAGE_SIZE, key.mrsigner) as runtime,
        contextlib.ExitStack() as living,
    ):
        pids = {"workers": list(runtime._pool.pids().values()), "zygote": [runtime._zygote.pid]}
        looks = sorted({max(1, sizes.enclaves * step // STEPS) for step in range(1, STEPS + 1)} | {1})
        for number in range(1, sizes.enclaves + 1):
            enclave: Enclave = living.enter_context(runtime.launch(*signed))
            if enclave.call(number, timeout=SECONDS) != number:
                raise RuntimeError("the handler did not return its event")
            if number in looks:
                say(f"memory: {number} of {sizes.enclaves} enclaves")
                for name, value in {"enclaves": number, **_look(pids)}.items():
                    series.setdefault(name, []).append(value)
    count = np.array(series["enclaves"])
    slopes = {
        name: float(np.polyfit(count, np.array(values), 1)[0])
        for name, values in series.items()
        if name != "enclaves" and len(count) > 1
    }
    return Group({"enclave_epc_bytes": image.epc_pages * PAGE_SIZE, "slopes": slopes}, series)


def _look(pids: dict[str, list[int]]) -> dict[str, float]:
    host = psutil.Process()
    enclaves = [child.pid for child in psutil.Process(pids["zygote"][0]).children(recursive=True)]
    everybody = {"host": [host.pid], **pids, "enclave": enclaves}
    found: dict[str, float] = {"own": 0}
    for name, numbers in everybody.items():
        maps = [_rollup(pid) for pid in numbers]
        found["own"] += sum(each["Pss"] - each["Pss_Shmem"] for each in maps)
        found[f"{name}_rss"] = sum(each["Rss"] for each in maps)
        found[f"{name}_own"] = sum(each["Pss"] - each["Pss_Shmem"] for each in maps)
        if name == "enclave":
            found["enclave_pss"] = sum(each["Pss"] for each in maps)
            found["enclave_uss"] = sum(each["Private_Clean"] + each["Private_Dirty"] for each in maps)
    return found


def _rollup(pid: int) -> dict[str, float]:
    """Bytes by name of a process's ``smaps_rollup``."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    return found
