"""A small HTTP API: routes, checks who calls, checks what is sent, answers.

    GET  /health                 for anyone
    GET  /products/<sku>         for anyone
    POST /orders                 for who has a token with the scope ``orders:write``

An event is a request: ``{"method", "path", "headers", "body", "time"}``, headers in lower case, body a text,
``time`` in seconds since 1970. The answer has status, headers and a body in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import access
import orders
from werkzeug.exceptions import BadRequest, HTTPException, MethodNotAllowed, Unauthorized
from werkzeug.routing import Map, RequestRedirect, Rule

ROUTES = Map(
    [
        Rule("/health", endpoint="health", methods=["GET"]),
        Rule("/products/<string(length=4):sku>", endpoint="product", methods=["GET"]),
        Rule("/orders", endpoint="order", methods=["POST"]),
    ]
)
JSON = {"content-type": "application/json"}


class Request(NamedTuple):
    """What an endpoint gets."""

    headers: dict[str, str]
    body: str
    time: int
    arguments: dict[str, Any]


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one request; see the module."""
    try:
        endpoint, request = _match(event)
        status, answer = ENDPOINTS[endpoint](request)
    except HTTPException as error:
        return _response(int(error.code or 500), {"error": error.name}, _headers(error))
    except orders.InvalidOrderError as error:
        return _response(422, {"error": "Unprocessable Entity", "found": error.found})
    return _response(status, answer)


def _match(event: Any) -> tuple[str, Request]:
    match event:
        case {"method": str(method), "path": str(path)}:
            endpoint, arguments = ROUTES.bind("enclave").match(path, method=method)
            rest = event.get("headers", {}), event.get("body", ""), event.get("time", 0)
            return str(endpoint), Request(*rest, dict(arguments))
    raise BadRequest


def _headers(error: HTTPException) -> dict[str, str]:
    if isinstance(error, MethodNotAllowed):
        return {"allow": ", ".join(sorted(error.valid_methods or ()))}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, RequestRedirect):
        return {"location": error.new_url}
    return {}


def _response(status: int, answer: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
    body = json.dumps(answer, sort_keys=True, separators=(",", ":"))
    return {"status": status, "headers": {**JSON, **(headers or {})}, "body": body}


def health(request: Request) -> tuple[int, Any]:
    """Are we there?"""
    return 200, {"healthy": True}


def product(request: Request) -> tuple[int, Any]:
    """What we sell, and for how much."""
    return 200, orders.product(request.arguments["sku"])


def order(request: Request) -> tuple[int, Any]:
    """Take an order."""
    who = access.caller(request.headers.get("authorization", ""), "orders:write", request.time)
    return 201, {"for": who, **orders.place(request.body)}


ENDPOINTS: dict[str, Callable[[Request], tuple[int, Any]]] = {
    "health": health,
    "product": product,
    "order": order,
}
