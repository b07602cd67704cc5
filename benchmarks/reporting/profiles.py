"""Where the time goes, for each target that may be missed.

Pure: samples in, text out. Which figures matter for which target is known beforehand; what they come to is
not.
"""

from __future__ import annotations

from collections.abc import Callable

from .accounts import account, per_page
from .enforcement_rows import enforcement_profiles
from .page_times import LARGE, PAGES, ceiling_page_time, fixed_and_per_page
from .rounds import Group
from .row import Groups, Row
from .startup import STAGES
from .text import microseconds, milliseconds, percent, times


def profile(row: Row, groups: Groups) -> str:
    """A paragraph on where the time of a target goes."""
    make = _PROFILES.get(row.name)
    return make(groups) if make else "No profile is taken for this row."


def _records(groups: Groups) -> str:
    group = groups["launches"]
    return (
        f"A page takes {per_page(group, 'records')} in the loop over records, {per_page(group, 'signer')}"
        f" in that of signing tools and {per_page(group, 'raw')} in SHA-256 of as many contiguous bytes"
        f" (one stream), so the loop itself is {_beside(group, 'records', 'raw')} of its time. Two workers"
        f" take {per_page(group, 'early_measuring')}, two bare processes {per_page(group, 'ceiling')}: at"
        f" the ceiling of these rounds the ratio would be {times(group.ratio('records', 'ceiling'))}. "
        + _spent(group, "early")
    )


def _measuring(groups: Groups) -> str:
    group = groups["launches"]
    return (
        f"A page takes {per_page(group, 'chain')} in one chain, {per_page(group, 'early_measuring')} with"
        f" two workers and {per_page(group, 'ceiling')} with two bare processes (one of them alone:"
        f" {per_page(group, 'two_lanes_alone')} for both halves): at the ceiling the ratio would be"
        f" {times(group.ratio('chain', 'ceiling'))}. " + _spent(group, "early")
    )


def _launch(name: str) -> Callable[[Groups], str]:
    def make(groups: Groups) -> str:
        group = groups["launches"]
        return (
            f"`serial` is VERIFIED after {milliseconds(group.of('serial_verified'))}, this launch after"
            f" {milliseconds(group.of(f'{name}_verified'))}, with its last page copied after"
            f" {milliseconds(group.of(f'{name}_copied'))}; the ceiling, without any copy, is"
            f" {milliseconds(group.of('ceiling'))}. " + _spent(group, name)
        )

    return make


def _first(groups: Groups) -> str:
    group = groups["launches"]
    return (
        f"Without a handler the last page is copied after {milliseconds(group.of('early_copied'))}; the"
        f" first instruction comes after {milliseconds(group.of('early_function_first'))} and VERIFIED after"
        f" {milliseconds(group.of('early_function_verified'))}. In the serial start the first instruction"
        f" comes after {milliseconds(group.of('serial_function_first'))}, VERIFIED after"
        f" {milliseconds(group.of('serial_function_verified'))}."
    )


def _many(name: str) -> Callable[[Groups], str]:
    def make(groups: Groups) -> str:
        group = groups["launches"]
        one, several = account(group, name.removeprefix("many_")), account(group, name)
        return (
            _spent(group, name)
            + f" A launch among many costs workers {microseconds(several.workers_each)} beside bare hashing"
            f" and copying, and the host {microseconds(several.host_each)}; the one large launch costs them"
            f" {microseconds(one.workers_each)} and {microseconds(one.host_each)}, once."
        )

    return make


def _numpy(groups: Groups) -> str:
    group = groups["launches"]
    return (
        f"A page takes {per_page(group, 'numpy_chain')} in one chain and"
        f" {per_page(group, 'numpy_measuring')} with two"
        " workers. " + _spent(group, "numpy")
    )


def _exact(groups: Groups) -> str:
    group = groups["chain"]
    return (
        f"A page takes {per_page(group, 'chain')} with its records, and as many contiguous bytes take"
        f" {per_page(group, 'openssl')} with OpenSSL and {per_page(group, 'own')} with our own kernel:"
        " what is left is making headers, and reading pages."
    )


def _eadd(name: str) -> Callable[[Groups], str]:
    def make(groups: Groups) -> str:
        group = groups["eadds"]
        return (
            f"A record takes {per_page(group, name, 'ns')}, and as many contiguous bytes take"
            f" {per_page(group, 'openssl', 'ns')} with OpenSSL and {per_page(group, 'own', 'ns')} with our"
            " own kernel: what is left is making the records."
        )

    return make


def _small(groups: Groups) -> str:
    group = groups["small"]
    named = ", ".join(f"{title} {microseconds(group.of(name))}" for name, title in STAGES.items())
    return (
        f"Medians of what follows on another, by the launch's own timeline: {named}. The slowest launch of a"
        f" round took {milliseconds(group.of('most'))}."
    )


def _import(groups: Groups) -> str:
    named = ", ".join(
        f"`{name}` {seconds * 1e3:.2f} ms" for name, seconds in groups["fresh"].facts["import_times"]
    )
    return f"The modules that take longest by themselves, as `-X importtime` tells: {named}."


def _runtime(groups: Groups) -> str:
    group = groups["fresh"]
    return (
        f"`Runtime()` returns after {milliseconds(group.of('made'))}, `launch()` after"
        f" {milliseconds(group.of('accepted'))}, VERIFIED comes after {milliseconds(group.of('verified'))},"
        f" and all workers are ready after {milliseconds(group.of('workers'))}."
    )


def _idle(groups: Groups) -> str:
    group = groups["idle"]
    named = ", ".join(f"{name} {group.of(name).median:.3%}" for name in group.series if name != "all")
    return f"Shares of one core: {named}."


def _arena(groups: Groups) -> str:
    group = groups["arena"]
    return (
        f"Plain copying takes {milliseconds(group.of('plain'))}; the library's allocation and one copying"
        f" thread {milliseconds(group.of('segment'))}; `Runtime()` returns after"
        f" {milliseconds(group.of('made'))} and the last page is copied after"
        f" {milliseconds(group.of('runtime'))}. Meanwhile the interpreters of workers and zygote boot on the"
        " same cores, and workers that are ready begin to hash."
    )


def _growth(way: str) -> Callable[[Groups], str]:
    def make(groups: Groups) -> str:
        group = groups["growth"]
        fixed, each = fixed_and_per_page(group, way)
        moments = {
            "the first copy begins": "begun",
            "the last page is copied": "copied",
            "the last one is hashed": "hashed",
        }
        named = ", ".join(
            f"{title} after {milliseconds(group.of(f'{way}:{LARGE}:{name}'))}"
            for title, name in moments.items()
        )
        return (
            f"A line through the medians from {LARGE} MiB up, each counting by its share, is"
            f" {fixed * 1e3:.2f} ms a launch and {each * 1e6:.3f} µs a page. At {LARGE} MiB {named}, and"
            f" VERIFIED comes after {milliseconds(group.of(f'{way}:{LARGE}'))}; the ceiling"
            f" is {ceiling_page_time(group) * LARGE * PAGES * 1e3:.3g} ms. CPU time until then: workers"
            f" {milliseconds(group.of(f'{way}:{LARGE}:workers'))}, host"
            f" {milliseconds(group.of(f'{way}:{LARGE}:host'))}."
        )

    return make


_PROFILES: dict[str, Callable[[Groups], str]] = {
    "records": _records,
    "chain": _measuring,
    "verified": _launch("fused"),
    "start": _launch("early"),
    "first": _first,
    "many-verified": _many("many_fused"),
    "many-start": _many("many_early"),
    "numpy": _numpy,
    "exact": _exact,
    "eadd-native": _eadd("native"),
    "eadd-numpy": _eadd("numpy"),
    "small": _small,
    "import": _import,
    "runtime": _runtime,
    "idle": _idle,
    "arena": _arena,
    "growth-verified": _growth("fused"),
    "growth-start": _growth("early"),
    **enforcement_profiles(),
}


def _spent(group: Group, name: str) -> str:
    known = account(group, name)
    return (
        f"Of two cores' time from launch to VERIFIED, bare hashing is {percent(known.hashing)}, bare copying"
        f" {percent(known.copying)}, what workers do beside {percent(known.workers)}, the host"
        f" {percent(known.host)}; {percent(known.rest)} was idle or other programs'."
    )


def _beside(group: Group, whole: str, part: str) -> str:
    return f"{100 - group.ratio(part, whole).median * 100:.0f} %"
