"""The host's side of the conversation with one enclave process: calls in, held output out.

One thread an enclave. Before VERIFIED it only sends: the launch socket and the output pipes are not read,
so whatever the enclave writes waits in the kernel (and the enclave waits when that is full). The hold is
that: there is no code that could let something out early. After :meth:`Session.release` it reads.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from ..shm.errors import EnclaveDestroyed, EnturboError, HandlerError
from .messages import MessageError, Stream, encode
from .processes import EnclaveProcess
from .trace import Timeline

log = logging.getLogger("enturbo.enclave")

SEND_SECONDS: Final = 30.0  # for an enclave that waits for a call to read it
SPAWN_SECONDS: Final = 10.0
DEFAULT_OUTPUT_LIMIT: Final = 1 << 20

Ocalls = Mapping[str, Callable[..., Any]]


@dataclass
class Channel:
    """The host's ends: launch socket, and the reading ends of the enclave's stdout and stderr."""

    sock: socket.socket
    stdout: int
    stderr: int

    def close(self) -> None:
        """Close all, read or not."""
        self.sock.close()
        for name in ("stdout", "stderr"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


@dataclass
class _Call:
    number: int
    event: Any
    timeout: float | None
    future: Future[Any] = field(default_factory=Future)
    sent: float = 0.0
    output_before: int = 0


class Session:
    """Calls of one enclave, first in first out, one at a time.

    ``spawn`` starts the process and gives it the other ends; it runs on the session's thread, so a launch
    never waits for a fork. ``on_end`` is told, on that thread, when the process ended or must be ended
    after VERIFIED; it gets the error that calls fail with.
    """

    def __init__(
        self,
        name: str,
        spawn: Callable[[], tuple[EnclaveProcess, Channel]],
        *,
        ocalls: Ocalls,
        timeline: Timeline,
        output_limit: int,
        on_end: Callable[[EnturboError], None],
    ) -> None:
        self._spawn, self._ocalls, self._timeline = spawn, ocalls, timeline
        self._output_limit, self._on_end = output_limit, on_end
        self._lock = threading.Lock()
        self._queue: deque[_Call] = deque()
        self._current: _Call | None = None
        self._number = 0
        self._released = False
        self._stopping = False
        self._error: EnturboError | None = None
        self.process: EnclaveProcess | None = None
        self._channel: Channel | None = None
        self._stream: Stream | None = None
        self.output = {"stdout": bytearray(), "stderr": bytearray()}
        self._output_total = 0
        self._ocall_pool: ThreadPoolExecutor | None = None
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=f"enturbo-session-{name}", daemon=True)

    # --------------------------------------------------------------------------------------- any thread

    def start(self) -> None:
        """Start the process, then serve it."""
        self._thread.start()

    def submit(self, event: Any, timeout: float | None) -> Future[Any]:
        """Queue a call. Raises MessageError: the event cannot be carried."""
        encode(event)
        with self._lock:
            self._number += 1
            call = _Call(self._number, event, timeout)
            error = self._error
            if error is None:
                self._queue.append(call)
        if error is None:
            self._wake()
        else:
            call.future.set_exception(error)
        return call.future

    def release(self) -> None:
        """VERIFIED: read what was held, from now on."""
        with self._lock:
            self._released = True
        self._wake()

    def fail(self, error: EnturboError) -> None:
        """All calls that have no result, and all later ones, fail with ``error``."""
        with self._lock:
            if self._error is None:
                self._error = error
            calls = [*([self._current] if self._current else []), *self._queue]
            self._current = None
            self._queue.clear()
        for call in calls:
            if not call.future.done() and (
                call.future.running() or call.future.set_running_or_notify_cancel()
            ):
                call.future.set_exception(error)

    def stop_reading(self) -> None:
        """From now on nothing is read from the enclave any more, whatever it writes while it is ended."""
        self._stopping = True
        self._wake()

    def stop(self) -> None:
        """End the thread; with the process gone, a send that waits for it ends at once."""
        self.stop_reading()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """After :meth:`stop`, with the process gone: close the ends. Held output is dropped unread."""
        if self._channel is not None:
            self._channel.close()
        if self._ocall_pool is not None:
            self._ocall_pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:  # a submit of another thread may be about to wake us
            fds = (self._wake_r, self._wake_w)
            self._wake_r = self._wake_w = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def forget(self) -> None:
        """In a forked child of the host: close the copies of all descriptors. Takes no lock."""
        self._stopping = True
        if self._channel is not None:
            self._channel.close()
        if self.process is not None:
            self.process.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
        self._wake_r = self._wake_w = -1

    def _wake(self) -> None:
        with self._lock:
            if self._wake_w >= 0:
                try:
                    os.write(self._wake_w, b"\0")
                except BlockingIOError:
                    return

    # -------------------------------------------------------------------------------- the session thread

    def _run(self) -> None:
        try:
            process, channel = self._spawn()
            with self._lock:
                self.process, self._channel = process, channel
            self._stream = Stream(channel.sock)
            while not self._stopping:
                self._send_next()
                self._wait()
        except EnturboError as error:
            self._ended(error)
        except OSError as error:
            self._ended(EnclaveDestroyed(f"the enclave process could not be served: {error}"))

    def _ended(self, error: EnturboError) -> None:
        if self._stopping:
            return
        if not isinstance(error, EnclaveDestroyed | HandlerError):
            error = EnclaveDestroyed(f"the enclave process ended: {error}")
        self._drain()
        self._on_end(error)

    def _send_next(self) -> None:
        """Send the next call when none is under way. The event goes in; nothing comes out by it."""
        with self._lock:
            if self._current is not None:
                return
            call = self._queue.popleft() if self._queue else None
            while call is not None and not call.future.set_running_or_notify_cancel():
                call = self._queue.popleft() if self._queue else None
            self._current = call
        if call is None or self._stream is None:
            return
        call.sent = time.monotonic()
        call.output_before = self._output_total
        try:
            self._stream.send({"call": call.number, "event": call.event}, SEND_SECONDS)
        except MessageError:
            # A dead process must not be announced before the verdict: wait for that, then say so.
            while not self._released and not self._stopping:
                self._wait()
            if not self._stopping:
                raise

    def _wait(self) -> None:
        """Wait for what may be looked at now: the wake pipe always, the enclave's output once released."""
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        channel, released, pidfd = self._channel, self._released, -1
        assert channel is not None
        if released:
            poll.register(channel.sock, select.POLLIN)
            # The process's end is told by its pidfd: a child that it forked may keep the socket open.
            pidfd = self.process.pidfd if self.process is not None else -1
            for fd in (channel.stdout, channel.stderr, pidfd):
                if fd >= 0:
                    poll.register(fd, select.POLLIN)
        timeout = self._time_left() if released else None
        ready = {fd for fd, _ in poll.poll(None if timeout is None else max(0.0, timeout * 1000))}
        if self._wake_r in ready:
            os.read(self._wake_r, 4096)
        if not released:
            return
        for fd in (channel.stdout, channel.stderr):
            if fd in ready:
                self._read_output(fd)
        if ready & {channel.sock.fileno(), pidfd}:
            self._read_messages()
        if pidfd in ready:
            raise EnclaveDestroyed("the enclave process ended")
        self._check_timeout()

    def _time_left(self) -> float | None:
        """Seconds until the current call's timeout. The clock starts when the event was sent or the
        enclave was verified, whichever is later: before that the host does not know how far it is."""
        call = self._current
        if call is None or call.timeout is None:
            return None
        verified = (self._timeline.verified or self._timeline.measured or 0) / 1e9
        return max(call.sent, verified) + call.timeout - time.monotonic()

    def _check_timeout(self) -> None:
        left, call = self._time_left(), self._current
        if left is not None and left <= 0 and call is not None:
            raise HandlerError(f"the call took longer than its {call.timeout} s", kind="timeout")

    def _read_messages(self) -> None:
        assert self._stream is not None
        for message in self._stream.pump():
            if not isinstance(message, dict):
                raise MessageError(f"expected a map from the enclave, found {type(message).__name__}")
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            return
        if "ocall" in message:
            self._ocall(message)
            return
        call = self._current
        number = message.get("result", message.get("error"))
        if call is None or number != call.number:
            raise MessageError(f"an answer to call {number!r}, which is not under way")
        numbers = [message.get(name, 0) for name in ("first", "end", "eaug", "shadow")]
        if not all(isinstance(value, int) and 0 <= value < 1 << 63 for value in numbers):
            raise MessageError("times and counts of an answer are not 63-bit integers")
        self._note_times(*numbers)
        self._drain()
        self._check_output(call)
        self._current = None
        if self._timeline.result is None:
            self._timeline.result = time.monotonic_ns()
        if "result" in message:
            call.future.set_result(message.get("value"))
        else:
            call.future.set_exception(_handler_error(message))

    def _note_times(self, first: int, end: int, eaug: int, shadow: int) -> None:
        timeline = self._timeline
        timeline.eaug_pages, timeline.shadow_pages = eaug, shadow
        if not first:
            return
        if timeline.first_instruction is None:
            timeline.first_instruction = first
        timeline.add("execute", "enclave", first, end)
        if timeline.verified is not None and end < timeline.verified:
            timeline.add("hold", "enclave", end, timeline.verified)

    def _ocall(self, message: dict[str, Any]) -> None:
        """Run a registered function on a thread of its own, so that timeouts still work meanwhile."""
        number, name, arguments = message.get("ocall"), message.get("name"), message.get("args")
        if not isinstance(name, str) or not isinstance(arguments, list):
            raise MessageError("an OCALL without a name or arguments")
        if self._ocall_pool is None:
            self._ocall_pool = ThreadPoolExecutor(1, "enturbo-ocall")
        self._ocall_pool.submit(self._run_ocall, number, name, arguments)

    def _run_ocall(self, number: object, name: str, arguments: list[Any]) -> None:
        assert self._stream is not None
        reply: dict[str, Any] = {"reply": number}
        function = self._ocalls.get(name)
        if function is None:
            reply["error"] = f"no function {name!r} is registered; there are {sorted(self._ocalls)}"
        else:
            try:
                reply["value"] = function(*arguments)
                encode(reply)
            except Exception as error:  # noqa: BLE001 - a user's function; the enclave gets its text
                reply = {"reply": number, "error": f"{type(error).__name__}: {error}"}
        try:
            self._stream.send(reply, SEND_SECONDS)
        except MessageError as error:
            log.debug("the reply to OCALL %s could not be sent: %s", name, error)

    # -------------------------------------------------------------------------------------------- output

    def _read_output(self, fd: int) -> bool:
        """Take what stands in one output pipe; False when that is nothing (now, or for good)."""
        channel = self._channel
        assert channel is not None
        name = "stdout" if fd == channel.stdout else "stderr"
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:  # drained since it was polled
            return False
        if not data:
            setattr(channel, name, -1)
            os.close(fd)
            return False
        self._output_total += len(data)
        kept = self.output[name]
        kept += data
        del kept[: max(0, len(kept) - self._output_limit)]
        log.debug("%s: %r", name, data[:200])
        if self._current is not None:
            self._check_output(self._current)
        return True

    def _check_output(self, call: _Call) -> None:
        written = self._output_total - call.output_before
        if written > self._output_limit:
            raise HandlerError(
                f"the handler wrote {written} bytes of output in one call; the limit is {self._output_limit}",
                kind="output",
            )

    def _drain(self) -> None:
        """Take what stands in the output pipes now, if it may be read at all."""
        channel = self._channel
        if not self._released or channel is None:
            return
        for name in ("stdout", "stderr"):
            fd: int = getattr(channel, name)
            try:
                while fd >= 0 and self._read_output(fd):
                    pass
            except HandlerError:
                return  # the limit; whoever called sees that for itself


def _handler_error(message: dict[str, Any]) -> HandlerError:
    kind, what = str(message.get("kind", "raise")), str(message.get("message", ""))
    name = str(message.get("type", ""))
    text = f"{name}: {what}" if name else what
    return HandlerError(text[:4096], kind=kind, remote_traceback=str(message.get("traceback", ""))[:65536])
