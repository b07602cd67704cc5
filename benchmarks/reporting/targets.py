"""The rows of the report: each target, what was measured for it, its limit, and how it was measured.

Pure: groups of samples in, rows out. The targets are the issue's, the rest comes from the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from enturbo.shm.layout import EPCM_ENTRY, SMC_SIZE

from .enforcement_rows import enforcement_rows
from .launch_rows import launch_rows
from .page_times import LARGE, page_time_spread
from .rounds import Group, summarise
from .row import Groups, Row
from .text import BYTES, MILLISECONDS, NONE, SHARE, TIMES, milliseconds, times

CLOSE = 0.15  # how far times per page may be from each other


def rows(groups: Groups) -> list[Row]:
    """All rows whose group was measured, in the order of the table."""
    return [row for name, make in _MAKERS.items() if name in groups for row in make(groups[name])]


# Which experiment a row's name stands in: what `--only` needs to know.
NAMES: dict[str, str] = {
    "records": "launches",
    "chain": "launches",
    "verified": "launches",
    "start": "launches",
    "first": "launches",
    "exact": "chain",
    "eadd-native": "eadds",
    "eadd-numpy": "eadds",
    "small": "small",
    "many-verified": "launches",
    "many-start": "launches",
    "numpy": "launches",
    "import": "fresh",
    "runtime": "fresh",
    "idle": "idle",
    "arena": "arena",
    "slope": "memory",
    "growth": "growth",
    "enforcement": "enforcement",
}


def _chain(group: Group) -> Iterator[Row]:
    limit = group.least("openssl", "own")
    yield Row(
        "exact",
        f"one exact chain, {group.facts['mebibytes']} MiB of pages with their records, native",
        "the SHA-256 limit",
        summarise([raw / chain for raw, chain in zip(limit, group["chain"], strict=True)]),
        SHARE,
        "The limit: as many contiguous bytes as the records have, hashed by one stream; of OpenSSL (through"
        " `hashlib`) and our own one-lane kernel whichever was faster in the round.",
        target=0.95,
        limit=summarise([1.0]),
    )


def _eadds(group: Group) -> Iterator[Row]:
    limit = group.least("openssl", "own")
    for name, hasher, what, least in (
        ("eadd-native", "native", "native", 0.75),
        ("eadd-numpy", "numpy", "hashlib + numpy", 0.4),
    ):
        yield Row(
            name,
            f"{group.facts['pages'] / 1e6:g} M EADD-only pages, {what}",
            "the SHA-256 limit",
            summarise([raw / ours for raw, ours in zip(limit, group[hasher], strict=True)]),
            SHARE,
            "The limit: as many bytes as the EADD records have, one stream, out of the cache; the faster of"
            " OpenSSL and our own kernel.",
            target=least,
            limit=summarise([1.0]),
        )


def _small(group: Group) -> Iterator[Row]:
    yield Row(
        "small",
        f"{group.facts['bytes'] >> 10} KiB enclave, warm pool: launch → VERIFIED",
        NONE,
        group.of("verified"),
        MILLISECONDS,
        f"No handler, so no enclave process. Each round's value is the median of {group.facts['launches']}"
        " launches one after the other; the host measures such an image alone.",
        target=0.5e-3,
        at_most=True,
    )


def _fresh(group: Group) -> Iterator[Row]:
    yield Row(
        "import",
        "`import enturbo`",
        NONE,
        group.of("package"),
        MILLISECONDS,
        "In fresh interpreters. Public names are imported when they are first used;"
        f" `from enturbo import EnclaveImage, Runtime, SigningKey` takes {milliseconds(group.of('names'))}.",
        target=60e-3,
        at_most=True,
    )
    ready = summarise(group["ready"])
    yield Row(
        "runtime",
        "`Runtime()` with two workers → its first launch VERIFIED",
        NONE,
        group.of("verified"),
        MILLISECONDS,
        "In fresh interpreters, imports done, EPC of the default size, an image of"
        f" {group.facts['first_bytes'] >> 20} MiB. `Runtime()` returns after"
        f" {milliseconds(group.of('made'))}, `launch()` after {milliseconds(group.of('accepted'))}; workers"
        f" that were ready when it was VERIFIED: {ready.least:.0f} to {ready.most:.0f}; all were after"
        f" {milliseconds(group.of('workers'))}.",
        target=400e-3,
        at_most=True,
    )


def _idle(group: Group) -> Iterator[Row]:
    yield Row(
        "idle",
        "an idle runtime with two workers: CPU time, share of one core",
        NONE,
        group.of("all"),
        SHARE,
        f"Host, zygote and workers over {group.facts['seconds']:g} s, by their CPU clocks.",
        target=0.005,
        at_most=True,
    )


def _arena(group: Group) -> Iterator[Row]:
    size = group.facts["mebibytes"]
    yield Row(
        "arena",
        f"a fresh arena: `Runtime()` → first {size} MiB copied",
        "plainly copying them into a fresh SharedMemory",
        group.ratio("plain", "runtime"),
        TIMES,
        f"Both from nothing to the last byte; plain copying takes {milliseconds(group.of('plain'))}. Making"
        f" the runtime and starting its processes is in it ({milliseconds(group.of('made'))} until"
        " `Runtime()` returns). The library's allocation and one copying thread alone are"
        f" {times(group.ratio('plain', 'segment'))} as fast as plain copying.",
        target=1.0,
    )


def _memory(group: Group) -> Iterator[Row]:
    yield Row(
        "smc",
        "SMC, each starting enclave",
        NONE,
        summarise([SMC_SIZE]),
        BYTES,
        "From the layout, as `enturbo doctor` states it.",
        target=4096,
        at_most=True,
    )
    yield Row(
        "epcm",
        "EPCM, each page",
        NONE,
        summarise([EPCM_ENTRY.size]),
        BYTES,
        "Likewise.",
        target=32,
        at_most=True,
    )
    if group.facts["slopes"]:
        yield Row(
            "slope",
            "memory of one more living enclave beside its EPC pages",
            NONE,
            summarise([group.facts["slopes"]["own"]]),
            BYTES,
            "Slope of a line through the PSS of all processes without shared memory, by the number of"
            " enclaves.",
        )


def _growth(group: Group) -> Iterator[Row]:
    for way, preference in (("fused", "verified"), ("early", "start")):
        spread = page_time_spread(group, way)
        if spread is None:
            continue
        yield Row(
            f"growth-{preference}",
            f'time per page from {LARGE} MiB up, `prefer="{preference}"`: dearest against cheapest size',
            NONE,
            summarise([spread - 1]),
            SHARE,
            "Time per page of each size over that of the largest size in the same round; the medians of these"
            " against each other.",
            target=CLOSE,
            at_most=True,
        )


_MAKERS: dict[str, Callable[[Group], Iterator[Row]]] = {
    "launches": launch_rows,
    "chain": _chain,
    "eadds": _eadds,
    "small": _small,
    "memory": _memory,
    "fresh": _fresh,
    "idle": _idle,
    "arena": _arena,
    "growth": _growth,
    "enforcement": enforcement_rows,
}
