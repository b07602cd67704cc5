"""Launches of large images against serial ones, bare hashing and a ceiling, all in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable

from enturbo import SigningKey
from enturbo.workers.sha256 import get_hasher

from .baselines import exact_chain, function_by_record, raw_openssl, record_by_record
from .ceiling import Ceiling
from .material import (
    MIB,
    PAGE_RECORDS,
    PAGE_SIZE,
    Signed,
    content,
    function_image,
    plain_image,
    start_function,
    start_many,
    start_plain,
    warm_runtime,
)
from .rounds import Group, Say, Step, take
from .sizes import Sizes


def measure_launches(sizes: Sizes, say: Say) -> Group:
    """All that is told about launches of one large image and of many small ones. Series are in seconds.

    The EPC has room for two launches, so that none waits for pages of the one before it.
    """
    size = sizes.image * MIB
    say("launches: images and signatures")
    key = SigningKey.generate()
    image, function = plain_image(size), function_image(size)
    part = plain_image(sizes.records * MIB)
    many = [plain_image(sizes.each * MIB, number) for number in range(sizes.many)]
    exact, parallel = (Signed(image, key.sign(image, scheme)) for scheme in ("sgx", "enturbo"))
    exact_function, parallel_function = (
        Signed(function, key.sign(function, scheme)) for scheme in ("sgx", "enturbo")
    )
    all_parallel = [Signed(each, key.sign(each, "enturbo")) for each in many]
    native, numpy = get_hasher("native"), get_hasher("hashlib")
    data, record_bytes = content(size), size // PAGE_SIZE * PAGE_RECORDS
    most = max(size, sizes.many * sizes.each * MIB)
    with (
        Ceiling(image) as ceiling,
        warm_runtime(2 * most + 16 * MIB, key.mrsigner) as runtime,
        warm_runtime(size + MIB, key.mrsigner, "hashlib") as without,
    ):
        scale = size / (sizes.records * MIB)
        exact_part = part.measure("sgx").digest
        steps: list[Step] = [
            ceiling.hash,
            ceiling.hash_alone,
            ceiling.copy,
            lambda: _timed("raw", lambda: raw_openssl(data, record_bytes)),
            lambda: _timed("records", lambda: record_by_record(part), exact_part, scale),
            lambda: _timed("signer", lambda: function_by_record(part), exact_part, scale),
            _chain("chain", exact_chain(image, native), exact),
            _chain("numpy_chain", exact_chain(image, numpy), exact),
            lambda: start_plain("serial", runtime, exact, startup="serial"),
            lambda: start_plain("fused", runtime, parallel, prefer="verified"),
            lambda: start_plain("early", runtime, parallel, prefer="start"),
            lambda: start_function("serial_function", runtime, exact_function, startup="serial"),
            lambda: start_function("fused_function", runtime, parallel_function, prefer="verified"),
            lambda: start_function("early_function", runtime, parallel_function, prefer="start"),
            lambda: start_many("many_fused", runtime, all_parallel, prefer="verified"),
            lambda: start_many("many_early", runtime, all_parallel, prefer="start"),
            lambda: start_plain("numpy", without, parallel, prefer="start"),
        ]
        series = take("launches", steps, sizes.launch_rounds, say)
        facts = {
            "mebibytes": sizes.image,
            "pages": size // PAGE_SIZE,
            "records_mebibytes": sizes.records,
            "many": sizes.many,
            "many_mebibytes": sizes.each,
            "epc_bytes": runtime.stats()["epc_pages"] * PAGE_SIZE,
            "epc_bytes_huge": runtime.stats()["epc_bytes_huge"],
            "cores": runtime.cores,
        }
    return Group(facts, series)


def _chain(name: str, work: Callable[[], bytes], signed: Signed) -> Step:
    return lambda: _timed(name, work, signed.sigstruct.enclavehash)


def _timed(
    name: str, work: Callable[[], bytes | None], expected: bytes | None = None, scale: float = 1.0
) -> dict[str, float]:
    """Seconds of ``work`` times ``scale``. What it returns must be ``expected``: nobody is fast and wrong."""
    begin = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - begin
    if found != expected:
        raise RuntimeError(f"{name} gave another value than the library")
    return {name: seconds * scale}
