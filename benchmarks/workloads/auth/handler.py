"""Sign-in: checks a password against its Argon2 hash, gives out a signed token, and checks such tokens.

Events: ``{"action": "login", "user": …, "password": …, "now": …}`` and
``{"action": "verify", "token": …, "now": …}``. ``now`` is the caller's time, seconds since 1970: an enclave
has no clock that it could trust. Answers have a status as of HTTP.

The signing key stands in the image, which anybody can read: it is good for an example, and for nothing else.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

FOLDER = Path(__file__).parent
LIFETIME = 900  # seconds that a token is good for
ALGORITHM = "HS256"
# The caller's time decides, not the machine's.
OPTIONS: Any = {
    "require": ["sub", "iat", "exp"],
    "verify_iat": False,
    "verify_exp": False,
    "verify_nbf": False,
}

_hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event; see the module."""
    match event:
        case {"action": "login", "user": str(user), "password": str(password), "now": int(now)}:
            return login(user, password, now)
        case {"action": "verify", "token": str(token), "now": int(now)}:
            return verify(token, now)
    return {"status": 400, "error": "expected a login or a verify"}


def login(user: str, password: str, now: int) -> dict[str, Any]:
    """A token for the user. An unknown user costs as much time as a wrong password, and is told the same."""
    users = _users()
    account = users.get(user)
    try:
        _hasher.verify((account or users["nobody"])["hash"], password)
    except VerifyMismatchError:
        account = None
    if account is None or user == "nobody":
        return {"status": 401, "error": "wrong user or password"}
    claims = {"sub": user, "roles": account["roles"], "iat": now, "exp": now + LIFETIME}
    return {
        "status": 200,
        "token": jwt.encode(claims, _key(), algorithm=ALGORITHM),
        "expires": claims["exp"],
    }


def verify(token: str, now: int) -> dict[str, Any]:
    """Who the token is about, if it is ours and has not run out."""
    try:
        claims = jwt.decode(token, _key(), algorithms=[ALGORITHM], options=OPTIONS)
    except jwt.InvalidTokenError:
        return {"status": 401, "error": "not a token of ours"}
    if not claims["iat"] <= now < claims["exp"]:
        return {"status": 401, "error": "the token has run out"}
    return {"status": 200, "user": claims["sub"], "roles": claims["roles"]}


@cache
def _users() -> dict[str, dict[str, Any]]:
    users: dict[str, dict[str, Any]] = json.loads(FOLDER.joinpath("users.json").read_text("utf-8"))
    return users


@cache
def _key() -> bytes:
    return bytes.fromhex(FOLDER.joinpath("signing.key").read_text("ascii"))
