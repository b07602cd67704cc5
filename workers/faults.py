"""Named points at which a test can stop or kill a measurer. Unset, they cost one comparison a stripe.

``ENTURBO_FAULT=POINT=ACTION:PATH`` makes the first worker that reaches POINT create the file PATH (so that
it happens once, and the test knows that it did) and then do ACTION: ``stop`` (SIGSTOP), ``kill`` (SIGKILL)
or ``exit`` (``os._exit``). Points of a stripe, in order: ``claimed``, ``hashed`` (before the SMC result),
``published`` (result there, nothing released), ``raised`` (blocks released raised, pages not).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

POINTS: Final = ("claimed", "hashed", "published", "raised")


def from_environment() -> Callable[[str], None] | None:
    """The fault that ``ENTURBO_FAULT`` describes, or None."""
    text = os.environ.get("ENTURBO_FAULT")
    if not text:
        return None
    where, _, rest = text.partition("=")
    action, _, path = rest.partition(":")
    if where not in POINTS or action not in ("stop", "kill", "exit") or not path:
        raise ValueError(f"ENTURBO_FAULT={text!r}: expected POINT=ACTION:PATH, POINT one of {POINTS}")

    def fault(point: str) -> None:
        if point != where:
            return
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return
        if action == "exit":
            os._exit(70)
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)

    return fault
