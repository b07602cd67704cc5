"""Runs inside the enclave: which city is nearest to a point, or which cities bear a name.

The database is the image's file ``cities.db``. Its bytes stand in EPC pages; sqlite3 reads them from there
(``deserialize``) on the first call and keeps the database as long as the enclave lives.

Events: ``{"lat": degrees, "lon": degrees}`` gives the nearest city, ``{"name": text}`` the cities of that
name in any language, the largest first. Both say in ``calls`` how often this enclave has been called.
"""

from __future__ import annotations

import math
import sqlite3
from typing import Any

DATABASE = "cities.db"
EARTH_RADIUS_KM = 6371.0088  # mean radius, IUGG
FIRST_RADIUS = 0.1  # degrees; doubled until a city is found within

_COLUMNS = "id, name, country, population, timezone, lat, lon"

_connection: sqlite3.Connection | None = None


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Answer one event; see the module. Raises ValueError for an event that is none of the two."""
    database = _database(context)
    if "name" in event:
        answer: dict[str, Any] = {"cities": search(database, str(event["name"]))}
    elif "lat" in event and "lon" in event:
        answer = nearest(database, float(event["lat"]), float(event["lon"]))
    else:
        raise ValueError("expected an event with lat and lon, or with name")
    answer["calls"] = count(context)
    return answer


def _database(context: Any) -> sqlite3.Connection:
    global _connection
    if _connection is None:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.deserialize(context.view(DATABASE))
        connection.execute("PRAGMA query_only = ON")
        _connection = connection
    return _connection


def count(context: Any) -> int | None:
    """Raise the counter in the first 8 bytes of the measured writable data; None if the image has none.

    The old value can be read as soon as the page is there. The new one can be written only when the page has
    been measured: the gate lets the view out no earlier.
    """
    try:
        data = context.data
    except LookupError:
        return None
    calls = int.from_bytes(data.read(0, 8), "little") + 1
    with data.view(0, 8) as counter:
        counter[:] = calls.to_bytes(8, "little")
    return calls


def nearest(database: sqlite3.Connection, lat: float, lon: float) -> dict[str, Any]:
    """The city with the least great-circle distance to (lat, lon), degrees."""
    if not (-90 <= lat <= 90 and math.isfinite(lon)):
        raise ValueError(f"not a place on Earth: lat {lat}, lon {lon}")
    lon = (lon + 180) % 360 - 180
    radius = FIRST_RADIUS
    while True:
        rows = (row for box in boxes(lat, lon, radius) for row in database.execute(_IN_BOX, box))
        found = min(((angle(lat, lon, row[5], row[6]), row) for row in rows), default=None)
        # A box holds all within the radius, and some more: a city farther off may not be the nearest.
        if found is not None and (math.degrees(found[0]) <= radius or radius >= 180):
            return {
                **_city(database, found[1]),
                "distance_km": round(found[0] * EARTH_RADIUS_KM, 3),
            }
        if radius >= 180:
            raise ValueError("the database holds no cities")
        radius = min(radius * 2, 180.0)


_IN_BOX = f"SELECT {_COLUMNS} FROM city WHERE band = ? AND lon BETWEEN ? AND ? AND lat BETWEEN ? AND ?"


def boxes(lat: float, lon: float, radius: float) -> list[tuple[int, float, float, float, float]]:
    """(band, lon from, lon to, lat from, lat to) that together hold all points within ``radius`` degrees.

    A band is one degree of latitude: the database is ordered by band, then longitude.
    """
    south, north = max(lat - radius, -90.0), min(lat + radius, 90.0)
    spans = [(-180.0, 180.0)]
    if south > -90 and north < 90:
        # Farthest east and west a circle reaches; more than the radius, the more the nearer to a pole.
        ratio = math.sin(math.radians(min(radius, 90.0))) / math.cos(math.radians(lat))
        half = math.degrees(math.asin(min(1.0, ratio))) + 1e-9
        west, east = lon - half, lon + half
        if west < -180:
            spans = [(-180.0, east), (west + 360, 180.0)]
        elif east > 180:
            spans = [(west, 180.0), (-180.0, east - 360)]
        else:
            spans = [(west, east)]
    bands = range(math.floor(south), math.floor(north) + 1)
    return [(band, *span, south, north) for band in bands for span in spans]


def angle(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    """The angle between two points, radians (haversine: exact for near points, too)."""
    phi1, phi2 = math.radians(lat1), math.radians(lat2)
    half = (
        math.sin((phi2 - phi1) / 2) ** 2
        + math.cos(phi1) * math.cos(phi2) * math.sin(math.radians(lon2 - lon1) / 2) ** 2
    )
    return 2 * math.asin(min(1.0, math.sqrt(half)))


def search(database: sqlite3.Connection, name: str, limit: int = 10) -> list[dict[str, Any]]:
    """Cities with this name or alternate name, whatever its case, the largest first."""
    rows = database.execute(
        f"SELECT {_COLUMNS} FROM city WHERE id IN (SELECT city FROM name WHERE folded = ?)"
        " ORDER BY population DESC, id LIMIT ?",
        (name.casefold(), limit),
    )
    return [_city(database, row) for row in rows.fetchall()]


def _city(database: sqlite3.Connection, row: tuple[Any, ...]) -> dict[str, Any]:
    city = dict(zip(_COLUMNS.split(", "), row, strict=True))
    (names,) = database.execute("SELECT names FROM alternate WHERE city = ?", row[:1]).fetchone()
    return {**city, "alternate_names": names.split("\n") if names else []}
