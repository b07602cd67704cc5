"""Every error that EnTurbo raises on purpose, under one root.

They stand on the lowest floor because all three raise them. Messages carry the facts: what was expected,
what was found, and where.
"""

from __future__ import annotations


class EnturboError(Exception):
    """The root of all errors of this library."""


class ImageFormatError(EnturboError):
    """A file or an image is not what it claims to be.

    Attributes: ``file`` (path or None), ``offset`` (bytes into the file or enclave, or None), ``expected``
    and ``found`` (text, or None).
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        self.what = what
        self.file = file
        self.offset = offset
        self.expected = expected
        self.found = found
        text = what
        if file is not None:
            text = f"{file}: {text}"
        if offset is not None:
            text += f" at offset {offset:#x}"
        if expected is not None:
            text += f": expected {expected}"
        if found is not None:
            text += f", found {found}" if expected is not None else f": found {found}"
        super().__init__(text)


class SignatureError(EnturboError):
    """A SIGSTRUCT or a key is malformed, or the signature does not hold."""


class UntrustedSigner(EnturboError):
    """The signature holds, but nobody here trusts its signer, version or product."""


class MeasurementMismatch(EnturboError):
    """The pages measured to another value than the trusted one. The enclave has been destroyed."""

    def __init__(self, expected: bytes, actual: bytes) -> None:
        self.expected = expected
        self.actual = actual
        super().__init__(f"MRENCLAVE expected {expected.hex()}, measured {actual.hex()}")


class EPCExhausted(EnturboError):
    """No free extent is large enough. All three numbers are pages."""

    def __init__(self, needed: int, free: int, largest: int) -> None:
        self.needed = needed
        self.free = free
        self.largest = largest
        super().__init__(f"EPC exhausted: {needed} pages needed, {free} free, largest extent {largest}")


class SharedMemoryFull(EnturboError):
    """/dev/shm cannot hold a segment. Sizes are bytes."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        self.needed = needed
        self.free = free
        self.total = total
        super().__init__(f"/dev/shm cannot hold {needed} bytes: {free} free of {total}")


class WorkerLost(EnturboError):
    """Too many workers died during one launch."""


class LaunchTimeout(EnturboError):
    """A start did not make progress, or did not end, within its deadline."""


class NoHandler(EnturboError):
    """The image names no handler, so it can be measured and verified but not called."""


class HandlerError(EnturboError):
    """The handler failed. ``kind`` is one of raise, exit, result, output, timeout.

    ``remote_traceback`` is text: nothing of the enclave's is ever unpickled.
    """

    def __init__(self, message: str, *, kind: str = "raise", remote_traceback: str = "") -> None:
        self.kind = kind
        self.remote_traceback = remote_traceback
        super().__init__(message + ("\n\n" + remote_traceback if remote_traceback else ""))


class EnclaveDestroyed(EnturboError):
    """The enclave is gone: closed, ended by itself after VERIFIED, or killed."""


class GateTimeout(EnturboError):
    """A page did not become readable (VALID) or writable (released) within the deadline."""


class EnforcementUnavailable(EnturboError):
    """The kernel cannot enforce gates and hold here, and a runtime was asked for that requires it."""

    def __init__(self, level: str, missing: tuple[str, ...]) -> None:
        self.level = level
        self.missing = missing
        super().__init__(
            f"enforcement by the kernel is required, this would be {level}: {'; '.join(missing)}"
        )
