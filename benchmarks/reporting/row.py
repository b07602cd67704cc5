"""A row of the report: a target, or a figure without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .rounds import Group, Summary

Groups = Mapping[str, Group]


@dataclass(frozen=True)
class Row:
    """One line of the tables. Times in seconds, shares as fractions; ``target`` None: no target is set."""

    name: str
    what: str
    against: str
    measured: Summary
    unit: str
    method: str
    target: float | None = None
    at_most: bool = False
    limit: Summary | None = None  # what could be reached at best, in the row's unit
    share: Summary | None = None  # of the ceiling

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        median = self.measured.median
        return median <= self.target if self.at_most else median >= self.target
