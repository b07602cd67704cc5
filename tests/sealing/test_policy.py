"""The policy: what it names, how targets are written, and what they stand for."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnturboError, Policy
from enturbo.runtime.policy import Target

STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


@pytest.mark.parametrize(
    ("text", "kind", "address"),
    [
        ("example.org:443", STREAM, ("example.org", 443)),
        ("127.0.0.1:1", STREAM, ("127.0.0.1", 1)),
        ("127.0.0.1:65535", STREAM, ("127.0.0.1", 65535)),
        ("tcp:127.0.0.1:80", STREAM, ("127.0.0.1", 80)),
        ("udp:127.0.0.1:53", DATAGRAM, ("127.0.0.1", 53)),
        ("[::1]:80", STREAM, ("::1", 80)),
        ("udp:[fe80::1]:53", DATAGRAM, ("fe80::1", 53)),
        ("unix:/run/x", 0, "/run/x"),
        ("unix:/run/../run//x", 0, "/run/x"),
        ("unix:/run/x:y", 0, "/run/x:y"),
    ],
)
def test_targets(text: str, kind: int, address: object) -> None:
    target = Target.parse(text)
    assert (target.kind, target.address) == (kind, address)
    assert Policy(connect=[text]).targets == (target,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "[]:80",
        "host:0",
        "host:65536",
        "host:-1",
        "host:+1",
        "host: 80",
        "host:80 ",
        "host:http",
        "host:8\u0660",  # a digit, but not of ASCII
        "tcp:",
        "tcp:80",
        "udp::53",
        "unix:",
        "unix:relative",
        "unix:@abstract",
        "unix:\0abstract",
    ],
)
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(EnturboError, match="policy: connect: expected"):
        Target.parse(text)
    with pytest.raises(EnturboError, match="policy: connect: expected"):
        Policy(connect=("127.0.0.1:80", text))


def test_a_target_s_addresses() -> None:
    assert Target.parse("127.0.0.1:80").resolve() == {("127.0.0.1", 80)}
    assert Target.parse("[::1]:80").resolve() == {("::1", 80)}
    assert Target.parse("[0:0:0:0:0:0:0:1]:80").resolve() == {("::1", 80)}
    assert Target.parse("unix:/run/x").resolve() == {"/run/x"}
    assert ("127.0.0.1", 80) in Target.parse("localhost:80").resolve()


def test_a_name_may_have_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And others the next time: it is looked up anew."""
    answers = [["10.0.0.1", "10.0.0.2"], ["10.0.0.3"]]
    asked: list[tuple[Any, ...]] = []

    def look_up(host: str, port: int, *, type: int) -> list[Any]:
        asked.append((host, port, type))
        return [(2, type, 0, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    target = Target.parse("udp:service.example:53")
    assert target.resolve() == {("10.0.0.1", 53), ("10.0.0.2", 53)}
    assert target.resolve() == {("10.0.0.3", 53)}
    assert asked == [("service.example", 53, DATAGRAM)] * 2


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(OSError, match="unknown"):
        Target.parse("nowhere.invalid:80").resolve()


def test_the_default_is_scratch_alone() -> None:
    assert Policy() == Policy(scratch=True, read=(), write=(), connect=())
    assert Policy().targets == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().scratch = False  # type: ignore[misc]


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    policy = Policy(read=[tmp_path, str(file)], write=[tmp_path])  # type: ignore[arg-type]
    assert policy.read == (str(tmp_path), str(file))
    assert policy.write == (str(tmp_path),)
    assert hash(policy) == hash(Policy(read=policy.read, write=policy.write))


@pytest.mark.parametrize("name", ["read", "write"])
@pytest.mark.parametrize("path", ["", ".", "relative", "/nowhere/at/all", "../etc"])
def test_paths_that_are_none(name: str, path: str) -> None:
    with pytest.raises(EnturboError, match=f"policy: {name}: expected an absolute path that exists"):
        Policy(**{name: (path,)})  # type: ignore[arg-type]


def test_a_file_is_no_folder_to_write_in(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(EnturboError, match="policy: write: expected a folder"):
        Policy(write=(str(file),))


@pytest.mark.parametrize("name", ["read", "write", "connect"])
@pytest.mark.parametrize("text", ["/tmp", b"/tmp"])
def test_one_text_is_not_several(name: str, text: str | bytes) -> None:
    with pytest.raises(EnturboError, match=f"policy: {name}: expected several texts"):
        Policy(**{name: text})  # type: ignore[arg-type]
