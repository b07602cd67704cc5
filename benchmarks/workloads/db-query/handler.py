"""Asks the database of the world's cities: the one nearest to a point, or those of a name.

Events are those of the cities example, whose handler comes along as the module ``cities``. Answered is what
stays as it is from one edition of the data to the next.
"""

from __future__ import annotations

from typing import Any

import cities


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Name, country and time zone of what was asked for; of the nearest city how far it is, too, to 10 km."""
    if not isinstance(event, dict):
        return {"error": "expected a place or a name"}
    try:
        answer = cities.handler(event, context)
    except ValueError as error:
        return {"error": str(error)}
    if "cities" in answer:
        return {"cities": [_brief(city) for city in answer["cities"]]}
    return {**_brief(answer), "distance_km": int(round(answer["distance_km"], -1))}


def _brief(city: dict[str, Any]) -> dict[str, Any]:
    return {key: city[key] for key in ("name", "country", "timezone")}
