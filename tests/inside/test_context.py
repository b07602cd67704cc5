"""What a handler gets, in a real enclave process."""

from __future__ import annotations

from typing import Any

import pytest

PAGE = 4096

SOURCE = """
import io

def handler(event, context):
    return globals()[event[0]](context, *event[1:])

def names(context):
    return context.names

def opened(context, name, seek, n):
    with context.open(name) as file:
        assert isinstance(file, io.BufferedReader) and file.readable() and not file.writable()
        file.seek(*seek)
        return file.read(n)

def lines(context, name):
    return list(io.TextIOWrapper(context.open(name)))

def viewed(context, name):
    view = context.view(name)
    assert view.readonly and view.format == "B"
    return bytes(view)

def store(context, name):
    context.view(name)[0] = 1

def read(context, region, *where):
    return getattr(context, region).read(*where)

def write(context, region, offset, data):
    return getattr(context, region).write(offset, data)

def poke(context, region, offset, value):
    memory = getattr(context, region)
    memory.view(offset, 1)[0] = value
    return memory.size, len(memory), len(memory.view())

def touch(context, *offsets):
    view = context.heap.view()
    for offset in offsets:
        view[offset] = 1

def ocall(context, name, *args):
    return context.ocall(name, *args)

def threads(context, count):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: context.ocall("double", number), range(count)))
"""

FILE = bytes(range(251)) * 40  # three pages, prime period: shifted bytes are seen


@pytest.fixture
def enclave(bench: Any) -> Any:
    return bench.enclave(
        SOURCE, files={"a.bin": FILE, "empty": b"", "sub/b.txt": b"one\ntwo\n"}, data=FILE, heap=4 * PAGE
    )


def test_files(enclave: Any) -> None:
    assert set(enclave.call(["names"])) == {"handler.py", "a.bin", "empty", "sub/b.txt"}
    assert enclave.call(["opened", "a.bin", [0], -1]) == FILE
    assert enclave.call(["opened", "a.bin", [4090], 20]) == FILE[4090:4110]
    assert enclave.call(["opened", "a.bin", [-5, 2], 100]) == FILE[-5:]
    assert enclave.call(["opened", "a.bin", [1 << 20], 1]) == b""
    assert enclave.call(["opened", "empty", [0], -1]) == b""
    assert enclave.call(["lines", "sub/b.txt"]) == ["one\n", "two\n"]
    assert enclave.call(["viewed", "a.bin"]) == FILE
    assert enclave.call(["viewed", "empty"]) == b""


def test_a_missing_file_names_those_that_are_there(enclave: Any) -> None:
    for action in (["viewed", "b.txt"], ["opened", "b.txt", [0], 1]):
        reply = enclave.reply(action)
        assert (reply["kind"], reply["type"]) == ("raise", "FileNotFoundError")
        assert "sub/b.txt" in reply["message"]


def test_a_files_view_cannot_be_written(enclave: Any) -> None:
    assert enclave.reply(["store", "a.bin"])["type"] == "TypeError"


def test_data_and_heap(enclave: Any) -> None:
    assert enclave.call(["read", "data"]) == FILE
    assert enclave.call(["read", "data", 4000, 200]) == FILE[4000:4200]
    assert enclave.call(["write", "data", 4090, b"0123456789"]) == 10
    assert enclave.call(["read", "data", 4089, 12]) == FILE[4089:4090] + b"0123456789" + FILE[4100:4101]
    # The store is in the EPC, not in a copy of it.
    data = enclave.runs[2]
    assert bytes(enclave.page(data.index)[4090:]) + bytes(enclave.page(data.index + 1)[:4]) == b"0123456789"
    assert enclave.call(["read", "heap"]) == bytes(4 * PAGE)
    assert enclave.call(["poke", "heap", 4 * PAGE - 1, 7]) == [4 * PAGE, 4 * PAGE, 4 * PAGE]
    assert enclave.call(["read", "heap", 4 * PAGE - 1]) == b"\x07"


@pytest.mark.parametrize("where", [[-1, 1], [0, len(FILE) + 1], [len(FILE) + 1], [5, -1]])
def test_outside_of_a_region(enclave: Any, where: list[int]) -> None:
    reply = enclave.reply(["read", "data", *where])
    assert (reply["kind"], reply["type"]) == ("raise", "IndexError")
    assert str(len(FILE)) in reply["message"]


def test_regions_that_the_image_lacks(bench: Any) -> None:
    enclave = bench.enclave(SOURCE)
    for region in ("data", "heap"):
        reply = enclave.reply(["read", region])
        assert (reply["type"], reply["message"]) == ("LookupError", f"the image has no {region} region")


def test_data_can_be_read_before_it_can_be_written(bench: Any) -> None:
    enclave = bench.enclave(SOURCE, data=FILE, released=False, gate_timeout=0.05)
    assert enclave.call(["read", "data"]) == FILE
    reply = enclave.reply(["poke", "data", 0, 1])
    assert (reply["kind"], reply["type"]) == ("gate", "enturbo.shm.errors.GateTimeout")
    enclave.set_all("released")
    assert enclave.call(["poke", "data", 0, 1])[0] == len(FILE)


def test_dynamic_pages_are_counted_at_their_first_touch(bench: Any) -> None:
    enclave = bench.enclave(SOURCE, heap=8 * PAGE, dynamic=True)
    assert enclave.reply(["names"])["eaug"] == 0
    assert enclave.reply(["touch", 0, 5, PAGE])["eaug"] == 2
    assert enclave.reply(["touch", 0, 7 * PAGE])["eaug"] == 3


def test_ocalls(enclave: Any) -> None:
    enclave.send(["ocall", "add", 1, "two", b"three"])
    request = enclave.recv()
    assert (request["name"], request["args"]) == ("add", [1, "two", b"three"])
    enclave.stream.send({"reply": request["ocall"], "value": [4]}, 5)
    assert enclave.recv()["value"] == [4]
    enclave.send(["ocall", "unknown"])
    enclave.stream.send({"reply": enclave.recv()["ocall"], "error": "no such function"}, 5)
    reply = enclave.recv()
    assert reply["type"].endswith("OcallError")
    assert "no such function" in reply["message"]


def test_ocalls_of_several_threads_get_their_own_answers(enclave: Any) -> None:
    enclave.send(["threads", 4])
    requests = [enclave.recv() for _ in range(4)]
    for request in reversed(requests):
        enclave.stream.send({"reply": request["ocall"], "value": 2 * request["args"][0]}, 5)
    assert enclave.recv()["value"] == [0, 2, 4, 6]
