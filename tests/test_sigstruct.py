"""SIGSTRUCT and signing keys: layout, strict form, strict signature, attribute bits."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo.runtime import rsa3
from enturbo.runtime.attributes import ALL_FLAGS, ENTURBO_BITS, FLAG_ENTURBO, measured_as, scheme_flags
from enturbo.runtime.image import EnclaveImage, Region
from enturbo.runtime.keys import SigningKey
from enturbo.runtime.measurement import Measurement, SchemeError
from enturbo.runtime.sigstruct import SIGNED, SIGSTRUCT, SIZE, Sigstruct
from enturbo.shm.errors import SignatureError

VALUE = Measurement(hashlib.sha256(b"value").digest(), "enturbo", 8, 4)


@pytest.fixture(scope="module")
def sigstruct(key: SigningKey) -> Sigstruct:
    return key.sign(VALUE, product_id=7, svn=3, date=0x20240102)


def test_layout_is_the_manuals() -> None:
    """Intel SDM Vol. 3D, table of SIGSTRUCT."""
    offsets = {field.name: (field.offset, SIGSTRUCT.struct(field.name).size) for field in SIGSTRUCT.fields}
    assert SIZE == 1808
    assert offsets == {
        "header1": (0, 12),
        "type": (12, 4),
        "vendor": (16, 4),
        "date": (20, 4),
        "header2": (24, 16),
        "hardware_version": (40, 4),
        "modulus": (128, 384),
        "exponent": (512, 4),
        "signature": (516, 384),
        "miscselect": (900, 4),
        "miscmask": (904, 4),
        "cet_attributes": (908, 1),
        "cet_mask": (909, 1),
        "family_id": (912, 16),
        "attributes_flags": (928, 8),
        "attributes_xfrm": (936, 8),
        "attributemask_flags": (944, 8),
        "attributemask_xfrm": (952, 8),
        "enclavehash": (960, 32),
        "extended_product_id": (1008, 16),
        "product_id": (1024, 2),
        "svn": (1026, 2),
        "q1": (1040, 384),
        "q2": (1424, 384),
    }
    assert (slice(0, 128), slice(900, 1028)) == SIGNED


def test_sign_encode_parse_verify(key: SigningKey, sigstruct: Sigstruct) -> None:
    encoded = sigstruct.encode()
    assert len(encoded) == SIZE
    assert encoded[:12].hex() == "06000000e100000000000100"
    assert encoded[24:40].hex() == "01010000600000006000000001000000"
    assert encoded[960:992] == VALUE.digest
    assert encoded[1024:1028] == bytes([7, 0, 3, 0])
    assert encoded[20:24] == bytes([0x02, 0x01, 0x24, 0x20])
    parsed = Sigstruct.parse(encoded)
    assert parsed == sigstruct
    parsed.verify()
    assert parsed.measurement == VALUE
    assert parsed.mrsigner == key.mrsigner == hashlib.sha256(encoded[128:512]).digest()


def test_the_signature_is_what_another_library_accepts(sigstruct: Sigstruct) -> None:
    modulus = int.from_bytes(sigstruct.modulus, "little")
    public = rsa.RSAPublicNumbers(3, modulus).public_key()
    encoded = sigstruct.encode()
    signed = encoded[:128] + encoded[900:1028]
    public.verify(sigstruct.signature[::-1], signed, padding.PKCS1v15(), hashes.SHA256())


def test_quotients_are_the_manuals(sigstruct: Sigstruct) -> None:
    """With Q1 and Q2 the processor needs no division."""
    n, s, q1, q2 = (
        int.from_bytes(number, "little")
        for number in (sigstruct.modulus, sigstruct.signature, sigstruct.q1, sigstruct.q2)
    )
    square_rest = s * s - q1 * n
    assert 0 <= square_rest < n
    assert 0 <= s * square_rest - q2 * n < n
    assert s * square_rest - q2 * n == pow(s, 3, n)


def test_equal_input_gives_equal_bytes(key: SigningKey) -> None:
    assert key.sign(VALUE, date=1).encode() == key.sign(VALUE, date=1).encode()


def test_signing_an_image_measures_it(key: SigningKey) -> None:
    image = EnclaveImage([Region(0, 3, 0x205, b"code")], size=1 << 14)
    signed = key.sign(image, "sgx")
    assert signed.measurement == image.measure("sgx")
    assert signed.attributes_flags == 4
    assert signed.attributes_xfrm == 3
    other = key.sign(image, domains=2, block=8, debug=True)
    assert other.measurement == image.measure(domains=2, block=8)
    assert other.attributes_flags & 2
    with pytest.raises(SchemeError):
        key.sign(image, "other")


@pytest.mark.parametrize("changes", [{"svn": 1 << 16}, {"svn": -1}, {"product_id": 65536}, {"date": 1 << 32}])
def test_numbers_that_do_not_fit(key: SigningKey, changes: dict[str, int]) -> None:
    with pytest.raises(SignatureError, match=next(iter(changes))):
        key.sign(VALUE, **changes)  # type: ignore[arg-type]


@given(st.data())
@settings(deadline=None)
def test_no_changed_byte_goes_unnoticed(sigstruct: Sigstruct, data: st.DataObject) -> None:
    """Each of the 1808 bytes is a constant, zero, signed, or part of the signature."""
    encoded = bytearray(sigstruct.encode())
    at = data.draw(st.integers(0, SIZE - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SignatureError):
        Sigstruct.parse(encoded).verify()


@given(st.binary(max_size=64) | st.binary(min_size=SIZE, max_size=SIZE))
@settings(deadline=None)
def test_parse_never_raises_anything_else(data: bytes) -> None:
    with pytest.raises(SignatureError):
        Sigstruct.parse(data, "x.sig", 100)


def _put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(encoded: bytearray) -> None:
        encoded[at : at + len(value)] = value

    return change


def _signature_is_modulus(encoded: bytearray) -> None:
    encoded[516:900] = encoded[128:512]


def _even_modulus(encoded: bytearray) -> None:
    encoded[128] &= 0xFE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put(0, b"\x07"), r"header1 at offset 0x1000: expected 06000000.*found 07000000"),
        (_put(24, b"\x00"), r"header2 at offset 0x1018"),
        (_put(44, b"\x01"), r"reserved bytes at offset 0x102c"),
        (_put(127, b"\x01"), "reserved"),
        (_put(910, b"\x01"), "reserved"),
        (_put(992, b"\x01"), "reserved"),
        (_put(1028, b"\x01"), "reserved"),
        (_put(512, b"\x01\x00\x01"), "exponent at offset 0x1200: expected 3, found 65537"),
        (_put(511, b"\x00"), "expected 3072 bits"),
        (_even_modulus, "odd"),
        (_signature_is_modulus, "not smaller"),
        (lambda encoded: encoded.pop(), "expected 1808 bytes, found 1807"),
        (lambda encoded: encoded.append(0), "expected 1808 bytes, found 1809"),
    ],
)
def test_form(sigstruct: Sigstruct, change: Callable[[bytearray], object], message: str) -> None:
    encoded = bytearray(sigstruct.encode())
    change(encoded)
    with pytest.raises(SignatureError, match=message) as caught:
        Sigstruct.parse(encoded, "some.sig", 0x1000)
    assert "some.sig" in str(caught.value)


def test_quotients_are_checked(sigstruct: Sigstruct) -> None:
    with pytest.raises(SignatureError, match="Q1"):
        replace(sigstruct, q1=bytes(384)).verify()
    with pytest.raises(SignatureError, match="Q2"):
        replace(sigstruct, q2=bytes(384)).verify()


def test_a_forged_cube_root_is_refused() -> None:
    """With e = 3 a signature whose cube only begins like the message is found without the key."""
    modulus = (1 << 3071) | 1 | int.from_bytes(os.urandom(300), "big") << 8
    digest = hashlib.sha256(b"forged").digest()
    tail = b"\x00" + rsa3._DIGEST_INFO + digest
    wanted = int.from_bytes((b"\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff" + tail).ljust(384, b"\x00"), "big")
    low, high = 0, 1 << 1024
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**3 < wanted else (low, middle)
    assert (low**3).to_bytes(384, "big")[
        : 10 + len(tail)
    ] == b"\x00\x01" + b"\xff" * 8 + tail  # a lax check passes
    with pytest.raises(SignatureError, match="does not hold"):
        rsa3.verify(modulus, low, digest)


@pytest.mark.parametrize("domains", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("block", [1, 2, 16, 512, 1024])
def test_attribute_bits_carry_the_parameters(domains: int, block: int) -> None:
    flags = scheme_flags("enturbo", domains, block)
    assert flags == 1 << 63 | (domains.bit_length() - 1) << 58 | (block.bit_length() - 1) << 54
    assert measured_as(flags | 4, ENTURBO_BITS) == ("enturbo", domains, block)


def test_attribute_bits_of_sgx() -> None:
    assert scheme_flags("sgx", 32, 16) == 0
    assert measured_as(0b100_1111_0110 & ~8, 0) == ("sgx", 1, 1)  # all that SGX knows but INIT
    assert scheme_flags("enturbo", 32, 16) | 4 == 0x9500_0000_0000_0004


@pytest.mark.parametrize(
    ("flags", "mask", "message"),
    [
        (5, ALL_FLAGS, "INIT"),
        (FLAG_ENTURBO | 5, ALL_FLAGS, "INIT"),
        (4 | 1 << 3, ALL_FLAGS, r"bit 3\b"),
        (4 | 1 << 8 | 1 << 9, ALL_FLAGS, "bits 8, 9"),
        (4 | 1 << 53, ALL_FLAGS, "bit 53"),
        (4 | 1 << 54, ALL_FLAGS, "bit 54 without bit 63"),
        (4 | 1 << 62, ALL_FLAGS, "bit 62 without bit 63"),
        (FLAG_ENTURBO | 1 << 20, ALL_FLAGS, "bit 20"),
        (FLAG_ENTURBO | 6 << 58, ALL_FLAGS, "62:58.*found 6"),
        (FLAG_ENTURBO | 31 << 58, ALL_FLAGS, "62:58.*found 31"),
        (FLAG_ENTURBO | 11 << 54, ALL_FLAGS, "57:54.*found 11"),
        (FLAG_ENTURBO | 5 << 58, ALL_FLAGS & ~(1 << 63), "needs bit 63"),
        (FLAG_ENTURBO | 5 << 58, ALL_FLAGS & ~(1 << 57), "needs bit 57"),
        (FLAG_ENTURBO | 5 << 58, 0, "needs bits 54, 55"),
    ],
)
def test_odd_attribute_bits(sigstruct: Sigstruct, flags: int, mask: int, message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        measured_as(flags, mask)
    with pytest.raises(SignatureError, match=message):
        _ = replace(sigstruct, attributes_flags=flags, attributemask_flags=mask).measurement


@given(st.integers(0, ALL_FLAGS), st.integers(0, ALL_FLAGS))
@settings(deadline=None)
def test_what_is_accepted_says_one_thing(flags: int, mask: int) -> None:
    try:
        scheme, domains, block = measured_as(flags, mask)
    except SignatureError:
        return
    assert flags & (ENTURBO_BITS | 1) == scheme_flags(scheme, domains, block)


def test_key_files(key: SigningKey, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert SigningKey.load(path).mrsigner == key.mrsigner
    with pytest.raises(FileExistsError):
        key.save(path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        key.save(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def _pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "not a usable PEM"),
        (lambda: b"\xff" * 100, "not a usable PEM"),
        (lambda: b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a usable PEM"),
        (lambda: _pem(ec.generate_private_key(ec.SECP256R1())), "expected an RSA key"),
        (lambda: _pem(ec.generate_private_key(ec.SECP256R1()), b"password"), "not a usable PEM"),
        (lambda: _pem(rsa.generate_private_key(65537, 2048)), "exponent"),
        (lambda: _pem(rsa.generate_private_key(3, 2048)), "expected 3072 bits, found 2048"),
    ],
)
def test_key_files_that_are_none(make: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(make())
    with pytest.raises(SignatureError, match=message) as caught:
        SigningKey.load(path)
    assert str(path) in str(caught.value)
