"""Which level a runtime has, who may refuse it, and what is the same on all of them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from enturbo import EnclaveImage, EnforcementUnavailable, EnturboError, EPCExhausted, Runtime
from enturbo.runtime import enforcement, landlock, seccomp
from enturbo.shm import uffd
from enturbo.shm.layout import PAGE_SIZE

WAIT = float(os.environ.get("ENTURBO_TEST_WAIT", "30"))  # seconds; a bound, never a measure
Function = Callable[..., EnclaveImage]
Probe = Callable[..., int]


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an ordinary user finds."""
    probe: Probe = uffd.probe
    monkeypatch.setattr(
        uffd, "probe", lambda *, user_mode_only: user_mode_only and probe(user_mode_only=True)
    )


MISSING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "Landlock": lambda patch: patch.setattr(landlock, "abi", lambda: 0),
    "seccomp": lambda patch: patch.setattr(seccomp, "probe", lambda: False),
    "userfaultfd": lambda patch: patch.setattr(uffd, "probe", lambda *, user_mode_only: 0),
    "minor faults": lambda patch: patch.setattr(
        uffd, "probe", lambda *, user_mode_only: uffd.FEATURE_WP_SHMEM
    ),
    "x86-64": lambda patch: patch.setattr("platform.machine", lambda: "riscv64"),
}


def test_here_the_kernel_enforces() -> None:
    found = enforcement.probe()
    assert found.by_kernel
    assert found.level == ("kernel" if uffd.probe(user_mode_only=False) else "kernel-user")


@pytest.mark.parametrize("part", list(MISSING))
def test_a_missing_part_lowers_the_level(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning, or not at all where that was asked for."""
    MISSING[part](monkeypatch)
    with caplog.at_level(logging.WARNING, "enturbo"):
        assert enforcement.choose("auto", required=False).level == "cooperative"
    assert "not enforced" in caplog.text
    assert part in caplog.text
    for wanted, required in (("auto", True), ("kernel", False), ("cooperative", True)):
        with pytest.raises(EnforcementUnavailable) as caught:
            enforcement.choose(wanted, required=required)
        assert caught.value.level == "cooperative"


def test_a_runtime_refuses_to_run_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    MISSING["Landlock"](monkeypatch)
    with pytest.raises(EnforcementUnavailable, match="Landlock"):
        Runtime(epc="1MiB", workers=0, require_enforcement=True)


@pytest.mark.parametrize("options", [{"enforcement": "hardware"}, {"wrlock": "later"}])
def test_odd_options(options: dict[str, str]) -> None:
    with pytest.raises(EnturboError, match="expected one of"):
        Runtime(epc="1MiB", workers=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["kernel", "kernel-user", "cooperative"])
def test_an_enclave_tells_its_level(function: Function, level: str, request: pytest.FixtureRequest) -> None:
    """And what a handler does with its memory by system calls works on each."""
    if level == "kernel-user":
        request.getfixturevalue("unprivileged")
    elif level == "kernel" and not uffd.probe(user_mode_only=False):
        level = "kernel-user"  # all that this user can have
    image = function(
        "import os\n"
        "def handler(event, context):\n"
        "    os.write(1, context.view('handler.py'))\n"
        "    fd = os.memfd_create('x')\n"
        "    os.write(fd, b'\\7' * 100000)\n"
        "    os.lseek(fd, 0, 0)\n"
        "    read = os.readv(fd, [context.data.view()])\n"
        "    return read, bytes(context.data.read(0, 2)), context.heap.read(0, 1)\n",
        data=bytes(100_000),
    )
    wanted = "cooperative" if level == "cooperative" else "kernel"
    for wrlock in ("wait", "shadow"):
        options: dict[str, Any] = {"enforcement": wanted, "wrlock": wrlock}
        with (
            Runtime(epc="8MiB", workers=1, **options) as runtime,
            runtime.launch(image, expected=image.measure()) as enclave,
        ):
            assert enclave.enforcement == level
            assert enclave.call(None, timeout=WAIT) == [100_000, b"\7\7", b"\0"]


@pytest.fixture
def shadowing() -> Iterator[Runtime]:
    with Runtime(epc=200 * PAGE_SIZE, workers=0, wrlock="shadow") as runtime:
        yield runtime


def test_private_copies_count_against_the_epc(shadowing: Runtime, function: Function) -> None:
    """A page is reserved for each that may be copied, and given back with the rest."""
    image = function("def handler(event, context):\n    return 1\n", data=70 * PAGE_SIZE, heap=PAGE_SIZE)
    others = image.epc_pages - 70
    with shadowing.launch(image, expected=image.measure()) as enclave:
        assert shadowing.stats()["epc_pages_free"] == 200 - others - 2 * 70
        with pytest.raises(EPCExhausted):
            shadowing.launch(image, expected=image.measure())
        assert enclave.call(None, timeout=WAIT) == 1
    assert shadowing.stats()["epc_pages_free"] == 200


def test_private_copies_are_counted(shadowing: Runtime, function: Function) -> None:
    image = function(
        "def handler(event, context):\n"
        "    for page in event:\n"
        "        context.data.write(page * 4096, b'x')\n"
        "    context.heap.write(0, b'x')\n",
        data=bytes(range(1, 11)) * (7 * PAGE_SIZE),
    )
    with shadowing.launch(image, expected=image.measure()) as enclave:
        enclave.call([0, 3, 3, 69], timeout=WAIT)
        assert enclave.timeline.shadow_pages == 3
        enclave.call([4], timeout=WAIT)
        assert enclave.timeline.shadow_pages == 4
        # What the segment holds is what was measured, also after the verdict.
        before = sum(region.page_count for region in image.regions if not region.flags & 2)
        content = shadowing.memory.epc.pages(enclave._start.place.first_page + before, 70)
        assert bytes(content) == bytes(range(1, 11)) * (7 * PAGE_SIZE)


def test_sqlite_makes_its_temporary_files_in_the_scratch_folder(function: Function) -> None:
    """Once VERIFIED; it reads TMPDIR when it is loaded, which is before there is such a folder."""
    image = function(
        "import sqlite3\n"
        "def handler(event, context):\n"
        "    base = sqlite3.connect('')\n"
        "    base.execute('pragma temp_store = 1')\n"
        "    base.execute('pragma cache_size = 5')\n"
        "    base.execute('create temp table t (a)')\n"
        "    base.executemany('insert into t values (?)', ((bytes(900),) for _ in range(2000)))\n"
        "    return base.execute('select count(*) from t').fetchone()[0]\n"
    )
    with Runtime(epc="8MiB", workers=0, require_enforcement=True) as runtime:
        runtime._zygote.modules(WAIT)
        time.sleep(0.5)  # it has preloaded sqlite3 by then
        with runtime.launch(image, expected=image.measure()) as enclave:
            assert enclave.call(None, timeout=WAIT) == 2000
