"""The pool of worker processes: start, ring, watch, respawn.

    host threads ── ring() ──► one socket pair a worker ──► worker processes
         ▲                          ▲        │ news            │ claims, results, releases
         └── on_change() ◄── pool thread ◄───┘                 ▼
                                 └── pidfds: a death        shared memory

One thread owns the workers' life: it starts them, reads their news, notices their death and starts others.
Starting is its business alone, so nobody ever waits for a worker: the host measures until they report.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Final

from ..shm.launches import holds_claim
from ..shm.memory import Memory
from .bootstrap import child_command
from .protocol import NEWS_SIZE, READY, WARM, News, decode
from .wrlock import WriteLocks, dropping

log = logging.getLogger("enturbo.pool")

BOOT_FAILURES: Final = 3  # workers in a row that die before they report: no more are started
CLOSE_SECONDS: Final = 2.0  # for a worker to leave by itself before it is killed
RESPAWN_PAUSE: Final = 0.02
PACKAGES: Final = ("numpy", "xxhash")


class _Worker:
    """One running worker process, as the pool sees it."""

    def __init__(
        self, index: int, incarnation: int, process: subprocess.Popen[bytes], bell: socket.socket
    ) -> None:
        self.index, self.incarnation = index, incarnation
        self.process, self.bell = process, bell
        self.pidfd = os.pidfd_open(process.pid)
        self.ready = False
        self.warm = False

    def close(self) -> None:
        self.bell.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Pool:
    """``count`` workers on ``memory``. ``on_news`` hears of spans, ``on_change`` of what concerns every
    start:
    a worker that is ready, a death."""

    def __init__(
        self,
        memory: Memory,
        count: int,
        hasher: str,
        *,
        on_news: Callable[[int, News], None],
        on_change: Callable[[], None],
    ) -> None:
        self._memory, self.count, self._hasher = memory, count, hasher
        self._on_news, self._on_change = on_news, on_change
        self._lock = threading.Lock()
        self._workers: dict[int, _Worker] = {}
        self.locks: dict[int, WriteLocks] = {}  # of gated launches that are being measured, by generation
        self._incarnations = 0
        self._boot_failures = 0
        self.deaths = 0
        self._closing = threading.Event()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._host_pidfd = os.pidfd_open(os.getpid())
        self._thread = threading.Thread(target=self._run, name="enturbo-pool", daemon=True)

    def start(self) -> None:
        """Begin to start the workers; returns at once."""
        self._thread.start()

    def ring(self) -> None:
        """Wake every worker. Never blocks: a full socket means that it has not looked yet, and will."""
        with self._lock:
            for worker in self._workers.values():
                _tell(worker, b"\0")

    def share(self, locks: WriteLocks) -> None:
        """Hand the write locks of a launch to every worker, also to those that start later. Takes them.

        Nobody waits for an answer: stores that a worker does not let through are the pager's business.
        """
        with self._lock:
            self.locks[locks.generation] = locks
            for worker in self._workers.values():
                _hand(worker, locks)

    def unshare(self, generation: int) -> None:
        """The launch has been measured, or is over: let go of its write locks."""
        with self._lock:
            locks = self.locks.pop(generation, None)
            if locks is None:
                return
            locks.close()
            for worker in self._workers.values():
                _tell(worker, dropping(generation))

    def pids(self) -> dict[int, int]:
        """Worker slot -> process id of the workers that run now."""
        with self._lock:
            return {index: worker.process.pid for index, worker in self._workers.items()}

    @property
    def ready(self) -> int:
        """Workers that have reported and live."""
        with self._lock:
            return sum(worker.ready for worker in self._workers.values())

    @property
    def warm(self) -> int:
        """Workers that have the whole EPC in their page tables."""
        with self._lock:
            return sum(worker.warm for worker in self._workers.values())

    @property
    def broken(self) -> bool:
        """No worker could boot, so no more are started; the host measures alone."""
        return self._boot_failures >= BOOT_FAILURES

    def wait_ready(self, timeout: float) -> bool:
        """Wait until all workers have reported; False past ``timeout`` seconds."""
        return self._wait_for(lambda: self.ready, timeout)

    def wait_warm(self, timeout: float) -> bool:
        """Wait until all workers have mapped the whole EPC; False past ``timeout`` seconds."""
        return self._wait_for(lambda: self.warm, timeout)

    def _wait_for(self, count: Callable[[], int], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while count() < self.count:
            if time.monotonic() > deadline or self.broken or self._closing.is_set():
                return False
            time.sleep(0.002)
        return True

    def kill_holders(self, slot: int) -> list[int]:
        """SIGKILL the workers that hold a claim of ``slot``; their pids.

        For stopped or hung workers: the kernel takes a dead process's claims back.
        """
        killed = []
        with self._lock:
            for worker in self._workers.values():
                if holds_claim(worker.process.pid, slot):
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
                    killed.append(worker.process.pid)
        if killed:
            log.warning(
                "killed workers %s: they held a claim of launch slot %d past its deadline", killed, slot
            )
        return killed

    # ---------------------------------------------------------------------------------- the pool thread

    def _run(self) -> None:
        try:
            for index in range(self.count):
                if not self._closing.is_set():
                    self._spawn(index)
            while not self._closing.is_set():
                self._turn()
        except Exception:
            log.exception("the pool's thread ended: the host measures alone from now on")
            self._boot_failures = BOOT_FAILURES
            self._on_change()

    def _turn(self) -> None:
        """Wait for news or a death and deal with what came."""
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        with self._lock:
            owner = {}
            for worker in self._workers.values():
                for fd in (worker.bell.fileno(), worker.pidfd):
                    owner[fd] = worker
                    poll.register(fd, select.POLLIN)
        dead: dict[int, _Worker] = {}
        for fd, _ in poll.poll():
            if fd == self._wake_r:
                os.read(self._wake_r, 4096)
                continue
            worker = owner[fd]
            if fd == worker.pidfd:
                dead[worker.index] = worker
            else:
                self._read_news(worker)
        for worker in dead.values():
            self._bury(worker)
        if dead:
            self._on_change()

    def _read_news(self, worker: _Worker) -> None:
        while True:
            try:
                message = worker.bell.recv(NEWS_SIZE, socket.MSG_DONTWAIT)
            except OSError:
                return
            if not message:
                return  # its pidfd tells the rest
            news = decode(message)
            if news is None:
                continue
            if news.kind == READY:
                worker.ready = True
                self._boot_failures = 0
                self._on_change()
            elif news.kind == WARM:
                worker.warm = True
            else:
                self._on_news(worker.index, news)

    def _bury(self, worker: _Worker) -> None:
        """A worker died: say why, wake the others (its claims are free), start another."""
        self._read_news(worker)
        with self._lock:
            del self._workers[worker.index]
        status = worker.process.wait()
        worker.close()
        self.deaths += 1
        # Killed from outside (an OOM killer, a test) says nothing about whether workers can boot.
        if not worker.ready and status not in (-signal.SIGKILL, -signal.SIGTERM):
            self._boot_failures += 1
        log.warning("worker %d (pid %d) %s", worker.index, worker.process.pid, describe_status(status))
        self.ring()
        if self.broken:
            log.error("%d workers in a row died before they were ready: no more are started", BOOT_FAILURES)
        elif not self._closing.wait(RESPAWN_PAUSE if worker.ready else 10 * RESPAWN_PAUSE):
            self._spawn(worker.index)

    def _spawn(self, index: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = self._memory.fds()
        self._incarnations += 1
        numbers = (theirs.fileno(), os.getpid(), self._host_pidfd, index, self._incarnations, *fds)
        try:
            argv, env = child_command("enturbo.workers.worker", [*map(str, numbers), self._hasher], PACKAGES)
            process = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._host_pidfd, fds.epc, fds.epcm, fds.control),
                cwd="/",
                start_new_session=True,  # Ctrl-C at the terminal is the host's to handle
            )
            worker = _Worker(index, self._incarnations, process, ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        with self._lock:
            self._workers[index] = worker
            for locks in self.locks.values():
                _hand(worker, locks)
        # Rung now, so that a worker that starts during a launch looks at the table by itself.

    # ------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """End all workers: close their sockets, wait, kill what is left. Nothing remains. Twice is fine."""
        if self._closing.is_set():
            return
        self._closing.set()
        os.write(self._wake_w, b"\0")
        if self._thread.is_alive():
            self._thread.join()
        for worker in self._workers.values():
            worker.bell.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers.values():
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.close()
        self._workers.clear()
        self._close_own()

    def _close_own(self) -> None:
        for locks in self.locks.values():
            locks.close()
        self.locks.clear()
        for fd in (self._wake_r, self._wake_w, self._host_pidfd):
            os.close(fd)

    def forget(self) -> None:
        """In a forked child of the host: close every descriptor, touch no process."""
        self._closing.set()
        for worker in self._workers.values():
            worker.process.returncode = 0  # it is the parent's to wait for
            worker.close()
        self._workers.clear()
        self._close_own()


def _hand(worker: _Worker, locks: WriteLocks) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", locks.fd))]
    with contextlib.suppress(OSError):
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        worker.bell.sendmsg([locks.encode()], rights, flags)


def _tell(worker: _Worker, message: bytes) -> None:
    with contextlib.suppress(OSError):
        worker.bell.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
