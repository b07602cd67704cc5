"""What stands between an enclave's process and the world, seen from the host: its gate and its held calls.

             Warden: one a runtime: the level, the policy, the pager, the scratch folders
               │
spawn ─► Guard.attach ─► pages gated, calls held ─┬─ VERIFIED ─► lift (pages) ─► release (calls: Broker)
                                                  └─ REJECTED ─► reject (poison) ─► killed, gone ─► close
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Final

from ..shm.memory import Memory
from ..shm.uffd import FEATURE_POISON, Userfaultfd
from ..workers.wrlock import WriteLocks
from .broker import Broker
from .enforcement import Enforcement
from .pager import Gated, Pager
from .policy import Policy
from .processes import EnclaveProcess
from .spec import EnclaveSpec, SealSpec
from .touching import Toucher
from .trace import Timeline

log = logging.getLogger("enturbo.enclave")

SCRATCH_MODE: Final = 0o700


class Warden:
    """Guards of one runtime, and what they share.

    ``share`` and ``unshare`` hand the write locks of a launch to whoever measures, and take them back.
    """

    def __init__(
        self,
        memory: Memory,
        enforcement: Enforcement,
        policy: Policy,
        share: Callable[[WriteLocks], None],
        unshare: Callable[[int], None],
    ) -> None:
        self.memory, self.enforcement, self.policy = memory, enforcement, policy
        self.share, self.unshare = share, unshare
        self.pager = Pager()
        self._lock = threading.Lock()
        self._scratch = ""

    def guard(self, spec: EnclaveSpec, timeline: Timeline, toucher: Callable[[], Toucher] | None) -> Guard:
        """A guard for one launch. ``toucher``: makes what copies touched pages first; None: they wait for
        their turn."""
        return Guard(self, spec, timeline, toucher)

    def make_scratch(self, generation: int) -> str:
        """A new folder in which one enclave may write after VERIFIED; empty if the policy has none."""
        if not self.policy.scratch:
            return ""
        with self._lock:
            if not self._scratch:
                self._scratch = tempfile.mkdtemp(prefix="enturbo-")
        path = os.path.join(self._scratch, str(generation))
        os.mkdir(path, SCRATCH_MODE)
        return path

    def close(self) -> None:
        """End the pager and remove the scratch folders; all guards are closed."""
        self.pager.close()
        with self._lock:
            folder, self._scratch = self._scratch, ""
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def forget(self) -> None:
        """In a forked child of the host: close the copies of all descriptors."""
        self._scratch = ""
        self.pager.forget()


class Guard:
    """One enclave's gate and hold. Thread-safe: the session's thread attaches, the start's thread decides."""

    def __init__(
        self,
        warden: Warden,
        spec: EnclaveSpec,
        timeline: Timeline,
        toucher: Callable[[], Toucher] | None,
    ) -> None:
        self._warden, self._spec, self._timeline = warden, spec, timeline
        self._make_toucher = toucher
        self._toucher: Toucher | None = None
        self._lock = threading.Lock()
        self._lifted = self._released = self._rejected = False
        self._scratch = ""
        self._gated: Gated | None = None
        self._broker: Broker | None = None

    def seal(self) -> SealSpec | None:
        """How the process is to be sealed; None where the level is cooperative."""
        enforcement, policy = self._warden.enforcement, self._warden.policy
        if not enforcement.by_kernel:
            return None
        self._scratch = self._warden.make_scratch(self._spec.generation)
        return SealSpec(
            user_mode_only=enforcement.level == "kernel-user",
            features=enforcement.features,
            gated=not self._lifted,
            scratch=self._scratch,
            read=tuple(policy.read),
            write=tuple(policy.write),
        )

    def attach(self, process: EnclaveProcess) -> None:
        """The process is there, before anything was sent to it: take its gate and its held calls over."""
        with self._lock:
            if process.listener >= 0:
                self._broker = Broker(
                    process.take("listener"), process.take("memory"), process.pid, self._warden.policy
                )
                if self._released:
                    self._broker.start()
            if process.uffd >= 0:
                uffd = Userfaultfd(process.take("uffd"))
                gated = self._gated = Gated(
                    self._warden.memory.epcm, self._spec, uffd, process.address, self._timeline, self._want
                )
                if self._rejected:
                    self._poison(gated)
                elif self._lifted:
                    gated.lift()
                else:
                    gated.prime()
                    self._warden.pager.add(gated)
                    locks = gated.write_locks()
                    if locks is not None:
                        self._warden.share(locks)

    def lift(self) -> None:
        """VERIFIED (or measured, where nothing is expected): no page is gated any more."""
        with self._lock:
            self._lifted = True
            if self._gated is not None:
                self._gated.lift()
                self._retire(self._gated)

    def release(self) -> None:
        """After :meth:`lift`: answer the held calls, and those to come, by the policy."""
        with self._lock:
            self._released = True
            if self._broker is not None:
                self._broker.start()

    def reject(self) -> None:
        """REJECTED: nobody who waits for a page will ever get it. What is held stays held."""
        with self._lock:
            self._rejected = True
            if self._gated is not None:
                self._poison(self._gated)
                self._retire(self._gated)

    def close(self) -> None:
        """The processes are gone: let go of everything. May be called again."""
        with self._lock:
            if self._gated is not None:
                self._gated.end()
                self._retire(self._gated)
                self._gated.close()
            if self._broker is not None:
                self._broker.close()
            folder, self._scratch = self._scratch, ""
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def forget(self) -> None:
        """In a forked child of the host: close the copies of all descriptors. Takes no lock."""
        if self._gated is not None:
            self._gated.uffd.close()
        if self._broker is not None:
            with contextlib.suppress(OSError):
                self._broker.forget()

    def _want(self, page: int) -> None:
        """The pager's thread: somebody sleeps on a page that is not VALID."""
        if self._toucher is None and self._make_toucher is not None:
            self._toucher = self._make_toucher()
        if self._toucher is not None:
            self._toucher.want(page)

    def _poison(self, gated: Gated) -> None:
        if self._warden.enforcement.features & FEATURE_POISON:
            gated.poison()
        else:
            gated.end()

    def _retire(self, gated: Gated) -> None:
        """The pager asks for nothing any more: its lock was taken since the gate is over."""
        if self._toucher is not None:
            self._toucher.close()
        self._warden.pager.remove(gated)
        self._warden.unshare(self._spec.generation)
