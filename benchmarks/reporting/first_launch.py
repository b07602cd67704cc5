"""In a fresh interpreter: when a new runtime has accepted its first launch, and when that is VERIFIED.

Prints JSON: seconds from the call of ``Runtime()`` to its return (``made``), to the return of ``launch()``
(``accepted``) and to VERIFIED (``verified``), and how many workers were ready then.
"""

from __future__ import annotations

import json
import sys
import time

from enturbo import EnclaveImage, Region, Runtime
from enturbo.runtime.backing import pack


def main(size: int, workers: int) -> None:
    """Start one image of ``size`` bytes; what it measures to is known, so no key is needed."""
    content = bytes(value % 251 for value in range(size))
    regions, backing = pack([Region(0, size // 4096, 0x201, content)])
    image = EnclaveImage(regions, size=size, backing=backing)
    expected = image.measure()
    begin = time.monotonic_ns()
    with Runtime(workers=workers) as runtime:
        made = time.monotonic_ns()
        enclave = runtime.launch(image, expected=expected)
        accepted = time.monotonic_ns()
        enclave.wait_verified(60)
        ready = runtime.stats()["workers_ready"]
        verified = enclave.timeline.verified
        assert verified is not None
        moments = {"made": made, "accepted": accepted, "verified": verified}
        found = {name: (moment - begin) / 1e9 for name, moment in moments.items()}
        runtime.wait_workers()
        found["workers"] = (time.monotonic_ns() - begin) / 1e9
        enclave.close()
    print(json.dumps({**found, "ready": ready}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
