"""Enclave files that name layers of a store: the same images as whole files, or an error that says why."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from enturbo import EnclaveImage, ImageFormatError, Region, Runtime
from enturbo.runtime.backing import pack
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


def layered(store: Store, pages: Sequence[int] = (150, 90), seed: int = 1) -> EnclaveImage:
    """Contents in two layers and in a memfd, in turn; a fill and heap."""
    regions, page = list[Region](), 0

    def add(count: int, **options: Any) -> None:
        nonlocal page
        regions.append(Region(page * PAGE_SIZE, count, 0x203, **options))
        page += count

    layers = [store.open(store.put([content_of(count, number)])) for number, count in enumerate(pages)]
    add(40, content=content_of(40, 100 + seed)[:-10])
    for layer, count in zip(layers, pages, strict=True):
        for first, part in ((20, count - 20), (0, 20)):
            view = layer.view[first * PAGE_SIZE : (first + part) * PAGE_SIZE]
            add(part, content=view, file_page=first, layer=layer)
            add(7, content=content_of(7, first))
    add(1, fill=5)
    add(30, measured=False)
    packed, backing = pack(regions)
    return EnclaveImage(packed, size=1 << 22, backing=backing)


def test_a_thin_file_is_the_same_image(store: Store, tmp_path: Path) -> None:
    image = layered(store)
    expected = image.measure()
    image.save(tmp_path / "thin", store=store)
    image.save(tmp_path / "whole")
    own = 40 + 4 * 7
    assert (tmp_path / "thin").stat().st_size == (1 + own) * PAGE_SIZE
    assert (tmp_path / "whole").stat().st_size == (1 + own + 240) * PAGE_SIZE
    with EnclaveImage.load(tmp_path / "thin", store=store) as thin:
        assert [region.layer is None for region in thin.regions] == [r.layer is None for r in image.regions]
        assert thin.regions[1:] == image.regions[1:]  # the first ends within a page, in a file it does not
        assert thin.measure() == expected
        assert thin.as_edmm().measure() == image.as_edmm().measure()
        for name, options in (("again", {"store": store}), ("whole again", {})):
            thin.save(tmp_path / name, **options)
            assert (tmp_path / name).read_bytes() == (
                tmp_path / name.split()[0].replace("again", "thin")
            ).read_bytes()
    with EnclaveImage.load(tmp_path / "whole", store=Store("/nowhere")) as whole:
        assert all(region.layer is None for region in whole.regions)
        assert whole.measure() == expected
    assert store.size(hashlib.sha256(content_of(150, 0)).hexdigest()) == 150 * PAGE_SIZE


@pytest.mark.parametrize("form", ["thin", "whole"])
@pytest.mark.parametrize("prefer", list(PREFERENCES))
def test_it_starts_verified(store: Store, tmp_path: Path, form: str, prefer: Preference) -> None:
    """Workers copy from the store's files."""
    image = layered(store)
    expected = image.measure()
    image.save(tmp_path / "file", store=store if form == "thin" else None)
    image.close()
    with (
        EnclaveImage.load(tmp_path / "file", store=store) as loaded,
        Runtime(epc="8MiB", workers=2) as runtime,
    ):
        assert runtime.warm(WAIT)
        for startup in ("enturbo", "serial"):
            with runtime.launch(loaded, expected=expected, startup=startup, prefer=prefer) as enclave:
                assert enclave.wait_verified(WAIT) == expected.digest
                if startup == "enturbo":
                    mode = runtime.memory.launches.copy_mode[enclave._start.place.slot]
                    assert int(mode) == PREFERENCES[prefer]
        assert runtime.workers_see_files


def test_two_images_share_one_mapping(store: Store, tmp_path: Path) -> None:
    one = layered(store)
    one.save(tmp_path / "one", store=store)
    layered(store, seed=2).save(tmp_path / "two", store=store)
    two, three = (EnclaveImage.load(tmp_path / name, store=store) for name in ("one", "two"))
    layers = {id(region.layer) for image in (one, two, three) for region in image.regions if region.layer}
    assert len(layers) == 2
    assert two.measure() == one.measure() != three.measure()
    assert Path("/proc/self/maps").read_text().count(str(store.folder)) == 2
    one.close()
    two.close()
    value = three.measure()
    three.close()
    del one, two
    with EnclaveImage.load(tmp_path / "two", store=store) as again:
        assert again.measure() == value
    del three, again
    gc.collect()
    assert str(store.folder) not in Path("/proc/self/maps").read_text()
    assert not any(str(store.folder) in name for name in _open_files())


def _open_files() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{fd}")


def test_another_store_gets_what_it_does_not_have(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = layered(store), Store(tmp_path / "other")
    other.put([content_of(150, 0)])
    put, read = other.put, list[str]()

    def noted(content: Iterable[Buffer]) -> str:
        read.append(put(content))
        return read[-1]

    monkeypatch.setattr(other, "put", noted)
    image.save(tmp_path / "thin", store=other)
    assert read == [hashlib.sha256(content_of(90, 1)).hexdigest()]
    assert [name for name in files(other.folder) if "partial" in name] == []
    with EnclaveImage.load(tmp_path / "thin", store=other) as loaded:
        assert loaded.measure() == image.measure()
        assert {r.layer.fd for r in loaded.regions if r.layer} & {
            r.layer.fd for r in image.regions if r.layer
        } == set()


def test_a_layer_that_was_changed_is_not_kept_as_another(store: Store, tmp_path: Path) -> None:
    image = layered(store)
    layer = next(region.layer for region in image.regions if region.layer)
    assert layer.digest is not None
    overwrite(store.path(layer.digest), 0, b"other")
    other = Store(tmp_path / "other")
    with pytest.raises(ImageFormatError, match=f"changed after it was loaded: expected {layer.digest}"):
        image.save(tmp_path / "thin", store=other)
    assert not (tmp_path / "thin").exists()
    assert not other.has(layer.digest)


def test_a_layer_without_a_name_goes_into_the_file(store: Store, tmp_path: Path) -> None:
    (region,), layer = pack([Region(0, 3, 0x203, content_of(3))])
    image = EnclaveImage([Region(0, 3, 0x203, region.content, file_page=0, layer=layer)], size=1 << 14)
    image.save(tmp_path / "file", store=store)
    with EnclaveImage.load(tmp_path / "file", store=store) as loaded:
        assert loaded.regions[0].layer is None
        assert loaded.measure() == image.measure()
    assert not store.folder.exists()


def test_a_missing_layer_is_named(store: Store, tmp_path: Path) -> None:
    image = layered(store)
    image.save(tmp_path / "thin", store=store)
    empty = Store(tmp_path / "empty")
    digest = hashlib.sha256(content_of(150, 0)).hexdigest()
    with pytest.raises(
        ImageFormatError, match=f"thin: layer 1: {empty.folder}: object {digest}.*self-contained"
    ):
        EnclaveImage.load(tmp_path / "thin", store=empty)
    overwrite(store.path(digest), 0, b"\0" * 8)
    with pytest.raises(ImageFormatError, match=f"thin: layer 1: {store.folder}: object {digest}.*Remove"):
        EnclaveImage.load(tmp_path / "thin", store=store)


def test_the_default_store_is_looked_at_for_layers_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = layered(store)
    image.save(tmp_path / "thin", store=store)
    image.save(tmp_path / "whole")
    monkeypatch.setenv("ENTURBO_STORE", str(store.folder))
    with EnclaveImage.load(tmp_path / "thin") as loaded:
        assert loaded.measure() == image.measure()
    monkeypatch.delattr(Store, "default")
    with EnclaveImage.load(tmp_path / "whole") as loaded:
        assert loaded.measure() == image.measure()


# ------------------------------------------------------------------------------------------ hostile manifests


def load_forger() -> ModuleType:
    """test_enclave_file.py, which cannot be imported by name: it writes files whose checksums all hold."""
    path = Path(__file__).with_name("test_enclave_file.py")
    spec = importlib.util.spec_from_file_location("enturbo_test_enclave_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


forger = load_forger()
A, B = content_of(3, 1), content_of(2, 2)
LAYERS = [[hashlib.sha256(A).digest(), 3], [hashlib.sha256(B).digest(), 2]]


def row(number: int, **changes: Any) -> list[Any]:
    """A page of a layer, at page ``number`` of the enclave."""
    found: list[Any] = forger.row(**{"offset": number * PAGE_SIZE, "sum": 0, "layer": 1, **changes})
    return found


def forged(rows: Sequence[Any], content: bytes = b"", **changes: Any) -> bytes:
    found: bytes = forger.forge(forger.manifest(rows, **{"layers": LAYERS[:1], **changes}), content)
    return found


@pytest.fixture
def two_layers(store: Store) -> Store:
    store.put([A])
    store.put([B])
    return store


def test_a_forged_file_that_is_right_loads(two_layers: Store, tmp_path: Path) -> None:
    rows = [row(0, layer_page=2), row(1, layer=2), row(2), forger.row(offset=3 * PAGE_SIZE)]
    (tmp_path / "file").write_bytes(forged(rows, forger.PAGE, layers=LAYERS))
    with EnclaveImage.load(tmp_path / "file", store=two_layers) as image:
        assert [bytes(region.content or b"") for region in image.regions] == [
            A[2 * PAGE_SIZE :],
            B[:PAGE_SIZE],
            A[:PAGE_SIZE],
            forger.PAGE,
        ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (forged([row(0, layer=2)]), "at most 1, found 2"),
        (forged([row(0, layer=1 << 60)]), "at most 1"),
        (forged([row(0, layer=-1)]), "negative"),
        (forged([row(0, layer=True)]), "rows of numbers"),
        (forged([row(0, layer_page=3)]), "3 pages"),
        (forged([row(0, layer_page=1 << 63)]), "3 pages"),
        (forged([row(0, pages=4, content=4)]), "3 pages"),
        (forged([row(0, pages=2, content=2, layer_page=2)]), "3 pages"),
        (forged([row(0, content=0)]), "3 pages"),
        (forged([row(0, sum=1)]), "checksum 0"),
        (forged([row(0, content=2)]), "region's content"),
        (forged([row(0, fill=1)]), "region's fill"),
        (forged([row(0)], forger.PAGE), "file size"),
        (forged([row(0), row(0)]), "overlap"),
        (forged([row(0)], layers=LAYERS), "expected 1, which are used"),
        (forged([]), "expected 0, which are used"),
        (forged([row(0, layer=2), row(1)], layers=LAYERS), "at most 1, found 2"),
        (forged([row(0), row(1, layer=2)], layers=[LAYERS[0], LAYERS[0]]), "each once"),
        (forged([row(0)], layers=[[bytes(31), 3]]), "rows of SHA-256"),
        (forged([row(0)], layers=[["x" * 32, 3]]), "rows of SHA-256"),
        (forged([row(0)], layers=[[LAYERS[0][0], 0]]), "rows of SHA-256"),
        (forged([row(0)], layers=[[LAYERS[0][0], True]]), "rows of SHA-256"),
        (forged([row(0)], layers=[[LAYERS[0][0], -3]]), "rows of SHA-256"),
        (forged([row(0)], layers=[[LAYERS[0][0], 1 << 32]]), "rows of SHA-256"),
        (forged([row(0)], layers=[[*LAYERS[0], 0]]), "rows of SHA-256"),
        (forged([row(0)], layers=LAYERS[0]), "rows of SHA-256"),
        (forged([row(0)], layers={}), "rows of SHA-256"),
        (forged([row(0)], layers=[[LAYERS[0][0], 2]]), "size of layer 1.*0x2000, found 0x3000"),
        (forged([row(0)], layers=[[LAYERS[0][0], 4]]), "size of layer 1.*0x4000, found 0x3000"),
        (forged([row(0)], layers=[[bytes(32), 3]]), f"layer 1: .*object {'00' * 32}.*found nothing"),
    ],
)
def test_a_forged_file_that_is_wrong(two_layers: Store, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(data)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageFormatError, match=message) as caught:
        EnclaveImage.load(tmp_path / "file", store=two_layers)
    assert caught.value.file == str(tmp_path / "file")
    del caught
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
