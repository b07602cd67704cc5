"""What all tests share: the leak check around the session, and small images and keys."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from enturbo import EnclaveImage, Region, Runtime, SigningKey
from enturbo.runtime.backing import pack


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
    return found


def _processes() -> dict[int, str]:
    """Children and their children, without multiprocessing's own tracker, which stays until exit."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "resource_tracker" not in line:
            found[child.pid] = line
    return found


def _open_files() -> dict[int, str]:
    """Descriptors apart from what the interpreter keeps: the tracker's pipe, event loops, random devices."""
    return {fd: where for fd, where in _descriptors().items() if "/dev/urandom" not in where}


def _forget_what_was_logged() -> None:
    """The last test's records are still pytest's, with errors whose frames hold images and descriptors."""
    for record in gc.get_objects():
        if type(record) is logging.LogRecord:
            record.args = record.exc_info = None


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After the session /dev/shm, processes and descriptors are as before; in each process of several."""
    # The tracker's pipe is made on first use of shared memory and stays; let it be there before.
    with Runtime(epc="1MiB", workers=0):
        pass
    shm, files, processes = set(os.listdir("/dev/shm")), _open_files(), _processes()
    yield
    _forget_what_was_logged()
    gc.collect()  # a mapping lives as long as a view of it, and tests tie views into cycles
    deadline = time.monotonic() + 5
    # Another session's segment has its name for a moment, too.
    while _processes().keys() - processes.keys() or set(os.listdir("/dev/shm")) - shm:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert set(os.listdir("/dev/shm")) - shm == set()
    assert {pid: line for pid, line in _processes().items() if pid not in processes} == {}
    assert {fd: where for fd, where in _open_files().items() if fd not in files} == {}


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Distributions are kept in a store of this session's, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTURBO_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(scope="session")
def key() -> SigningKey:
    """One signing key for all tests (RSA-3072 takes a while to find)."""
    return SigningKey.generate()


@pytest.fixture(scope="session")
def runtime(key: SigningKey) -> Iterator[Runtime]:
    """A runtime with two workers that trusts ``key``; for tests that leave it as they found it."""
    with Runtime(epc="64MiB", workers=2, signers=[key.mrsigner]) as runtime:
        assert runtime.wait_workers()
        yield runtime


@pytest.fixture(scope="session")
def cooperative(key: SigningKey) -> Iterator[Runtime]:
    """The same without the kernel's enforcement: for handlers that do before the verdict, or at all, what a
    sealed process may not, so that what stands behind the seal is tested by itself."""
    with Runtime(epc="64MiB", workers=2, signers=[key.mrsigner], enforcement="cooperative") as runtime:
        assert runtime.wait_workers()
        yield runtime


def patterned(pages: int, seed: int = 1) -> bytes:
    """Bytes that repeat every 251, another phase a page, so that swapped pages and blocks differ."""
    cycle = bytes(range(251)) * 18
    return b"".join(cycle[(seed + 7 * page) % 251 :][:4096] for page in range(pages))


@pytest.fixture
def host_copies() -> Callable[[EnclaveImage], EnclaveImage]:
    """The same image, with its pages in this process's memory alone: workers cannot copy them."""

    def unback(image: EnclaveImage) -> EnclaveImage:
        regions = [replace(region, file_page=None) for region in image.regions]
        return EnclaveImage(regions, size=image.size, dynamic=image.dynamic)

    return unback


@pytest.fixture
def all_copy() -> Callable[[EnclaveImage], EnclaveImage]:
    """The same image, with its pages in a file that workers can read."""

    def back(image: EnclaveImage) -> EnclaveImage:
        regions, backing = pack(image.regions)
        return EnclaveImage(regions, size=image.size, dynamic=image.dynamic, backing=backing)

    return back


@pytest.fixture
def make_image() -> Callable[..., EnclaveImage]:
    """An image of ``pages`` measured pages (R|W) and ``heap`` unmeasured ones."""

    def make(pages: int = 64, *, heap: int = 0, seed: int = 1, flags: int = 0x203) -> EnclaveImage:
        regions = [Region(0, pages, flags, patterned(pages, seed))] if pages else []
        if heap:
            regions.append(Region(pages * 4096, heap, 0x203, measured=False))
        size = 4096
        while size < (pages + heap) * 4096:
            size *= 2
        return EnclaveImage(regions, size=size)

    return make


@pytest.fixture
def function(tmp_path: Path) -> Callable[..., EnclaveImage]:
    """The image of a handler given as source text; more files and arguments as of ``from_function``."""

    def make(source: str, **options: object) -> EnclaveImage:
        folder = tmp_path / f"function{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "handler.py").write_text(source)
        options.setdefault("heap", "64KiB")
        return EnclaveImage.from_function(folder, **options)  # type: ignore[arg-type]

    return make
