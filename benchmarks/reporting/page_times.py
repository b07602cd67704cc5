"""Growth in other words: time per page by size, and how near these times are to each other. Pure."""

from __future__ import annotations

import numpy as np

from .rounds import Group, Summary

LARGE = 64  # MiB; from here on the time per page must not change much
PAGES = 256  # a MiB


def page_times(group: Group, way: str) -> dict[int, Summary]:
    """Seconds a page by MiB."""
    return {
        size: group.of(f"{way}:{size}").scaled(1 / (size * PAGES))
        for size in group.facts["sizes"]
        if f"{way}:{size}" in group
    }


def ceiling_page_time(group: Group) -> float:
    """Seconds a page of the ceiling."""
    return group.of("ceiling").median / (float(group.facts["ceiling_mebibytes"]) * PAGES)


def page_time_spread(group: Group, way: str) -> float | None:
    """The dearest of the large sizes against the cheapest; None for fewer than two of them.

    Of medians of times per page that were each divided by that of the largest size in the same round.
    """
    large = [int(size) for size in group.facts["sizes"] if size >= LARGE and f"{way}:{size}" in group]
    if len(large) < 2:
        return None
    base = f"{way}:{large[-1]}"
    medians = [group.ratio(f"{way}:{size}", base).median * large[-1] / size for size in large]
    return max(medians) / min(medians)


def fixed_and_per_page(group: Group, way: str) -> tuple[float, float]:
    """Seconds a launch and seconds a page: a line through the medians of the large sizes.

    Fitted to the least relative error, or the largest size alone would decide.
    """
    known = {
        size: value.median * size * PAGES for size, value in page_times(group, way).items() if size >= LARGE
    }
    pages, seconds = np.array(list(known)) * float(PAGES), np.array(list(known.values()))
    each, fixed = np.polyfit(pages, seconds, 1, w=1 / seconds)
    return float(fixed), float(each)
