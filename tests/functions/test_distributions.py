"""Which distributions come along, and which of their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage
from enturbo.runtime.distributions import Distribution, find
from enturbo.shm.errors import ImageFormatError

Make = Callable[..., Path]


def names(found: list[Distribution]) -> list[str]:
    return [str(distribution) for distribution in found]


def test_what_is_required_in_turn_comes_along(make_distribution: Make, tmp_path: Path) -> None:
    make_distribution(
        tmp_path,
        "top",
        "2.1",
        requires=["Middle-Part>=1", "never; python_version < '3'", "extra-only; extra == 'x'"],
    )
    make_distribution(tmp_path, "middle.part", "1.5", requires=["bottom", "top"])  # in a circle
    make_distribution(tmp_path, "bottom", "0.1")
    make_distribution(tmp_path, "extra-only", "3", requires=["deeper; sys_platform == 'linux'"])
    make_distribution(tmp_path, "deeper", "4")
    make_distribution(tmp_path, "unrelated")
    site = [str(tmp_path)]
    assert names(find(["top"], site=site)) == ["bottom 0.1", "middle.part 1.5", "top 2.1"]
    assert names(find(["TOP[x]"], site=site)) == [
        *("bottom 0.1", "deeper 4", "extra-only 3", "middle.part 1.5", "top 2.1")
    ]
    assert names(find(["bottom", "bottom>=0"], site=site)) == ["bottom 0.1"]
    assert find([], site=site) == []


def test_only_what_was_shipped_goes_in(make_distribution: Make, tmp_path: Path) -> None:
    files = {"pkg/__init__.py": "", "pkg/data.txt": "data", "pkg/tests/test_it.py": "", "alone.py": ""}
    make_distribution(tmp_path, "pkg", files=files)
    info = ["pkg-1.0.dist-info/METADATA", "pkg-1.0.dist-info/WHEEL"]
    (found,) = find(["pkg"], site=[str(tmp_path)])
    assert [file.name for file in found.files] == sorted([*files, *info])
    assert [file.read() for file in found.files if file.name == "pkg/data.txt"] == [b"data"]
    (found,) = find(["pkg"], site=[str(tmp_path)], exclude=["*/tests/*", "alone.*"])
    assert [file.name for file in found.files] == [
        "pkg-1.0.dist-info/METADATA",
        *info[1:],
        "pkg/__init__.py",
        "pkg/data.txt",
    ]


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("nothing-like-it", r"the function requires nothing-like-it.*installed distribution.*pip install"),
        ("pkg>=2", r"the function requires pkg.*version >=2.*1\.0 is installed"),
        ("needy", r"needy requires gone.*expected an installed distribution"),
        ("pkg ==", r"requirement of the function"),
        ("-r other.txt", r"requirement of the function"),
        ("", r"requirement of the function"),
    ],
)
def test_what_is_not_there_is_named(
    make_distribution: Make, tmp_path: Path, requirement: str, message: str
) -> None:
    make_distribution(tmp_path, "pkg")
    make_distribution(tmp_path, "needy", requires=["gone>=1"])
    with pytest.raises(ImageFormatError, match=message):
        find([requirement], site=[str(tmp_path)])


def test_a_changed_file_is_named(make_distribution: Make, tmp_path: Path) -> None:
    make_distribution(tmp_path, "pkg")
    (tmp_path / "pkg.py").write_text("name = 'Pkg'\n")
    (found,) = find(["pkg"], site=[str(tmp_path)])
    with pytest.raises(
        ImageFormatError, match=r"pkg\.py: changed since it was installed: expected sha256 \w{64}"
    ):
        next(file for file in found.files if file.name == "pkg.py").read()
    (tmp_path / "pkg.py").unlink()
    with pytest.raises(ImageFormatError, match=r"pkg 1\.0 lists a file"):
        find(["pkg"], site=[str(tmp_path)])


def test_editable_installs_and_eggs_are_refused(make_distribution: Make, tmp_path: Path) -> None:
    make_distribution(tmp_path, "soft", files={"__editable__.soft-1.0.pth": "/somewhere"})
    with pytest.raises(ImageFormatError, match=r"soft 1\.0.*installed as editable"):
        find(["soft"], site=[str(tmp_path)])
    make_distribution(tmp_path, "egg")
    (tmp_path / "egg-1.0.dist-info" / "RECORD").unlink()
    with pytest.raises(ImageFormatError, match=r"egg 1\.0.*RECORD"):
        find(["egg"], site=[str(tmp_path)])


def test_markers_editable_installs_and_scripts(make_distribution: Make, tmp_path: Path) -> None:
    entry = "[console_scripts]\ntool = pkg:main\n"
    files = {
        "pkg.py": "",
        "pkg-1.0.dist-info/entry_points.txt": entry,
        "bin/tool": "#!/somewhere/python",
        "data/weights.pth": "0101",
    }
    make_distribution(tmp_path, "pkg", files=files)
    site = [str(tmp_path)]
    (found,) = find(["pkg", "never; sys_platform == 'win32'"], site=site)
    listed = {file.name for file in found.files}
    assert "bin/tool" not in listed
    assert {"data/weights.pth", "pkg.py", "pkg-1.0.dist-info/entry_points.txt"} <= listed
    with pytest.raises(ImageFormatError, match="requirement of the function"):
        find(["pkg; os_name ~= 'posix'"], site=site)
    (tmp_path / "pkg-1.0.dist-info" / "direct_url.json").write_text('{"dir_info": {"editable": true}}')
    with pytest.raises(ImageFormatError, match=r"pkg 1\.0.*installed as editable"):
        find(["pkg"], site=site)


@pytest.mark.parametrize("record", [b"\xff\xfe", b"one-column\n", b'"a' + b"x" * 200000, b"a\\b.py,,\n"])
def test_a_damaged_record_is_named(make_distribution: Make, tmp_path: Path, record: bytes) -> None:
    make_distribution(tmp_path, "pkg")
    (tmp_path / "pkg-1.0.dist-info" / "RECORD").write_bytes(record)
    with pytest.raises(ImageFormatError, match=r"pkg 1\.0: RECORD"):
        find(["pkg"], site=[str(tmp_path)])


def test_pth_files_are_left_out_and_told(
    make_distribution: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_distribution(tmp_path, "hooked", files={"hooked.py": "", "hooked.pth": "import hooked"})
    with caplog.at_level(logging.WARNING, "enturbo.build"):
        (found,) = find(["hooked"], site=[str(tmp_path)])
    assert "hooked.pth" not in [file.name for file in found.files]
    assert "hooked.pth is left out" in caplog.text


def test_one_name_means_one_thing(
    make_distribution: Make, function: Callable[..., Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    make_distribution(site, "first", files={"shared/__init__.py": "", "shared/one.py": "1"})
    make_distribution(site, "second", files={"shared/__init__.py": "", "shared/two.py": "2"})
    options: dict[str, Any] = {"site": [site], "heap": 0}
    EnclaveImage.from_function(function(), requirements=["first", "second"], **options)
    make_distribution(site, "third", files={"shared/one.py": "another 1"})
    make_distribution(site, "first", files={"shared/__init__.py": "", "shared/one.py": "1"})
    with pytest.raises(ImageFormatError, match=r"shared/one\.py.*first 1\.0 and third 1\.0"):
        EnclaveImage.from_function(function(), requirements=["first", "third"], **options)
    make_distribution(site, "json", files={"json/__init__.py": ""})
    with pytest.raises(ImageFormatError, match=r"json 1\.0 replaces a module of the standard library"):
        EnclaveImage.from_function(function(), requirements=["json"], **options)
    folder = function()
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "x.py").write_text("")
    EnclaveImage.from_function(folder, **options)
    with pytest.raises(ImageFormatError, match=r"a folder site-packages"):
        EnclaveImage.from_function(folder, requirements=["first"], **options)


def test_equal_inputs_give_equal_images(
    make_distribution: Make, function: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever folders, installer, times and modes: the names and bytes alone count."""
    digests = []
    for number, installer in enumerate(("pip", "another")):
        site = tmp_path / f"somewhere{number}" / "lib"
        for name in ("pkg", "other") if number else ("other", "pkg"):
            files = {f"{name}/__init__.py": "import os\n", f"{name}/data": "x" * 5000}
            make_distribution(
                site, name, files=files, requires=["other"] if name == "pkg" else [], installer=installer
            )
        for path in site.rglob("*"):
            os.utime(path, (number * 10**6, number * 10**6))
            path.chmod(0o755 if path.is_dir() or number else 0o600)
        image = EnclaveImage.from_function(function(), requirements=["pkg"], site=[site], heap="1MiB")
        digests.append(image.measure().digest)
        image.save(tmp_path / f"{number}.enclave")
    assert digests[0] == digests[1]
    assert (tmp_path / "0.enclave").read_bytes() == (tmp_path / "1.enclave").read_bytes()
