"""Encrypts files of the image with AES-256-GCM, and checks what it has encrypted.

Events: ``{"action": "encrypt", "file": …, "key": …, "nonce": …}`` and the same with ``"decrypt"`` and a
``"tag"``; key, nonce and tag in hex. A file is read in pieces; what comes out stands in the enclave's heap.
The file's name is authenticated with it, so one file cannot be passed off as another.
"""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_SIZE, NONCE_SIZE, TAG_SIZE = 32, 12, 16
PIECE = 1 << 16
SLACK = 15  # bytes of room that update_into asks for, and does not fill


class Refused(Exception):
    """What cannot be done, in words for the caller."""


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event; see the module."""
    try:
        return _answer(event, context)
    except Refused as refused:
        return {"error": str(refused)}


def _answer(event: Any, context: Any) -> dict[str, Any]:
    match event:
        case {"action": "encrypt", "file": str(name), "key": key, "nonce": nonce}:
            size, tag = encrypt(name, _hex(key, "key", KEY_SIZE), _hex(nonce, "nonce", NONCE_SIZE), context)
            return {"size": size, "sha256": _digest(context, size), "tag": tag.hex()}
        case {"action": "decrypt", "file": str(name), "key": key, "nonce": nonce, "tag": tag}:
            secrets = _hex(key, "key", KEY_SIZE), _hex(nonce, "nonce", NONCE_SIZE)
            expected = _hex(tag, "tag", TAG_SIZE)
            size, _ = encrypt(name, *secrets, context)
            decrypt(name, *secrets, expected, size, context)
            plain = hashlib.sha256(context.view(name)).hexdigest()
            return {"size": size, "sha256": _digest(context, size), "same": _digest(context, size) == plain}
    raise Refused("expected an encrypt or a decrypt")


def encrypt(name: str, key: bytes, nonce: bytes, context: Any) -> tuple[int, bytes]:
    """Encrypt a file into the heap. Gives its size and the tag."""
    encryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(name.encode())
    size = 0
    with _open(name, context) as file:
        while piece := file.read(PIECE):
            size += _into_heap(encryptor, piece, size, context)
    encryptor.finalize()
    return size, encryptor.tag


def decrypt(name: str, key: bytes, nonce: bytes, tag: bytes, size: int, context: Any) -> None:
    """Decrypt what stands in the heap, in place. Under a wrong tag nothing of it is left there."""
    decryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).decryptor()
    decryptor.authenticate_additional_data(name.encode())
    for at in range(0, size, PIECE):
        _into_heap(decryptor, context.heap.read(at, min(PIECE, size - at)), at, context)
    try:
        decryptor.finalize_with_tag(tag)
    except InvalidTag:
        context.heap.write(0, bytes(size))
        raise Refused("the tag is not that of this file under this key") from None


def _open(name: str, context: Any) -> Any:
    try:
        return context.open(name)
    except FileNotFoundError:
        raise Refused(f"no file {name!r}") from None


def _into_heap(cipher: Any, piece: bytes, at: int, context: Any) -> int:
    if at + len(piece) + SLACK > len(context.heap):
        raise Refused("the file is larger than the heap")
    with context.heap.view(at, len(piece) + SLACK) as target:
        return int(cipher.update_into(piece, target))


def _digest(context: Any, size: int) -> str:
    return hashlib.sha256(context.heap.read(0, size)).hexdigest()


def _hex(text: Any, what: str, size: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except (TypeError, ValueError):
        raise Refused(f"the {what} is not hexadecimal") from None
    if len(value) != size:
        raise Refused(f"the {what} has {len(value)} bytes, not {size}")
    return value
