"""Small functions that do real work, as images: what enforcement costs them is measured by starting them.

Contents are the same in every run. All are large enough to be still measured while their function works.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from enturbo import EnclaveImage
from enturbo.examples.cities.build import cities_image

from .material import MIB, content

ORDERS = 300_000  # rows; some 64 MiB
CHECKED = 128 * MIB
ASSETS = 128 * MIB
REWRITTEN = 64 * MIB

_ORDERS = """
import sqlite3

def handler(event, context):
    with sqlite3.connect(":memory:") as database:
        database.deserialize(context.view("orders.db"))
        database.execute("PRAGMA temp_store = MEMORY")  # a file would wait for VERIFIED
        query = "SELECT country, count(*), sum(amount) FROM orders WHERE day >= ? GROUP BY country ORDER BY 1"
        return [list(row) for row in database.execute(query, (event,))]
"""
_CHECKSUM = """
import zlib

def handler(event, context):
    value = 0
    with context.open("data.bin") as file:
        while part := file.read(event):
            value = zlib.crc32(part, value)
    return value
"""
_PAGE = """
import json
from string import Template

def handler(event, context):
    with context.open("catalogue.json") as file:
        catalogue = json.load(file)
    with context.open("row.html") as file:
        row = Template(file.read().decode())
    wanted = [item for item in catalogue if event in item["tags"]]
    return "".join(row.substitute(item) for item in sorted(wanted, key=lambda item: item["price"]))
"""
# Every byte of the data is replaced, page after page.
_REWRITE = """
def handler(event, context):
    table = bytes(value ^ event for value in range(256))
    data = context.data
    for at in range(0, len(data), 65536):
        with data.view(at, 65536) as part:
            part[:] = bytes(part).translate(table)
    return len(data)
"""
# What is written when, for the two ways to write: see `Writing`.
_WRITE = """
import zlib

PAGE = 4096

def handler(event, context):
    data = context.data
    if event == "nothing":
        return 0
    pages = len(data) // PAGE
    if event == "read":
        total = 0
        for at in range(0, len(data), 65536):
            total += data.read(at, 65536)[0]
        for page in range(0, pages, 256):
            data.write(page * PAGE, b"x")
        return pages // 256
    if event == "one":
        data.write((pages - 1) * PAGE, b"x")
        zlib.crc32(bytes(16 << 20))
        return 1
    step = 16 if event == "some" else 1
    for page in range(0, pages, step):
        data.write(page * PAGE, b"x" * PAGE)
    return -(-pages // step)
"""


class Task(NamedTuple):
    """A function's image, the event that it is called with, and a look at its answer."""

    title: str
    image: Callable[[], EnclaveImage]
    event: Any
    is_right: Callable[[Any], bool]
    writes: bool  # to measured pages: the two ways to write differ


def function(source: str, **parts: Any) -> EnclaveImage:
    """The image of a handler given as text."""
    with TemporaryDirectory() as folder:
        Path(folder, "handler.py").write_text(source)
        return EnclaveImage.from_function(folder, heap=0, **parts)


def writing_image(size: int) -> EnclaveImage:
    """A function that writes to ``size`` bytes of measured data as its event says.

    ``all``: each page once; ``some``: one page in 16; ``read``: it reads all and writes to one page in 256;
    ``one``: the last page, and then it computes for some time; ``nothing``. It returns the number of pages.
    """
    return function(_WRITE, data=content(size))


@cache
def tasks() -> Mapping[str, Task]:
    """By name; nothing is built before it is asked for."""
    return {
        "cities": Task(
            "`examples/cities`: the nearest city, database of 60 MiB",
            cities_image,
            {"lat": 48.85, "lon": 2.35},
            lambda answer: answer["country"] == "FR",
            True,
        ),
        "orders": Task(
            "sqlite3: `deserialize`, then a sum over all rows, database of 64 MiB",
            lambda: function(_ORDERS, files={"orders.db": _orders()}),
            100,
            lambda answer: len(answer) == len(_COUNTRIES),
            False,
        ),
        "checksum": Task(
            f"zlib: CRC-32 of a file of {CHECKED // MIB} MiB",
            lambda: function(_CHECKSUM, files={"data.bin": content(CHECKED)}),
            1 << 18,
            lambda answer: answer > 0,
            False,
        ),
        "page": Task(
            f"json and string.Template: a page from a catalogue of 1 MiB, beside {ASSETS // MIB} MiB that it"
            " does not read",
            lambda: function(
                _PAGE,
                files={"assets.bin": content(ASSETS), "catalogue.json": _catalogue(), "row.html": _ROW},
            ),
            "blue",
            lambda answer: answer.startswith("<tr>"),
            False,
        ),
        "rewrite": Task(
            f"all {REWRITTEN // MIB} MiB of its measured data replaced, front to back",
            lambda: function(_REWRITE, data=content(REWRITTEN)),
            0x55,
            lambda answer: answer == REWRITTEN,
            True,
        ),
    }


_COUNTRIES = ("AT", "BR", "CN", "DE", "EG", "FR", "GB", "IN")
_TAGS = ("red", "green", "blue", "large", "small", "new", "used")
_ROW = b"<tr><td>$name</td><td>$price</td><td>$stock</td></tr>\n"


def _orders() -> bytes:
    note = "to be left with the neighbours, or in the shed behind the house; " * 3
    rows = (
        (number, _COUNTRIES[number * 7 % 8], number % 365, number * 37 % 10_000, f"{number} {note}")
        for number in range(ORDERS)
    )
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(
            "CREATE TABLE orders"
            " (id INTEGER PRIMARY KEY, country TEXT, day INTEGER, amount INTEGER, note TEXT)"
        )
        database.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)
        database.commit()
        return database.serialize()


def _catalogue() -> bytes:
    items = [
        {
            "name": f"article {number}",
            "price": number * 7919 % 100_000 / 100,
            "stock": number % 50,
            "tags": [_TAGS[number % 7], _TAGS[number * 3 % 7]],
        }
        for number in range(12_500)
    ]
    return json.dumps(items).encode()
