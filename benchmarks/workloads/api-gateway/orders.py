"""What is sold, and orders of it: checked against a JSON Schema, priced from a list."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from werkzeug.exceptions import BadRequest, NotFound

FOLDER = Path(__file__).parent


class InvalidOrderError(Exception):
    """An order that is none; ``found`` has, for each error, the place in it and the rule that it breaks."""

    def __init__(self, found: list[dict[str, str]]) -> None:
        super().__init__(f"{len(found)} errors")
        self.found = found


def product(sku: str) -> dict[str, Any]:
    """A product by its number. Raises NotFound."""
    found = _products().get(sku)
    if found is None:
        raise NotFound
    return {"sku": sku, **found}


def place(body: str) -> dict[str, Any]:
    """Price an order. Raises BadRequest if it is no JSON, InvalidOrderError if it breaks the schema."""
    try:
        order = json.loads(body)
    except ValueError:
        raise BadRequest from None
    found = sorted(
        (
            {"at": "/" + "/".join(map(str, error.absolute_path)), "rule": str(error.validator)}
            for error in _validator().iter_errors(order)
        ),
        key=lambda error: (error["at"], error["rule"]),
    )
    if not found:
        # A schema does not know what is sold.
        found = [
            {"at": f"/items/{number}/sku", "rule": "known"}
            for number, item in enumerate(order["items"])
            if item["sku"] not in _products()
        ]
    if found:
        raise InvalidOrderError(found)
    lines = [{**item, "cents": product(item["sku"])["cents"] * item["count"]} for item in order["items"]]
    return {"lines": lines, "cents": sum(line["cents"] for line in lines), "to": order["to"]["country"]}


@cache
def _products() -> dict[str, dict[str, Any]]:
    products: dict[str, dict[str, Any]] = json.loads(FOLDER.joinpath("products.json").read_text("utf-8"))
    return products


@cache
def _validator() -> Any:
    schema = json.loads(FOLDER.joinpath("order.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)
