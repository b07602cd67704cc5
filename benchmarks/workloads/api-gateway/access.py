"""Who calls, and what they may do: bearer tokens, signed with a key that the image carries.

Anybody can read that key in the image: it is good for an example, and for nothing else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jwt
from werkzeug.exceptions import Forbidden, Unauthorized

ISSUER = "https://sign-in.example"
AUDIENCE = "orders"
# The time of the request decides, not the machine's.
OPTIONS: Any = {
    "require": ["sub", "exp", "iss", "aud"],
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
}


def caller(authorization: str, scope: str, now: int) -> str:
    """The caller's name. Raises Unauthorized without a good token, Forbidden without ``scope``."""
    kind, _, token = authorization.partition(" ")
    if kind.lower() != "bearer":
        raise Unauthorized
    try:
        claims = jwt.decode(
            token, _key(), algorithms=["HS256"], audience=AUDIENCE, issuer=ISSUER, options=OPTIONS
        )
    except jwt.InvalidTokenError:
        raise Unauthorized from None
    if now >= claims["exp"]:
        raise Unauthorized
    if scope not in str(claims.get("scope", "")).split():
        raise Forbidden
    return str(claims["sub"])


@cache
def _key() -> bytes:
    return bytes.fromhex(Path(__file__).with_name("signing.key").read_text("ascii"))
