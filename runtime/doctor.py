"""What this machine offers a runtime, and what it does not: the facts behind ``enturbo doctor``.

Everything is looked up cheaply and without side effects. Nothing here is needed by a launch.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Any, Final

from ..shm import uffd
from ..shm.errors import EnturboError
from ..shm.layout import EPCM_ENTRY, PAGE_SIZE, SMC_SIZE
from ..shm.mapping import HUGE_PAGE
from ..shm.segment import SHM_DIRECTORY, Segment
from ..workers.sha256 import get_hasher, hasher_report
from . import landlock, seccomp
from .enforcement import MEANING, probe

CPU_FLAGS: Final = ("sha_ni", "avx2", "avx512f")


def examine() -> dict[str, dict[str, Any]]:
    """Facts by section; values are text, numbers, booleans, lists and None."""
    return {
        "machine": _machine(),
        "processors": _processors(),
        "hasher": _hasher(),
        "shared memory": _shared_memory(),
        "gates": _gates(),
        "memory cost": {
            "smc_bytes_per_starting_enclave": SMC_SIZE,
            "epcm_bytes_per_page": EPCM_ENTRY.size,
            "page_bytes": PAGE_SIZE,
        },
    }


def _machine() -> dict[str, Any]:
    from .. import __version__

    return {
        "enturbo": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def _processors() -> dict[str, Any]:
    from .host import MAX_WORKERS

    usable = len(os.sched_getaffinity(0))
    model, flags = _cpu()
    covered = platform.machine() == "x86_64"
    return {
        "model": model,
        "logical": os.cpu_count(),
        "usable": usable,
        "cpu_quota": _cpu_quota(),
        "features": [flag for flag in CPU_FLAGS if flag in flags],
        "default_workers": min(usable, MAX_WORKERS) if covered else 0,
        # Workers release pages to the enclave with plain stores; that is covered on x86-64 alone.
        "host_measures_alone": not covered,
    }


def _cpu() -> tuple[str | None, frozenset[str]]:
    """Model and feature flags of the first processor."""
    model, flags = None, frozenset[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and model is None:
                model = value.strip()
            elif name.strip() in ("flags", "Features") and not flags:
                flags = frozenset(value.split())
    return model, flags


def _cpu_quota() -> float | None:
    """Processors that the control group allows on average; None: no limit is set."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def _hasher() -> dict[str, Any]:
    report = dict(hasher_report())
    forced = os.environ.get("ENTURBO_HASHER") or None
    try:
        chosen = get_hasher()
    except EnturboError as error:
        return {"chosen": None, "problem": str(error), "ENTURBO_HASHER": forced, **report}
    return {
        "chosen": chosen.name,
        "lanes": chosen.lanes,
        "midstates": chosen.midstates,
        "ENTURBO_HASHER": forced,
        **report,
    }


def _shared_memory() -> dict[str, Any]:
    try:
        room = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        return {"path": SHM_DIRECTORY, "problem": error.strerror}
    return {
        "path": SHM_DIRECTORY,
        "size_bytes": room.f_blocks * room.f_frsize,
        "free_bytes": room.f_bavail * room.f_frsize,
        "huge_pages": _grants_huge_pages(),
    }


def _grants_huge_pages() -> bool:
    """Whether the kernel makes an EPC of huge pages; tried on one."""
    try:
        segment = Segment.create(HUGE_PAGE)
    except EnturboError:  # no room even for that
        return False
    granted = segment.huge > 0
    segment.close()
    return granted


def _gates() -> dict[str, Any]:
    _, flags = _cpu()
    found = probe()
    features = uffd.probe(user_mode_only=True)
    return {
        "enforcement": found.level,
        "which_means": MEANING[found.level],
        "missing_for_more": list(found.missing),
        "userfaultfd": uffd.probe(user_mode_only=False) != 0,
        "userfaultfd_user_mode": features != 0,
        "userfaultfd_poison": features & uffd.FEATURE_POISON != 0,
        "landlock_abi": landlock.abi(),
        "seccomp_notification": seccomp.probe(),
        "protection_keys": "ospke" in flags,
        "confidentiality": False,
    }
