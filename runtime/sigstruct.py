"""SIGSTRUCT: the signed statement of what an enclave measures to, 1808 bytes.

Source: Intel SDM Vol. 3D, "Enclave Signature Structure (SIGSTRUCT)". It carries its own key, so a
signature that holds says nothing about whom to believe: that is :mod:`enturbo.runtime.trust`.

Scheme ``enturbo`` and its parameters are signed, too, in bits of ATTRIBUTES.FLAGS that SGX reserves.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, Self

from ..shm.errors import SignatureError
from ..shm.layout import Record
from . import rsa3
from .attributes import ALL_FLAGS, FLAG_MODE64BIT, XFRM_LEGACY, measured_as
from .measurement import Measurement

Buffer = bytes | bytearray | memoryview

SIZE: Final = 1808
HEADER1: Final = bytes.fromhex("06000000e100000000000100")
HEADER2: Final = bytes.fromhex("01010000600000006000000001000000")

SIGSTRUCT: Final = Record(
    "SIGSTRUCT",
    SIZE,
    (
        ("header1", "12s", 0),
        ("type", "I", 12),  # bit 31: a debug SIGSTRUCT
        ("vendor", "I", 16),  # 0x8086: Intel
        ("date", "I", 20),  # BCD yyyymmdd, or other forms by other signers
        ("header2", "16s", 24),
        ("hardware_version", "I", 40),
        ("modulus", "384s", 128),
        ("exponent", "I", 512),
        ("signature", "384s", 516),
        ("miscselect", "I", 900),
        ("miscmask", "I", 904),
        ("cet_attributes", "B", 908),
        ("cet_mask", "B", 909),
        ("family_id", "16s", 912),
        ("attributes_flags", "Q", 928),
        ("attributes_xfrm", "Q", 936),
        ("attributemask_flags", "Q", 944),
        ("attributemask_xfrm", "Q", 952),
        ("enclavehash", "32s", 960),
        ("extended_product_id", "16s", 1008),
        ("product_id", "H", 1024),
        ("svn", "H", 1026),
        ("q1", "384s", 1040),
        ("q2", "384s", 1424),
    ),
)
# What the signature covers: the header part and the body part.
SIGNED: Final = (slice(0, 128), slice(900, 1028))
_CONSTANTS: Final = {"header1": HEADER1, "header2": HEADER2, "exponent": rsa3.EXPONENT}


@dataclass(frozen=True, kw_only=True)
class Sigstruct:
    """The fields of a SIGSTRUCT. Numbers of 384 bytes are little-endian, as stored.

    :meth:`parse` checks the form, :meth:`verify` the signature, :attr:`measurement` the attribute bits.
    """

    modulus: bytes
    signature: bytes = bytes(rsa3.SIZE)
    q1: bytes = bytes(rsa3.SIZE)
    q2: bytes = bytes(rsa3.SIZE)
    enclavehash: bytes
    attributes_flags: int = FLAG_MODE64BIT
    attributes_xfrm: int = XFRM_LEGACY
    attributemask_flags: int = ALL_FLAGS
    attributemask_xfrm: int = ALL_FLAGS
    product_id: int = 0
    svn: int = 0
    date: int = 0
    type: int = 0
    vendor: int = 0
    hardware_version: int = 0
    miscselect: int = 0
    miscmask: int = 0xFFFF_FFFF
    cet_attributes: int = 0
    cet_mask: int = 0
    family_id: bytes = bytes(16)
    extended_product_id: bytes = bytes(16)

    @classmethod
    def parse(cls, data: Buffer, file: str | None = None, offset: int = 0) -> Self:
        """Read 1808 bytes. ``file`` and ``offset`` (of ``data`` in it) are for the message alone.

        Raises SignatureError for a wrong length, header, exponent, modulus (3072 bits, odd), a signature that
        is not smaller than the modulus, and for reserved bytes that are not zero.
        """
        where = "" if file is None else f"{file}: "
        if len(data) != SIZE:
            raise SignatureError(
                f"{where}SIGSTRUCT at offset {offset:#x}: expected {SIZE} bytes, found {len(data)}"
            )
        data = bytes(data)
        try:
            _check_form(data, offset)
        except SignatureError as error:
            raise SignatureError(f"{where}{error}") from None
        return cls(**{name.name: _get(data, name.name) for name in fields(cls)})

    def encode(self) -> bytes:
        """The 1808 bytes. Raises SignatureError if a field does not fit."""
        out = bytearray(SIZE)
        for field in SIGSTRUCT.fields:
            value = _CONSTANTS[field.name] if field.name in _CONSTANTS else getattr(self, field.name)
            code = SIGSTRUCT.struct(field.name)
            if isinstance(value, bytes) and len(value) != code.size:
                raise SignatureError(
                    f"SIGSTRUCT.{field.name}: expected {code.size} bytes, found {len(value)}"
                )
            if isinstance(value, int) and not 0 <= value < 1 << 8 * code.size:
                raise SignatureError(
                    f"SIGSTRUCT.{field.name}: expected {8 * code.size} bits, found {value:#x}"
                )
            code.pack_into(out, field.offset, value)
        return bytes(out)

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers: bytes 0 to 127 and 900 to 1027."""
        encoded = self.encode()
        return b"".join(encoded[part] for part in SIGNED)

    def verify(self) -> None:
        """Check the signature with the key inside, strictly, and Q1 and Q2. Raises SignatureError.

        EINIT does the same before it believes anything else in the structure. The fields never change, so a
        signature that holds is looked at once: later launches of the same object do not pay for it again.
        """
        return self._signature_holds

    @cached_property
    def _signature_holds(self) -> None:
        modulus = int.from_bytes(self.modulus, "little")
        signature = int.from_bytes(self.signature, "little")
        rsa3.check_modulus(modulus)
        rsa3.verify(modulus, signature, hashlib.sha256(self.signed_bytes).digest())
        for name, stored, computed in zip(
            ("Q1", "Q2"), (self.q1, self.q2), rsa3.quotients(modulus, signature), strict=True
        ):
            if int.from_bytes(stored, "little") != computed:
                raise SignatureError(f"SIGSTRUCT.{name}: expected {computed:#x}, found {stored[::-1].hex()}")

    @cached_property
    def mrsigner(self) -> bytes:
        """SHA-256 of the modulus as stored: who signed (32 bytes)."""
        return hashlib.sha256(self.modulus).digest()

    @property
    def measurement(self) -> Measurement:
        """What the pages must measure to, with scheme and parameters from the attribute bits.

        Raises SignatureError for attribute bits that are odd, naming them. Not proven before :meth:`verify`.
        """
        scheme, domains, block = measured_as(self.attributes_flags, self.attributemask_flags)
        return Measurement(self.enclavehash, scheme, domains, block)


def _get(data: bytes, name: str) -> Any:
    (value,) = SIGSTRUCT.struct(name).unpack_from(data, SIGSTRUCT.offset(name))
    return value


def _check_form(data: bytes, base: int) -> None:
    for name, constant in _CONSTANTS.items():
        found = _get(data, name)
        if found != constant:
            texts = [value.hex() if isinstance(value, bytes) else str(value) for value in (constant, found)]
            at = base + SIGSTRUCT.offset(name)
            raise SignatureError(f"SIGSTRUCT.{name} at offset {at:#x}: expected {texts[0]}, found {texts[1]}")
    for start, end in _reserved():
        if any(data[start:end]):
            raise SignatureError(
                f"SIGSTRUCT reserved bytes at offset {base + start:#x}: expected {end - start} zeros,"
                f" found {data[start:end].hex()}"
            )
    modulus = int.from_bytes(data[128:512], "little")
    rsa3.check_modulus(modulus)
    if int.from_bytes(data[516:900], "little") >= modulus:
        raise SignatureError(f"SIGSTRUCT.signature at offset {base + 516:#x}: not smaller than the modulus")


def _reserved() -> list[tuple[int, int]]:
    """The gaps between the fields: (start, end)."""
    gaps: list[tuple[int, int]] = []
    end = 0
    for field in SIGSTRUCT.fields:
        if field.offset > end:
            gaps.append((end, field.offset))
        end = field.offset + SIGSTRUCT.struct(field.name).size
    return gaps
