"""``enturbo measure`` and ``verify``: several metadata blocks, schemes, where the SIGSTRUCT stands."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from enturbo import EnclaveImage, Measurement, Region, SigningKey, Sigstruct
from enturbo.runtime.cli import main
from enturbo.runtime.commands import examine

Enturbo = Callable[..., tuple[int, str, str]]
Blocks = Callable[..., Path]


@pytest.fixture
def enturbo(capsys: pytest.CaptureFixture[str]) -> Enturbo:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def image(content: bytes, version: str, sigstruct: Sigstruct | None, *variants: EnclaveImage) -> EnclaveImage:
    return EnclaveImage(
        [Region(0, 3, 0x205, content)],
        size=1 << 14,
        sigstructs=[] if sigstruct is None else [sigstruct],
        details={"metadata_version": version},
        variants=variants,
    )


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blocks:
    """A file whose metadata blocks describe images with these contents, each with its own SIGSTRUCT."""

    def make(contents: Sequence[bytes], sigstructs: Sequence[Sigstruct | None]) -> Path:
        path = tmp_path / "several.enclave"
        image(b"", "0", None).save(path)

        def load(path: Path, edmm: bool = False) -> EnclaveImage:
            versions = ("2.4", "2.1", "1.4", "1.3")
            first, *rest = (
                image(content, version, sigstruct)
                for content, version, sigstruct in zip(contents, versions, sigstructs, strict=False)
            )
            return image(contents[0], "2.4", next(iter(first.sigstructs), None), *rest)

        monkeypatch.setattr(examine, "load_image", load)
        return path

    return make


def value(content: bytes) -> bytes:
    return image(content, "", None).measure("sgx").digest


@pytest.fixture
def signed(key: SigningKey) -> Callable[[bytes], Sigstruct]:
    def sign(content: bytes) -> Sigstruct:
        return key.sign(Measurement(value(content), "sgx"), svn=4)

    return sign


def test_blocks_that_agree(blocks: Blocks, signed: Callable[[bytes], Sigstruct], enturbo: Enturbo) -> None:
    path = blocks([b"same"] * 3, [signed(b"same")] * 3)
    code, out, err = enturbo("measure", path)
    assert (code, err) == (0, "")
    assert "2.4, 2.1, 1.4: one value" in out
    code, out, _ = enturbo("measure", path, "--json")
    (row,) = json.loads(out)
    assert (code, row["scheme"], row["mrenclave"]) == (0, "sgx", value(b"same").hex())
    assert [each["metadata_version"] for each in row["variants"]] == ["2.4", "2.1", "1.4"]
    assert all(each["match"] and each["signature_valid"] for each in row["variants"])
    assert enturbo("verify", path)[0] == 0


def test_blocks_that_measure_differently(
    blocks: Blocks, signed: Callable[[bytes], Sigstruct], enturbo: Enturbo
) -> None:
    """Even if each is what its own SIGSTRUCT says: which one runs depends on the loader."""
    path = blocks([b"one", b"one", b"two"], [signed(b"one"), signed(b"one"), signed(b"two")])
    for command in ("measure", "verify"):
        code, out, err = enturbo(command, path)
        assert code == 1
        (line,) = err.splitlines()
        for text in (f"{value(b'one').hex()} (2.4, 2.1)", f"{value(b'two').hex()} (1.4)"):
            assert text in line
            assert text in out
    code, out, _ = enturbo("measure", path, "--json")
    (row,) = json.loads(out)
    assert (code, [each["match"] for each in row["variants"]]) == (1, [True] * 3)
    # Unsigned, nothing else would be wrong.
    assert enturbo("measure", blocks([b"one", b"two"], [None, None]))[0] == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_block_is_checked(
    blocks: Blocks, signed: Callable[[bytes], Sigstruct], enturbo: Enturbo, place: int
) -> None:
    wrong = [signed(b"same")] * 3
    wrong[place] = signed(b"other")
    path = blocks([b"same"] * 3, wrong)
    code, out, _ = enturbo("measure", path, "--json")
    (row,) = json.loads(out)
    assert (code, row["match"], row["signature_valid"]) == (1, False, True)
    code, _, err = enturbo("verify", path)
    assert (code, "not what was signed" in err) == (1, True)
    wrong[place] = replace(signed(b"same"), svn=9)  # changed after signing
    path = blocks([b"same"] * 3, wrong)
    code, out, _ = enturbo("measure", path, "--json")
    (row,) = json.loads(out)
    assert (code, row["match"], row["signature_valid"]) == (1, True, False)
    code, _, err = enturbo("verify", path)
    assert (code, "signature does not hold" in err) == (1, True)


def test_each_file_is_one_step(
    blocks: Blocks, signed: Callable[[bytes], Sigstruct], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = blocks([b"same"] * 3, [signed(b"same")] * 3)
    steps: list[int] = []
    found = examine.examine_all([path, path], wanted=("enturbo", 4, 4), step=lambda: steps.append(1))
    assert (len(found), len(steps)) == (2, 2)


def test_given_sigstruct_is_for_all_blocks(
    blocks: Blocks, signed: Callable[[bytes], Sigstruct], tmp_path: Path, enturbo: Enturbo
) -> None:
    given = tmp_path / "given.sig"
    given.write_bytes(signed(b"same").encode())
    path = blocks([b"same"] * 2, [signed(b"other"), None])
    assert enturbo("measure", path)[0] == 1
    assert enturbo("measure", path, "--sigstruct", given)[0] == 0


# ----------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    ("field", "failing"),
    [("signature", "signature"), ("q1", "Q1"), ("q2", "Q2"), ("enclavehash", "signature")],
)
def test_verify_tells_what_does_not_hold(
    key: SigningKey,
    make_image: Callable[..., EnclaveImage],
    tmp_path: Path,
    enturbo: Enturbo,
    field: str,
    failing: str,
) -> None:
    path = tmp_path / "i.enclave"
    made = make_image(4)
    made.save(path)
    sigstruct = key.sign(made)
    bad = getattr(sigstruct, field)
    sigstruct = replace(sigstruct, **{field: bad[:20] + bytes([bad[20] ^ 1]) + bad[21:]})
    path.with_name("i.enclave.sig").write_bytes(sigstruct.encode())
    code, out, err = enturbo("verify", path, "--signer", key.mrsigner.hex())
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")}
    assert code == 1
    assert len(err.splitlines()) == 1
    assert lines[failing] == "DOES NOT HOLD"
    assert lines["ENCLAVEHASH"] == ("matches" if field != "enclavehash" else "DOES NOT MATCH")
    assert (lines["signer"], lines["verdict"]) == ("trusted", "REFUSED")
    _, out, _ = enturbo("verify", path, "--json")
    checks = json.loads(out)["checks"]
    assert checks[failing.lower()] is False


def test_verify_tells_that_all_holds(
    key: SigningKey, make_image: Callable[..., EnclaveImage], tmp_path: Path, enturbo: Enturbo
) -> None:
    path = tmp_path / "i.enclave"
    made = make_image(4)
    made.save(path)
    path.with_name("i.enclave.sig").write_bytes(key.sign(made, "sgx").encode())
    code, out, _ = enturbo("verify", path, "--signer", key.mrsigner.hex(), "--json")
    found = json.loads(out)
    assert (code, found["verified"], found["signer_trusted"]) == (0, True, True)
    assert found["checks"] == {"signature": True, "q1": True, "q2": True, "enclavehash": True}
    code, out, _ = enturbo("verify", path, "--signer", "00" * 32)
    assert (code, "NOT TRUSTED" in out, out.count("holds")) == (1, True, 3)


# ---------------------------------------------------------------------------------------------- other formats


def stream() -> bytes:
    """A page of code and one that is not measured, as an SGXS stream."""
    records = struct.pack("<8sIQ44x", b"ECREATE", 1, 1 << 16) + struct.pack("<8sQQ40x", b"EADD", 0, 0x205)
    for chunk in range(16):
        records += struct.pack("<8sQ48x", b"EEXTEND", chunk * 256) + bytes(range(256))
    return records + struct.pack("<8sQQ40x", b"EADD", 0x1000, 0x203)


def test_other_tools_files_are_measured_as_the_hardware_does(
    tmp_path: Path, key: SigningKey, enturbo: Enturbo
) -> None:
    path = tmp_path / "e.sgxs"
    path.write_bytes(stream())
    digest = hashlib.sha256(stream()).hexdigest()
    code, out, _ = enturbo("measure", path, "--json")
    (row,) = json.loads(out)
    assert (code, row["format"], row["scheme"], row["mrenclave"]) == (0, "sgxs", "sgx", digest)
    assert (row["signed"], row["match"]) == (False, None)
    _, out, _ = enturbo("measure", path, "--json", "--scheme", "enturbo")
    assert json.loads(out)[0]["scheme"] == "enturbo"
    # A SIGSTRUCT of scheme enturbo is obeyed.
    with EnclaveImage.load(path) as loaded:
        (tmp_path / "e.sgxs.sig").write_bytes(key.sign(loaded).encode())
    _, out, _ = enturbo("measure", path, "--json")
    assert (json.loads(out)[0]["scheme"], json.loads(out)[0]["match"]) == ("enturbo", True)


def test_the_sigstruct_beside_a_stream(tmp_path: Path, key: SigningKey, enturbo: Enturbo) -> None:
    """Fortanix's tools write NAME.sig beside NAME.sgxs; FILE.sig goes before it."""
    path = tmp_path / "e.sgxs"
    path.write_bytes(stream())
    right = key.sign(Measurement(hashlib.sha256(stream()).digest(), "sgx"))
    (tmp_path / "e.sig").write_bytes(right.encode())
    assert enturbo("verify", path)[0] == 0
    (tmp_path / "e.sgxs.sig").write_bytes(key.sign(Measurement(bytes(32), "sgx")).encode())
    assert enturbo("verify", path)[0] == 1


def test_a_sigstruct_is_not_measured(tmp_path: Path, key: SigningKey, enturbo: Enturbo) -> None:
    path = tmp_path / "e.sig"
    path.write_bytes(key.sign(Measurement(bytes(32), "sgx")).encode())
    code, out, err = enturbo("measure", path)
    assert (code, out) == (2, "")
    assert "SIGSTRUCT" in err
