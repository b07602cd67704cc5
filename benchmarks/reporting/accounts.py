"""Where two cores' time goes, and how fast the baselines are: tables of the launches' rounds. Pure."""

from __future__ import annotations

from typing import NamedTuple

from .material import PAGE_RECORDS, WORKERS
from .rounds import Group, Summary, summarise
from .text import microseconds, milliseconds, percent

LAUNCHES = {
    "fused": 'one image, `prefer="verified"`',
    "early": 'one image, `prefer="start"`',
    "many_fused": 'many at once, `prefer="verified"`',
    "many_early": 'many at once, `prefer="start"`',
    "numpy": "one image, `hashlib` hasher",
}


class Account(NamedTuple):
    """What became of two cores' time between launch and VERIFIED; all but ``wall`` are shares of it.

    ``hashing`` and ``copying`` are the CPU time that two bare processes took for the same bytes in the same
    round, ``workers`` is what the workers took above that, ``host`` what the host took, ``rest`` what nobody
    of ours took.
    """

    wall: Summary
    hashing: Summary
    copying: Summary
    workers: Summary
    host: Summary
    rest: Summary
    workers_each: Summary  # seconds a launch
    host_each: Summary  # seconds a launch


def account(group: Group, name: str) -> Account:
    """Of one kind of launch: see :data:`LAUNCHES`."""
    launches, scale = 1, 1.0
    if name.startswith("many"):
        launches = group.facts["many"]
        scale = launches * group.facts["many_mebibytes"] / group.facts["mebibytes"]
    found: list[list[float]] = []
    for wall, hashed, copied, workers, host in zip(
        group[f"{name}_verified"],
        group["numpy_chain" if name == "numpy" else "ceiling_cpu"],
        group["copying_cpu"],
        group[f"{name}_workers"],
        group[f"{name}_host"],
        strict=True,
    ):
        whole = WORKERS * wall
        beside = workers - scale * (hashed + copied)
        parts = [scale * hashed, scale * copied, beside, host, whole - workers - host]
        found.append([wall, *(part / whole for part in parts), beside / launches, host / launches])
    return Account(*(summarise(values) for values in zip(*found, strict=True)))


def account_table(group: Group) -> list[str]:
    """All kinds of launches."""
    lines = [
        "| launch | to VERIFIED | hashing | copying | workers beside | host | nobody of ours | a launch:"
        " workers beside, host |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in LAUNCHES.items():
        known = account(group, name)
        shares = (known.hashing, known.copying, known.workers, known.host, known.rest)
        lines.append(
            f"| {title} | {milliseconds(known.wall)} | "
            + " | ".join(map(percent, shares))
            + f" | {microseconds(known.workers_each)}, {microseconds(known.host_each)} |"
        )
    return lines


def speed_table(group: Group) -> list[str]:
    """The baselines and the ceiling, per page and as bytes of records a second."""
    size = f"{group.facts['mebibytes']} MiB"
    part = f"{group.facts['records_mebibytes']} MiB, scaled"
    titles = {
        "signer": f"record by record, as signing tools do it ({part})",
        "records": f"record by record, written for speed ({part})",
        "numpy_chain": f"exact chain, hashlib + numpy ({size})",
        "chain": f"exact chain, native ({size})",
        "raw": "raw SHA-256, OpenSSL, one stream of as many bytes",
        "two_lanes_alone": "raw two-lane hashing, one process: twice its half of the records",
        "ceiling": "**the ceiling**: raw two-lane hashing, two processes, half of the records each",
        "copying": "two processes that copy the pages into warm shared memory, half each",
    }
    lines = ["| baseline | time | a page | records |", "|---|---|---|---|"]
    for name, title in titles.items():
        rate = group.facts["pages"] * PAGE_RECORDS / group.of(name).median / 1e9
        moved = "" if name == "copying" else f"{rate:.2f} GB/s"
        lines.append(f"| {title} | {milliseconds(group.of(name))} | {per_page(group, name)} | {moved} |")
    return lines


def per_page(group: Group, name: str, unit: str = "µs") -> str:
    """A series' median over the group's pages."""
    factor = {"µs": 1e6, "ns": 1e9}[unit]
    return f"{group.of(name).median / group.facts['pages'] * factor:.3g} {unit}"
