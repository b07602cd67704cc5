"""Runtime: the host. It owns the EPC, the worker pool and the zygote, and launches enclaves.

Runtime ──┬── Memory     EPC pages, EPCM, launch table and SMCs (shared)
          ├── Pool       worker processes that measure
          ├── Zygote     forks enclave processes
          └── Enclave*   one start thread and one session thread each
"""

from __future__ import annotations

import atexit
import logging
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from ..shm.errors import EnturboError
from ..shm.launches import forget_claims
from ..shm.layout import PAGE_SIZE
from ..shm.memory import DEFAULT_SLOTS
from ..workers.copying import copy_into
from ..workers.pool import Pool
from ..workers.protocol import BLIND, COPIED, DONE, SCRUBBED, SPAN, News
from ..workers.sha256 import get_hasher
from ..workers.wrlock import WriteLocks
from .arena import Arena
from .enclave import Enclave
from .enforcement import choose
from .guard import Guard, Warden
from .image import EnclaveImage
from .measurement import Measurement
from .policy import Policy
from .processes import EnclaveProcess, Zygote
from .session import DEFAULT_OUTPUT_LIMIT, Channel, Ocalls, Session
from .sigstruct import Sigstruct
from .sizes import parse_size
from .spawning import enclave_spec, shadow_pages, spawn
from .spec import EnclaveSpec, GateMode, WrlockMode
from .startup import PREFERENCES, STARTUPS, Preference, Start, Strategy
from .threads import Threads
from .trace import Timeline
from .trust import check_trust

log = logging.getLogger("enturbo")
log.addHandler(logging.NullHandler())  # what is logged is the application's to show: errors are raised too

MAX_WORKERS: Final = 8
GATES: Final = ("write", "execute")
WRLOCKS: Final = ("wait", "shadow")
END_SECONDS: Final = 5.0  # for an enclave's processes to be gone; past it its pages stay quarantined

_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Runtime:
    """A simulated EPC, the workers that measure it, and the enclaves that live in it.

    Args:
        epc: size of the EPC, bytes or text such as ``"512MiB"``; shared memory, allocated in the background.
        workers: measuring processes; None: the usable cores, at most 8. 0: the host measures alone. It is
            never waited for them.
        signers, min_svn, product_id, any_signer, allow_unsigned: whom launches trust unless they say it
            themselves; see :meth:`launch`.
        gate: ``"write"`` (a page may be read when VALID, written when measured) or ``"execute"`` (neither
            read nor run before it is measured).
        ocalls: functions that handlers may call by name through ``context.ocall``, after VERIFIED.
        hasher: ``"native"``, ``"hashlib"`` or ``"reference"``; None: the best there is.
        progress_timeout: seconds without a measured block after which the workers that hold claims of the
            launch are killed. gate_timeout: seconds an enclave waits for a page (GateTimeout).
        max_worker_deaths: more than these during one launch reject it (WorkerLost).
        output_limit: bytes of stdout and stderr a call may write.
        enforcement: ``"kernel"``, ``"cooperative"``, or ``"auto"``: the highest that this kernel has, with a
            warning in the log where that is none. require_enforcement: refuse to run without.
        wrlock: what a store to a page does that is not measured yet: ``"wait"``, or ``"shadow"``: go to a
            private copy, for which a page of the EPC is reserved.
        policy: what enclaves may do once they are VERIFIED; None: write in a scratch folder, no network.

    Raises SharedMemoryFull, EnforcementUnavailable, EnturboError. Use as a context manager, or :meth:`close`.
    """

    def __init__(
        self,
        epc: int | str = "512MiB",
        workers: int | None = None,
        *,
        signers: Iterable[bytes] = (),
        min_svn: int = 0,
        product_id: int | None = None,
        any_signer: bool = False,
        allow_unsigned: bool = False,
        gate: GateMode = "write",
        ocalls: Mapping[str, Callable[..., Any]] | None = None,
        hasher: str | None = None,
        slots: int = DEFAULT_SLOTS,
        progress_timeout: float = 2.0,
        gate_timeout: float = 30.0,
        max_worker_deaths: int = 64,
        output_limit: int = DEFAULT_OUTPUT_LIMIT,
        enforcement: str = "auto",
        require_enforcement: bool = False,
        wrlock: WrlockMode = "wait",
        policy: Policy | None = None,
    ) -> None:
        if gate not in GATES:
            raise EnturboError(f"gate: expected one of {', '.join(GATES)}, found {gate!r}")
        if wrlock not in WRLOCKS:
            raise EnturboError(f"wrlock: expected one of {', '.join(WRLOCKS)}, found {wrlock!r}")
        if workers is not None and workers < 0:
            raise EnturboError(f"workers: expected a number from 0, found {workers}")
        self.enforcement = choose(enforcement, required=require_enforcement)
        self.wrlock: WrlockMode = wrlock
        self.cores = len(os.sched_getaffinity(0))
        self.hasher = get_hasher(hasher)
        # Pages handed to other processes rely on x86-64's store order; see enturbo.shm.epcm. Elsewhere the
        # host measures alone and enclaves run when they are verified.
        self.store_order = platform.machine() == "x86_64"
        if workers is None:
            workers = min(self.cores, MAX_WORKERS)
        self.workers = workers if self.store_order else 0
        self.gate, self.gate_timeout, self.progress_timeout = gate, gate_timeout, progress_timeout
        self.max_worker_deaths, self.output_limit = max_worker_deaths, output_limit
        self._trust: dict[str, Any] = {
            "signers": tuple(signers),
            "min_svn": min_svn,
            "product_id": product_id,
            "any_signer": any_signer,
            "allow_unsigned": allow_unsigned,
        }
        self.ocalls: dict[str, Callable[..., Any]] = dict(ocalls or {})
        epc_pages = -(-parse_size(epc) // PAGE_SIZE)
        if epc_pages < 1:
            raise EnturboError("epc: expected at least one page")
        self._lock = threading.Lock()
        self._launched = threading.Condition(self._lock)
        self._starting: set[int] = set()  # generations of the launches that are being copied and measured
        self._launching = 0  # launches that have a place and are not registered yet
        self._usable = True
        self._forked = False
        self._enclaves: set[Enclave] = set()
        self._by_generation: dict[int, Enclave] = {}
        self.arena = Arena(
            epc_pages,
            slots,
            self.hasher,
            ring=lambda: self._pool.ring(),
            kill_holders=lambda slot: self._pool.kill_holders(slot),
            has_workers=lambda: self._pool.ready > 0,
        )
        self.memory = self.arena.memory
        self._pool = Pool(
            self.memory, self.workers, self.hasher.name, on_news=self._on_news, on_change=self._on_change
        )
        self._warden = Warden(
            self.memory, self.enforcement, policy or Policy(), self._pool.share, self._pool.unshare
        )
        self._zygote = Zygote()
        self.threads = Threads("enturbo-start")
        self.workers_see_files = True  # until one of them has been refused the descriptors of this process
        _runtimes.add(self)
        try:
            self.arena.start()
            self._pool.start()
            self._zygote.start()
        except BaseException:
            self.close()
            raise

    # ----------------------------------------------------------------------------------------- launching

    def launch(
        self,
        image: EnclaveImage,
        sigstruct: Sigstruct | bytes | None = None,
        *,
        startup: str = "enturbo",
        prefer: Preference = "start",
        expected: Measurement | None = None,
        signers: Iterable[bytes] | None = None,
        min_svn: int | None = None,
        product_id: int | None = None,
        any_signer: bool | None = None,
        allow_unsigned: bool | None = None,
        ocalls: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Enclave:
        """Start an enclave; returns at once.

        What it must measure to comes from ``sigstruct`` (scheme, D and B stand in it), whose signer must be
        one of ``signers`` unless ``any_signer``; or from ``expected``; or ``allow_unsigned`` says that
        nothing is expected. ``startup``: ``"serial"`` or ``"enturbo"``. ``prefer``, of use to ``enturbo``
        alone: ``"start"`` copies everything first, so that the handler finds its pages early; ``"verified"``
        copies each stripe directly before it is hashed, which ends sooner.

        Raises SignatureError, UntrustedSigner, EPCExhausted, LaunchTableFull, EnturboError here; what is
        found later (MeasurementMismatch, WorkerLost, …) fails the enclave's futures and ``wait_verified``.
        """
        launched = time.monotonic_ns()
        strategy = STARTUPS.get(startup)
        if strategy is None:
            raise EnturboError(f"startup: expected one of {', '.join(STARTUPS)}, found {startup!r}")
        if prefer not in PREFERENCES:
            raise EnturboError(f"prefer: expected one of {', '.join(PREFERENCES)}, found {prefer!r}")
        self._check_usable()
        given = {
            "signers": None if signers is None else tuple(signers),
            "min_svn": min_svn,
            "product_id": product_id,
            "any_signer": any_signer,
            "allow_unsigned": allow_unsigned,
        }
        trust: dict[str, Any] = {
            name: self._trust[name] if value is None else value for name, value in given.items()
        }
        if isinstance(sigstruct, bytes | bytearray | memoryview):
            sigstruct = Sigstruct.parse(bytes(sigstruct))
        measurement = check_trust(sigstruct, expected=expected, **trust)
        timeline = Timeline(launched)
        timeline.add("verify", "host", launched, time.monotonic_ns())
        with self._lock:
            self._check_usable()
            self._launching += 1
        try:
            enclave = self._register(
                image, strategy, prefer, measurement, timeline, {**self.ocalls, **(ocalls or {})}
            )
            try:
                enclave.begin()
            except BaseException:
                enclave.close()
                raise
        finally:
            # Only now may close() look: it can end what has begun, and nothing else.
            with self._lock:
                self._launching -= 1
                self._launched.notify_all()
        return enclave

    def _register(
        self,
        image: EnclaveImage,
        strategy: Strategy,
        prefer: Preference,
        measurement: Measurement | None,
        timeline: Timeline,
        ocalls: Ocalls,
    ) -> Enclave:
        """A place and an enclave in it that :meth:`close` knows of; nothing runs yet."""
        place = self.arena.take(image.epc_pages + shadow_pages(image, self.wrlock))
        start = None
        try:
            start = Start(self, image, measurement, place, timeline, prefer)
            session = guard = None
            if image.handler is not None:
                spec = enclave_spec(image, place, self.gate, self.gate_timeout, self.wrlock)
                toucher = start.toucher if prefer == "start" else None
                guard = self._warden.guard(spec, timeline, toucher)
                session = self._session_maker(spec, guard, timeline, ocalls)
            enclave = Enclave(self, strategy, start, session, guard, timeline)
        except BaseException:
            if start is not None:
                start.close()
            self.arena.give_back(place)
            raise
        with self._lock:
            self._enclaves.add(enclave)
            self._by_generation[enclave.generation] = enclave
        return enclave

    def _session_maker(
        self, spec: EnclaveSpec, guard: Guard, timeline: Timeline, ocalls: Ocalls
    ) -> Callable[[Enclave], Session]:
        def make(enclave: Enclave) -> Session:
            return Session(
                str(spec.generation),
                lambda: self._spawn(spec, guard),
                ocalls=ocalls,
                timeline=timeline,
                output_limit=self.output_limit,
                on_end=enclave.session_ended,
            )

        return make

    def _spawn(self, spec: EnclaveSpec, guard: Guard) -> tuple[EnclaveProcess, Channel]:
        process, channel = spawn(self._zygote, self.arena, spec, guard.seal())
        guard.attach(process)
        return process, channel

    # ------------------------------------------------------------------------- what starts and ends need

    def ring(self) -> None:
        """Wake the workers."""
        self._pool.ring()

    @property
    def locks(self) -> Mapping[int, WriteLocks]:
        """The write locks of gated launches that are being measured, by generation."""
        return self._pool.locks

    @property
    def pool_deaths(self) -> int:
        """Workers that died since the runtime began."""
        return self._pool.deaths

    def note_start(self, generation: int) -> None:
        """A start begins."""
        with self._lock:
            self._starting.add(generation)

    def note_end(self, generation: int) -> None:
        """It is over, whatever came of it."""
        with self._lock:
            self._starting.discard(generation)

    @property
    def starting(self) -> int:
        """Launches that are being copied and measured."""
        return len(self._starting)

    def is_oldest(self, generation: int) -> bool:
        """Whether no older launch is being measured: workers then have none that they prefer to this one."""
        with self._lock:
            return generation <= min(self._starting, default=generation)

    @property
    def has_idle_cores(self) -> bool:
        """Whether fewer workers run than there are cores: then a host thread that measures disturbs
        nobody."""
        return self._pool.ready < self.cores

    def kill_holders(self, slot: int) -> list[int]:
        """Kill the workers that hold a claim of ``slot``."""
        return self._pool.kill_holders(slot)

    def copy_bytes(self, target: memoryview, source: memoryview) -> None:
        """Copy into the EPC, past the cache for long stretches; all stores are visible on return."""
        copy_into(target, source)

    def end_process(self, process: EnclaveProcess | None) -> bool:
        """End an enclave process and all its descendants; False when they are not gone in time."""
        if process is None or process.pidfd < 0:
            return True
        gone = self._zygote.end(process, END_SECONDS)
        if gone:
            process.close()
        return gone

    def forget_enclave(self, enclave: Enclave) -> None:
        """An enclave has ended."""
        with self._lock:
            self._enclaves.discard(enclave)
            self._by_generation.pop(enclave.generation, None)

    def _on_news(self, worker: int, news: News) -> None:
        if news.kind == SCRUBBED:
            self.arena.collect()
            return
        if news.kind == BLIND:
            self.workers_see_files = False
            return
        enclave = self._by_generation.get(news.generation)
        if enclave is None:
            return
        if news.pages and news.kind in (COPIED, SPAN):
            name = "copy" if news.kind == COPIED else "measure"
            enclave.timeline.add(name, f"worker {worker}", news.start, news.end, news.pages)
        # What a start waits for; to wake it for each span would cost a measurer more than the span's worth.
        if news.kind == DONE or (news.kind == COPIED and news.finished):
            enclave.notify()

    def _on_change(self) -> None:
        with self._lock:
            enclaves = list(self._enclaves)
        for enclave in enclaves:
            enclave.notify()

    # ------------------------------------------------------------------------------------------ the rest

    def stats(self) -> dict[str, Any]:
        """Counts of this moment: EPC pages (total, free, of the free ones dirty, quarantined), bytes of the
        EPC
        in huge pages, launches, workers. Dirty pages are scrubbed by workers in their idle time."""
        with self._lock:
            live = len(self._enclaves)
        return {
            "epc_pages": self.memory.epc.page_count,
            "epc_pages_free": self.arena.free_pages,
            "epc_pages_dirty": self.arena.dirty_pages,
            "epc_pages_quarantined": self.arena.quarantined,
            "epc_bytes_huge": self.memory.epc_segment.huge,
            "launches": self.arena.launches,
            "enclaves": live,
            "workers": self.workers,
            "workers_ready": self._pool.ready,
            "worker_deaths": self._pool.deaths,
            "hasher": self.hasher.name,
        }

    def wait_workers(self, timeout: float = 10.0) -> bool:
        """Wait until all workers have reported; launches never need this. False past ``timeout`` s."""
        return self._pool.wait_ready(timeout)

    def warm(self, timeout: float = 60.0) -> bool:
        """Wait until the whole EPC is allocated and mapped by the host and by all workers.

        It happens in the background from the beginning, and launches never wait for it (only for their own
        pages to be allocated); but a launch that comes sooner pays for its first touches itself. False past
        ``timeout`` seconds, or if no worker can be started. Raises SharedMemoryFull.
        """
        deadline = time.monotonic() + timeout
        mapped = self.arena.wait_mapped(timeout)
        return self._pool.wait_warm(max(0.0, deadline - time.monotonic())) and mapped

    def wait_scrubbed(self, timeout: float = 10.0) -> bool:
        """Wait until no pages of ended launches are left to be scrubbed; False past ``timeout`` seconds.

        For measurements alone: a launch takes clean pages where there are some, and helps where there are
        none.
        """
        return self.arena.wait_scrubbed(timeout)

    def close(self) -> None:
        """End all enclaves, workers and the zygote, give all shared memory back. Twice is fine."""
        with self._lock:
            if not self._usable:
                return
            self._usable = False
            self._launched.wait_for(lambda: self._launching == 0)
            enclaves = list(self._enclaves)
        for enclave in enclaves:
            enclave.close()
        self.threads.close()
        self._warden.pager.close()  # before the pool: it has the write locks
        self._pool.close()
        self._zygote.close(END_SECONDS)
        self._warden.close()
        self.arena.close()
        _runtimes.discard(self)

    def _check_usable(self) -> None:
        if self._forked:
            raise EnturboError("this Runtime belongs to the parent process; make one in the forked child")
        if not self._usable:
            raise EnturboError("the Runtime is closed")

    def _after_fork(self) -> None:
        """In a forked child of the host: no descriptor of the runtime stays open, or the child would keep
        claims and lifelines alive after the host's death. No lock is taken: its holder is not here."""
        self._lock = threading.Lock()  # so that this object can still be asked, and closed at exit
        if not self._usable:
            return
        self._usable, self._forked = False, True
        for enclave in list(self._enclaves):
            enclave.forget()
        self._pool.forget()
        self._zygote.forget()
        self._warden.forget()
        self.arena.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close_all() -> None:
    for runtime in list(_runtimes):
        runtime.close()


def _forked() -> None:
    forget_claims()
    for runtime in list(_runtimes):
        runtime._after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forked)
