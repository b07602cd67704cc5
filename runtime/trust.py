"""Whom to believe: the decision before the first page is copied.

A SIGSTRUCT carries its own key, so a valid signature alone means nothing: anyone can make one. A launch
therefore needs one of: a signer that the caller knows, the value that the caller expects, or the explicit
word that any signer, or none at all, will do.
"""

from __future__ import annotations

from collections.abc import Collection

from ..shm.errors import UntrustedSigner
from .measurement import DIGEST_SIZE, Measurement
from .sigstruct import Sigstruct


def check_trust(
    sigstruct: Sigstruct | None,
    *,
    signers: Collection[bytes] | None = None,
    min_svn: int | None = None,
    product_id: int | None = None,
    expected: Measurement | None = None,
    any_signer: bool = False,
    allow_unsigned: bool = False,
) -> Measurement | None:
    """The value that the enclave must measure to; None: no value is known, the enclave ends MEASURED.

    Args:
        sigstruct: the signed statement, if there is one. Its form and signature are always checked.
        signers: MRSIGNERs (32 bytes each) that are trusted.
        min_svn, product_id: what a SIGSTRUCT must say besides. Without a SIGSTRUCT they ask nothing.
        expected: the value that the caller insists on. It suffices without a trusted signer, but not instead
            of one that ``signers`` asks for; a SIGSTRUCT must agree with it.
        any_signer: any valid signature will do.
        allow_unsigned: no SIGSTRUCT will do, too. It trusts no foreign signer.

    Raises SignatureError (malformed, odd attribute bits, the signature does not hold) and UntrustedSigner.
    """
    trusted = _checked(signers)
    if sigstruct is None:
        if expected is None and not allow_unsigned:
            raise UntrustedSigner(
                "no SIGSTRUCT is given and nothing else says what to expect:"
                " pass a SIGSTRUCT and signers=, or expected=Measurement(…), or allow_unsigned=True"
            )
        return expected
    sigstruct.verify()
    signed = sigstruct.measurement
    _check_signer(sigstruct.mrsigner, trusted, any_signer or (not trusted and expected is not None))
    if product_id is not None and sigstruct.product_id != product_id:
        raise UntrustedSigner(f"product id: expected {product_id}, found {sigstruct.product_id}")
    if min_svn is not None and sigstruct.svn < min_svn:
        raise UntrustedSigner(f"security version (svn): expected at least {min_svn}, found {sigstruct.svn}")
    if expected is not None and expected != signed:
        raise UntrustedSigner(
            f"the signed value is not the expected one: expected {expected}, signed {signed}"
        )
    return signed


def _checked(signers: Collection[bytes] | None) -> frozenset[bytes]:
    if isinstance(signers, bytes | str):
        raise TypeError("signers: expected a collection of MRSIGNERs, found a single one; write [mrsigner]")
    for signer in signers or ():
        if not isinstance(signer, bytes) or len(signer) != DIGEST_SIZE:
            raise ValueError(f"signers: an MRSIGNER is {DIGEST_SIZE} bytes, found {signer!r}")
    return frozenset(signers or ())


def _check_signer(mrsigner: bytes, trusted: frozenset[bytes], anyone: bool) -> None:
    if anyone or mrsigner in trusted:
        return
    if not trusted:
        raise UntrustedSigner(
            f"the signature of {mrsigner.hex()} holds, but nothing says whom to trust:"
            " pass signers=[mrsigner, …], or expected=Measurement(…), or any_signer=True"
        )
    known = ", ".join(sorted(signer.hex() for signer in trusted))
    raise UntrustedSigner(f"signer {mrsigner.hex()} is not trusted: expected one of {known}")
