"""Growth: launch to VERIFIED from 1 MiB up, all sizes in the same rounds."""

from __future__ import annotations

from enturbo import SigningKey
from enturbo.shm.segment import room

from .ceiling import Ceiling
from .material import MIB, Signed, plain_image, start_plain, stretched_image, warm_runtime
from .rounds import Group, Say, Step, summarise, take
from .sizes import Sizes

BASE = 256  # MiB of content at most; larger images repeat it
REPEAT_UP_TO = 16  # MiB; smaller images are started several times a round
REPEATS = 5
WAYS = {
    "serial": {"startup": "serial"},
    "fused": {"prefer": "verified"},
    "early": {"prefer": "start"},
}
MOMENTS = ("begun", "copied", "hashed", "workers", "host")  # of start_plain


def measure_growth(sizes: Sizes, say: Say) -> Group:
    """Seconds to VERIFIED as ``way:MiB``, and moments before it; the ceiling is ``ceiling_mebibytes``'.

    Sizes for which ``/dev/shm`` has no room are left out and named in the facts.
    """
    key = SigningKey.generate()
    base = plain_image(min(BASE, max(sizes.growth)) * MIB)
    free, _ = room()
    fitting = [size for size in sizes.growth if size * MIB * 1.1 < free]
    signed = {}
    for size in fitting:
        say(f"growth: signing {size} MiB")
        image = stretched_image(base, size * MIB)
        for scheme in ("sgx", "enturbo"):
            if scheme == "enturbo" or size <= sizes.growth_serial:
                signed[scheme, size] = Signed(image, key.sign(image, scheme))
    say("growth: a warm EPC")
    with Ceiling(base) as ceiling, warm_runtime(max(fitting) * MIB, key.mrsigner) as runtime:

        def step(way: str, size: int) -> Step:
            subject = signed["sgx" if way == "serial" else "enturbo", size]
            repeats = REPEATS if size <= REPEAT_UP_TO else 1

            def launches() -> dict[str, float]:
                found = [start_plain("launch", runtime, subject, **WAYS[way]) for _ in range(repeats)]
                medians = {name: summarise([each[name] for each in found]).median for name in found[0]}
                moments = {f"{way}:{size}:{name}": medians[f"launch_{name}"] for name in MOMENTS}
                return {f"{way}:{size}": medians["launch_verified"], **moments}

            return launches

        steps: list[Step] = [ceiling.hash]
        steps += [
            step(way, size)
            for size in fitting
            for way in WAYS
            if way != "serial" or size <= sizes.growth_serial
        ]
        series = take("growth", steps, sizes.growth_rounds, say)
    left_out = [size for size in sizes.growth if size not in fitting]
    facts = {"sizes": fitting, "left_out": left_out, "ceiling_mebibytes": base.page_count * 4096 // MIB}
    return Group(facts, series)
