"""What this kernel can enforce, and what a runtime therefore relies on.

    kernel        userfaultfd of the privileged kind and the sealed process: accesses and system calls on
                  pages that are not ready sleep in the kernel; nothing gets out before VERIFIED
    kernel-user   the same with userfaultfd for user mode alone, which any user may have: a *system call* on
                  such a page fails with EFAULT instead of sleeping
    cooperative   enclaves ask before they touch; nothing stops one that does not

Chosen once, when a runtime starts. A part that is missing (an older kernel, a container that filters system
calls) lowers the whole level: a gate that a handler may unmap, or a sealed process that reads what is not
there yet, would promise what it does not keep.
"""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from typing import Final, Literal

from ..shm import uffd
from ..shm.errors import EnforcementUnavailable, EnturboError
from . import landlock, seccomp

log = logging.getLogger("enturbo")

Level = Literal["kernel", "kernel-user", "cooperative"]
ENFORCEMENTS: Final = ("auto", "kernel", "cooperative")


# What stands behind each promise, by level.
MEANING: Final[dict[Level, str]] = {
    "kernel": "accesses and system calls on pages that are not ready sleep in the kernel; sealed process",
    "kernel-user": "accesses sleep in the kernel, system calls on such pages fail; sealed process",
    "cooperative": "handlers must ask before they touch; a handler that does not is not stopped",
}


@dataclass(frozen=True)
class Enforcement:
    """A level, the userfaultfd features behind it, and what kept it from a higher one."""

    level: Level
    features: int = 0
    missing: tuple[str, ...] = ()

    @property
    def by_kernel(self) -> bool:
        """Whether the kernel enforces at all."""
        return self.level != "cooperative"


def probe() -> Enforcement:
    """The highest level that this process can have. Changes nothing; some 50 µs."""
    if platform.machine() != "x86_64":
        return Enforcement(
            "cooperative", 0, (f"the gates are made for x86-64, this is {platform.machine()}",)
        )
    missing = []
    if not landlock.abi():
        missing.append("Landlock (Linux 5.13, and enabled)")
    if not seccomp.probe():
        missing.append("seccomp user notification with killable waits (Linux 5.19)")
    if not os.path.exists("/proc/self/pagemap"):
        missing.append("/proc")
    privileged = uffd.probe(user_mode_only=False)
    features = privileged or uffd.probe(user_mode_only=True)
    if features & uffd.NEEDED != uffd.NEEDED:
        missing.append("userfaultfd with minor faults and write protection for shared memory (Linux 5.19)")
    if missing:
        return Enforcement("cooperative", 0, tuple(missing))
    features &= uffd.NEEDED | uffd.FEATURE_POISON
    if privileged:
        return Enforcement("kernel", features)
    return Enforcement("kernel-user", features, ("userfaultfd for system calls needs CAP_SYS_PTRACE",))


def choose(wanted: str, *, required: bool) -> Enforcement:
    """The level for ``wanted`` (``auto``, ``kernel`` or ``cooperative``).

    ``kernel`` and ``required`` take either kernel level and refuse a lower one. Raises
    EnforcementUnavailable, EnturboError.
    """
    if wanted not in ENFORCEMENTS:
        raise EnturboError(f"enforcement: expected one of {', '.join(ENFORCEMENTS)}, found {wanted!r}")
    if wanted == "cooperative":
        if required:
            raise EnforcementUnavailable("cooperative", ("it was asked for",))
        return Enforcement("cooperative", 0, ("it was asked for",))
    found = probe()
    if not found.by_kernel and (required or wanted == "kernel"):
        raise EnforcementUnavailable(found.level, found.missing)
    if not found.by_kernel:
        log.warning(
            "gates and hold are not enforced, handlers must cooperate: missing %s", "; ".join(found.missing)
        )
    return found
