"""Several threads, one stream: each waits for its own answers. Used by the host towards the zygote, and in an
enclave, where the main thread waits for calls and any thread for the answers to its OCALLs.

Standard library only; the zygote imports it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .messages import MessageError, MessageTimeout, Stream


class Mailbox:
    """Lets several threads wait for different messages of one stream.

    ``key`` tells what a message answers; every waiting thread names one key. Whoever waits while nobody
    reads becomes the reader, hands others their messages, and passes the role on when its own has come.
    Messages with the same key keep their order.
    """

    def __init__(self, stream: Stream, key: Callable[[Any], object]) -> None:
        self.stream = stream
        self._key = key
        self._changed = threading.Condition()
        self._reading = False
        self._inbox: dict[object, deque[Any]] = {}
        self._failure: MessageError | None = None

    def wait(self, key: object, timeout: float | None = None) -> Any:
        """The next message with ``key``. Raises MessageTimeout, or what ended the stream."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                waiting = self._inbox.get(key)
                if waiting:
                    message = waiting.popleft()
                    if not waiting:
                        del self._inbox[key]
                    return message
                if self._failure is not None:
                    raise self._failure
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise MessageTimeout(f"no answer within {timeout} s")
                if self._reading:
                    self._changed.wait(left)
                    continue
                self._reading = True
            self._read(left)

    def _read(self, timeout: float | None) -> None:
        message = failure = None
        try:
            message = self.stream.recv(timeout)
            key = self._key(message)
        except MessageTimeout:
            key = None
        except MessageError as error:
            failure = error
        finally:
            with self._changed:
                self._reading = False
                if failure is not None:
                    self._failure = failure
                elif message is not None:
                    self._inbox.setdefault(key, deque()).append(message)
                self._changed.notify_all()
