"""The demo on a small database: what it computes, and the command that shows it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from enturbo import EnclaveImage, Runtime, SigningKey
from enturbo.examples.cities import build
from enturbo.runtime import demo
from enturbo.runtime.cli import main
from enturbo.runtime.compare import COMBINATIONS, ENTURBO1, Candidate, compare, epc_size, prepare

CITIES = {
    str(number): {
        "geonameid": number,
        "name": name,
        "latitude": lat,
        "longitude": lon,
        "countrycode": country,
        "population": 1000 * number,
        "timezone": "UTC",
        "alternatenames": [f"{name} {other}" for other in range(200)],
    }
    for number, (name, country, lat, lon) in enumerate(
        [
            ("Paris", "FR", 48.853, 2.349),
            ("Sydney", "AU", -33.868, 151.207),
            ("Tokyo", "JP", 35.69, 139.692),
            ("Nairobi", "KE", -1.283, 36.817),
        ],
        1,
    )
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> EnclaveImage:
    """The example's image on four cities."""
    path = tmp_path_factory.mktemp("cities") / "cities.db"
    build.write_database(path, CITIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_cities", lambda cache: path)
        return build.cities_image(heap="1MiB")


@pytest.fixture(scope="module")
def genuine(image: EnclaveImage, key: SigningKey) -> Candidate:
    """enturbo1 alone, signed."""
    (candidate,) = prepare(image, key, [ENTURBO1])
    return candidate


@pytest.fixture(scope="module")
def foreign() -> SigningKey:
    """Nobody trusts it."""
    return SigningKey.generate()


@pytest.fixture(scope="module")
def host(image: EnclaveImage, key: SigningKey) -> Iterator[Runtime]:
    """A runtime that trusts the key and holds one launch."""
    with Runtime(epc=epc_size(image), workers=1, signers=[key.mrsigner]) as runtime:
        yield runtime


def test_one_enclave_answers_and_counts(host: Runtime, genuine: Candidate) -> None:
    answers = demo.ask(host, genuine)
    assert [(answer.city, answer.calls) for answer in answers] == [
        ("Paris", 1),
        ("Sydney", 2),
        ("Tokyo", 3),
        ("Nairobi", 4),
    ]


def test_all_combinations_answer_alike(host: Runtime, image: EnclaveImage, key: SigningKey) -> None:
    seen: list[None] = []
    comparison = compare(
        host,
        prepare(image, key),
        demo.example_event(),
        rounds=2,
        warm_up=False,
        on_start=lambda: seen.append(None),
    )
    assert [row.combination for row in comparison.rows] == list(COMBINATIONS)
    assert len(seen) == 2 * len(COMBINATIONS)
    assert all(len(row.samples) == 2 for row in comparison.rows)
    assert demo.agreed([row.answers[0] for row in comparison.rows])
    assert [[answer["calls"] for answer in row.answers] for row in comparison.rows] == [[1, 2]] * 5
    assert not demo.agreed([{"name": "Paris", "calls": 1}, {"name": "Lyon", "calls": 1}])


def test_one_value_for_any_number_of_workers(image: EnclaveImage, genuine: Candidate) -> None:
    values = list(demo.read_back(image, genuine.sigstruct, (0, 1, 2)))
    assert [value.workers for value in values] == [0, 1, 2]
    assert {value.mrenclave for value in values} == {genuine.sigstruct.enclavehash}
    assert all(value.agrees for value in values)
    assert {sum(value.measured_pages.values()) for value in values} == {image.page_count}


def test_what_must_be_refused_is(
    host: Runtime, genuine: Candidate, foreign: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SigningKey, "generate", lambda: foreign)
    refusals = list(demo.refusals(host, genuine))
    assert [refusal.error for refusal in refusals] == [
        "MeasurementMismatch",
        "UntrustedSigner",
        "MeasurementMismatch",
    ]
    assert all(refusal.refused for refusal in refusals)
    assert [refusal.state for refusal in refusals] == ["REJECTED", "never created", "REJECTED"]
    assert host.stats()["epc_pages_free"] == host.stats()["epc_pages"]


def test_what_is_not_refused_is_told(host: Runtime, genuine: Candidate) -> None:
    told = demo.attempt("genuine", lambda: host.launch(genuine.image, genuine.sigstruct))
    assert (told.error, told.delivered, told.refused) == ("none", True, False)


def test_tampering_changes_one_bit_of_the_database(image: EnclaveImage) -> None:
    changed = demo.tampered(image, demo.DATABASE)
    bits = 0
    for before, after in zip(image.regions, changed.regions, strict=True):
        assert (before.offset, before.page_count, before.flags) == (
            after.offset,
            after.page_count,
            after.flags,
        )
        for one, other in zip(bytes(before.content or b""), bytes(after.content or b""), strict=True):
            bits += (one ^ other).bit_count()
    assert bits == 1


def test_the_command(
    image: EnclaveImage,
    key: SigningKey,
    foreign: SigningKey,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = iter([key, foreign])  # a new one takes a while to find
    monkeypatch.setattr(SigningKey, "generate", lambda: next(keys))
    monkeypatch.setattr(build, "cities_image", lambda: image)
    assert main(["demo", "--rounds", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["combination"] for row in shown["rows"]] == [each.name for each in COMBINATIONS]
    assert len({row["mrenclave"] for row in shown["rows"]}) == 4
    assert [value["workers"] for value in shown["read_back"]] == [1, 2, 3, 8]
    assert all(value["agrees"] for value in shown["read_back"])
    assert [refusal["delivered"] for refusal in shown["refusals"]] == [False] * 3
    assert shown["answers"][0]["city"] == "Paris"


@pytest.fixture
def quick(image: EnclaveImage, genuine: Candidate, key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on the small image, without what other tests look at: keys, worker counts, refusals."""
    value = demo.ReadBack(1, genuine.sigstruct.enclavehash, True, {"host": image.page_count})
    refusal = demo.Refusal("a trial", "UntrustedSigner", "a message", "never created", False, 0)
    monkeypatch.setattr(build, "cities_image", lambda: image)
    monkeypatch.setattr(SigningKey, "generate", lambda: key)
    monkeypatch.setattr(demo, "read_back", lambda *arguments: [value])
    monkeypatch.setattr(demo, "refusals", lambda *arguments: [refusal])


@pytest.mark.usefixtures("quick")
def test_the_command_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("Simulated", "enturbo2", "serial*", "is Paris (FR)", "UntrustedSigner", "refused"):
        assert words in out


@pytest.mark.usefixtures("quick")
def test_the_command_fails_when_a_value_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = demo.ReadBack(1, bytes(32), False, {"host": 1})
    monkeypatch.setattr(demo, "read_back", lambda *arguments: [wrong])
    assert main(["demo", "--rounds", "1", "--json"]) == 1
    assert "did not show" in capsys.readouterr().err


def test_without_the_extra_it_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("enturbo: ")
    assert 'pip install "enturbo[demo]"' in error
    assert list(tmp_path.iterdir()) == []
