"""What the samples of :mod:`.enforcement` say: its rows, where the time of each goes, and a table of writes.

Pure. "Wait" and "shadow" are the two ways to write with ``enforcement="auto"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .enforcement import COOPERATIVE, MODES, PREFERENCES, SHADOW, WAIT, WRITES
from .handlers import tasks
from .rounds import Group, Summary, summarise
from .row import Groups, Row
from .text import MILLISECONDS, SHARE, TIMES, milliseconds, ranged, text, times

SLOWER = 1.10  # a start to VERIFIED, against a cooperative one
LATER = 2e-3  # seconds to the first instruction
BLOCKED = 0.10  # of the time to a function's first output, or VERIFIED
CONTENTS = {"data": "of measured writable data", "files": "of files"}
WRITTEN = {
    "all": "each page once",
    "some": "one page in 16",
    "read": "all read, one page in 256 written",
    "one": "the last page alone, then it computes",
}


def enforcement_rows(group: Group) -> Iterator[Row]:
    """All of them."""
    yield from _starts(group)
    yield from _works(group)
    yield from _others(group)


def enforcement_profiles() -> dict[str, Callable[[Groups], str]]:
    """By row: where its time goes."""
    found: dict[str, Callable[[Groups], str]] = {}
    for name in CONTENTS:
        for preference in PREFERENCES:
            for mode in (WAIT, SHADOW):
                key = f"{name}:{preference}"
                found[f"enforced:{key}:{mode}"] = _profile(_verified, key, mode)
                found[f"sooner:{key}:{mode}"] = _profile(_first, key, mode)
    for name in tasks():
        for mode in (WAIT, SHADOW):
            found[f"blocked:{name}:{mode}"] = _profile(_blocked, name, mode)
    return found


def _profile(make: Callable[[Group, str, str], str], name: str, mode: str) -> Callable[[Groups], str]:
    return lambda groups: make(groups["enforcement"], name, mode)


def _modes(group: Group, name: str) -> list[str]:
    """The enforced ones that were measured for it."""
    return [mode for mode in (WAIT, SHADOW) if f"{name}:{mode}_first" in group]


def _differences(group: Group, above: str, below: str) -> Summary:
    return summarise([a - b for a, b in zip(group[above], group[below], strict=True)])


# ----------------------------------------------------------------------------------------------- starts


def _starts(group: Group) -> Iterator[Row]:
    image = f"{group.facts['mebibytes']} MiB"
    for name, what in CONTENTS.items():
        for preference in PREFERENCES:
            key = f"{name}:{preference}"
            for mode in _modes(group, key):
                yield Row(
                    f"enforced:{key}:{mode}",
                    f'enforced start → VERIFIED, {image} {what}, `prefer="{preference}"`'
                    f"{_way(group, key, mode)}",
                    '`enforcement="cooperative"`',
                    group.ratio(f"{key}:{mode}_verified", f"{key}:{COOPERATIVE}_verified"),
                    TIMES,
                    f'`enforcement="auto"`, which is the level "{group.facts["level"]}" here: gates by'
                    " userfaultfd and a sealed process. The function returns its event; its process is"
                    " forked, sealed and called while the workers measure.",
                    target=SLOWER,
                    at_most=True,
                )
                yield Row(
                    f"sooner:{key}:{mode}",
                    f'enforced start → first handler instruction, {image} {what}, `prefer="{preference}"`'
                    f"{_way(group, key, mode)}: how much later",
                    '`enforcement="cooperative"`',
                    _differences(group, f"{key}:{mode}_first", f"{key}:{COOPERATIVE}_first"),
                    MILLISECONDS,
                    "Differences of the same launches, taken inside each round. Medians of both sides are in"
                    " the table of starts.",
                    target=LATER,
                    at_most=True,
                )


def _way(group: Group, key: str, mode: str) -> str:
    return f', `wrlock="{mode}"`' if len(_modes(group, key)) > 1 else ""


def _others(group: Group) -> Iterator[Row]:
    sizes = {
        "medium": f"{group.facts['medium_mebibytes']} MiB of measured writable data",
        "small": f"{group.facts['small_bytes'] >> 10} KiB of measured writable data",
    }
    for name, size in sizes.items():
        key = f"{name}:start"
        for mode in _modes(group, key):
            yield Row(
                f"other:{key}:{mode}",
                f'enforced start → result, {size}, `wrlock="{mode}"`',
                '`enforcement="cooperative"`',
                group.ratio(f"{key}:{mode}_result", f"{key}:{COOPERATIVE}_result"),
                TIMES,
                "Each round's value is a median of starts one after the other:"
                f" {', '.join(f'{count} of `{each}`' for each, count in group.facts['repeats'].items())}."
                " Such an image is VERIFIED before its process has called the function, so what the seal"
                " takes is seen in full.",
            )


def starts_table(group: Group) -> list[str]:
    """Every start, cooperative and enforced: milestones, and CPU time."""
    lines = [
        "| start | runtime | process there | gate taken over | first instruction | VERIFIED | result |"
        " CPU: workers, host, zygote, enclave |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("data", "files", "medium", "small"):
        for preference in PREFERENCES:
            for mode in MODES:
                key = f"{name}:{preference}:{mode}"
                if f"{key}_first" not in group:
                    continue
                moments = ("forked", "taken", "first", "verified", "result")
                cells = " | ".join(milliseconds(group.of(f"{key}_{moment}")) for moment in moments)
                clocks = ", ".join(
                    text(group.of(f"{key}_{who}").median, MILLISECONDS)
                    for who in ("workers", "host", "zygote", "enclave")
                )
                lines.append(f'| {name}, `prefer="{preference}"` | {mode} | {cells} | {clocks} |')
    return lines


def _verified(group: Group, key: str, mode: str) -> str:
    excess = ", ".join(
        f"{title} {_signed(_differences(group, f'{key}:{mode}_{who}', f'{key}:{COOPERATIVE}_{who}'))}"
        for who, title in (
            ("workers", "workers"),
            ("host", "host"),
            ("zygote", "zygote"),
            ("enclave", "enclave process"),
        )
    )
    return (
        f"VERIFIED after {milliseconds(group.of(f'{key}:{mode}_verified'))}, cooperative after"
        f" {milliseconds(group.of(f'{key}:{COOPERATIVE}_verified'))}. CPU time against the cooperative start,"
        f" medians of differences: {excess}. All four share two cores; workers take write protection off"
        " what they release, the host's pager answers faults and lifts the gate, the process seals itself."
    )


def _first(group: Group, key: str, mode: str) -> str:
    stages = "; ".join(
        f"{title} {_stage(group, f'{key}:{mode}', *ends)}, cooperative"
        f" {_stage(group, f'{key}:{COOPERATIVE}', *ends)}"
        for title, *ends in (
            ("until the host has the process, forked and sealed", "", "forked"),
            ("gate taken over", "forked", "taken"),
            ("call, manifest and module until the first instruction", "taken", "first"),
        )
    )
    cpu = (text(group.of(f"{key}:{each}_enclave").median, MILLISECONDS) for each in (mode, COOPERATIVE))
    return (
        f"First instruction after {milliseconds(group.of(f'{key}:{mode}_first'))}, cooperative after"
        f" {milliseconds(group.of(f'{key}:{COOPERATIVE}_first'))}. Medians of stages: {stages}. CPU time of"
        f" the enclave process until its result: {', cooperative '.join(cpu)}. Two workers have both cores"
        " meanwhile."
    )


def _stage(group: Group, key: str, begin: str, end: str) -> str:
    if not begin:
        return text(group.of(f"{key}_{end}").median, MILLISECONDS)
    return text(_differences(group, f"{key}_{end}", f"{key}_{begin}").median, MILLISECONDS)


def _signed(value: Summary) -> str:
    return f"{value.median * 1e3:+.2f} ms"


# ------------------------------------------------------------------------------------- functions at work


def _works(group: Group) -> Iterator[Row]:
    for name, task in tasks().items():
        for mode in _modes(group, name):
            key = f"{name}:{mode}"
            yield Row(
                f"blocked:{key}",
                f"blocked by gates and held calls: {task.title}{_way(group, name, mode)}",
                "its time from first instruction to first output or VERIFIED",
                shares(group, key),
                SHARE,
                "First output is the result: these functions print nothing. Gates: how long accesses of the"
                " function slept in the kernel, from when the pager learned of each to when it had let it"
                " through, as far as that lies inside; how long a fault takes to reach the pager is not in it"
                f' (see `make bench ARGS="-k fault"`). {held_calls(group)}',
                target=BLOCKED,
                at_most=True,
            )


def shares(group: Group, key: str) -> Summary:
    """The part of the window in which a function was blocked; 0 where VERIFIED came before it began."""
    pairs = zip(group[f"{key}_blocked"], group[f"{key}_window"], strict=True)
    return summarise([slept / window if window else 0.0 for slept, window in pairs])


def held_calls(group: Group) -> str:
    """What there was of them, counted where the host answers them."""
    series = [name for name in group.series if name.endswith("_held")]
    counted = sum(sum(group[name]) for name in series)
    starts = sum(len(group[name]) for name in series)
    if not counted:
        return (
            "Held calls: none; a held call ends by the host's answer, and the host answered none in any of"
            f" {starts} starts."
        )
    return (
        f"Held calls: {counted:.0f} answered in {starts} starts; what they waited is **not** in the figure."
    )


def _blocked(group: Group, name: str, mode: str) -> str:
    key = f"{name}:{mode}"
    whole = [end - first for end, first in zip(group[f"{key}_end"], group[f"{key}_first"], strict=True)]
    theirs = [
        end - first
        for end, first in zip(
            group[f"{name}:{COOPERATIVE}_end"], group[f"{name}:{COOPERATIVE}_first"], strict=True
        )
    ]
    each = [
        slept / waits if waits else 0.0
        for slept, waits in zip(group[f"{key}_blocked"], group[f"{key}_waits"], strict=True)
    ]
    ratio = summarise([ours / other for ours, other in zip(whole, theirs, strict=True)])
    return (
        f"It was blocked for {milliseconds(group.of(f'{key}_blocked'))} of"
        f" {milliseconds(group.of(f'{key}_window'))}, in {group.of(f'{key}_waits').median:.0f} waits of"
        f" {milliseconds(summarise(each))}. Workers, function and pager are four that want two cores: a wait"
        " ends when the page is there *and* the pager has had its turn. The whole call took"
        f" {milliseconds(summarise(whole))}, {times(ratio)} of what it took in a cooperative start."
    )


# ---------------------------------------------------------------------------- waiting or private copies


def writes_table(group: Group) -> list[str]:
    """Functions that write at once, by what a store does to a page that is not measured yet."""
    size = f"{group.facts['written']} MiB"
    lines = [
        f"A function that writes to {size} of measured data from its first instruction on. *Handler*: its own"
        " time. *Done*: from the launch until it has returned; the result is delivered at VERIFIED or then,"
        " whichever is later. *Blocked*: as above. *EPC*: pages reserved for the enclave.",
        "",
        "| it writes | `wrlock` | handler | done | VERIFIED | result | blocked | private copies | EPC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for event in WRITES:
        for mode in MODES:
            key = f"{event}:{mode}"
            handler = _differences(group, f"{key}_end", f"{key}_first")
            cells = [milliseconds(handler)]
            cells += [
                milliseconds(group.of(f"{key}_{name}")) for name in ("end", "verified", "result", "blocked")
            ]
            cells += [f"{group.of(f'{key}_{name}').median:,.0f}" for name in ("copies", "reserved")]
            lines.append(f"| {WRITTEN[event]} | {_wrlock(mode)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The same function called when its enclave is VERIFIED: each page once, the first time and again.",
        "",
        "| `wrlock` | first | again |",
        "|---|---|---|",
    ]
    for mode in MODES:
        first, again = (milliseconds(group.of(f"late:{mode}_{turn}")) for turn in ("first", "again"))
        lines.append(f"| {_wrlock(mode)} | {first} | {again} |")
    return [*lines, "", verdict(group)]


def _wrlock(mode: str) -> str:
    return "cooperative" if mode == COOPERATIVE else f'`"{mode}"`'


def verdict(group: Group) -> str:
    """In which of these cases which way was faster, in the same rounds."""
    parts = []
    for event, title in WRITTEN.items():
        done = group.ratio(f"{event}:{WAIT}_end", f"{event}:{SHADOW}_end")
        parts.append(f"{title}: {ranged(done, TIMES)}")
    late = group.ratio(f"late:{WAIT}_first", f"late:{SHADOW}_first")
    return (
        'Time until the function has returned, `"wait"` over `"shadow"` in the same rounds (above 1: private'
        f" copies are faster): {'; '.join(parts)}. First stores after VERIFIED: {ranged(late, TIMES)}."
    )
