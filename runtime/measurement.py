"""What an enclave measured to, and under which scheme.

An MRENCLAVE alone says nothing: the same pages have one value for scheme ``sgx`` and another one for each
pair (D, B) of scheme ``enturbo``. So the digest and what it was made with travel together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..shm.errors import EnturboError
from ..shm.layout import MAX_BLOCK, MAX_DOMAINS

SCHEMES: Final = ("enturbo", "sgx")
DIGEST_SIZE: Final = 32
DEFAULT_DOMAINS: Final = 32
DEFAULT_BLOCK: Final = 16


class SchemeError(EnturboError, ValueError):
    """No such measurement scheme, or parameters outside of it."""


def _power_of_two_up_to(value: object, limit: int) -> bool:
    return type(value) is int and 1 <= value <= limit and value & (value - 1) == 0


def check_scheme(scheme: str, domains: int = DEFAULT_DOMAINS, block: int = DEFAULT_BLOCK) -> None:
    """Refuse an unknown scheme and, for ``enturbo``, parameters that cannot be signed (:class:`SchemeError`).

    ``domains`` (D) is a power of two in 1..32, ``block`` (B, pages) a power of two in 1..1024.
    """
    if scheme not in SCHEMES:
        raise SchemeError(f"unknown scheme: expected one of {', '.join(SCHEMES)}, found {scheme!r}")
    if scheme == "enturbo":
        if not _power_of_two_up_to(domains, MAX_DOMAINS):
            raise SchemeError(f"domains: expected a power of two in 1..{MAX_DOMAINS}, found {domains!r}")
        if not _power_of_two_up_to(block, MAX_BLOCK):
            raise SchemeError(f"block: expected a power of two in 1..{MAX_BLOCK} pages, found {block!r}")


@dataclass(frozen=True)
class Measurement:
    """An MRENCLAVE: ``digest`` (32 bytes), ``scheme`` and, for ``enturbo``, D domains and B pages a block.

    For ``sgx`` both parameters mean nothing; they are stored as 1 whatever was given, so that equal values
    compare equal. Raises :class:`SchemeError`.
    """

    digest: bytes
    scheme: str = "enturbo"
    domains: int = DEFAULT_DOMAINS
    block: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        if not isinstance(self.digest, bytes) or len(self.digest) != DIGEST_SIZE:
            raise SchemeError(f"MRENCLAVE: expected {DIGEST_SIZE} bytes, found {self.digest!r}")
        check_scheme(self.scheme, self.domains, self.block)
        if self.scheme == "sgx":
            object.__setattr__(self, "domains", 1)
            object.__setattr__(self, "block", 1)

    def __str__(self) -> str:
        if self.scheme == "sgx":
            return f"{self.digest.hex()} (sgx)"
        return f"{self.digest.hex()} (enturbo, {self.domains} domains, {self.block} pages a block)"
