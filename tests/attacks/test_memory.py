"""Attacks on an enclave's own memory, before it is measured; by the programs ``catalogue/memory*.py``.

A tampered image runs code from one of its pages. While nothing is measured yet, the code tries to put the
genuine bytes back: into the EPC, so that the launch becomes VERIFIED, or at least into what the enclave reads
there afterwards. The page is one without W (``R``), an executable one (``X``) or a writable one (``W``);
``EPCM`` means the entry of such a page.

Each attack is run where nothing enforces, too, and reaches something there: else it would show nothing. The
table says what:

    VERIFIED  the genuine bytes are in the EPC before anything is measured, and the launch becomes that
    EPC       other bytes are there, and something else is measured than the image
    EPCM      an entry says that a page was measured
    view      the enclave reads genuine bytes; what is measured is the image

or what stops it even there:

    mapping   the page is mapped privately and from a read-only descriptor; the EPCM is from such a one, too
    closed    no descriptor of the EPC is left in the process
    children  they do not inherit the pages
    kernel    the kernel refuses it to everyone
"""

from __future__ import annotations

import json
import os
import select
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from enturbo import Enclave, EnclaveImage, MeasurementMismatch, Region, Runtime
from enturbo.runtime.syscalls import NUMBERS
from enturbo.shm.layout import EPCM_ENTRY, PAGE_SIZE
from enturbo.workers.measure import Measurer
from enturbo.workers.view import Outcome

WAIT = 30.0  # seconds; a bound on every wait here, never a measure
AFTER = 0.01  # seconds in which an attack that is stopped may still do something
PROGRAMS = sorted((Path(__file__).parent / "catalogue").glob("memory*.py"))
GENUINE = b"#" * PAGE_SIZE
TAMPERED = b"strike()\n".ljust(PAGE_SIZE, b"#")
DATA_PAGES = 4
NAMES = {number: name for name, number in NUMBERS.items()}


def build(folder: Path, **pages: bytes) -> EnclaveImage:
    """The image; ``R``, ``X`` and ``W``: the page of that kind, genuine if it is not given."""
    (folder / "catalogue").mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        shutil.copy(program, folder / "catalogue")
    (folder / "plugin").write_bytes(pages.get("R", GENUINE))
    data = pages.get("W", GENUINE) + GENUINE * (DATA_PAGES - 1)
    image = EnclaveImage.from_function(folder, handler="catalogue.memory:handler", data=data, heap="64KiB")
    # The host copies, and it measures alone: small, and in no file.
    regions = [replace(region, content=_bytes(region), file_page=None) for region in image.regions]
    regions.append(Region(regions[-1].end + PAGE_SIZE, 1, 0x205, pages.get("X", GENUINE)))
    return EnclaveImage(regions, size=1 << (regions[-1].end - 1).bit_length())


def _bytes(region: Region) -> bytes | None:
    return None if region.content is None else bytes(memoryview(region.content))


@dataclass(frozen=True)
class Images:
    """The genuine image, and one for each kind of page that is tampered with."""

    genuine: EnclaveImage
    tampered: dict[str, EnclaveImage]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("memory") / "program"
    tampered = {kind: build(folder, **{kind: TAMPERED}) for kind in "RXW"}
    return Images(build(folder), tampered)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is measured before this is set."""
    event, step = threading.Event(), Measurer.step

    def wait(measurer: Measurer, slot: int, generation: int) -> Outcome:
        assert event.wait(2 * WAIT)
        return step(measurer, slot, generation)

    monkeypatch.setattr(Measurer, "step", wait)
    yield event
    event.set()


@dataclass(frozen=True)
class Ended:
    """What became of an attack, and of its launch.

    ``reached``, before anything was measured: "EPC", "EPCM" or "view", whatever comes first; "" for nothing.
    ``stopped``: the first step that failed, and why it went on no more; "" for neither. ``verified``: whether
    the launch became that; ``right``: whether what was measured is the tampered image, to the bit.
    """

    reached: str
    stopped: str
    verified: bool
    right: bool
    steps: list[str]


class Observed:
    """One launch of a tampered image, seen from outside."""

    def __init__(self, runtime: Runtime, images: Images, means: str, kind: str) -> None:
        self.runtime, self.means, self.kind = runtime, means, kind
        page = "W" if kind == "EPCM" else kind
        self.image = images.tampered[page]
        self.tampered = self.image.measure().digest
        self.enclave: Enclave = runtime.launch(self.image, expected=images.genuine.measure())
        self.first = self.enclave._start.place.first_page
        indexes = [0]
        for region in self.image.regions:
            indexes.append(indexes[-1] + region.page_count)
        regions = dict(zip(("manifest", "code", "R", "W", "heap", "X"), self.image.regions, strict=True))
        self.index = dict(zip(regions, indexes, strict=False))
        self.future = self.enclave.submit(self._event(regions[page], regions, page))

    def _event(self, target: Region, regions: dict[str, Region], page: str) -> dict[str, Any]:
        memory, index = self.runtime.memory, self.index[page]
        entry = EPCM_ENTRY.size * index + EPCM_ENTRY.offset("released")
        file, segment, size = (self.first + index) * PAGE_SIZE, memory.epc_segment, target.size
        if self.kind == "EPCM":
            file, segment = EPCM_ENTRY.size * self.first + entry, memory.epcm_segment
            begin = EPCM_ENTRY.size * self.first & -PAGE_SIZE
            size = (
                -(-(EPCM_ENTRY.size * (self.first + self.image.epc_pages) - begin) // PAGE_SIZE) * PAGE_SIZE
            )
        (worker,) = self.runtime._pool.pids().values()
        return {
            "means": self.means,
            "kind": self.kind,
            "numbers": NUMBERS,
            "offset": target.offset,
            "size": size,
            "data": regions["W"].offset,
            "heap": regions["heap"].offset,
            "word": entry // 4,
            "word_value": self.enclave.generation.to_bytes(4, "little"),
            "file": file,
            "data_file": (self.first + self.index["W"]) * PAGE_SIZE,
            "host": os.getpid(),
            "host_fd": memory.epc_segment.fd,
            "yama": TRACING_IS_GUARDED,
            "worker": worker,
            "worker_at": _address_in(worker, segment.fd, file),
        }

    def __enter__(self) -> Observed:
        return self

    def __exit__(self, *_: object) -> None:
        self.enclave.close()

    def report(self) -> dict[str, Any]:
        """What the attack has written into the heap so far."""
        heap = self.runtime.memory.epc.pages(self.first + self.index["heap"], 16)
        text = bytes(heap).split(b"\0", 1)[0]
        try:
            report: dict[str, Any] = json.loads(text)
        except ValueError:  # nothing yet, or it is being written
            return {"steps": [], "seen": "", "done": False}
        return report

    def wait_stopped(self) -> str:
        """Until the attack is through or goes on no more; why it does not."""
        deadline = time.monotonic() + WAIT
        while True:
            if self.report()["done"]:
                return ""
            why = self._why_stopped()
            if why:
                return why
            assert time.monotonic() < deadline, self.report()
            time.sleep(1e-3)

    def _why_stopped(self) -> str:
        session, guard = self.enclave._session, self.enclave._guard
        assert session is not None
        assert guard is not None
        process = session.process
        if process is None:
            return ""
        if select.select([process.pidfd], [], [], 0)[0]:
            return "died"
        if guard._gated is not None and any(wait.protected for wait in guard._gated._waits):
            return "sleeps"
        if guard._broker is not None:
            listener, poll = guard._broker._listener, select.poll()
            poll.register(listener.fd, select.POLLIN)
            if any(events & select.POLLIN for _, events in poll.poll(0)):
                call = listener.receive()
                # A thread that is through is held, too, when it ends.
                if call is not None and NAMES[call.number] != "exit":
                    return "held: " + NAMES[call.number]
        return ""

    def reached(self) -> str:
        """What of it is not as it was copied."""
        memory, at = self.runtime.memory, self.first
        for region in self.image.regions:
            if region.chunks and bytes(memory.epc.pages(at, region.page_count)) != (
                _bytes(region) or b""
            ).ljust(region.size, b"\0"):
                return "EPC"
            at += region.page_count
        if memory.epcm.released_mask(self.first, self.image.page_count, self.enclave.generation).any():
            return "EPCM"
        return "view" if self.report()["seen"] == "genuine" else ""

    def end(self, measuring: threading.Event) -> Ended:
        """Wait for the attack, then measure."""
        try:
            why = self.wait_stopped()
            if why:
                time.sleep(AFTER)
            reached, report = self.reached(), self.report()
        finally:
            measuring.set()
        actual = None
        try:
            actual = self.enclave.wait_verified(WAIT)
            verified = True
        except MeasurementMismatch as mismatch:
            actual, verified = mismatch.actual, False
        failed = [step for step in report["steps"] if ": " in step and not step.endswith(": done")]
        last = [why if ": " in why else f"{report['steps'][-1]} {why}"] if why else []
        stopped = ", ".join(failed[:1] + last)
        return Ended(reached, stopped, verified, actual == self.tampered, report["steps"])


def _address_in(pid: int, fd: int, offset: int) -> int:
    """Where another process has mapped a byte of a file, writable."""
    inode = str(os.fstat(fd).st_ino)
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            addresses, rights, start, _, number, *_ = line.split()
            begin, end = (int(address, 16) for address in addresses.split("-"))
            if number == inode and rights == "rw-s" and 0 <= offset - int(start, 16) < end - begin:
                return begin + offset - int(start, 16)
    raise AssertionError(f"process {pid} has not mapped it")


@pytest.fixture(scope="module")
def cooperative() -> Iterator[Runtime]:
    with Runtime(epc="4MiB", workers=1, enforcement="cooperative") as runtime:
        assert runtime.wait_workers()
        yield runtime


@pytest.fixture(scope="module", params=["wait", pytest.param("shadow", marks=pytest.mark.slow)])
def enforced(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with Runtime(epc="4MiB", workers=1, require_enforcement=True, wrlock=request.param) as runtime:
        assert runtime.wait_workers()
        yield runtime


# -------------------------------------------------------------------------------------------- the catalogue

YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
TRACING_IS_GUARDED: Final = YAMA.exists() and YAMA.read_text().strip() != "0"
STOPPERS: Final = ("mapping", "closed", "children", "kernel")


@dataclass(frozen=True)
class Attack:
    """One means, for each kind of page: what it reaches without enforcement, or what stops it even there.

    ``stop``: where the kernel ends it, for a page with W: the first step that fails, and what becomes of it
    then. ``others``: the same for pages without W, where it is not what follows from their mapping.
    ``root``: kinds for which it needs privilege; ``ptrace``: whether it needs leave to trace others.
    """

    means: str
    stop: str
    W: str = ""
    R: str = ""
    X: str = ""
    EPCM: str = ""
    others: str = ""
    root: str = ""
    ptrace: bool = False

    def reaches(self, kind: str) -> str:
        """Without enforcement, with the privilege that this process has."""
        able = os.geteuid() == 0 or (
            kind not in self.root.split() and not (self.ptrace and TRACING_IS_GUARDED)
        )
        outcome: str = getattr(self, kind)
        return outcome if able and outcome not in STOPPERS else ""

    def stopped(self, kind: str, level: str, wrlock: str) -> str:
        """Where the kernel ends it."""
        if kind != "W":
            return self.others or self.stop.replace("store sleeps", "store died")
        stop = ON_LEVEL.get(level, {}).get(self.means, self.stop)
        if wrlock == "shadow":  # a store goes to the enclave's own copy
            stop = ", ".join(
                part for part in stop.split(", ") if not part.endswith(("sleeps", "EFAULT", "died"))
            )
        return stop


SLEEPS: Final = "store sleeps"


def _everywhere(means: str, stop: str, outcome: str, **more: Any) -> Attack:
    return Attack(means, stop, W=outcome, R=outcome, X=outcome, **more)


def _advice(means: str) -> Attack:
    return Attack(means, f"madvise: EPERM, {SLEEPS}", W="VERIFIED", R="mapping", X="mapping")


# By class, as docs/security.md lists them.
CATALOGUE: Final[dict[str, tuple[Attack, ...]]] = {
    "plain stores": (
        Attack("store", SLEEPS, W="VERIFIED", R="mapping", X="mapping"),
        Attack("threads", SLEEPS, W="VERIFIED", R="mapping", X="mapping"),
    ),
    "own EPC through an alias": (
        _everywhere("own_descriptors", "held: openat", "closed"),
        _everywhere("map_files", "held: openat", "VERIFIED", EPCM="EPCM", root="W R X EPCM"),
        _everywhere("descriptor_of_the_host", "held: openat", "VERIFIED"),
        _everywhere("pidfd_getfd", "held: pidfd_open", "VERIFIED", ptrace=True),
        _everywhere("remap_file_pages", "held: remap_file_pages", "VERIFIED"),
        Attack("mremap_duplicate", "mremap: ENOMEM", W="VERIFIED", R="kernel", X="VERIFIED"),
    ),
    "mremap": (
        Attack("mremap_away", "mremap: ENOMEM", W="VERIFIED", R="view", X="view"),
        _everywhere("mremap_over", "mremap: ENOMEM", "view"),
    ),
    "MAP_FIXED": (
        _everywhere("map_fixed", "mmap: EPERM", "view"),
        _everywhere("map_fixed_memfd", "mmap: EPERM", "view"),
        _everywhere("map_fixed_from_below", "mmap: EPERM", "view"),
    ),
    "munmap and mmap": (
        _everywhere("munmap", "munmap: EPERM", "view"),
        _everywhere("munmap_from_below", "munmap: EPERM", "view"),
    ),
    "shmat with SHM_REMAP": (_everywhere("shmat", "held: shmget", "view"),),
    "mprotect": (
        Attack("mprotect", f"mprotect: EPERM, {SLEEPS}", W="VERIFIED", R="view", X="view"),
        Attack("mprotect_from_below", f"mprotect: EPERM, {SLEEPS}", W="VERIFIED", R="view", X="view"),
        Attack("pkey_mprotect", f"pkey_mprotect: EPERM, {SLEEPS}", W="VERIFIED", R="view", X="view"),
        Attack("mprotect_entries", "", EPCM="mapping", others="mprotect: EACCES, store died"),
    ),
    "madvise": (
        _advice("madvise_dontneed"),
        _advice("madvise_dontneed_locked"),
        _advice("madvise_free"),
        _advice("madvise_remove"),
        _advice("madvise_dofork"),
        _advice("madvise_cold"),
        _advice("madvise_pageout"),
        _advice("madvise_populate_write"),
        _advice("madvise_collapse"),
        _advice("madvise_guard"),
    ),
    "process_madvise": (
        Attack("process_madvise", "held: process_madvise", W="VERIFIED", R="mapping", X="mapping"),
    ),
    "/proc/self/mem": (
        Attack("proc_self_mem", "held: openat", W="VERIFIED", R="view", X="view", EPCM="mapping"),
    ),
    "process_vm_writev": (
        Attack("process_vm_writev", "held: process_vm_writev", W="VERIFIED", R="mapping", X="mapping"),
        _everywhere(
            "process_vm_writev_worker", "held: process_vm_writev", "VERIFIED", EPCM="EPCM", ptrace=True
        ),
        _everywhere("proc_worker_mem", "held: openat", "VERIFIED", ptrace=True),
    ),
    "ptrace": (
        _everywhere("ptrace_worker", "held: ptrace", "VERIFIED", ptrace=True),
        Attack("ptrace_parent", "held: clone", W="VERIFIED", R="view", X="view"),
        _everywhere("ptrace_itself", "held: ptrace", "kernel"),
    ),
    "stores by the kernel": (
        Attack("read", "read sleeps", W="VERIFIED", R="mapping", X="mapping", others="read: EFAULT"),
        Attack("futex_wake_op", "futex: EFAULT", W="EPC", R="mapping", X="mapping"),
        Attack("signal_frame", "signal sleeps", W="EPC"),
        Attack("aio", "held: io_setup", W="VERIFIED", R="mapping", X="mapping"),
        Attack("io_uring", "io_uring_setup: ENOSYS", W="VERIFIED", R="mapping", X="mapping"),
    ),
    "child process": (
        _everywhere("fork_child", "held: clone", "children"),
        Attack("fork_child_dofork", "madvise: EPERM, held: clone", W="VERIFIED", R="mapping", X="mapping"),
        Attack("vfork_child", "held: clone", W="VERIFIED", R="mapping", X="mapping"),
        Attack("clone_vm", "held: clone", W="VERIFIED", R="mapping", X="mapping"),
    ),
    "userfaultfd on itself, and unregistering": (
        Attack(
            "own_userfaultfd",
            f"userfaultfd: ENOSYS, {SLEEPS}",
            W="VERIFIED",
            R="view",
            X="view",
            others="userfaultfd: ENOSYS",
        ),
        Attack(
            "dev_userfaultfd",
            f"open: EACCES, {SLEEPS}",
            W="VERIFIED",
            R="view",
            X="view",
            others="open: EACCES",
            root="R X",
        ),
        Attack("unregister", "held: ioctl", W="VERIFIED", R="mapping", X="mapping"),
        Attack("close_descriptors", SLEEPS, W="VERIFIED", R="mapping", X="mapping"),
    ),
    "brk": (Attack("brk", f"brk: ENOMEM, {SLEEPS}", W="VERIFIED", R="mapping", X="mapping"),),
}

# With userfaultfd for user mode alone the kernel itself fails on such a page where it would sleep.
ON_LEVEL: Final = {"kernel-user": {"read": "read: EFAULT", "signal_frame": "signal died"}}

RUNS: Final = [
    pytest.param(attack, kind, id=f"{attack.means}-{kind}")
    for attacks in CATALOGUE.values()
    for attack in attacks
    for kind in ("R", "X", "W", "EPCM")
    if getattr(attack, kind)
]


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "kind"), RUNS)
def test_it_works_where_nothing_enforces(
    cooperative: Runtime, images: Images, measuring: threading.Event, attack: Attack, kind: str
) -> None:
    expected = attack.reaches(kind)
    with Observed(cooperative, images, attack.means, kind) as observed:
        ended = observed.end(measuring)
        assert ended.reached == ("EPC" if expected == "VERIFIED" else expected), ended
        assert ended.verified == (expected == "VERIFIED"), ended
        assert ended.right == (expected not in ("VERIFIED", "EPC")), ended
        if ended.verified:
            assert observed.future.result(WAIT) == "genuine"


@pytest.mark.parametrize(("attack", "kind"), RUNS)
def test_the_kernel_stops_it(
    enforced: Runtime, images: Images, measuring: threading.Event, attack: Attack, kind: str
) -> None:
    with Observed(enforced, images, attack.means, kind) as observed:
        ended = observed.end(measuring)
        # A private copy is the enclave's own, and never measured.
        own = kind == "W" and enforced.wrlock == "shadow"
        assert ended.reached in (("", "view") if own else ("",)), ended
        assert not ended.verified, ended
        assert ended.right, ended
        assert ended.stopped == attack.stopped(kind, observed.enclave.enforcement, enforced.wrlock), ended
        with pytest.raises(MeasurementMismatch):
            observed.future.result(WAIT)
        assert observed.enclave.stdout == observed.enclave.stderr == b""
