"""Run the model of a measured start through SPIN.

Three sets of runs: exhaustive instances in which every property must hold, the rules of ``mutations``
taken away one by one, each of which must break what its row says, and reachability checks, which show
that the instances are not empty. Standard library only; needs ``spin`` and ``gcc``.

    python docs/model/check.py            what `make model` runs (about a minute on two idle cores)
    python docs/model/check.py --large    larger instances
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent
MODEL: Final = HERE / "startup.pml"
MUTATIONS: Final = HERE / "mutations"

DEPTH: Final = 10_000  # steps; the longest run of any instance is far below, and the search says so
VECTOR_BYTES: Final = 512
DEADLINE_S: Final = 900  # per run: past it the run failed

# What makes a search incomplete, in the words of pan.
TRUNCATED: Final = ("max search depth too small", "Search not completed", "out of memory", "MEMLIM")

# What pan calls the errors that are no property of the model's own.
UNNAMED: Final = {"hang": "invalid end state", "cycle": "non-progress cycle"}


class Row(NamedTuple):
    """One run: ``breaks`` is "nothing", "hang", "cycle" or the properties of which one must break."""

    kind: str
    name: str
    flags: str
    breaks: str
    checks: str = "ALL_PROPS"  # the properties that are switched on
    large: bool = False


class Outcome(NamedTuple):
    row: Row
    passed: bool
    verdict: str
    states: int
    megabytes: float
    seconds: float


# Exhaustive: all properties on, no assertion violated, no invalid end state, search complete.
QUICK: Final = (
    Row("holds", "host copies, 1 x 2 domains, 1 block", "-DSTOPS=1 -DABORTS=1", "nothing"),
    Row("holds", "... 2 blocks, one touched", "-DBLOCKS=2 -DTOUCHES=1", "nothing"),
    Row("holds", "... 2 blocks, tampered first", "-DBLOCKS=2 -DTAMPERED=1", "nothing"),
    Row("holds", "1 x 1 domains, 2 blocks, two crashes", "-DPER_PAIR=1 -DBLOCKS=2 -DCRASHES=2", "nothing"),
    Row("holds", "... 3 blocks", "-DPER_PAIR=1 -DBLOCKS=3", "nothing"),
    Row("holds", "2 x 1 domains, 1 block", "-DPAIRS=2 -DPER_PAIR=1 -DSTOPS=1", "nothing"),
    Row(
        "holds",
        "... 2 blocks, one launch",
        "-DPAIRS=2 -DPER_PAIR=1 -DBLOCKS=2 -DLAUNCHES=1 -DTAMPERED=0",
        "nothing",
    ),
    Row("holds", "2 x 2 domains, 1 block, one launch", "-DPAIRS=2 -DTAMPERED=0 -DLAUNCHES=1", "nothing"),
    Row("holds", "workers copy, 1 x 2 domains, 1 block", "-DWORKER_COPY=1 -DABORTS=1", "nothing"),
    Row("holds", "... 2 blocks, one touched", "-DWORKER_COPY=1 -DBLOCKS=2 -DTOUCHES=1", "nothing"),
    Row("holds", "... 2 x 1 domains", "-DWORKER_COPY=1 -DPAIRS=2 -DPER_PAIR=1 -DSTOPS=1", "nothing"),
    Row("holds", "workers copy first, 1 x 2 domains", "-DWORKER_COPY=2 -DSTOPS=1", "nothing"),
    Row(
        "holds",
        "... 1 x 1 domains, 2 blocks, one touched",
        "-DWORKER_COPY=2 -DPER_PAIR=1 -DBLOCKS=2 -DTOUCHES=1 -DABORTS=1",
        "nothing",
    ),
    Row(
        "holds",
        "workers scrub, 1 x 1 domains",
        "-DWORKER_SCRUB=1 -DPER_PAIR=1 -DSTOPS=1 -DABORTS=1",
        "nothing",
    ),
    Row("ends", "no run is endless", "-DPER_PAIR=1 -DBLOCKS=2 -DABORTS=1", "no cycle"),
    Row("ends", "... 2 x 1 domains", "-DPAIRS=2 -DPER_PAIR=1 -DCRASHES=0 -DSTOPS=1", "no cycle"),
)

LARGE: Final = (
    Row("holds", "1 x 2 domains, 2 blocks", "-DBLOCKS=2 -DSTOPS=1 -DABORTS=1", "nothing"),
    Row("holds", "... two crashes", "-DBLOCKS=2 -DCRASHES=2 -DABORTS=1", "nothing"),
    Row("holds", "... tampered code", "-DBLOCKS=2 -DSTOPS=1 -DTAMPERED=1 -DBAD_PAGE=CODE_PAGE", "nothing"),
    Row("holds", "1 x 2 domains, 3 blocks", "-DBLOCKS=3", "nothing"),
    Row("holds", "2 x 1 domains, 2 blocks", "-DPAIRS=2 -DPER_PAIR=1 -DBLOCKS=2 -DSTOPS=1", "nothing"),
    Row("holds", "2 x 2 domains, 1 block", "-DPAIRS=2 -DSTOPS=1", "nothing"),
    Row("holds", "... abort", "-DPAIRS=2 -DABORTS=1", "nothing"),
    Row("holds", "workers copy, 2 blocks", "-DWORKER_COPY=1 -DBLOCKS=2 -DSTOPS=1 -DABORTS=1", "nothing"),
    Row("holds", "... 2 x 1 domains", "-DWORKER_COPY=1 -DPAIRS=2 -DPER_PAIR=1 -DBLOCKS=2", "nothing"),
    Row("holds", "workers copy first, 2 blocks", "-DWORKER_COPY=2 -DBLOCKS=2 -DABORTS=1", "nothing"),
    Row("holds", "... 2 x 1 domains", "-DWORKER_COPY=2 -DPAIRS=2 -DPER_PAIR=1", "nothing"),
    Row("holds", "two touched, host copies, 2 blocks", "-DTOUCHES=2 -DBLOCKS=2 -DSTOPS=1", "nothing"),
    Row("holds", "... workers copy", "-DTOUCHES=2 -DWORKER_COPY=1 -DBLOCKS=2 -DSTOPS=1", "nothing"),
    Row("holds", "... workers copy first", "-DTOUCHES=2 -DWORKER_COPY=2 -DBLOCKS=2 -DSTOPS=1", "nothing"),
    Row("holds", "workers scrub, 1 x 2 domains", "-DWORKER_SCRUB=1 -DABORTS=1", "nothing"),
    Row("ends", "no run is endless", "-DPER_PAIR=1 -DBLOCKS=2 -DSTOPS=1 -DABORTS=1", "no cycle"),
    Row(
        "ends",
        "... workers copy first and scrub",
        "-DWORKER_COPY=2 -DWORKER_SCRUB=1 -DPER_PAIR=1 -DBLOCKS=2",
        "no cycle",
    ),
    Row("ends", "... workers copy", "-DWORKER_COPY=1 -DPER_PAIR=1 -DBLOCKS=2 -DABORTS=1", "no cycle"),
)

# Each property says that something never happens; the run must refute it.
REACHED: Final = tuple(
    Row("reached", name, flags, never, never)
    for name, flags, never in (
        ("a launch is VERIFIED", "", "NO_VERIFIED"),
        ("a launch is REJECTED", "", "NO_REJECTED"),
        ("a pair is taken over", "-DBLOCKS=2 -DPER_PAIR=1", "NO_TAKEOVER"),
        ("a torn copy is passed over", "-DBLOCKS=2 -DPER_PAIR=1", "NO_TORN"),
        ("a late worker gives its claim back", "", "NO_LATE"),
        ("a deadline kills a stopped worker", "-DSTOPS=1", "NO_KILL"),
        ("the enclave writes while others measure", "-DBLOCKS=2 -DPER_PAIR=1", "NO_OVERLAP"),
        ("two workers hash at once", "-DPAIRS=2 -DPER_PAIR=1", "NO_PARALLEL"),
        ("VERIFIED before the last release", "", "NO_LEFTOVER"),
        ("closing meets a claim", "-DABORTS=1", "NO_CAUGHT"),
        ("a tampered enclave heals a released page", "", "NO_HEAL"),
        ("a page is copied again", "-DWORKER_COPY=1", "NO_RECOPY"),
        ("... by who copies first", "-DWORKER_COPY=2", "NO_RECOPY"),
        ("a page is VALID before its turn", "-DTOUCHES=1 -DBLOCKS=2", "NO_AHEAD"),
        ("... where workers copy", "-DWORKER_COPY=1 -DTOUCHES=1 -DBLOCKS=2", "NO_AHEAD"),
    )
)


def mutations() -> list[Row]:
    """The rows of ``mutations``."""
    table = tomllib.loads(MUTATIONS.read_text())["mutation"]
    return [Row("mutation", row["name"], row["flags"], row["breaks"], properties(row)) for row in table]


def properties(row: Mapping[str, str]) -> str:
    """The properties to switch on: those that must break, else those named, else all."""
    if row["breaks"] in ("nothing", "hang", "cycle"):
        return row.get("checks", "ALL_PROPS")
    return row["breaks"]


def unknown_macros(rows: Sequence[Row]) -> list[str]:
    """Macros that rows set and the model does not read: such a row would take nothing away."""
    read = set(re.findall(r"\b[A-Z][A-Z_]+\d?\b", MODEL.read_text()))
    return sorted({name for row in rows for name in re.findall(r"-D(\w+)", row.flags)} - read)


def call(command: Sequence[str], folder: Path) -> str:
    """Standard output and error of a command that must not hang."""
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(
        command, cwd=folder, stdout=pipe, stderr=merged, text=True, timeout=DEADLINE_S, check=False
    )
    return done.stdout


def search(row: Row, megabytes: int) -> str:
    """Generate, compile and run one verifier; what it printed."""
    endless = row.breaks in ("cycle", "no cycle")
    with tempfile.TemporaryDirectory(prefix="enturbo-model-") as name:
        folder = Path(name)
        generated = call(["spin", "-a", f"-DPROPS={row.checks}", *row.flags.split(), str(MODEL)], folder)
        if not (folder / "pan.c").exists():
            return generated
        compile_flags = ["-DNP"] if endless else ["-DSAFETY"]
        # Compiling costs more than it saves where the search is short, and a counterexample comes at once.
        short = row.breaks not in ("nothing", "no cycle")
        compile_flags += ["-O0" if short else "-O2" if row.large else "-O1"]
        compile_flags += ["-w", "-DCOLLAPSE", f"-DMEMLIM={megabytes}", f"-DVECTORSZ={VECTOR_BYTES}"]
        compiled = call(["gcc", *compile_flags, "-o", "pan", "pan.c"], folder)
        if not (folder / "pan").exists():
            return generated + compiled
        options = [f"-m{DEPTH}", "-n"]
        if endless:
            options += ["-l"]
        elif row.breaks == "hang":
            options += ["-A"]  # assertions off: only an invalid end state counts
        elif row.checks != "ALL_PROPS":
            options += ["-E"]  # invalid end states off: only the assertion counts
        return generated + call(["./pan", *options], folder)


def judge(row: Row, printed: str) -> tuple[bool, str]:
    """Did the run show what its row says, and what did it show."""
    errors = re.search(r"errors: (\d+)", printed)
    if errors is None:
        return False, "no result: " + " ".join(printed.split())[-300:]
    found = re.search(r"pan:1: (.*?) \(at depth \d+\)", printed)
    shown = found.group(1).split("(")[0].strip() if found else "complete, no error"
    if errors.group(1) == "0":
        cut = [words for words in TRUNCATED if words in printed]
        if cut:
            return False, "search not complete: " + cut[0]
        return row.breaks in ("nothing", "no cycle"), shown
    if row.breaks in ("nothing", "no cycle"):
        return False, found.group(1) if found else "an error without a name"
    wanted = UNNAMED.get(row.breaks, "assertion violated")
    if wanted not in shown:
        return False, shown
    return True, shown if row.breaks in UNNAMED else f"{row.breaks} violated"


def run(row: Row, megabytes: int) -> Outcome:
    """One row, from source to verdict."""
    begun = time.monotonic()
    try:
        printed = search(row, megabytes)
    except subprocess.TimeoutExpired as late:
        return Outcome(row, False, f"no end within {late.timeout:.0f} s", 0, 0.0, time.monotonic() - begun)
    passed, verdict = judge(row, printed)
    states = re.search(r"(\d+) states, stored", printed)
    memory = re.search(r"([\d.]+)\s+total actual memory usage", printed)
    return Outcome(
        row,
        passed,
        verdict,
        int(states.group(1)) if states else 0,
        float(memory.group(1)) if memory else 0.0,
        time.monotonic() - begun,
    )


def show(outcome: Outcome) -> None:
    """One line of the table."""
    row = outcome.row
    mark = "ok  " if outcome.passed else "FAIL"
    print(
        f"{mark} {row.kind:8} {row.name:42} {outcome.states:>10,} {outcome.megabytes:>6.0f} "
        f"{outcome.seconds:>6.1f}  {outcome.verdict}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and tell by the exit code whether everything was as it should be."""
    parser = argparse.ArgumentParser(description="check the model of a measured start with SPIN")
    parser.add_argument("--large", action="store_true", help="the larger instances instead of the quick set")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args(arguments)
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        print(
            f"{' and '.join(missing)} not found; on Debian: apt install {' '.join(missing)}", file=sys.stderr
        )
        return 2
    rows = LARGE if options.large else (*QUICK, *mutations(), *REACHED)
    unknown = unknown_macros(rows)
    if unknown:
        print(f"{MODEL.name} knows no {', '.join(unknown)}", file=sys.stderr)
        return 2
    rows = tuple(row._replace(large=options.large) for row in rows if options.only in row.name)
    megabytes = (8000 if options.large else 4000) // max(1, options.jobs)
    print(f"     {'run':8} {'instance':42} {'states':>10} {'MB':>6} {'s':>6}  shows")
    begun = time.monotonic()
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(lambda row: run(row, megabytes), rows):
            show(outcome)
            outcomes.append(outcome)
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{sum(outcome.states for outcome in outcomes):,} states in {time.monotonic() - begun:.0f} s")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
