"""Where all this ran: as much as a reader needs to judge the figures, and nothing that names the machine."""

from __future__ import annotations

import datetime
import os
import platform
import ssl
from pathlib import Path

import numpy as np
import psutil

import enturbo
from enturbo.runtime.doctor import examine


def facts() -> dict[str, str]:
    """Name and value, in the order in which they are shown."""
    found = examine()
    processors, hasher = found["processors"], found["hasher"]
    quota = processors["cpu_quota"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "enturbo": enturbo.__version__,
        "processor": f"{processors['model']}, {_signature()}",
        "cores": f"{processors['usable']} usable of {processors['logical']}"
        + (f", {quota:g} on average by quota" if quota else "")
        + (", virtual machine" if _is_virtual() else ""),
        "features": ", ".join(processors["features"]) or "none of those that matter",
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "OpenSSL": ssl.OPENSSL_VERSION,
        "numpy": np.__version__,
        "native kernel": str(hasher["native_kernel"]),
        "load average before": " / ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _cpuinfo() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _signature() -> str:
    """Family, model and stepping: names of processors in virtual machines tell little."""
    known = _cpuinfo()
    parts = [
        f"{name} {known[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in known
    ]
    return " ".join(parts) or platform.machine()


def _is_virtual() -> bool:
    return "hypervisor" in _cpuinfo().get("flags", "").split()
