"""The rows of the launches' rounds: see :mod:`.targets`."""

from __future__ import annotations

from collections.abc import Iterator

from .rounds import Group, Summary, summarise
from .row import Row
from .text import SHARE, TIMES


def launch_rows(group: Group) -> Iterator[Row]:
    size, many = group.facts["mebibytes"], group.facts["many"]
    each = group.facts["many_mebibytes"]
    image = f"{size} MiB"

    def share(name: str) -> Summary:
        return group.ratio("ceiling", name)

    yield Row(
        "records",
        f"measuring {image}, scheme enturbo",
        "record by record with hashlib, serial",
        group.ratio("records", "early_measuring"),
        TIMES,
        "Numerator: a Python loop over the pages, one `hashlib` update for each header and each chunk,"
        f" with headers that stand ready; {group.facts['records_mebibytes']} MiB of it, scaled by pages."
        ' Denominator: two workers in a launch with `prefer="start"`, which copies everything first;'
        " from the start of the first stripe to the end of the last, as the workers tell, so the copy is"
        " not in it (but its last stripe may be), nor are opening, merge and verdict. Claims, results and"
        " releases are.",
        target=11,
        limit=group.ratio("records", "ceiling"),
        share=share("early_measuring"),
    )
    yield Row(
        "signer",
        f"measuring {image}, scheme enturbo",
        "record by record as signing tools do it, serial",
        group.ratio("signer", "early_measuring"),
        TIMES,
        "As the row before, but with a function a record that packs its header anew and checks its"
        " arguments, as in Gramine's signer.",
        limit=group.ratio("signer", "ceiling"),
        share=share("early_measuring"),
    )
    yield Row(
        "chain",
        f"measuring {image}, scheme enturbo",
        "own exact chain, serial",
        group.ratio("chain", "early_measuring"),
        TIMES,
        "Numerator: the native hasher, one call over all pages where they lie: our fastest exact chain."
        " Denominator: as before.",
        target=2.9,
        limit=group.ratio("chain", "ceiling"),
        share=share("early_measuring"),
    )
    for name, way, preference, least in (
        ("verified", "fused", "verified", 3.0),
        ("start", "early", "start", 2.6),
    ):
        yield Row(
            name,
            f'launch → VERIFIED, {image}, `prefer="{preference}"`',
            "own `serial`, fused",
            group.ratio("serial_verified", f"{way}_verified"),
            TIMES,
            "Copy included. Image without a handler, so no enclave process runs beside the workers. `serial`"
            " copies and measures piece by piece in the cache (scheme sgx, native).",
            target=least,
            limit=group.ratio("serial_verified", "ceiling"),
            share=share(f"{way}_verified"),
        )
        yield Row(
            f"{name}-handler",
            f'launch → VERIFIED, {image} with a handler, `prefer="{preference}"`',
            "own `serial`, fused",
            group.ratio("serial_function_verified", f"{way}_function_verified"),
            TIMES,
            "An image with a handler, whose process is forked and calls the handler while the workers"
            " measure, on the same cores. In the serial start that process comes after the verdict.",
            limit=group.ratio("serial_function_verified", "ceiling"),
            share=share(f"{way}_function_verified"),
        )
    yield Row(
        "first",
        f'launch → first handler instruction, {image}, `prefer="start"`',
        "own `serial`",
        group.ratio("serial_function_first", "early_function_first"),
        TIMES,
        "The enclave process stamps the moment directly before the handler's first call. The call is"
        " submitted directly after the launch.",
        target=8,
    )
    for name, way, preference in (("many-verified", "fused", "verified"), ("many-start", "early", "start")):
        scale = many * each / size
        bytes_a_second = [
            scale * one / all_of_them
            for one, all_of_them in zip(group[f"{way}_verified"], group[f"many_{way}_verified"], strict=True)
        ]
        yield Row(
            name,
            f'{many} enclaves of {each} MiB at once, `prefer="{preference}"`: bytes per second',
            f"one launch of {image}, likewise",
            summarise(bytes_a_second),
            SHARE,
            "Different images, without handlers, launched one after the other from one thread without"
            " waiting; from the first `launch()` to the last VERIFIED.",
            target=0.9,
            share=summarise(
                [
                    scale * one / all_of_them
                    for one, all_of_them in _pairs(group, "ceiling", f"many_{way}_verified")
                ]
            ),
        )
    yield Row(
        "numpy",
        f"measuring {image} without the C extension's hasher",
        "own exact chain, hashlib + numpy",
        group.ratio("numpy_chain", "numpy_measuring"),
        TIMES,
        "Numerator: one call of the `hashlib` hasher over all pages. Denominator:"
        ' `Runtime(hasher="hashlib")`, two workers, measured as in the first row. Its limit is the'
        " number of workers.",
        target=1.8,
        limit=summarise([2.0]),
        share=share("numpy_measuring"),
    )


def _pairs(group: Group, above: str, below: str) -> list[tuple[float, float]]:
    return list(zip(group[above], group[below], strict=True))
