"""Whom to believe: every way to launch, and every way to be refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from enturbo.runtime.keys import SigningKey
from enturbo.runtime.measurement import Measurement
from enturbo.runtime.sigstruct import Sigstruct
from enturbo.runtime.trust import check_trust
from enturbo.shm.errors import SignatureError, UntrustedSigner

VALUE = Measurement(b"\x11" * 32, "enturbo", 8, 4)
OTHER = Measurement(b"\x22" * 32, "enturbo", 8, 4)
OTHER_DOMAINS = Measurement(b"\x11" * 32, "enturbo", 4, 4)
OTHER_BLOCK = Measurement(b"\x11" * 32, "enturbo", 8, 8)
OTHER_SCHEME = Measurement(b"\x11" * 32, "sgx")

KNOWN = "the signer"  # stands for [key.mrsigner] in the tables
FOREIGN = [b"\x33" * 32, b"\x44" * 32]


@pytest.fixture(scope="module")
def sigstruct(key: SigningKey) -> Sigstruct:
    return key.sign(VALUE, product_id=7, svn=3)


def ask(sigstruct: Sigstruct | None, key: SigningKey, terms: dict[str, Any]) -> Measurement | None:
    if terms.get("signers") == KNOWN:
        terms = {**terms, "signers": [*FOREIGN, key.mrsigner]}
    return check_trust(sigstruct, **terms)


@pytest.mark.parametrize(
    "terms",
    [
        {"signers": KNOWN},
        {"signers": KNOWN, "min_svn": 3},
        {"signers": KNOWN, "min_svn": 0, "product_id": 7},
        {"signers": KNOWN, "expected": VALUE},
        {"signers": KNOWN, "any_signer": True, "allow_unsigned": True},
        {"expected": VALUE},
        {"expected": VALUE, "signers": []},
        {"any_signer": True},
        {"any_signer": True, "min_svn": 3, "product_id": 7},
        {"any_signer": True, "signers": FOREIGN},
        {"any_signer": True, "expected": VALUE},
    ],
)
def test_signed_and_trusted(key: SigningKey, sigstruct: Sigstruct, terms: dict[str, Any]) -> None:
    assert ask(sigstruct, key, terms) == VALUE


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, r"pass signers=.*or expected=.*or any_signer=True"),
        ({"signers": []}, "pass signers="),
        ({"allow_unsigned": True}, "pass signers="),
        ({"min_svn": 0, "product_id": 7}, "pass signers="),
        ({"signers": FOREIGN}, "is not trusted: expected one of 3333"),
        ({"signers": FOREIGN, "allow_unsigned": True}, "is not trusted"),
        ({"signers": FOREIGN, "expected": VALUE}, "is not trusted"),
        ({"signers": KNOWN, "min_svn": 4}, "svn.*at least 4, found 3"),
        ({"signers": KNOWN, "product_id": 8}, "product id: expected 8, found 7"),
        ({"signers": KNOWN, "product_id": 0}, "product id: expected 0, found 7"),
        ({"any_signer": True, "min_svn": 4}, "svn"),
        ({"expected": VALUE, "product_id": 8}, "product id"),
        ({"signers": KNOWN, "expected": OTHER}, "not the expected one.*2222.*1111"),
        ({"signers": KNOWN, "expected": OTHER_SCHEME}, "sgx"),
        ({"any_signer": True, "expected": OTHER_DOMAINS}, "4 domains.*8 domains"),
        ({"any_signer": True, "allow_unsigned": True, "expected": OTHER_BLOCK}, "not the expected one"),
        ({"expected": OTHER}, "not the expected one"),
    ],
)
def test_signed_but_not_trusted(
    key: SigningKey, sigstruct: Sigstruct, terms: dict[str, Any], message: str
) -> None:
    with pytest.raises(UntrustedSigner, match=message):
        ask(sigstruct, key, terms)


@pytest.mark.parametrize(
    "terms",
    [
        {"signers": KNOWN},
        {"expected": VALUE},
        {"any_signer": True},
        {"any_signer": True, "allow_unsigned": True},
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {"enclavehash": b"\x22" * 32},
        {"svn": 9},
        {"attributes_flags": 4},
        {"q1": bytes(384)},
        {"signature": bytes(384)},
    ],
)
def test_a_signature_that_does_not_hold_is_never_overlooked(
    key: SigningKey, sigstruct: Sigstruct, terms: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(SignatureError):
        ask(replace(sigstruct, **changes), key, terms)


def test_odd_attribute_bits_are_refused_though_signed(key: SigningKey, sigstruct: Sigstruct) -> None:
    for flags in (5, 4 | 1 << 54, sigstruct.attributes_flags | 1 << 40):
        odd = key._seal(replace(sigstruct, attributes_flags=flags))
        odd.verify()
        with pytest.raises(SignatureError, match="bit"):
            check_trust(odd, signers=[key.mrsigner])


@pytest.mark.parametrize(
    ("terms", "value"),
    [
        ({"expected": VALUE}, VALUE),
        ({"expected": VALUE, "allow_unsigned": True}, VALUE),
        ({"expected": VALUE, "signers": KNOWN, "min_svn": 9}, VALUE),
        ({"expected": OTHER_SCHEME}, OTHER_SCHEME),
        ({"allow_unsigned": True}, None),
        ({"allow_unsigned": True, "signers": KNOWN, "any_signer": True}, None),
    ],
)
def test_without_a_sigstruct(key: SigningKey, terms: dict[str, Any], value: Measurement | None) -> None:
    assert ask(None, key, terms) == value


@pytest.mark.parametrize(
    "terms", [{}, {"signers": KNOWN}, {"any_signer": True}, {"min_svn": 0, "product_id": 0}]
)
def test_without_anything_to_believe(key: SigningKey, terms: dict[str, Any]) -> None:
    with pytest.raises(UntrustedSigner, match=r"signers=.*expected=.*allow_unsigned=True"):
        ask(None, key, terms)


def test_signers_that_are_none(key: SigningKey, sigstruct: Sigstruct) -> None:
    with pytest.raises(TypeError, match="collection"):
        check_trust(sigstruct, signers=key.mrsigner)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 bytes"):
        check_trust(sigstruct, signers=[b"short"])
    with pytest.raises(ValueError, match="32 bytes"):
        check_trust(sigstruct, signers=[key.mrsigner.hex()])  # type: ignore[list-item]
