"""The timeline by itself."""

from __future__ import annotations

import pytest

from enturbo import Timeline
from enturbo.runtime import trace


def test_spans_by_start_and_milestones_in_seconds() -> None:
    timeline = Timeline(launched=1_000_000_000)
    timeline.add("measure", "worker 0", 1_200_000_000, 1_300_000_000, pages=3)
    timeline.add("copy", "host", 1_100_000_000, 1_250_000_000, pages=5)
    timeline.verified = 1_500_000_000
    assert [span.name for span in timeline.spans] == ["copy", "measure"]
    assert timeline.spans[0].duration == 150_000_000
    assert timeline.milestones()["verified"] == 0.5
    assert timeline.milestones()["result"] is None
    assert str(timeline) == "launch → verified 500.00 ms"
    events = timeline.to_chrome()["traceEvents"]
    copy = next(event for event in events if event["name"] == "copy")
    assert (copy["ts"], copy["dur"], copy["args"]) == (100_000, 150_000, {"pages": 5})


def test_a_timeline_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_SPANS", 3)
    timeline = Timeline(launched=0)
    for call in range(10):
        timeline.add("execute", "enclave", call, call + 1)
    assert [span.start for span in timeline.spans] == [0, 1, 2]
