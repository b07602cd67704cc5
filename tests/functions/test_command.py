"""``enturbo build --with``, and what ``inspect`` shows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from enturbo import EnclaveImage
from enturbo.runtime.cli import main

Make = Callable[..., Path]


@pytest.fixture
def site(make_distribution: Make, tmp_path: Path) -> str:
    site = tmp_path / "site"
    make_distribution(site, "top", "1.2", requires=["bottom"])
    make_distribution(site, "bottom", "0.3")
    make_distribution(site, "other", "7")
    return str(site)


def test_build_with_distributions(
    function: Callable[..., Path], site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requirements.txt").write_text("# what it needs\n\nother>=7  # the newest\n")
    files = [str(tmp_path / name) for name in ("thin.enclave", "whole.enclave")]
    options = ["--with", "top", "-r", str(tmp_path / "requirements.txt"), "--site", site, "--heap", "0"]
    for file, more in zip(files, ([], ["--whole"]), strict=True):
        assert main(["build", str(function()), "-o", file, *options, *more, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        found = [(each["name"], each["version"], each["files"]) for each in facts["distributions"]]
        assert found == [("bottom", "0.3", 3), ("other", "7", 3), ("top", "1.2", 3)]
    digests = []
    for file in files:
        with EnclaveImage.load(file) as image:
            digests.append(image.measure().digest)
    assert digests[0] == digests[1]
    assert Path(files[0]).stat().st_size < Path(files[1]).stat().st_size
    assert main(["build", str(function()), "-o", files[0], *options]) == 0
    assert "top 1.2" in capsys.readouterr().out


def test_inspect_shows_whose_each_region_is(
    function: Callable[..., Path], site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "f.enclave")
    assert main(["build", str(function()), "-o", file, "--with", "top", "--site", site]) == 0
    capsys.readouterr()
    assert main(["inspect", file, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    labels = [region["label"] for region in facts["regions"]]
    assert labels == ["program manifest", "function", "bottom 0.3", "top 1.2", "heap"]
    assert [each["name"] for each in facts["distributions"]] == ["bottom", "top"]
    assert main(["inspect", file]) == 0
    text = capsys.readouterr().out
    assert "bottom 0.3" in text
    assert "distribution" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--with", "nothing-like-it"], "the function requires nothing-like-it"),
        (["--with", "top>=2"], "version >=2"),
        (["--with", "top", "--site", "/nowhere"], "/nowhere"),
        (["-r", "missing.txt"], "missing.txt"),
    ],
)
def test_what_is_missing_is_told(
    function: Callable[..., Path],
    site: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    file = tmp_path / "f.enclave"
    where = [] if "--site" in options else ["--site", site]
    assert main(["build", str(function()), "-o", str(file), *options, *where]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not file.exists()


def test_diff_names_the_distribution(
    function: Callable[..., Path],
    make_distribution: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = []
    for number in (1, 2):
        site = make_distribution(tmp_path / f"site{number}", "pkg", files={"pkg.py": f"value = {number}\n"})
        files.append(str(tmp_path / f"{number}.enclave"))
        options = ["--with", "pkg", "--site", str(site), "--heap", "0"]
        assert main(["build", str(function()), "-o", files[-1], *options]) == 0
    capsys.readouterr()
    assert main(["diff", *files]) == 1
    assert "pkg 1.0" in capsys.readouterr().out
