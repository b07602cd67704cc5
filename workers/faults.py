"""Named points at which a test can stop or kill a measurer. Unset, they cost one comparison a stripe.

``ENTURBO_FAULT=POINT=ACTION:PATH`` makes the first worker that reaches POINT create the file PATH (so that it
happens once, and the test knows that it did) and then do ACTION: ``stop`` (SIGSTOP), ``kill`` (SIGKILL) or
``exit`` (``os._exit``). Points of a stripe that is measured, in order: ``claimed``, ``hashed`` (before the
SMC result), ``published`` (result there, nothing released), ``raised`` (blocks released raised, pages not).
Of rows that are copied or scrubbed by holders of claims: ``filling`` (nothing done), ``filled`` (bytes there,
not VALID), ``valid`` (VALID, and nobody told).

``ENTURBO_FAULT=POINT=nap:SECONDS`` has every worker sleep there, every time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Final

POINTS: Final = ("claimed", "hashed", "published", "raised")
FILL_POINTS: Final = ("filling", "filled", "valid")


def from_environment() -> Callable[[str], None] | None:
    """The fault that ``ENTURBO_FAULT`` describes, or None."""
    text = os.environ.get("ENTURBO_FAULT")
    if not text:
        return None
    where, _, rest = text.partition("=")
    action, _, path = rest.partition(":")
    if where not in (*POINTS, *FILL_POINTS) or action not in ("stop", "kill", "exit", "nap") or not path:
        raise ValueError(
            f"ENTURBO_FAULT={text!r}: expected POINT=ACTION:PATH, POINT one of {POINTS + FILL_POINTS}"
        )

    def fault(point: str) -> None:
        if point != where:
            return
        if action == "nap":
            time.sleep(float(path))
            return
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return
        if action == "exit":
            os._exit(70)
        os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)

    return fault
