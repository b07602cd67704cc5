"""The command line on real files: round trips, wrong input, exit codes, and what goes to stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from enturbo import EnclaveImage, SigningKey, __version__
from enturbo.runtime import enforcement, landlock
from enturbo.runtime.cli import main
from enturbo.runtime.commands import measuring
from enturbo.runtime.commands.examine import OPEN_FILES
from enturbo.workers import crew
from enturbo.workers.chains import ImageChain, advance
from enturbo.workers.hash_numpy import NumpyHasher
from enturbo.workers.sha256 import Hasher

HANDLER = """
import time

def handler(event, context):
    print("printed inside")
    if "fail" in event:
        raise ValueError(event["fail"])
    while "hang" in event:
        time.sleep(1)
    return {"event": event, "raw": b"\\x00\\xff", "nan": float("nan"), 1: [None, True]}
"""
ROW = [
    "file",
    "format",
    "scheme",
    "mrenclave",
    "pages_added",
    "pages_measured",
    "signed",
    "match",
    "signature_valid",
    "mrsigner",
]


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def complains(self, code: int, *facts: str) -> None:
        """It failed with ``code`` and one line that holds ``facts``, and said nothing on stdout."""
        assert self.code == code, self
        assert self.out == ""
        assert "Traceback" not in self.err
        (line,) = self.err.splitlines()
        assert line.startswith("enturbo: ")
        for fact in facts:
            assert fact in line


Enturbo = Callable[..., Ran]


class Files(NamedTuple):
    """An unsigned image, a signed one, and the key."""

    plain: Path
    signed: Path
    key: Path
    mrsigner: str


@pytest.fixture
def enturbo(capsys: pytest.CaptureFixture[str]) -> Enturbo:
    """Run a command line in this process; ``run`` without workers, which take a while to boot."""

    def run(*arguments: object) -> Ran:
        if arguments[0] == "run" and "--workers" not in arguments:
            arguments = (*arguments, "--workers", 0)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, key: SigningKey) -> Files:
    """Made once; tests that change something work on copies."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "function").mkdir()
    (folder / "function" / "handler.py").write_text(HANDLER)
    plain, signed, key_file = folder / "plain.enclave", folder / "signed.enclave", folder / "key.pem"
    image = EnclaveImage.from_function(folder / "function", heap="64KiB")
    image.save(plain)
    image.save(signed)
    key.save(key_file)
    signed.with_name("signed.enclave.sig").write_bytes(key.sign(image).encode())
    return Files(plain, signed, key_file, key.mrsigner.hex())


@pytest.fixture(scope="module")
def foreign() -> SigningKey:
    """Another key."""
    return SigningKey.generate()


# ------------------------------------------------------------------------------------------------ round trips


def test_from_a_folder_to_a_result(tmp_path: Path, enturbo: Enturbo) -> None:
    folder, image, key = tmp_path / "function", tmp_path / "f.enclave", tmp_path / "k.pem"
    folder.mkdir()
    (folder / "handler.py").write_text("def handler(event, context):\n    return event['a'] + 1\n")
    built = enturbo("build", folder, "-o", image, "--heap", "1MiB", "--json")
    assert (built.code, built.json["handler"]) == (0, "handler:handler")
    mrsigner = enturbo("keygen", "-o", key).out.strip()
    assert mrsigner == SigningKey.load(key).mrsigner.hex()
    signed = enturbo("sign", image, "--key", key, "--svn", 3, "--product-id", 7, "--json")
    assert (signed.code, signed.json["mrsigner"]) == (0, mrsigner)
    (row,) = enturbo("measure", "--json", image).json
    assert row == {
        "file": str(image),
        "format": "enclave",
        "scheme": "enturbo",
        "mrenclave": signed.json["mrenclave"],
        "pages_added": built.json["pages_added"],
        "pages_measured": built.json["pages_measured"],
        "signed": True,
        "match": True,
        "signature_valid": True,
        "mrsigner": mrsigner,
    }
    verified = enturbo("verify", image, "--signer", mrsigner, "--min-svn", 3, "--product-id", 7)
    assert verified.code == 0
    assert "VERIFIED" in verified.out
    ran = enturbo("run", image, "--signer", mrsigner, "--event", '{"a": 41}', "--workers", 1)
    assert ran == Ran(0, "42\n", "")


@pytest.mark.parametrize("edmm", [False, True])
@pytest.mark.parametrize(
    ("scheme", "startup"), [("sgx", "serial"), ("sgx", "enturbo"), ("enturbo", "serial")]
)
def test_any_startup_with_any_scheme(
    made: Files, tmp_path: Path, enturbo: Enturbo, scheme: str, startup: str, edmm: bool
) -> None:
    form = ["--edmm"] if edmm else []
    sigstruct = tmp_path / "s.sig"
    signed = enturbo(
        "sign", made.plain, "--key", made.key, "--scheme", scheme, "-o", sigstruct, "--json", *form
    )
    image = EnclaveImage.load(made.plain)
    expected = (image.as_edmm() if edmm else image).measure(scheme).digest.hex()
    image.close()
    assert signed.json["mrenclave"] == expected
    ran = enturbo(
        "run",
        made.plain,
        "--sigstruct",
        sigstruct,
        "--any-signer",
        "--startup",
        startup,
        "--workers",
        1,
        *form,
    )
    assert ran.code == 0
    assert ran.json["event"] == {}


def test_measure_tells_all_files_in_order(made: Files, enturbo: Enturbo) -> None:
    ran = enturbo("measure", "--json", made.signed, made.plain, made.signed)
    assert ran.code == 0
    assert [row["file"] for row in ran.json] == [str(made.signed), str(made.plain), str(made.signed)]
    assert all(list(row) == ROW for row in ran.json)
    plain = ran.json[1]
    assert (plain["signed"], plain["match"], plain["signature_valid"], plain["mrsigner"]) == (
        False,
        None,
        None,
        None,
    )
    assert plain["mrenclave"] == ran.json[0]["mrenclave"]


def test_measure_with_another_scheme_still_checks_the_signed_one(made: Files, enturbo: Enturbo) -> None:
    (row,) = enturbo("measure", "--json", "--scheme", "sgx", made.signed).json
    (other,) = enturbo("measure", "--json", made.signed).json
    assert (row["scheme"], row["match"]) == ("sgx", True)
    assert row["mrenclave"] != other["mrenclave"]


def test_measure_takes_many_files(
    make_image: Callable[..., EnclaveImage], key: SigningKey, tmp_path: Path, enturbo: Enturbo
) -> None:
    """Each row is about its file, whatever the sizes, schemes and signatures of the others."""
    wanted = []
    for number, (pages, heap) in enumerate([(900, 0), (3, 70_000), (0, 5), (600, 600), (40, 0)]):
        image = make_image(pages, heap=heap, seed=number)
        path = tmp_path / f"{number}.enclave"
        image.save(path)
        scheme = "enturbo"
        if number % 2 == 0:
            scheme = "sgx"
            sigstruct = key.sign(image, scheme)
            path.with_name(path.name + ".sig").write_bytes(sigstruct.encode())
        digest = image.measure(scheme, hasher="reference").digest.hex()
        wanted.append((str(path), scheme, digest, pages + heap, pages, True if scheme == "sgx" else None))
    paths = [row[0] for row in wanted]
    ran = enturbo("measure", "--json", *paths)
    assert ran.code == 0
    names = ("file", "scheme", "mrenclave", "pages_added", "pages_measured", "match")
    assert [tuple(row[name] for name in names) for row in ran.json] == wanted
    for scheme in ("sgx", "enturbo"):
        rows = enturbo("measure", "--json", "--scheme", scheme, *paths).json
        # The signed value is compared whatever is shown.
        assert [row["match"] for row in rows] == [row[-1] for row in wanted]
        assert [row["scheme"] for row in rows] == [scheme] * 5
    text = enturbo("measure", *paths).out
    places = [text.index(part) for row in wanted for part in (row[0], row[2])]
    assert places == sorted(places)


def test_measure_pairs_files_of_scheme_sgx(
    made: Files, enturbo: Enturbo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images too small for threads, and a hasher that says it has two lanes."""
    lanes = []

    def noted(hasher: Hasher, chains: Sequence[ImageChain], size: float) -> None:
        lanes.append(len(chains))
        advance(hasher, chains, size)

    class TwoLanes(NumpyHasher):
        lanes = 2

    monkeypatch.setattr(crew, "advance", noted)
    monkeypatch.setattr(crew, "get_hasher", lambda name: TwoLanes())
    one = enturbo("measure", "--json", "--scheme", "sgx", made.plain)
    assert set(lanes) == {1}
    lanes.clear()
    two = enturbo("measure", "--json", "--scheme", "sgx", made.plain, made.plain)
    assert set(lanes) == {2}
    assert two.json == one.json * 2


def test_measure_keeps_few_files_open(made: Files, enturbo: Enturbo) -> None:
    """More files than a process may have descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 2 * OPEN_FILES + 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        ran = enturbo("measure", "--json", *[made.plain] * (3 * OPEN_FILES + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ran.code == 0
    assert ran.json == [ran.json[0]] * (3 * OPEN_FILES + 1)


def test_measure_makes_a_step_a_file(
    made: Files, tmp_path: Path, enturbo: Enturbo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a file that cannot be read, and for one that is measured by two schemes."""
    steps = []

    @contextlib.contextmanager
    def counted(title: str, total: int) -> Iterator[Callable[[], None]]:
        steps.append(total)
        yield lambda: steps.append(1)

    monkeypatch.setattr(measuring, "progress", counted)
    files = [made.signed, tmp_path / "missing", made.plain]
    assert enturbo("measure", "--scheme", "sgx", *files).code == 2
    assert steps == [3, 1, 1, 1]


def test_compare_has_the_five_combinations(made: Files, enturbo: Enturbo) -> None:
    ran = enturbo("compare", made.plain, "--key", made.key, "--rounds", 1, "--workers", 1, "--json")
    assert ran.code == 0
    rows = {row["combination"]: row for row in ran.json["rows"]}
    assert list(rows) == ["sgx1", "sgx2", "enturbo1", "enturbo2", "serial*"]
    assert len({row["mrenclave"] for row in rows.values()}) == 4
    assert rows["enturbo1"]["mrenclave"] == rows["serial*"]["mrenclave"]
    assert rows["sgx1"]["speed_up"] == 1
    assert rows["sgx1"]["speed_up_sgx2"] is None
    assert rows["enturbo2"]["speed_up_sgx2"] == pytest.approx(rows["sgx2"]["life"] / rows["enturbo2"]["life"])
    for row in rows.values():
        # Serial: nothing runs before VERIFIED. The life ends with the result, so it is the longest of all.
        assert row["startup"] == "enturbo" or row["verified"] <= row["first_instruction"]
        assert row["life"] >= max(row["first_instruction"], row["verified"])
        assert 0 < row["startup_share"] <= 1


def test_compare_without_a_handler(
    make_image: Callable[..., EnclaveImage], made: Files, tmp_path: Path, enturbo: Enturbo
) -> None:
    path = tmp_path / "plain.enclave"
    make_image(70, heap=8).save(path)
    ran = enturbo("compare", path, "--key", made.key, "--rounds", 1, "--workers", 0, "--json")
    assert ran.code == 0
    for row in ran.json["rows"]:
        assert (row["first_instruction"], row["startup_share"]) == (None, None)
        assert row["life"] == row["verified"] > 0


def test_compare_prints_a_table(made: Files, enturbo: Enturbo) -> None:
    ran = enturbo("compare", made.plain, "--key", made.key, "--rounds", 1, "--workers", 0)
    assert ran.code == 0
    for word in ("sgx1", "sgx2", "enturbo1", "enturbo2", "VERIFIED", "speed-up", "1.00 x"):
        assert word in ran.out


# -------------------------------------------------------------------------------------------------------- run


def test_run_prints_json_and_nothing_else(made: Files, enturbo: Enturbo) -> None:
    ran = enturbo(
        "run", made.signed, "--signer", made.mrsigner, "--event", '{"x": [1.5, "é"]}', "--workers", 2
    )
    assert ran.code == 0
    assert ran.json == {"event": {"x": [1.5, "é"]}, "raw": "AP8=", "nan": None, "1": [None, True]}
    assert ran.err == "printed inside\n"


def test_run_takes_a_key_file_as_signer(made: Files, enturbo: Enturbo) -> None:
    assert enturbo("run", made.signed, "--signer", made.key).code == 0


def test_run_reads_the_event_from_a_file(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    event = tmp_path / "event.json"
    event.write_text('{"from": "a file"}', encoding="utf-8")
    ran = enturbo("run", made.signed, "--any-signer", "--event", f"@{event}")
    assert ran.json["event"] == {"from": "a file"}


def test_run_reads_the_event_from_stdin(
    made: Files, enturbo: Enturbo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"from": "stdin"}'))
    ran = enturbo("run", made.signed, "--any-signer", "--event", "-")
    assert ran.json["event"] == {"from": "stdin"}


def test_run_unsigned_when_told_so(made: Files, enturbo: Enturbo) -> None:
    assert enturbo("run", made.plain, "--allow-unsigned").code == 0


@pytest.mark.parametrize("startup", ["serial", "enturbo"])
def test_run_writes_a_trace(made: Files, tmp_path: Path, enturbo: Enturbo, startup: str) -> None:
    trace = tmp_path / "t.json"
    arguments = ("--any-signer", "--startup", startup, "--workers", 2, "--trace", trace)
    assert enturbo("run", made.signed, *arguments).code == 0
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    spans = {event["name"] for event in events if event["ph"] == "X"}
    assert {"copy", "measure", "merge", "verify", "execute"} <= spans
    measured = [event["args"]["pages"] for event in events if event["name"] == "measure" and "dur" in event]
    with EnclaveImage.load(made.signed) as image:
        assert sum(measured) == image.page_count
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")


def test_run_writes_a_trace_of_a_refused_start_too(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    trace = tmp_path / "t.json"
    changed = _changed(made, tmp_path)
    ran = enturbo("run", changed, "--any-signer", "--trace", trace)
    ran.complains(1, "MRENCLAVE expected")
    names = {event["name"] for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]}
    assert "copy" in names
    assert not names & {"execute", "first_instruction"}  # nothing of what it did was released


REACHING = """
import socket
def handler(event, context):
    found = []
    for path, port in event:
        try:
            if port:
                with socket.create_connection(("127.0.0.1", port), 5) as peer:
                    peer.sendall(b"hello")
            else:
                with open(path, "a") as file:
                    file.write("hello")
            found.append("done")
        except OSError as error:
            found.append(type(error).__name__)
    return found
"""


def test_run_lets_a_handler_reach_what_it_is_told_and_no_more(tmp_path: Path, enturbo: Enturbo) -> None:
    folder, image = tmp_path / "function", tmp_path / "reaching.enclave"
    folder.mkdir()
    (folder / "handler.py").write_text(REACHING)
    (tmp_path / "out").mkdir()
    assert enturbo("build", folder, "-o", image).code == 0
    inside, beside = tmp_path / "out" / "file", tmp_path / "file"
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (allowed, other)]
        event = json.dumps([[str(inside), 0], [str(beside), 0], ["", ports[0]], ["", ports[1]]])
        arguments = ("run", image, "--allow-unsigned", "--require-enforcement", "--event", event)
        assert enturbo(*arguments).json == ["PermissionError"] * 4
        granted = ("--write", inside.parent, "--connect", f"127.0.0.1:{ports[0]}", "--wrlock", "shadow")
        assert enturbo(*arguments, *granted).json == ["done", "PermissionError", "done", "PermissionError"]
        with allowed.accept()[0] as peer:
            assert peer.recv(10) == b"hello"
    assert inside.read_text() == "hello"
    assert not beside.exists()


def test_run_with_a_policy_that_is_none(made: Files, enturbo: Enturbo) -> None:
    enturbo("run", made.signed, "--any-signer", "--connect", "nowhere").complains(2, "policy: connect")
    enturbo("run", made.signed, "--any-signer", "--write", "/no/such/folder").complains(2, "policy: write")


def test_a_handler_that_raises(made: Files, enturbo: Enturbo) -> None:
    arguments = ("run", made.signed, "--any-signer", "--event", '{"fail": "no such luck"}')
    ran = enturbo(*arguments)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "enturbo: the handler failed (raise): ValueError: no such luck",
        "printed inside",
    ]
    assert "/enclave/handler.py" in enturbo(*arguments, "--verbose").err


def test_a_handler_that_hangs(made: Files, enturbo: Enturbo) -> None:
    ran = enturbo("run", made.signed, "--any-signer", "--event", '{"hang": 1}', "--timeout", 0.3)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("enturbo: the handler failed (timeout)")


def test_a_trace_that_cannot_be_written(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    trace = tmp_path / "no" / "t.json"
    enturbo("run", made.signed, "--any-signer", "--trace", trace).complains(2, str(trace), "No such file")


def test_ctrl_c_ends_it_cleanly(made: Files) -> None:
    command = [sys.executable, "-m", "enturbo.runtime.cli", "run", str(made.signed), "--any-signer", "-v"]
    with subprocess.Popen(
        [*command, "--event", '{"hang": 1}'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # logged when it is VERIFIED: it runs
        assert first.startswith("enturbo: launch 1")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------------ trust


def _changed(made: Files, folder: Path) -> Path:
    """Another image beside the SIGSTRUCT of the signed one."""
    function = folder / "changed"
    function.mkdir()
    (function / "handler.py").write_text(HANDLER + "# changed\n")
    path = folder / "changed.enclave"
    with EnclaveImage.from_function(function, heap="64KiB") as image:
        image.save(path)
    (folder / "changed.enclave.sig").write_bytes(made.signed.with_name("signed.enclave.sig").read_bytes())
    return path


def test_a_mismatch(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    changed = _changed(made, tmp_path)
    ran = enturbo("measure", "--json", made.signed, changed)
    assert ran.code == 1
    assert [(row["match"], row["signature_valid"]) for row in ran.json] == [(True, True), (False, True)]
    verified = enturbo("verify", changed)
    assert verified.code == 1
    assert "not what was signed" in verified.err
    enturbo("run", changed, "--signer", made.mrsigner).complains(1, "MRENCLAVE expected", "measured")


def test_a_bad_signature(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    bad = bytearray(made.signed.with_name("signed.enclave.sig").read_bytes())
    bad[516] ^= 1
    sigstruct = tmp_path / "bad.sig"
    sigstruct.write_bytes(bad)
    ran = enturbo("measure", "--json", made.plain, "--sigstruct", sigstruct)
    (row,) = ran.json
    assert (ran.code, row["signed"], row["match"], row["signature_valid"]) == (1, True, True, False)
    assert enturbo("verify", made.plain, "--sigstruct", sigstruct).code == 1
    enturbo("run", made.plain, "--sigstruct", sigstruct, "--any-signer").complains(1)


def test_a_foreign_signer(made: Files, foreign: SigningKey, enturbo: Enturbo) -> None:
    other = foreign.mrsigner.hex()
    ran = enturbo("verify", made.signed, "--signer", other, "--json")
    assert (ran.code, ran.json["verified"], ran.json["signer_trusted"]) == (1, False, False)
    enturbo("run", made.signed, "--signer", other).complains(1, made.mrsigner, "not trusted")


@pytest.mark.parametrize(("option", "fact"), [("--min-svn", "svn"), ("--product-id", "product id")])
def test_version_and_product(made: Files, enturbo: Enturbo, option: str, fact: str) -> None:
    assert enturbo("verify", made.signed, option, 9).code == 1
    enturbo("run", made.signed, "--any-signer", option, 9).complains(1, fact)


def test_nobody_is_trusted_by_default(made: Files, enturbo: Enturbo) -> None:
    enturbo("run", made.signed).complains(1, "--any-signer", made.mrsigner)
    enturbo("run", made.plain).complains(1, "unsigned", "--allow-unsigned")
    enturbo("run", made.plain, "--any-signer").complains(1, "unsigned")
    enturbo("verify", made.plain).complains(1, "unsigned")


# ------------------------------------------------------------------------------------------------ wrong input


def test_files_that_cannot_be_read(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    truncated, other = tmp_path / "truncated.enclave", tmp_path / "other.enclave"
    truncated.write_bytes(made.plain.read_bytes()[:-4096])
    other.write_text("not an image at all")
    missing = tmp_path / "missing.enclave"
    for path, fact in (
        (truncated, "expected"),
        (other, "format"),
        (missing, "No such file"),
        (tmp_path, "file"),
    ):
        for command in (
            ["measure"],
            ["verify"],
            ["run", "--any-signer"],
            ["sign", "--key", made.key],
            ["compare", "--key", made.key],
        ):
            enturbo(*command, path).complains(2, str(path), fact)
    ran = enturbo("measure", "--json", missing, made.plain, truncated)
    assert ran.code == 2
    assert [row["file"] for row in ran.json] == [str(made.plain)]
    assert len(ran.err.splitlines()) == 2


def test_sigstructs_that_cannot_be_read(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    short = tmp_path / "short.sig"
    short.write_bytes(made.signed.with_name("signed.enclave.sig").read_bytes()[:-1])
    for path, fact in ((short, "1808"), (tmp_path / "missing.sig", "No such file")):
        for command in (["measure"], ["verify"], ["run", "--any-signer"]):
            enturbo(*command, made.plain, "--sigstruct", path).complains(2, str(path), fact)
    enturbo("measure", made.plain, made.signed, "--sigstruct", short).complains(2, "one file")


@pytest.mark.parametrize(
    ("event", "fact"),
    [
        ("{", "line 1"),
        ("NaN", "NaN"),
        ("[" * 100_000, "not JSON"),
        ("@/nonexistent/event.json", "No such file"),
        (str(1 << 70), "event"),
    ],
)
def test_events_that_are_none(made: Files, enturbo: Enturbo, event: str, fact: str) -> None:
    enturbo("run", made.signed, "--any-signer", "--event", event).complains(2, "event", fact)


@pytest.mark.parametrize(
    ("arguments", "code", "fact"),
    [
        (["--signer", "abc"], 2, "64 hexadecimal digits"),
        (["--any-signer", "--epc", "many"], 2, "not a size"),
        (["--any-signer", "--epc", "4096"], 1, "EPC exhausted"),
    ],
)
def test_options_that_do_not_fit(
    made: Files, enturbo: Enturbo, arguments: list[str], code: int, fact: str
) -> None:
    enturbo("run", made.signed, *arguments).complains(code, fact)


def test_an_image_without_a_handler(
    make_image: Callable[..., EnclaveImage], tmp_path: Path, enturbo: Enturbo
) -> None:
    path = tmp_path / "plain.enclave"
    make_image(4).save(path)
    enturbo("run", path, "--allow-unsigned").complains(2, "no handler")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sign", "--scheme", "md5"],
        ["sign", "--domains", "x"],
        ["sign", "--svn", "70000"],
        ["run", "--startup", "eager"],
        ["measure", "--no-such-option"],
        ["no-such-command"],
    ],
)
def test_usage_errors(made: Files, enturbo: Enturbo, arguments: list[str]) -> None:
    more = ["--key", made.key] if arguments[0] == "sign" else []
    ran = enturbo(*arguments, made.plain, *more)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err


def test_schemes_that_cannot_be_signed(made: Files, tmp_path: Path, enturbo: Enturbo) -> None:
    output = tmp_path / "s.sig"
    for option, value in (("--domains", 3), ("--domains", 64), ("--block", 2048)):
        ran = enturbo("sign", made.plain, "--key", made.key, option, value, "-o", output)
        ran.complains(2, "power of two", str(value))
        for files in ([made.plain, made.signed], [tmp_path / "missing"]):  # before any file is read
            ran = enturbo("measure", "--json", *files, "--scheme", "enturbo", option, value)
            ran.complains(2, "power of two", str(value))
    assert not output.exists()


def test_keys(
    made: Files, tmp_path: Path, enturbo: Enturbo, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SigningKey, "generate", lambda: key)  # a new one takes a while to find
    path = tmp_path / "k.pem"
    assert enturbo("keygen", "-o", path).code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    enturbo("keygen", "-o", path).complains(2, str(path))
    assert path.read_bytes() == before
    link = tmp_path / "link.pem"
    link.symlink_to(tmp_path / "elsewhere.pem")
    enturbo("keygen", "-o", link).complains(2, str(link))
    assert not (tmp_path / "elsewhere.pem").exists()
    other = tmp_path / "other.pem"
    other.write_text("no key")
    enturbo("sign", made.plain, "--key", other).complains(2, str(other))
    enturbo("sign", made.plain, "--key", tmp_path / "missing.pem").complains(2, "missing.pem", "No such file")


def test_build_refuses_what_is_no_function(tmp_path: Path, enturbo: Enturbo) -> None:
    output = tmp_path / "f.enclave"
    (tmp_path / "empty").mkdir()
    enturbo("build", tmp_path / "missing", "-o", output).complains(2, "missing")
    enturbo("build", tmp_path / "empty", "-o", output).complains(2, "handler")
    (tmp_path / "empty" / "handler.py").write_text("handler = None\n")
    enturbo("build", tmp_path / "empty", "-o", tmp_path / "no" / "f.enclave").complains(2, "No such file")
    enturbo("build", tmp_path / "empty", "-o", output, "--heap", "some").complains(2, "not a size")
    assert not output.exists()


def test_build_takes_data(tmp_path: Path, enturbo: Enturbo) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "handler.py").write_text(
        "def handler(event, context):\n    return bytes(context.data.read(0, 5))\n"
    )
    (tmp_path / "data").write_bytes(b"hello, region")
    image = tmp_path / "f.enclave"
    assert enturbo("build", tmp_path / "f", "-o", image, "--data", f"@{tmp_path / 'data'}").code == 0
    assert enturbo("run", image, "--allow-unsigned").json == "aGVsbG8="


def test_progress_goes_to_a_terminal_on_stderr(made: Files) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "enturbo.runtime.cli", "measure", "--json", str(made.signed)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}
        ) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while data := os.read(ours, 4096):
                    shown += data
            assert process.stdout is not None
            assert [row["match"] for row in json.loads(process.stdout.read())] == [True]
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert b"measuring" in shown


def test_a_reader_that_leaves(made: Files) -> None:
    command = [sys.executable, "-m", "enturbo.runtime.cli", "measure", "--json", str(made.signed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_control_characters_are_not_printed(tmp_path: Path, enturbo: Enturbo) -> None:
    ran = enturbo("measure", tmp_path / "a\x1b[31m.enclave")
    ran.complains(2, "a\\x1b[31m.enclave")


# --------------------------------------------------------------------------------------------------- the rest


def test_version(enturbo: Enturbo) -> None:
    assert enturbo("--version") == Ran(0, f"enturbo {__version__}\n", "")


def test_help_lists_the_commands_and_imports_little() -> None:
    code = (
        "import sys\nfrom enturbo.runtime.cli import main\ncode = main(['--help'])\n"
        "assert code == 0\n"
        "print('HEAVY', sorted({'numpy', 'cryptography', 'xxhash', 'psutil'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for command in ("demo", "build", "keygen", "sign", "measure", "verify", "run", "compare", "doctor"):
        assert command in ran.stdout
    assert "HEAVY []" in ran.stdout


def test_doctor(enturbo: Enturbo) -> None:
    found = enturbo("doctor", "--json").json
    assert found["processors"]["usable"] == len(os.sched_getaffinity(0))
    assert found["hasher"]["chosen"] in found["hasher"]["available"]
    gates = found["gates"]
    assert gates["enforcement"] == enforcement.probe().level
    assert bool(gates["missing_for_more"]) == (gates["enforcement"] != "kernel")
    assert found["memory cost"]["smc_bytes_per_starting_enclave"] == 4096
    assert found["memory cost"]["epcm_bytes_per_page"] == 32
    assert found["shared memory"]["size_bytes"] > 0
    printed = enturbo("doctor")
    assert printed.code == 0
    assert gates["which_means"][:30] in printed.out


def test_doctor_where_nothing_can_be_enforced(enturbo: Enturbo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    gates = enturbo("doctor", "--json").json["gates"]
    assert gates["enforcement"] == "cooperative"
    assert any("Landlock" in each for each in gates["missing_for_more"])
    assert "cooperative here" in enturbo("doctor").out


def test_doctor_with_a_hasher_that_is_none(enturbo: Enturbo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTURBO_HASHER", "md5")
    found = enturbo("doctor", "--json").json
    assert found["hasher"]["chosen"] is None
    assert "md5" in found["hasher"]["problem"]
