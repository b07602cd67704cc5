"""The timeline of one start: who did what, when, on one clock.

All times are nanoseconds of CLOCK_MONOTONIC, which host, workers and enclave share. Spans are named after
what a start consists of: ``copy``, ``measure`` (one track a worker), ``merge``, ``verify``, ``execute``,
``hold``. :meth:`Timeline.to_chrome` gives the Chrome trace format, which Perfetto opens.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any, Final, NamedTuple

MAX_SPANS: Final = 10_000  # a start has hundreds; an enclave that serves for weeks must not grow for it


class Span(NamedTuple):
    """One stretch of work. ``pages`` is 0 where pages do not apply."""

    name: str
    track: str
    start: int
    end: int
    pages: int = 0

    @property
    def duration(self) -> int:
        """Nanoseconds."""
        return self.end - self.start


class Timeline:
    """Spans and milestones of one enclave. Thread-safe; readable at any time.

    Milestones (ns, or None while they have not happened): ``launched``, ``copied``, ``measured``,
    ``verified``, ``first_instruction`` (stamped by the enclave directly before the first call of the
    handler, known here only after VERIFIED) and ``result`` (first result delivered).
    """

    def __init__(self, launched: int) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.launched = launched
        self.copied: int | None = None
        self.measured: int | None = None
        self.verified: int | None = None
        self.first_instruction: int | None = None
        self.result: int | None = None
        self.gate_waits = 0  # accesses that slept in the kernel until their page was ready,
        self.gate_seconds = 0.0  # and for how long, each thread by itself
        self.shadow_pages = 0  # private copies that stores have made (wrlock="shadow")
        self.eaug_pages = 0  # heap pages that were touched, so EAUG'd, so far (SGX2 images)

    def add(self, name: str, track: str, start: int, end: int, pages: int = 0) -> None:
        """Record a span; past :data:`MAX_SPANS` it is left out."""
        with self._lock:
            if len(self._spans) < MAX_SPANS:
                self._spans.append(Span(name, track, start, end, pages))

    def add_wait(self, start: int, end: int) -> None:
        """An access of the enclave slept in the kernel, from when the pager learned of it."""
        self.add("gate", "enclave waits", start, end)
        with self._lock:
            self.gate_waits += 1
            self.gate_seconds += (end - start) / 1e9

    @property
    def spans(self) -> list[Span]:
        """All spans so far, by start."""
        with self._lock:
            return sorted(self._spans, key=lambda span: (span.start, span.end))

    def since_launch(self, moment: int | None) -> float | None:
        """Seconds from launch to ``moment``; None stays None."""
        return None if moment is None else (moment - self.launched) / 1e9

    def milestones(self) -> dict[str, float | None]:
        """Seconds after the launch at which each milestone happened."""
        names = ("copied", "measured", "verified", "first_instruction", "result")
        return {name: self.since_launch(getattr(self, name)) for name in names}

    def to_chrome(self) -> dict[str, Any]:
        """The Chrome trace event format: complete events (``ph`` X) in µs, one thread a track."""
        spans = self.spans
        tracks = {
            track: number for number, track in enumerate(dict.fromkeys(span.track for span in spans), 1)
        }
        pid = os.getpid()
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": "enturbo"}}
        ]
        for track, number in tracks.items():
            events.append(
                {"ph": "M", "pid": pid, "tid": number, "name": "thread_name", "args": {"name": track}}
            )
        events.extend(
            {
                "ph": "X",
                "pid": pid,
                "tid": tracks[span.track],
                "name": span.name,
                "cat": "startup",
                "ts": (span.start - self.launched) / 1000,
                "dur": span.duration / 1000,
                "args": {"pages": span.pages} if span.pages else {},
            }
            for span in spans
        )
        for name, seconds in self.milestones().items():
            if seconds is not None:
                events.append(
                    {"ph": "i", "s": "p", "pid": pid, "tid": 0, "name": name, "ts": seconds * 1e6, "args": {}}
                )
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_chrome` as JSON."""
        Path(path).write_text(json.dumps(self.to_chrome()), encoding="utf-8")

    def __str__(self) -> str:
        parts = [
            f"{name} {seconds * 1e3:.2f} ms"
            for name, seconds in sorted(self.milestones().items(), key=lambda item: item[1] or 0)
            if seconds is not None
        ]
        return "launch → " + " · ".join(parts) if parts else "launched"
