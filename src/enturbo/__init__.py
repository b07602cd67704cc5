"""EnTurbo: start measured enclaves in parallel.

A real multiprocess runtime over a simulated EPC. The public names below are imported when they are first
used: the enclave's side imports this package too and must stay free of numpy and everything else that
images may carry themselves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Runtime": "runtime.host",
    "LaunchTableFull": "runtime.arena",
    "Enclave": "runtime.enclave",
    "EnclaveState": "runtime.enclave",
    "EnclaveImage": "runtime.image",
    "Region": "runtime.region",
    "Measurement": "runtime.measurement",
    "Sigstruct": "runtime.sigstruct",
    "SigningKey": "runtime.keys",
    "Timeline": "runtime.trace",
    "EnturboError": "shm.errors",
    "ImageFormatError": "shm.errors",
    "SignatureError": "shm.errors",
    "UntrustedSigner": "shm.errors",
    "MeasurementMismatch": "shm.errors",
    "EPCExhausted": "shm.errors",
    "SharedMemoryFull": "shm.errors",
    "WorkerLost": "shm.errors",
    "LaunchTimeout": "shm.errors",
    "NoHandler": "shm.errors",
    "HandlerError": "shm.errors",
    "EnclaveDestroyed": "shm.errors",
    "GateTimeout": "shm.errors",
    "EnforcementUnavailable": "shm.errors",
    "Policy": "runtime.policy",
}

if TYPE_CHECKING:
    from .runtime.arena import LaunchTableFull
    from .runtime.enclave import Enclave, EnclaveState
    from .runtime.host import Runtime
    from .runtime.image import EnclaveImage
    from .runtime.keys import SigningKey
    from .runtime.measurement import Measurement
    from .runtime.policy import Policy
    from .runtime.region import Region
    from .runtime.sigstruct import Sigstruct
    from .runtime.trace import Timeline
    from .shm.errors import (
        EnclaveDestroyed,
        EnforcementUnavailable,
        EnturboError,
        EPCExhausted,
        GateTimeout,
        HandlerError,
        ImageFormatError,
        LaunchTimeout,
        MeasurementMismatch,
        NoHandler,
        SharedMemoryFull,
        SignatureError,
        UntrustedSigner,
        WorkerLost,
    )

__all__ = [
    "EPCExhausted",
    "Enclave",
    "EnclaveDestroyed",
    "EnclaveImage",
    "EnclaveState",
    "EnforcementUnavailable",
    "EnturboError",
    "GateTimeout",
    "HandlerError",
    "ImageFormatError",
    "LaunchTableFull",
    "LaunchTimeout",
    "Measurement",
    "MeasurementMismatch",
    "NoHandler",
    "Policy",
    "Region",
    "Runtime",
    "SharedMemoryFull",
    "SignatureError",
    "SigningKey",
    "Sigstruct",
    "Timeline",
    "UntrustedSigner",
    "WorkerLost",
    "__version__",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
