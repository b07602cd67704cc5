"""A SIGSTRUCT in a file of its own: known, readable, and no image."""

from __future__ import annotations

from pathlib import Path

import pytest

from enturbo import EnclaveImage, SigningKey
from enturbo.runtime.formats import detect, load_sigstruct
from enturbo.runtime.sigstruct import Sigstruct
from enturbo.shm.errors import ImageFormatError, SignatureError


@pytest.fixture
def signed(key: SigningKey, tmp_path: Path) -> tuple[Path, Sigstruct]:
    sigstruct = key.sign(EnclaveImage([], size=4096), "sgx")
    (tmp_path / "x.sig").write_bytes(sigstruct.encode())
    return tmp_path / "x.sig", sigstruct


def test_it_is_known_and_read(signed: tuple[Path, Sigstruct]) -> None:
    assert detect(signed[0]).name == "sigstruct"
    assert load_sigstruct(signed[0]) == signed[1]


def test_it_is_no_image(signed: tuple[Path, Sigstruct]) -> None:
    with pytest.raises(ImageFormatError, match=r"x\.sig: no image .*a SIGSTRUCT, which has none"):
        EnclaveImage.load(signed[0])


@pytest.mark.parametrize("length", [12, 1807, 1809, 4096])
def test_of_another_length(length: int, signed: tuple[Path, Sigstruct]) -> None:
    data = signed[0].read_bytes()
    signed[0].write_bytes(data[:length].ljust(length, b"\0"))
    assert detect(signed[0]).name == "sigstruct"
    with pytest.raises(SignatureError, match=r"x\.sig.*expected 1808 bytes"):
        load_sigstruct(signed[0])
    with pytest.raises(ImageFormatError):
        EnclaveImage.load(signed[0])


def test_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"x" * 1808)
    with pytest.raises(SignatureError, match="header1"):
        load_sigstruct(tmp_path / "text")
    with pytest.raises(ImageFormatError, match="regular file"):
        load_sigstruct(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_sigstruct(tmp_path / "missing")
