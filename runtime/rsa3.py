"""The one signature that SGX knows: RSA-3072, e = 3, PKCS#1 v1.5, SHA-256. Numbers only.

Verification rebuilds the whole encoded message and compares it. Parsing the padding instead is how
signatures with e = 3 have been forged (RFC 8017, section 8.2.2, says to compare).
"""

from __future__ import annotations

from typing import Final

from ..shm.errors import SignatureError

BITS: Final = 3072
SIZE: Final = BITS // 8
EXPONENT: Final = 3
# DER of DigestInfo for SHA-256 up to the digest (RFC 8017, section 9.2, note 1).
_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")


def check_modulus(modulus: int) -> None:
    """Refuse a modulus that is not 3072 bits and odd (SignatureError)."""
    if modulus.bit_length() != BITS:
        raise SignatureError(f"RSA modulus: expected {BITS} bits, found {modulus.bit_length()}")
    if not modulus & 1:
        raise SignatureError("RSA modulus: expected an odd number, found an even one")


def encoded_message(digest: bytes) -> int:
    """EMSA-PKCS1-v1_5 of a SHA-256 digest, as the number that is signed."""
    tail = b"\x00" + _DIGEST_INFO + digest
    return int.from_bytes(b"\x00\x01" + b"\xff" * (SIZE - 2 - len(tail)) + tail, "big")


def verify(modulus: int, signature: int, digest: bytes) -> None:
    """Raise SignatureError unless ``signature`` is the one signature of ``digest`` under ``modulus``."""
    if not 0 <= signature < modulus or pow(signature, EXPONENT, modulus) != encoded_message(digest):
        raise SignatureError(f"the signature does not hold for SHA-256 {digest.hex()}")


def quotients(modulus: int, signature: int) -> tuple[int, int]:
    """Q1 and Q2, which spare the processor two divisions: S² div N and (S² mod N)·S div N."""
    square = signature * signature
    q1 = square // modulus
    return q1, (square - q1 * modulus) * signature // modulus
