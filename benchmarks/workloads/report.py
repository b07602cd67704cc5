"""Every workload in every combination and behind every gate: answers, sizes, times.

    python benchmarks/workloads/report.py [NAME…] [--rounds N] [--json F.json]

Progress goes to standard error, a Markdown table for docs/functions.md to standard output. Exit code 1 for an
answer that is not the expected one. Times are medians over rounds that go through all combinations in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catalogue import CatalogueError, Workload, load_all
from checking import FOUR, GATINGS, Gating, Run, run
from images import Sizes, build, sizes

from enturbo import EnclaveImage, Runtime, SigningKey
from enturbo.runtime.compare import ENTURBO1, epc_size, prepare
from enturbo.shm.errors import EnturboError

MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print. Exit code 0, 1 (a wrong answer) or 2 (a workload cannot be built)."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="workloads; all without one")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each combination (default 5)")
    parser.add_argument(
        "--brief", action="store_true", help="behind the other gates start enturbo1 alone, not all four"
    )
    parser.add_argument("--json", type=Path, metavar="F.json", help="where all figures go besides")
    options = parser.parse_args(arguments)
    try:
        workloads = [each for each in load_all() if each.name in options.names or not options.names]
        found = [_measure(workload, options.rounds, options.brief) for workload in workloads]
    except (CatalogueError, EnturboError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(_table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(each["wrong"] for each in found) else 0


def _measure(workload: Workload, rounds: int, brief: bool) -> dict[str, Any]:
    _say(f"{workload.name}: building")
    image = build(workload)
    key = SigningKey.generate()
    candidates = prepare(image, key, FOUR)
    runs: dict[str, list[Run]] = {}
    wrong: list[str] = []
    starts = 0
    for gating in GATINGS:
        default = gating is GATINGS[0]
        _say(f"{workload.name}: {gating.name}")
        with _runtime(image, key, gating) as runtime:
            runtime.wait_workers(10.0)
            for _ in range(rounds if default else 1):
                for candidate in candidates:
                    if brief and not default and candidate.combination is not ENTURBO1:
                        continue
                    starts += 1
                    runtime.wait_scrubbed()
                    done = run(runtime, candidate, workload)
                    wrong += [f"{gating.name}, {candidate.combination.name}: {each}" for each in done.wrong]
                    if default:
                        runs.setdefault(candidate.combination.name, []).append(done)
    for each in wrong:
        _say(f"{workload.name}: WRONG {each}")
    return {
        "name": workload.name,
        "sizes": sizes(image)._asdict(),
        "wrong": wrong,
        "starts": starts,
        "runs": {name: [each._asdict() for each in values] for name, values in runs.items()},
    }


def _runtime(image: EnclaveImage, key: SigningKey, gating: Gating) -> Runtime:
    epc = 2 * epc_size(image, "shadow") + 8 * MIB
    return Runtime(
        epc=epc,
        signers=[key.mrsigner],
        enforcement=gating.enforcement,
        gate=gating.gate,
        wrlock=gating.wrlock,
    )


def _table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| workload | native code | modules | data | heap | measured pages | sgx1 ms | sgx2 ms | enturbo1 ms"
        " | enturbo2 ms | speed-up 1 | speed-up 2 | handler ms |",
        "|---" * 13 + "|",
    ]
    for each in found:
        size = Sizes(**each["sizes"])
        life = {
            name: statistics.median(run["result"] for run in runs) * 1000
            for name, runs in each["runs"].items()
        }
        handler = statistics.median(run["handler"] for run in each["runs"]["enturbo2"]) * 1000
        cells = [
            each["name"],
            *(f"{value / MIB:.1f}" for value in (size.code, size.modules, size.data, size.heap)),
            str(size.measured_pages),
            *(f"{life[name]:.0f}" for name in ("sgx1", "sgx2", "enturbo1", "enturbo2")),
            f"{_ratio(each, 'sgx1', 'enturbo1'):.2f}",
            f"{_ratio(each, 'sgx2', 'enturbo2'):.2f}",
            f"{handler:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(each: dict[str, Any], baseline: str, name: str) -> float:
    """Of the lives, the median of the rounds' own ratios."""
    pairs = zip(each["runs"][baseline], each["runs"][name], strict=True)
    return float(statistics.median(theirs["result"] / ours["result"] for theirs, ours in pairs))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
