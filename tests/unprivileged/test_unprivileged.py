"""The gates, the seal and the attacks on them hold for an ordinary user too, not for root alone.

Run as root, these tests become ``nobody``; run by anybody else, they stay who they are. Without privilege the
kernel gives another kind of userfaultfd, and Landlock and seccomp need no-new-privileges, so what was shown
for root says little here.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 240  # a bound on the inner run, which takes a fraction of it
FOLDERS = ("gates", "attacks", "sealing", "functions")
FEWEST = 5  # in a folder: fewer are a sign that something was not collected
LINES = 60  # of a failed run's output

ABOUT = """
import enturbo, json, os
from enturbo.runtime.enforcement import probe
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
found = probe()
print(json.dumps({
    "ids": sorted({*os.getresuid(), *os.getresgid(), *os.getgroups()}),
    "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapAmb"], 16),
    "file": enturbo.__file__,
    "level": found.level,
    "missing": found.missing,
}))
"""


@pytest.fixture(scope="module")
def about(place: Any) -> dict[str, Any]:
    """What the environment says of itself."""
    done = place.run("-c", ABOUT, seconds=60)
    assert done.returncode == 0, done.stdout
    return dict(json.loads(done.stdout))


def test_an_ordinary_user_runs_the_installed_wheel(place: Any, person: Any, about: dict[str, Any]) -> None:
    """No root among its ids, no capability, no group of root's; and it is not this source tree."""
    assert 0 not in about["ids"]
    assert about["capabilities"] == 0
    if person.becoming:
        assert about["ids"] == sorted({person.uid, person.gid})
    assert Path(about["file"]).is_relative_to(place.python.parents[1])


def test_it_can_write_its_home_alone(place: Any) -> None:
    """Neither the environment nor the suite is the user's to change: what is tested is what was installed."""
    if not place.person.becoming:
        return  # both are its own; there is nobody else who could have made them
    for folder in (place.suite, place.suite / "tests", place.python.parents[1]):
        code = f"open({str(folder / 'mine')!r}, 'w')"
        assert "PermissionError" in place.run("-c", code, seconds=60).stdout
    done = place.run("-c", "import tempfile; print(tempfile.mkstemp()[1])", seconds=60)
    assert Path(done.stdout.strip()).is_relative_to(place.home), done.stdout


def test_the_kernel_enforces_for_it(about: dict[str, Any]) -> None:
    """By the kind of userfaultfd that any user may have, unless the system gives all users the other kind."""
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    given = switch.exists() and switch.read_text().strip() == "1"
    assert about["level"] == ("kernel" if given else "kernel-user"), about["missing"]


def test_gates_seal_and_attacks_pass_for_it(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What the kernel enforces in these folders, but for the 500 launches, which take long."""
    folders = [folder for folder in FOLDERS if (place.suite / "tests" / folder).is_dir()]
    assert folders
    report = place.home / "report.xml"
    command = [
        "-m",
        "pytest",
        "-k",
        "not (500_times or cooperative or nothing_enforces)",
        "-p",
        "no:cacheprovider",
        "--maxfail=3",
        f"--junitxml={report}",
    ]
    command += [f"--basetemp={place.home / 'pytest'}", *(f"tests/{folder}" for folder in folders)]
    try:
        done = place.run(*command, seconds=SECONDS)
    except TimeoutExpired as error:
        pytest.fail(f"not done after {SECONDS} s:\n{closing(error.stdout)}", pytrace=False)
    if done.returncode:
        pytest.fail(
            f"as {place.person.name}, pytest gave {done.returncode}:\n{closing(done.stdout)}", pytrace=False
        )

    cases = list(ElementTree.parse(report).iter("testcase"))
    assert [case.get("name") for case in cases if case.find("skipped") is not None] == []
    for folder in folders:
        ran = [case for case in cases if str(case.get("classname")).startswith(f"tests.{folder}.")]
        assert len(ran) >= FEWEST, f"{folder}: {len(ran)} tests ran"
    with capsys.disabled():
        print(f"\n{place.person.name}, {', '.join(folders)}: {closing(done.stdout, 1)}")


def closing(output: str | bytes | None, lines: int = LINES) -> str:
    """The last lines of a run's output."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def test_without_an_interpreter_it_fails_and_says_why(
    find_interpreter: Any, person: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A suite that finds nothing it can run must not look as if it had passed."""
    monkeypatch.setitem(find_interpreter.__globals__, "candidates", lambda: [tmp_path / "python3"])
    both = (pytest.fail.Exception, pytest.skip.Exception)
    with pytest.raises(both, match="can run, so nothing was shown") as caught:
        find_interpreter(person)
    assert caught.type is pytest.fail.Exception
