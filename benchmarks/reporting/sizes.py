"""How much is measured: the targets' own sizes, and smaller ones to try the report out."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Sizes in MiB, rounds without the first one of each experiment, which never counts."""

    image: int  # the image of the launches
    records: int  # measured record by record, then scaled
    many: int  # enclaves launched at once
    each: int  # MiB of each of them
    launch_rounds: int
    chain: int  # the image of the exact chain
    chain_rounds: int
    eadd_pages: int
    eadd_rounds: int
    small_launches: int  # a round
    small_rounds: int
    fresh_rounds: int  # interpreters, runtimes and arenas that were just made
    idle_seconds: float
    enclaves: int  # of the memory slope
    growth: tuple[int, ...]
    growth_serial: int  # the largest size that is also started serially
    growth_rounds: int
    written: int  # measured data that functions write to
    enforcement_rounds: int


FULL = Sizes(
    image=256,
    records=16,
    many=64,
    each=4,
    launch_rounds=21,
    chain=64,
    chain_rounds=25,
    eadd_pages=31_500_000,
    eadd_rounds=5,
    small_launches=60,
    small_rounds=9,
    fresh_rounds=9,
    idle_seconds=15.0,
    enclaves=64,
    growth=(1, 4, 16, 64, 256, 1024, 4096),
    growth_serial=1024,
    growth_rounds=9,
    written=64,
    enforcement_rounds=15,
)
QUICK = Sizes(
    image=32,
    records=4,
    many=8,
    each=4,
    launch_rounds=3,
    chain=16,
    chain_rounds=3,
    eadd_pages=1_000_000,
    eadd_rounds=3,
    small_launches=10,
    small_rounds=3,
    fresh_rounds=3,
    idle_seconds=5.0,
    enclaves=8,
    growth=(1, 4, 16, 64, 128),
    growth_serial=64,
    growth_rounds=3,
    written=16,
    enforcement_rounds=3,
)
