"""One enclave's life, seen from the host.

    CREATED ─► COPYING ─► MEASURING ─► MEASURED ─► VERIFIED ─► DESTROYED
                  └──────────┴─────────────┴─────► REJECTED

A thread of its own carries the start out. REJECTED is reached in this order and no other: the process and
all its descendants are gone, then its output is dropped unread, then the pages are scrubbed, then they are
free. Dropping first would let a dying enclave write into the next one's buffer.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from ..shm.errors import EnclaveDestroyed, EnturboError, LaunchTimeout, NoHandler, UntrustedSigner
from ..workers.pool import describe_status
from .guard import Guard
from .session import Session
from .startup import Start, Strategy
from .threads import Task
from .trace import Timeline

if TYPE_CHECKING:
    from .host import Runtime

log = logging.getLogger("enturbo.enclave")

CLOSE_SECONDS: Final = 10.0  # for a start that was cancelled to unwind


class EnclaveState(enum.StrEnum):
    """Where an enclave stands."""

    CREATED = "CREATED"
    COPYING = "COPYING"
    MEASURING = "MEASURING"
    MEASURED = "MEASURED"
    VERIFIED = "VERIFIED"
    REJECTED = "REJECTED"
    DESTROYED = "DESTROYED"

    def __str__(self) -> str:
        return self.value


class Enclave:
    """A started enclave. Made by :meth:`Runtime.launch`; a context manager that closes it."""

    def __init__(
        self,
        host: Runtime,
        strategy: Strategy,
        start: Start,
        session: Callable[[Enclave], Session] | None,
        guard: Guard | None,
        timeline: Timeline,
    ) -> None:
        self._host, self._strategy, self._start, self._guard = host, strategy, start, guard
        self.timeline = timeline
        self._condition = threading.Condition()
        self._state = EnclaveState.CREATED
        self._mrenclave: bytes | None = None
        self._error: EnturboError | None = None
        self._cause: EnturboError | None = None  # what ended the session by itself
        self._closed = False
        self._ended = threading.Event()  # process gone, pages back
        self._end_lock = threading.Lock()
        self._session = session(self) if session is not None else None
        self._thread = Task(host.threads, self._run, f"enturbo-start-{start.place.generation}")

    # -------------------------------------------------------------------------------------- what users see

    @property
    def state(self) -> EnclaveState:
        """CREATED, COPYING, MEASURING, MEASURED, VERIFIED, REJECTED or DESTROYED."""
        return self._state

    @property
    def mrenclave(self) -> bytes | None:
        """The measured value (32 bytes); None until it is measured."""
        return self._mrenclave

    @property
    def generation(self) -> int:
        """The launch's number, unique in its runtime."""
        return self._start.place.generation

    @property
    def enforcement(self) -> str:
        """What stands behind gates and hold: ``kernel``, ``kernel-user`` or ``cooperative``.

        See :mod:`enturbo.runtime.enforcement`.
        """
        return self._host.enforcement.level

    @property
    def stdout(self) -> bytes:
        """What the enclave printed, as far as it has been released (the last ``output_limit`` bytes)."""
        return bytes(self._session.output["stdout"]) if self._session else b""

    @property
    def stderr(self) -> bytes:
        """What the enclave wrote to stderr, likewise."""
        return bytes(self._session.output["stderr"]) if self._session else b""

    def submit(self, event: Any, *, timeout: float | None = None) -> Future[Any]:
        """Call the handler with ``event``; at once, also while the enclave is still being measured.

        The future's result is released only after VERIFIED. Calls run one at a time in order of
        submission. ``timeout``: seconds the handler may take, counted from the call's start or from
        VERIFIED, whichever is later; past it the enclave is killed and the call fails with HandlerError.

        Raises NoHandler, and MessageError for an event that msgpack cannot carry. Everything else fails the
        future, whenever it happens: HandlerError, the launch's own error (MeasurementMismatch, …), or
        EnclaveDestroyed.
        """
        if self._session is None:
            raise NoHandler("the image names no handler: it can be measured and verified, not called")
        return self._session.submit(event, timeout)

    def call(self, event: Any, *, timeout: float | None = None) -> Any:
        """:meth:`submit` and wait for the result."""
        return self.submit(event, timeout=timeout).result()

    async def acall(self, event: Any, *, timeout: float | None = None) -> Any:
        """:meth:`submit`, awaited."""
        return await asyncio.wrap_future(self.submit(event, timeout=timeout))

    def wait_measured(self, timeout: float | None = None) -> bytes:
        """Wait for the verdict; MRENCLAVE. Raises the launch's error, or LaunchTimeout past ``timeout`` s."""
        with self._condition:
            if not self._condition.wait_for(self._is_decided, timeout):
                raise LaunchTimeout(f"no verdict within {timeout} s: the enclave is {self._state}")
            if self._error is not None:
                raise self._error
            if self._mrenclave is None:
                raise EnclaveDestroyed("the enclave was closed before it was measured")
            return self._mrenclave

    def wait_verified(self, timeout: float | None = None) -> bytes:
        """Wait for VERIFIED; MRENCLAVE. As :meth:`wait_measured`; UntrustedSigner for an unsigned launch."""
        mrenclave = self.wait_measured(timeout)
        if self._start.expected is None:
            raise UntrustedSigner(
                "the launch is unsigned (allow_unsigned=True): it is MEASURED, never VERIFIED"
            )
        return mrenclave

    def close(self) -> None:
        """End the enclave: process and descendants gone, pages scrubbed and free. Twice is fine.

        Calls that have no result fail with EnclaveDestroyed.
        """
        self._closed = True
        self._start.cancel()
        if not self._thread.started:
            self._start.close()  # it never began
        elif not self._thread.is_current:
            self._thread.join(CLOSE_SECONDS)
        self._end(EnclaveDestroyed("the enclave was closed"), EnclaveState.DESTROYED)
        self._ended.wait(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        value = self._mrenclave.hex()[:16] + "…" if self._mrenclave else "unmeasured"
        return f"<Enclave {self.generation} {self._state} {value}>"

    # --------------------------------------------------------------------------------------- the start

    def begin(self) -> None:
        """Start the thread (once, by the runtime)."""
        self._thread.start()

    def forget(self) -> None:
        """In a forked child of the host: close the copies of this enclave's descriptors."""
        self._start.forget()
        if self._session is not None and not self._ended.is_set():
            self._session.forget()
        if self._guard is not None and not self._ended.is_set():
            self._guard.forget()

    def notify(self) -> None:
        """Pool thread: something may have changed."""
        self._start.changed.set()

    def _run(self) -> None:
        try:
            self._host.note_start(self.generation)
            try:
                self._carry_out()
            finally:
                self._host.note_end(self.generation)
        except EnturboError as error:
            self._reject(error)
        except Exception as error:
            log.exception("launch %d failed", self.generation)
            self._reject(EnturboError(f"the launch failed: {type(error).__name__}: {error}"))
        finally:
            self._start.close()

    def _carry_out(self) -> None:
        self._host.arena.wait_allocated(self._start.place)
        early = self._strategy.early and self._host.store_order
        if self._session is not None and early:
            self._session.start()
        self._set_state(EnclaveState.COPYING)
        self._start.on_copied = lambda: self._set_state(EnclaveState.MEASURING)
        self._strategy.run(self._start)
        mrenclave = self._start.merge()
        with self._condition:
            self._mrenclave = mrenclave
        self._set_state(EnclaveState.MEASURED)
        if self._start.verify(mrenclave):
            self._set_state(EnclaveState.VERIFIED)
        log.debug("launch %d: %s", self.generation, self.timeline)
        if self._session is not None and self._guard is not None:
            self._guard.lift()
            if not early:
                self._session.start()
            self._session.release()
            self._guard.release()

    def _reject(self, error: EnturboError) -> None:
        cancelled = isinstance(error, EnclaveDestroyed)
        if cancelled:
            error = self._cause or error  # cancelled, but why
        else:
            log.warning("launch %d rejected: %s", self.generation, error)
        self._start.abort_copy()
        if self._guard is not None:
            self._guard.reject()
        state = EnclaveState.DESTROYED if cancelled else EnclaveState.REJECTED
        self._end(error, state)

    # ----------------------------------------------------------------------------------------- the end

    def session_ended(self, error: EnturboError) -> None:
        """Session thread: the process ended by itself or broke a limit, after VERIFIED; or there is none."""
        if not self._closed:
            log.warning("enclave %d: %s", self.generation, error)
        self._cause = error
        self._start.cancel()
        threading.Thread(target=self._end_after_start, args=(error,), name="enturbo-end", daemon=True).start()

    def _end_after_start(self, error: EnturboError) -> None:
        # The start may be in the middle of a copy, into pages that must not be free before it is over.
        self._thread.join(CLOSE_SECONDS)
        self._end(error, EnclaveState.DESTROYED)

    def _end(self, error: EnturboError, state: EnclaveState) -> None:
        """Whoever comes first ends the enclave; everybody else waits for that."""
        with self._end_lock:
            if self._ended.is_set():
                if state is EnclaveState.DESTROYED:
                    self._set_state(state)
                return
            gone = True
            if self._session is not None:
                self._session.stop_reading()
                gone = self._host.end_process(self._session.process)
                self._session.stop()
                # A spawn that was under way when we looked has made its process by now.
                gone = self._host.end_process(self._session.process) and gone
                error = _with_status(error, self._session, by_itself=not self._closed)
                self._session.close()
            if self._guard is not None and gone:
                self._guard.close()
            # A start thread that did not unwind in time might still copy: its pages are not reused.
            unwound = self._thread.is_current or not self._thread.is_alive()
            self._host.arena.reclaim(self._start.place, gone and unwound, shared=self._start.shared)
            with self._condition:
                if (self._error is None and self._mrenclave is None) or state is EnclaveState.REJECTED:
                    self._error = error
                self._ended.set()
            self._set_state(state)
            if self._session is not None:
                self._session.fail(error)
            self._host.forget_enclave(self)

    def _is_decided(self) -> bool:
        return self._error is not None or self._ended.is_set() or self._is_settled()

    def _is_settled(self) -> bool:
        final = EnclaveState.MEASURED if self._start.expected is None else EnclaveState.VERIFIED
        return self._state in (final, EnclaveState.DESTROYED, EnclaveState.REJECTED)

    def _set_state(self, state: EnclaveState) -> None:
        with self._condition:
            self._state = state
            self._condition.notify_all()


def _with_status(error: EnturboError, session: Session, *, by_itself: bool) -> EnturboError:
    """Add how the process ended, where it ended by itself and that is known."""
    status = session.process.returncode if session.process is not None else None
    if not by_itself or status is None or not isinstance(error, EnclaveDestroyed):
        return error
    return EnclaveDestroyed(f"the enclave process {describe_status(status)}")
