"""One exact chain against the SHA-256 limit: of measured pages, and of pages that are only added (EADD)."""

from __future__ import annotations

import time
from collections.abc import Callable

from enturbo.workers.sha256 import get_hasher

from .baselines import exact_chain, raw_openssl, raw_own
from .material import FLAGS, MIB, PAGE_RECORDS, content, plain_image
from .rounds import Group, Say, Step, take
from .sizes import Sizes

EADD_RECORD = 64  # bytes
RAW_BYTES = MIB  # hashed again and again where records are made and not read: it stays in the cache


def measure_chain(sizes: Sizes, say: Say) -> Group:
    """Seconds of one exact chain over pages in memory, and of SHA-256 over as many contiguous bytes."""
    image = plain_image(sizes.chain * MIB)
    pages = image.page_count
    native = get_hasher("native")
    records = content(pages * PAGE_RECORDS)
    chain = exact_chain(image, native)
    if chain() != image.measure("sgx").digest:
        raise RuntimeError("the exact chain gave another value than the library")
    steps: list[Step] = [
        lambda: _timed("openssl", lambda: raw_openssl(records, len(records))),
        lambda: _timed("own", lambda: raw_own(native, records, len(records))),
        lambda: _timed("chain", chain),
    ]
    series = take("exact chain", steps, sizes.chain_rounds, say)
    return Group({"mebibytes": sizes.chain, "pages": pages}, series)


def measure_eadds(sizes: Sizes, say: Say) -> Group:
    """Seconds of EADD-only pages by both hashers, and of SHA-256 over as many bytes as their records have."""
    native, numpy = get_hasher("native"), get_hasher("hashlib")
    pages, data = sizes.eadd_pages, content(RAW_BYTES)
    digests: set[bytes] = set()

    def native_run() -> None:
        chain = native.start()
        chain.eadd_run(0, pages, FLAGS)
        digests.add(chain.digest())

    def numpy_run() -> None:
        chain = numpy.start()
        chain.eadd_run(0, pages, FLAGS)
        digests.add(chain.digest())

    steps: list[Step] = [
        lambda: _timed("openssl", lambda: raw_openssl(data, pages * EADD_RECORD)),
        lambda: _timed("own", lambda: raw_own(native, data, pages * EADD_RECORD)),
        lambda: _timed("native", native_run),
        lambda: _timed("numpy", numpy_run),
    ]
    series = take("EADD-only pages", steps, sizes.eadd_rounds, say)
    if len(digests) != 1:
        raise RuntimeError("the hashers do not agree on EADD-only pages")
    return Group({"pages": pages}, series)


def _timed(name: str, work: Callable[[], object]) -> dict[str, float]:
    begin = time.perf_counter()
    work()
    return {name: time.perf_counter() - begin}
