"""SigningKey: who vouches for an enclave. RSA-3072 with e = 3, the only kind that SIGSTRUCT knows."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from ..shm.errors import SignatureError
from . import rsa3
from .attributes import FLAG_DEBUG, FLAG_MODE64BIT, scheme_flags
from .measurement import DEFAULT_BLOCK, DEFAULT_DOMAINS, Measurement
from .sigstruct import Sigstruct

if TYPE_CHECKING:
    from .image import EnclaveImage

PathLike = str | os.PathLike[str]

_MAX_FILE: Final = 1 << 16


class SigningKey:
    """A private key that signs enclaves."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        public = key.public_key().public_numbers()
        if public.e != rsa3.EXPONENT:
            raise SignatureError(f"signing key: expected exponent {rsa3.EXPONENT}, found {public.e}")
        rsa3.check_modulus(public.n)
        self._key = key
        self._modulus = public.n

    @classmethod
    def generate(cls) -> Self:
        """A new key. Takes tenths of a second."""
        return cls(rsa.generate_private_key(public_exponent=rsa3.EXPONENT, key_size=rsa3.BITS))

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read an unencrypted PEM file.

        Raises OSError, and SignatureError for what is no RSA-3072 key with e = 3.
        The file's mode is not looked at: containers mount secrets with whatever mode they like.
        """
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SignatureError(f"{os.fspath(path)}: not a usable PEM private key: {error}") from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise SignatureError(f"{os.fspath(path)}: expected an RSA key, found {type(key).__name__}")
        try:
            return cls(key)
        except SignatureError as error:
            raise SignatureError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: PathLike) -> None:
        """Write the key as PEM (PKCS#8), mode 0600. An existing file is never replaced (FileExistsError)."""
        data = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # O_EXCL: neither a link planted here nor someone else's open file gets to see the key.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o600)
                file.write(data)
                file.flush()
                os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(path).unlink()
            raise

    @property
    def mrsigner(self) -> bytes:
        """SHA-256 of the modulus, little-endian (32 bytes): what ``signers=`` takes."""
        return hashlib.sha256(self._modulus.to_bytes(rsa3.SIZE, "little")).digest()

    def sign(
        self,
        image: EnclaveImage | Measurement,
        scheme: str = "enturbo",
        *,
        domains: int = DEFAULT_DOMAINS,
        block: int = DEFAULT_BLOCK,
        product_id: int = 0,
        svn: int = 0,
        debug: bool = False,
        date: int | None = None,
        workers: int = 0,
        hasher: str | None = None,
    ) -> Sigstruct:
        """Measure ``image`` and sign the value.

        Args:
            image: what to sign. A Measurement is signed as it is, with its own scheme and parameters.
            scheme, domains, block, workers, hasher: as of :meth:`EnclaveImage.measure`.
            product_id, svn: u16; policies refer to them.
            debug: sets ATTRIBUTES.DEBUG.
            date: as stored, BCD yyyymmdd; None: today (UTC).

        Raises SchemeError, and SignatureError for numbers that do not fit. Equal input gives equal bytes.
        """
        if isinstance(image, Measurement):
            measured = image
        else:
            measured = image.measure(scheme, domains=domains, block=block, workers=workers, hasher=hasher)
        flags = FLAG_MODE64BIT | scheme_flags(measured.scheme, measured.domains, measured.block)
        unsigned = Sigstruct(
            modulus=self._modulus.to_bytes(rsa3.SIZE, "little"),
            enclavehash=measured.digest,
            attributes_flags=flags | (FLAG_DEBUG if debug else 0),
            product_id=product_id,
            svn=svn,
            date=int(f"{datetime.now(UTC):%Y%m%d}", 16) if date is None else date,
        )
        return self._seal(unsigned)

    def _seal(self, unsigned: Sigstruct) -> Sigstruct:
        signed = self._key.sign(unsigned.signed_bytes, padding.PKCS1v15(), hashes.SHA256())
        signature = int.from_bytes(signed, "big")
        q1, q2 = rsa3.quotients(self._modulus, signature)
        return replace(
            unsigned,
            signature=signature.to_bytes(rsa3.SIZE, "little"),
            q1=q1.to_bytes(rsa3.SIZE, "little"),
            q2=q2.to_bytes(rsa3.SIZE, "little"),
        )
