"""Figures as text, each with its unit; ranges are those of the rounds."""

from __future__ import annotations

from .rounds import Summary

TIMES, SHARE, MILLISECONDS, BYTES = "\N{MULTIPLICATION SIGN}", "%", "ms", "bytes"
NONE = "-"


def text(value: float, unit: str) -> str:
    """One figure of a row: seconds where the unit is ms, a fraction where it is %."""
    if unit == TIMES:
        return f"{value:.2f} {TIMES}"
    if unit == SHARE:
        return f"{value * 100:.3g} %"
    if unit == MILLISECONDS:
        return f"{value * 1e3:,.0f} ms" if value >= 0.1 else f"{value * 1e3:.3g} ms"
    return f"{value:,.0f} bytes" if value < 1 << 16 else f"{value / 1024:,.0f} KiB"


def bound(value: float, unit: str) -> str:
    """A target: as :func:`text`, without figures that say nothing."""
    return f"{value:g} {TIMES}" if unit == TIMES else text(value, unit)


def ranged(value: Summary, unit: str) -> str:
    """Median and range; the range is left out where there is one value."""
    if value.least == value.most:
        return text(value.median, unit)
    least, most = (text(each, unit).rsplit(" ", 1)[0] for each in value[1:])
    return f"{text(value.median, unit)} ({least} to {most})"


def times(value: Summary) -> str:
    """A ratio with its range."""
    return ranged(value, TIMES)


def milliseconds(value: Summary) -> str:
    """Seconds as ms with their range."""
    return ranged(value, MILLISECONDS)


def microseconds(value: Summary) -> str:
    """The median of seconds as whole µs."""
    return f"{value.median * 1e6:,.0f} µs"


def percent(value: Summary) -> str:
    """The median of fractions as whole percent."""
    return f"{value.median * 100:.0f} %"
