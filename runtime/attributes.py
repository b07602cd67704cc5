"""ATTRIBUTES.FLAGS, and how they carry the measurement scheme.

Bits of SGX (Intel SDM Vol. 3D, "ATTRIBUTES Structure"): 0 INIT, 1 DEBUG, 2 MODE64BIT, 4 PROVISIONKEY,
5 EINITTOKENKEY, 6 CET, 7 KSS, 10 AEXNOTIFY; all others are reserved there. Scheme ``enturbo`` uses ten::

    63  scheme enturbo    62:58  log2 of D, at most 5    57:54  log2 of B, at most 10

and needs all ten set in ATTRIBUTEMASK, so that they cannot be changed under the signature.
"""

from __future__ import annotations

from typing import Final

from ..shm.errors import SignatureError
from .measurement import check_scheme

FLAG_INIT: Final = 1 << 0
FLAG_DEBUG: Final = 1 << 1
FLAG_MODE64BIT: Final = 1 << 2
SGX_FLAGS: Final = sum(1 << bit for bit in (1, 2, 4, 5, 6, 7, 10))  # those that a signer may set
ALL_FLAGS: Final = (1 << 64) - 1
XFRM_LEGACY: Final = 3  # x87 and SSE state: set in every enclave

FLAG_ENTURBO: Final = 1 << 63
_DOMAINS_AT: Final = 58
_BLOCK_AT: Final = 54
_MAX_LOG_DOMAINS: Final = 5
_MAX_LOG_BLOCK: Final = 10
ENTURBO_BITS: Final = 0b11_1111_1111 << _BLOCK_AT


def scheme_flags(scheme: str, domains: int, block: int) -> int:
    """The bits of ATTRIBUTES.FLAGS that say how to measure; 0 for ``sgx``. Raises SchemeError."""
    check_scheme(scheme, domains, block)
    if scheme == "sgx":
        return 0
    return FLAG_ENTURBO | (domains.bit_length() - 1) << _DOMAINS_AT | (block.bit_length() - 1) << _BLOCK_AT


def measured_as(flags: int, mask: int) -> tuple[str, int, int]:
    """(scheme, D, B) that ATTRIBUTES.FLAGS and their mask say; D and B are 1 for ``sgx``.

    Raises SignatureError for INIT, for bits that neither SGX nor the scheme knows, for parameters out of
    range, and for scheme bits that the mask leaves open.
    """
    if flags & FLAG_INIT:
        raise SignatureError(f"ATTRIBUTES.FLAGS {flags:#x}: INIT (bit 0) is set; only EINIT sets it")
    scheme_bits = flags & ENTURBO_BITS
    if not flags & FLAG_ENTURBO and scheme_bits:
        raise SignatureError(
            f"ATTRIBUTES.FLAGS {flags:#x}: {_name(scheme_bits)} without bit 63 (scheme enturbo)"
        )
    unknown = flags & ~(SGX_FLAGS | ENTURBO_BITS)
    if unknown:
        raise SignatureError(f"ATTRIBUTES.FLAGS {flags:#x}: reserved {_name(unknown)}")
    if not flags & FLAG_ENTURBO:
        return "sgx", 1, 1
    open_bits = ENTURBO_BITS & ~mask
    if open_bits:
        raise SignatureError(f"ATTRIBUTEMASK.FLAGS {mask:#x}: scheme enturbo needs {_name(open_bits)}")
    log_domains = scheme_bits >> _DOMAINS_AT & 0b1_1111
    log_block = scheme_bits >> _BLOCK_AT & 0b1111
    if log_domains > _MAX_LOG_DOMAINS:
        raise SignatureError(
            f"ATTRIBUTES.FLAGS {flags:#x}: bits 62:58 (log2 of domains):"
            f" expected at most {_MAX_LOG_DOMAINS}, found {log_domains}"
        )
    if log_block > _MAX_LOG_BLOCK:
        raise SignatureError(
            f"ATTRIBUTES.FLAGS {flags:#x}: bits 57:54 (log2 of block):"
            f" expected at most {_MAX_LOG_BLOCK}, found {log_block}"
        )
    return "enturbo", 1 << log_domains, 1 << log_block


def _name(bits: int) -> str:
    found = [str(bit) for bit in range(64) if bits >> bit & 1]
    return ("bit " if len(found) == 1 else "bits ") + ", ".join(found)
