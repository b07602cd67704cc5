"""Samples by rounds: each round takes every step once, and values meet inside their round alone.

Machines slow down for minutes at a time. A ratio of two values of one round survives that, a ratio of two
medians does not.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Step = Callable[[], Mapping[str, float]]
Say = Callable[[str], None]
Series = dict[str, list[float]]


class Summary(NamedTuple):
    """The median of some values, and their range."""

    median: float
    least: float
    most: float

    def scaled(self, factor: float) -> Summary:
        """The same in another unit."""
        return Summary(*(value * factor for value in self))


def summarise(values: Sequence[float]) -> Summary:
    """Median and range of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))


@dataclass
class Group:
    """What one experiment found: values by name, one a round, and facts about how it was run."""

    facts: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)

    def __getitem__(self, name: str) -> list[float]:
        return self.series[name]

    def __contains__(self, name: object) -> bool:
        return name in self.series

    def of(self, name: str) -> Summary:
        """Median and range of one series."""
        return summarise(self.series[name])

    def ratio(self, above: str, below: str) -> Summary:
        """Of ratios that were each taken inside a round."""
        return summarise([a / b for a, b in zip(self.series[above], self.series[below], strict=True)])

    def least(self, *names: str) -> list[float]:
        """Round by round the smallest of several series."""
        return [min(values) for values in zip(*(self.series[name] for name in names), strict=True)]


def take(name: str, steps: Sequence[Step], rounds: int, say: Say, *, dropped: int = 1) -> Series:
    """Run all steps once a round; what each found, by name, without the first ``dropped`` rounds.

    Each round begins with another step, so that none always comes after the same one in the same state of
    caches, clocks and memory.
    """
    series: Series = {}
    for number in range(dropped + rounds):
        say(f"{name}: round {number + 1} of {dropped + rounds}")
        turn = number % len(steps)
        for step in (*steps[turn:], *steps[:turn]):
            gc.collect()
            found = step()
            if number >= dropped:
                for key, value in found.items():
                    series.setdefault(key, []).append(value)
    return series
