"""Measure every target side by side and write ``docs/performance.md``: ``make bench-report``.

Progress goes to standard error. Beside the report stands a JSON file with the value of every round, and the
folder of the growth plot. See ``reporting`` for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reporting import machine
from reporting.chains import measure_chain, measure_eadds
from reporting.enforcement import measure_enforcement
from reporting.growth import measure_growth
from reporting.launches import measure_launches
from reporting.memory import measure_memory
from reporting.rounds import Group, Say
from reporting.sizes import FULL, QUICK, Sizes
from reporting.startup import measure_arena, measure_fresh, measure_idle, measure_small
from reporting.targets import NAMES
from reporting.writer import Findings, markdown

from enturbo.runtime.enforcement import probe
from enturbo.workers.sha256 import available

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS: dict[str, Callable[[Sizes, Say], Group]] = {
    "launches": measure_launches,
    "chain": measure_chain,
    "eadds": measure_eadds,
    "small": measure_small,
    "fresh": measure_fresh,
    "arena": measure_arena,
    "idle": measure_idle,
    "memory": measure_memory,
    "growth": measure_growth,
    "enforcement": measure_enforcement,
}
DIGITS = 5  # of a sample in the JSON file


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and say where it is."""
    options = _parse(arguments)
    if options.source is not None:
        findings = _from_json(options.source.read_text(encoding="utf-8"))
    elif "native" not in available():
        print(
            "the report needs the C extension: every limit in it is one of the native kernels",
            file=sys.stderr,
        )
        return 2
    else:
        # Through the file's form and back, so that the same file always gives the same report.
        findings = _from_json(_as_json(_measure(options)))
    output: Path | None = options.output
    if output is None and not options.only:
        # A quick run is nobody's measurement: it stays where `make clean` finds it.
        output = ROOT / ("build" if findings.quick else "docs") / "performance.md"
    if output is None:
        print(markdown(findings, None))
        return 0
    picture = output.with_suffix("") / "growth.svg"
    drawn = "growth" in findings.groups
    if drawn:
        # Only now: this process is measured, and matplotlib would be most of its memory.
        from reporting.plot import draw

        draw(findings.groups["growth"], picture)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        markdown(findings, str(picture.relative_to(output.parent)) if drawn else None), encoding="utf-8"
    )
    output.with_suffix(".json").write_text(_as_json(findings), encoding="utf-8")
    _say(f"written: {output}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure every target and write docs/performance.md.")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: try it out")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(NAMES), default=[], metavar="ROW",
        help=f"measure what these rows need, and print it unless there is --output: {', '.join(NAMES)}",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="the Markdown file; JSON and plot go beside it")
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="JSON", help="measure nothing, write from these samples"
    )
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace) -> Findings:
    sizes = QUICK if options.quick else FULL
    wanted = {NAMES[name] for name in options.only} or set(EXPERIMENTS)
    facts = machine.facts()
    enforced = probe()
    if not enforced.by_kernel:
        wanted.discard("enforcement")
    groups = {name: run(sizes, _say) for name, run in EXPERIMENTS.items() if name in wanted}
    notes = {
        "enforcement": "; missing: ".join((enforced.level, *enforced.missing)),
        "load average after": " / ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    if "launches" in groups:
        found = groups["launches"].facts
        huge, whole = (found[name] >> 20 for name in ("epc_bytes_huge", "epc_bytes"))
        notes["huge pages"] = f"granted for {huge} of {whole} MiB of EPC" if huge else "not granted"
    return Findings(facts, groups, options.quick, notes)


def _as_json(findings: Findings) -> str:
    """One line a series, so that a reader and a diff find their way."""
    groups: dict[str, Any] = {}
    lines: dict[str, str] = {}
    for name, group in findings.groups.items():
        groups[name] = {"facts": group.facts, "series": {}}
        for key, values in group.series.items():
            mark = groups[name]["series"][key] = f"@{len(lines)}@"
            lines[f'"{mark}"'] = json.dumps([float(f"{value:.{DIGITS}g}") for value in values])
    known = {"machine": findings.machine, "notes": findings.notes, "quick": findings.quick, "groups": groups}
    text = json.dumps(known, indent=1, ensure_ascii=False)
    for mark, line in lines.items():
        text = text.replace(mark, line)
    return text + "\n"


def _from_json(text: str) -> Findings:
    known = json.loads(text)
    groups = {name: Group(**group) for name, group in known["groups"].items()}
    return Findings(known["machine"], groups, known["quick"], known["notes"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
