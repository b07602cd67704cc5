"""Real enclaves: those of ``table.toml`` that are found in the folder ENTURBO_CORPUS, told by their SHA-256.

    ENTURBO_CORPUS=/path/to/them pytest tests/corpus

Nothing is downloaded. Names and places in the folder do not matter.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enturbo import (
    EnclaveImage,
    EnclaveState,
    NoHandler,
    Region,
    Runtime,
    SignatureError,
    SigningKey,
    Sigstruct,
)
from enturbo.runtime.formats import detect
from enturbo.runtime.inspection import image_facts, signature_checks

CORPUS = os.environ.get("ENTURBO_CORPUS")
TABLE: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "table.toml").read_text())["file"]
needs_corpus = pytest.mark.skipif(CORPUS is None, reason="ENTURBO_CORPUS names no folder of real enclaves")
LARGEST = 64 << 20  # bytes of EPC that a start is tried with
MAX_FILE = 64 << 20


@pytest.fixture(scope="module")
def found() -> dict[str, Path]:
    """The files of the folder by SHA-256."""
    files = [path for path in Path(CORPUS or "").rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        hashlib.sha256(path.read_bytes()).hexdigest(): path
        for path in files
        if path.stat().st_size <= MAX_FILE
    }


def row_id(row: dict[str, Any]) -> str:
    return f"{row['repository']}/{Path(row['path']).name[:40]}"


def file_of(row: dict[str, Any], found: dict[str, Path]) -> Path:
    path = found.get(row["sha256"])
    if path is None:
        pytest.skip(f"not in ENTURBO_CORPUS: {row['path']} of {row['repository']}")
    return path


def sigstruct_of(row: dict[str, Any], image: EnclaveImage, found: dict[str, Path]) -> Sigstruct:
    if "sigstruct" not in row:
        return image.sigstructs[0]
    path = found.get(row["sigstruct"])
    if path is None:
        pytest.skip(f"not in ENTURBO_CORPUS: the SIGSTRUCT of {row['path']}")
    return Sigstruct.parse(path.read_bytes())


rows = pytest.mark.parametrize("row", [pytest.param(row, id=row_id(row)) for row in TABLE])


@needs_corpus
@rows
def test_it_measures_to_what_was_signed(row: dict[str, Any], found: dict[str, Path]) -> None:
    path = file_of(row, found)
    assert detect(path).name == row["format"]
    with EnclaveImage.load(path) as image:
        for each in (image, *image.variants):
            assert each.measure("sgx").digest.hex() == row["mrenclave"]
            assert each.details
            if row.get("signed", True):
                sigstruct = sigstruct_of(row, each, found)
                sigstruct.verify()
                assert all(signature_checks(sigstruct).values())
                assert (sigstruct.measurement.scheme, sigstruct.enclavehash.hex()) == (
                    "sgx",
                    row["mrenclave"],
                )
        facts = image_facts(image)
        assert len(facts["regions"]) == len(image.regions)
        assert facts["tcs"]


@needs_corpus
@rows
def test_one_flipped_bit_makes_its_sigstruct_invalid(row: dict[str, Any], found: dict[str, Path]) -> None:
    """In the hash, the modulus, the signature, Q1, Q2 or the attributes; offsets as in the manual."""
    if not row.get("signed", True):
        pytest.skip("it has no SIGSTRUCT")
    with EnclaveImage.load(file_of(row, found)) as image:
        encoded = sigstruct_of(row, image, found).encode()
    for at in (960, 991, 128, 511, 516, 899, 1040, 1423, 1424, 1807, 928, 944):
        flipped = bytearray(encoded)
        flipped[at] ^= 0x10
        with pytest.raises(SignatureError):
            Sigstruct.parse(bytes(flipped)).verify()


def small(row: dict[str, Any], found: dict[str, Path]) -> EnclaveImage:
    image = EnclaveImage.load(file_of(row, found))
    if image.epc_pages * 4096 > LARGEST:
        pages = image.epc_pages
        image.close()
        pytest.skip(f"{pages} pages: more than is started here")
    return image


@pytest.fixture(scope="module")
def large_runtime() -> Iterator[Runtime]:
    with Runtime(epc=LARGEST, workers=2) as runtime:
        assert runtime.wait_workers()
        yield runtime


def start(runtime: Runtime, image: EnclaveImage, sigstruct: Sigstruct, startup: str) -> None:
    """It is VERIFIED, by the signer it names, and cannot be called: it is not written for this runtime."""
    with runtime.launch(image, sigstruct, signers=[sigstruct.mrsigner], startup=startup) as enclave:
        assert enclave.wait_verified(60) == sigstruct.enclavehash
        assert enclave.state is EnclaveState.VERIFIED
        with pytest.raises(NoHandler):
            enclave.submit({})


@needs_corpus
@rows
def test_it_starts(
    row: dict[str, Any], found: dict[str, Path], large_runtime: Runtime, key: SigningKey
) -> None:
    """With its own SIGSTRUCT (scheme sgx), by both startups; signed anew, by scheme enturbo, too."""
    if not row.get("signed", True):
        pytest.skip("it has no SIGSTRUCT")
    with small(row, found) as image:
        sigstruct = sigstruct_of(row, image, found)
        for startup in ("serial", "enturbo"):
            start(large_runtime, image, sigstruct, startup)
        start(large_runtime, image, key.sign(image, "enturbo"), "enturbo")


def by_hand() -> EnclaveImage:
    """An image as a real loader builds it: code, data, a guard gap, a stack, a TCS page, SSA and a heap."""
    tcs = bytearray(72)
    for at, value in ((16, 0x19000), (32, 0x1000), (48, 0x1D000), (56, 0x1D000), (64, 0xFFFF_FFFF_FFFF_FFFF)):
        tcs[at : at + 8] = value.to_bytes(8, "little")
    tcs[28:32] = (2).to_bytes(4, "little")
    return EnclaveImage(
        [
            Region(0, 5, 0x205, bytes(range(251)) * 70, label="code"),
            Region(0x5000, 2, 0x203, b"data", label="data"),
            Region(0x8000, 16, 0x203, fill=0xCCCC_CCCC, label="stack"),
            Region(0x18000, 1, 0x100, bytes(tcs), label="tcs"),
            Region(0x19000, 2, 0x203, label="ssa"),
            Region(0x1C000, 1, 0x201, b"in part", measured=0x0003),
            Region(0x20000, 300, 0x203, measured=False, label="heap"),
        ],
        size=1 << 21,
    )


@pytest.mark.parametrize("scheme", ["sgx", "enturbo"])
@pytest.mark.parametrize("startup", ["serial", "enturbo"])
def test_an_image_by_hand_starts(runtime: Runtime, key: SigningKey, scheme: str, startup: str) -> None:
    """The same without any file."""
    image = by_hand()
    start(runtime, image, key.sign(image, scheme), startup)
