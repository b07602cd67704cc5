"""The store of layers: whatever is found by its digest is what was put there."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import enturbo
from enturbo import ImageFormatError
from enturbo.runtime import store as stores
from enturbo.runtime.backing import Backing
from enturbo.runtime.region import Buffer
from enturbo.runtime.startup import Preference
from enturbo.runtime.store import Store
from enturbo.shm.layout import COPY_FIRST, COPY_FUSED, PAGE_SIZE

WAIT = 30.0
NOTHING = hashlib.sha256(b"nothing").hexdigest()
PREFERENCES: dict[Preference, int] = {"start": COPY_FIRST, "verified": COPY_FUSED}


def content_of(pages: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


def files(folder: Path) -> list[str]:
    """All files below ``folder``, relative."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process with this package."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(enturbo.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def overwrite(path: Path, at: int, data: bytes) -> None:
    """What nobody should do to an object."""
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# ---------------------------------------------------------------------------------------------------- objects


def test_an_object_is_found_by_its_content(store: Store) -> None:
    content = content_of(5)
    pieces: list[Buffer] = [content[:100], bytearray(content[100:5000]), memoryview(content)[5000:]]
    digest = store.put(pieces)
    assert digest == hashlib.sha256(content).hexdigest()
    assert files(store.folder) == [f"objects/{digest[:2]}/{digest}"]
    assert store.has(digest)
    assert store.size(digest) == len(content)
    layer = store.open(digest)
    assert layer.digest == digest
    assert layer.view == content
    assert layer.view.readonly
    assert os.pread(layer.fd, 7, 4096) == content[4096:4103]
    umask = os.umask(0)
    os.umask(umask)
    assert store.path(digest).stat().st_mode & 0o777 == 0o444 & ~umask


def test_an_object_that_is_there_is_not_written_again(store: Store) -> None:
    digest = store.put([content_of(3)])
    before = store.path(digest).stat()
    assert store.put([content_of(3)[:10], content_of(3)[10:]]) == digest
    after = store.path(digest).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_an_object_is_whole_pages(store: Store, size: int) -> None:
    with pytest.raises(ImageFormatError, match=f"multiple of 4096 bytes, found {size}"):
        store.put([bytes(size)])
    assert files(store.folder) == []


def test_content_that_breaks_off_leaves_nothing(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(PAGE_SIZE)
        raise KeyError("no more")

    with pytest.raises(KeyError):
        store.put(broken())
    assert files(store.folder) == []


@pytest.mark.parametrize("digest", ["", "ab", "../" + NOTHING[3:], NOTHING.upper(), NOTHING + "\n", "x" * 64])
def test_what_is_no_digest(store: Store, digest: str) -> None:
    for use in (store.path, store.has, store.size, store.open, lambda name: store.remember("key", name)):
        with pytest.raises(ImageFormatError, match="64 hexadecimal digits"):
            use(digest)
    assert files(store.folder) == []


def test_a_missing_object_is_named(store: Store) -> None:
    for use in (store.size, store.open):
        with pytest.raises(ImageFormatError, match=f"{store.folder}: object {NOTHING}: .* found nothing"):
            use(NOTHING)
    assert not store.has(NOTHING)
    assert not store.folder.exists()  # looking makes nothing


def _flip(path: Path) -> None:
    overwrite(path, 5000, bytes([path.read_bytes()[5000] ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, PAGE_SIZE)


def _cut_within_a_page(path: Path) -> None:
    os.truncate(path, PAGE_SIZE + 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_flip, _cut, _cut_within_a_page, _empty, _pipe])
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_damaged_object_is_named(store: Store, damage: Any, opened_before: bool) -> None:
    """Each time; and it can be put again when it was removed, as the message says."""
    content = content_of(2)
    digest = store.put([content])
    if opened_before:
        assert store.open(digest).view == content
    damage(store.path(digest))
    for _ in range(2):
        with pytest.raises(ImageFormatError) as caught:
            store.open(digest)
        assert f"Remove {store.path(digest)}" in str(caught.value)
        assert caught.value.file == str(store.folder)
        assert digest in caught.value.what
    store.path(digest).unlink()
    store.put([content])
    assert store.open(digest).view == content


def test_an_object_of_another_size_is_replaced(store: Store) -> None:
    """A crash of the machine may leave one."""
    digest = store.put([content_of(2)])
    os.truncate(store.path(digest), 0)
    assert store.put([content_of(2)]) == digest
    assert store.open(digest).view == content_of(2)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed to be checked."""
    found: list[str] = []
    original = hashlib.file_digest

    def counted(file: Any, name: Any) -> Any:
        found.append(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return found


def test_an_object_is_checked_once_and_mapped_once(store: Store, hashed: list[str]) -> None:
    """As long as anybody uses it; and checked again when it has become another file."""
    digest = store.put([content_of(4)])
    path = store.path(digest)
    gc.collect()  # what other tests have left must not go in the middle
    before = len(os.listdir("/proc/self/fd"))
    one, two = store.open(digest), Store(store.folder).open(digest)
    assert one is two
    assert Path("/proc/self/maps").read_text().count(str(path)) == 1
    assert len(os.listdir("/proc/self/fd")) == before + 1
    view = two.view[:10]
    del one, two
    assert bytes(view) == content_of(4)[:10]
    assert str(path) in Path("/proc/self/maps").read_text()
    view.release()
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == before
    kept = store.open(digest)
    assert hashed == [str(path)]
    os.utime(path)
    other = store.open(digest)
    assert other is not kept
    assert other.view == kept.view
    assert hashed == [str(path)] * 2
    path.unlink()
    store.put([content_of(4)])
    assert store.open(digest) is not other
    assert hashed == [str(path)] * 3


def test_threads_share_it_too(store: Store, hashed: list[str]) -> None:
    digest = store.put([content_of(200)])
    for _ in range(20):
        found: list[Backing] = []
        barrier = threading.Barrier(8)

        def use(found: list[Backing] = found, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(WAIT)
            found.append(store.open(digest))

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert len({id(layer) for layer in found}) == 1
        assert found[0].fd >= 0
        assert len(found) == 8
    assert hashed == [str(store.path(digest))]


# ------------------------------------------------------------------------------------------ several processes

PUT_SAME = """
import sys
from enturbo.runtime.store import Store
store, own = Store(sys.argv[1]), bytes([int(sys.argv[2])])
sys.stdin.readline()
for number in range(30):
    shared = bytes([number]) * 8192
    assert store.open(store.put([shared, bytes(4096)])).view == shared + bytes(4096)
    store.put([own * 4096 * (number + 1)])
    store.remember("shared", store.put([shared]))
    assert store.lookup("shared")
"""


def test_several_writers_at_once(store: Store) -> None:
    """They write the same objects and different ones; all are whole, and nothing else is left."""
    writers = [python(PUT_SAME, store.folder, 100 + number) for number in range(4)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=WAIT)
        assert writer.returncode == 0
    expected = {hashlib.sha256(bytes([n]) * 8192 + bytes(4096)).hexdigest() for n in range(30)}
    expected |= {hashlib.sha256(bytes([n]) * 8192).hexdigest() for n in range(30)}
    for own in range(100, 104):
        expected |= {hashlib.sha256(bytes([own]) * 4096 * (n + 1)).hexdigest() for n in range(30)}
    found = files(store.folder)
    assert found == sorted([*(f"objects/{name[:2]}/{name}" for name in expected), "index/shared"])
    for name in expected:
        assert hashlib.sha256(store.path(name).read_bytes()).hexdigest() == name


DIE = """
import sys, time
from enturbo.runtime.store import Store
def half():
    yield bytes(1 << 20)
    print("half", flush=True)
    time.sleep(60)
Store(sys.argv[1]).put(half())
"""


def test_a_writer_that_is_killed_leaves_no_object(store: Store) -> None:
    """What it had written goes with a later writer."""
    with python(DIE, store.folder) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.kill()
        writer.wait(WAIT)
    (left,) = files(store.folder)
    assert left.startswith("partial/")
    digest = store.put([bytes(1 << 20)])
    assert store.open(digest).view == bytes(1 << 20)
    assert left in files(store.folder)  # its writer might live
    long_ago = time.time() - stores.PARTIAL_SECONDS - 10
    os.utime(store.folder / left, (long_ago, long_ago))
    store.put([bytes(1 << 21)])
    assert not any(name.startswith("partial/") for name in files(store.folder))


# -------------------------------------------------------------------------------------------------- the index


def test_a_key_leads_to_an_object(store: Store) -> None:
    one, two = store.put([content_of(1)]), store.put([content_of(1, 2)])
    assert store.lookup("key") is None
    store.remember("key", one)
    assert store.lookup("key") == one
    store.remember("key", two)
    assert store.lookup("key") == two
    assert Store(store.folder).lookup("key") == two
    assert "index/key" in files(store.folder)


@pytest.mark.parametrize("change", [b"", b"x", b"\xff" * 65, b"{}", b"{}\n\n", b" {}\n", b"{}" * 100])
def test_a_damaged_entry_is_none(store: Store, change: bytes) -> None:
    digest = store.put([content_of(1)])
    store.remember("key", digest)
    overwrite(store.folder / "index/key", 0, b"")
    (store.folder / "index/key").write_bytes(change.replace(b"{}", digest.encode()))
    assert store.lookup("key") is None
    store.remember("key", digest)
    assert store.lookup("key") == digest


def test_an_entry_that_leads_nowhere_is_none(store: Store) -> None:
    store.remember("key", NOTHING)
    assert store.lookup("key") is None
    (store.folder / "index/folder").mkdir()
    assert store.lookup("folder") is None


@pytest.mark.parametrize("key", ["", ".", "..", ".x", "a/b", "a\0b", "a\n", "é", "x" * 201])
def test_what_is_no_key(store: Store, key: str) -> None:
    for use in (store.lookup, lambda name: store.remember(name, NOTHING)):
        with pytest.raises(ValueError, match=r"expected 1\.\.200 letters"):
            use(key)
    assert not store.folder.exists()


# ---------------------------------------------------------------------------------------------------- folders


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ENTURBO_STORE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert Store.default().folder == tmp_path / ".cache/enturbo/store"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be left aside, says its specification
    assert Store.default().folder == tmp_path / ".cache/enturbo/store"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert Store.default().folder == Path("/cache/enturbo/store")
    monkeypatch.setenv("ENTURBO_STORE", "here")
    assert Store.default().folder == Path.cwd() / "here"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(OSError, match="the store cannot be written") as caught:
        store.put([bytes(PAGE_SIZE)])
    assert caught.value.filename == str(store.folder)
    with pytest.raises(OSError, match="the store cannot be written"):
        store.remember("key", NOTHING)
    assert store.lookup("key") is None
    assert not store.has(NOTHING)
    with pytest.raises(ImageFormatError, match="found nothing"):
        store.open(NOTHING)
