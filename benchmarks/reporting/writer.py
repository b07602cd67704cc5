"""The report as Markdown: tables and sentences around figures, which all come from the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .accounts import account_table, speed_table
from .ceiling import TRIES
from .enforcement_rows import starts_table, writes_table
from .page_times import ceiling_page_time, page_times
from .profiles import profile
from .rounds import Group
from .row import Row
from .targets import rows
from .text import NONE, TIMES, bound, milliseconds, percent, ranged, text

HOW_TO_RUN = """\
```sh
make bench-report                                            # everything, into docs/performance.md
make bench-report ARGS="--quick"                             # small sizes, few rounds, into build/
make bench-report ARGS="--only records many-start"           # some rows, printed
make bench-report ARGS="--from docs/performance.json"        # this text again from the samples
make bench                                                   # the benchmarks of each hot path
```

Close other programs first. The JSON file beside this one holds the value of every round, so that medians
and ranges can be checked."""


@dataclass
class Findings:
    """All that a report is made of."""

    machine: Mapping[str, str]
    groups: Mapping[str, Group]
    quick: bool
    notes: dict[str, str] = field(default_factory=dict)  # of the run, shown with the machine


def markdown(findings: Findings, picture: str | None) -> str:
    """The whole report; ``picture`` is the path of the growth plot as the text links it."""
    parts = [_opening(findings), _machine(findings)]
    known = rows(findings.groups)
    parts.append(_targets([row for row in known if row.target is not None]))
    further = [row for row in known if row.target is None]
    if further:
        parts.append(_further(further))
    parts.append(_missed(known, findings))
    parts.append(_methods(known))
    groups = findings.groups
    if "launches" in groups:
        parts.append(_launches(groups["launches"]))
    if "growth" in groups:
        parts.append(_growth(groups["growth"], picture))
    if "memory" in groups:
        parts.append(_memory(groups["memory"]))
    if "enforcement" in groups:
        parts.append(_enforcement(groups["enforcement"]))
    parts.append("## How to run it\n\n" + HOW_TO_RUN)
    return "\n\n".join(parts) + "\n"


def _opening(findings: Findings) -> str:
    quick = (
        "\n\n**This is a quick run: smaller images and few rounds. It shows that the report works, and is no"
        " measurement of the targets.**"
        if findings.quick
        else ""
    )
    return (
        "# Performance\n\nWritten by `make bench-report`, figures and all. Real processes on one machine,"
        " shared with others; wall clock unless it says CPU. Machines slow down for minutes at a time, so"
        " each row compares only what ran in the same rounds: a round takes everything once, its ratios are"
        " taken inside it, and a row gives the median of the rounds"
        " and their range. The first round never counts. Only ratios carry over to another machine." + quick
    )


def _machine(findings: Findings) -> str:
    known = {**findings.machine, **findings.notes}
    return "## Machine\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {value} |" for name, value in known.items()
    )


def _targets(known: Sequence[Row]) -> str:
    lines = [
        "## Targets",
        "",
        "*Limit*: what the row would be at the ceiling, where there is one. *Ceiling*: two bare processes"
        " that hash the same records in two lanes each, everything in place, in the same round (the fastest"
        f" of {TRIES} tries there); the column gives its time as a share of the row's. Two workers, warm EPC,"
        " unless the row says otherwise. The median decides whether a target is met.",
        "",
        "| what | against | target | measured: median (range) | limit | share of the ceiling | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in known:
        assert row.target is not None
        sign = "≤" if row.at_most else "≥"
        lines.append(
            f"| {row.what} | {row.against} | {sign} {bound(row.target, row.unit)} |"
            f" **{ranged(row.measured, row.unit)}** | {_limit(row)} | {_share(row)} |"
            f" {'yes' if row.met else '**no**'} |"
        )
    met = sum(bool(row.met) for row in known)
    return "\n".join([*lines, "", f"{met} of {len(known)} targets are met."])


def _further(known: Sequence[Row]) -> str:
    lines = [
        "Without a target:",
        "",
        "| what | against | measured: median (range) | limit | share of the ceiling |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.what} | {row.against} | {ranged(row.measured, row.unit)} | {_limit(row)} | {_share(row)} |"
        for row in known
    ]
    return "\n".join(lines)


def _limit(row: Row) -> str:
    return NONE if row.limit is None else text(row.limit.median, row.unit)


def _share(row: Row) -> str:
    return NONE if row.share is None else percent(row.share)


def _missed(known: Sequence[Row], findings: Findings) -> str:
    missed = [row for row in known if row.met is False]
    if not missed:
        return "## Missed targets\n\nNone in this run."
    lines = ["## Missed targets", ""]
    for row in missed:
        assert row.target is not None
        lines.append(
            f"- **{row.what}**{'' if row.against == NONE else f' against {row.against}'}:"
            f" {ranged(row.measured, row.unit)}, target {'at most' if row.at_most else 'at least'}"
            f" {bound(row.target, row.unit)}. {profile(row, findings.groups)}"
        )
    return "\n".join(lines)


def _methods(known: Sequence[Row]) -> str:
    by_method: dict[str, list[str]] = {}
    for row in known:
        against = "" if row.against == NONE else f" against {row.against}"
        by_method.setdefault(row.method, []).append(f"**{row.what}**{against}")
    lines = ["## How each row was measured", ""]
    lines += [f"- {'; '.join(titles)}: {method}" for method, titles in by_method.items()]
    return "\n".join(lines)


def _launches(group: Group) -> str:
    lines = [
        "## Baselines of the same rounds",
        "",
        *speed_table(group),
        "",
        f"{group.facts['pages']:,} pages; *records* counts 5184 bytes of each.",
        "",
        "## Where the time of a launch goes",
        "",
        "Shares of two cores' time from launch to VERIFIED, medians. *Hashing* and *copying* are the CPU"
        " time that the two bare processes took for the same bytes in the same round (with the `hashlib`"
        " hasher: one chain's time); *workers beside* is the CPU time that workers took above that"
        " (claims, results, releases, page tables, Python), *host* is that of the host process. What is"
        f" left was idle, or went to other programs. Many: {group.facts['many']} {TIMES}"
        f" {group.facts['many_mebibytes']} MiB.",
        "",
        *account_table(group),
    ]
    return "\n".join(lines)


def _growth(group: Group, picture: str | None) -> str:
    lines = ["## Growth", ""]
    if picture is not None:
        lines += [f"![Launch to VERIFIED by size of the image, in whole and per page]({picture})", ""]
    lines += [
        "Launch → VERIFIED, images without a handler, all sizes in the same rounds. Images above"
        f" {group.facts['ceiling_mebibytes']} MiB repeat that much content at different offsets. Whiskers:"
        f" the range of the rounds. The ceiling takes {ceiling_page_time(group) * 1e6:.3f} µs a page.",
        "",
        '| MiB | `serial` | a page | `prefer="start"` | a page | `prefer="verified"` | a page |',
        "|---|---|---|---|---|---|---|",
    ]
    ways = ("serial", "early", "fused")
    per_page = {way: page_times(group, way) for way in ways}
    for size in group.facts["sizes"]:
        cells = []
        for way in ways:
            if size in per_page[way]:
                cells += [
                    milliseconds(group.of(f"{way}:{size}")),
                    f"{per_page[way][size].median * 1e6:.3f} µs",
                ]
            else:
                cells += [NONE, NONE]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    if group.facts["left_out"]:
        sizes = ", ".join(f"{size} MiB" for size in group.facts["left_out"])
        lines += ["", f"Left out, because `/dev/shm` has no room for them: {sizes}."]
    return "\n".join(lines)


def _memory(group: Group) -> str:
    titles = {
        "own": "all processes, PSS without shared memory",
        "host_own": "of it the host",
        "workers_own": "of it the workers",
        "zygote_own": "of it the zygote",
        "enclave_own": "of it the enclave processes",
        "host_rss": "host, RSS",
        "workers_rss": "workers, RSS",
        "zygote_rss": "zygote, RSS",
        "enclave_rss": "enclave processes, RSS",
        "enclave_pss": "enclave processes, PSS",
        "enclave_uss": "enclave processes, USS",
    }
    counts = group["enclaves"]
    lines = [
        "## Memory of living enclaves",
        "",
        f"{counts[-1]:.0f} enclaves one after the other, each with a process of its own that has answered a"
        f" call, and {group.facts['enclave_epc_bytes'] >> 10:,} KiB of EPC. KiB, summed over processes; RSS"
        " and PSS hold the EPC pages that a process has mapped, the rows *without shared memory* do not."
        f" *Slope*: of a line through all {len(counts)} looks.",
        "",
        "| | " + " | ".join(f"{count:.0f}" for count in _few(counts)) + " | slope: KiB an enclave |",
        "|---|" + "---|" * (len(_few(counts)) + 1),
    ]
    for name, title in titles.items():
        cells = " | ".join(f"{value / 1024:,.0f}" for value in _few(group[name]))
        slope = group.facts["slopes"].get(name)
        lines.append(f"| {title} | {cells} | {NONE if slope is None else f'{slope / 1024:,.1f}'} |")
    return "\n".join(lines)


def _enforcement(group: Group) -> str:
    lines = [
        "## Enforced and cooperative starts",
        "",
        "Milliseconds after `launch()`; all runtimes in the same rounds. *Process there*: the host has its"
        " descriptors, so it is forked and, where enforced, sealed. CPU time of workers and host is until"
        " VERIFIED, that of zygote and enclave process until the result; medians.",
        "",
        *starts_table(group),
        "",
        "## Waiting or private copies",
        "",
        *writes_table(group),
    ]
    return "\n".join(lines)


def _few(values: Sequence[float]) -> list[float]:
    """First, middle and last: enough to see a line."""
    return [values[0], values[len(values) // 2], values[-1]]
