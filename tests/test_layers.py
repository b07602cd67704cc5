"""Images whose regions stand in several files: one of their own, and layers that they share."""

from __future__ import annotations

import gc
import itertools
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage, EnclaveState, ImageFormatError, Region, Runtime
from enturbo.runtime.backing import Backing, pack
from enturbo.runtime.startup import Preference
from enturbo.shm.layout import COPY_FIRST, COPY_FUSED, MAX_SOURCE_FD, MAX_SOURCE_PAGE, PAGE_SIZE
from enturbo.shm.mapping import map_shared
from enturbo.shm.memory import Memory
from enturbo.workers import filling
from enturbo.workers.filling import Sources, _file_and_page, _runs

WAIT = 30.0
SCHEDULES: tuple[tuple[str, Preference], ...] = (
    ("enturbo", "start"),
    ("enturbo", "verified"),
    ("serial", "start"),
)
MODES: dict[Preference, int] = {"start": COPY_FIRST, "verified": COPY_FUSED}


def descriptors(pid: int | str = "self") -> dict[str, str]:
    """What a process has open."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue  # the listing's own
    return found


def read_layer(path: Path, pages: int, seed: int) -> tuple[Backing, memoryview]:
    """A plain file, which workers read."""
    path.write_bytes(random.Random(seed).randbytes(pages * PAGE_SIZE))
    backing = Backing(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    return backing, map_shared(backing.fd, pages * PAGE_SIZE, writable=False)


def mapped_layer(pages: int, seed: int) -> tuple[Backing, memoryview]:
    """A sealed memfd, which workers map."""
    (region,), backing = pack([Region(0, pages, 0x201, random.Random(seed).randbytes(pages * PAGE_SIZE))])
    assert backing is not None
    assert isinstance(region.content, memoryview)
    return backing, region.content


def mixed_image(layers: list[tuple[Backing, memoryview]], pieces: int = 60) -> EnclaveImage:
    """Pieces of the image's own file and of each layer in turn, in no order within a layer, with fills and
    heap between them; then half of each layer at a stretch."""
    chance, regions, page = random.Random(3), list[Region](), 0

    def add(count: int, **options: Any) -> None:
        nonlocal page
        options.setdefault("measured", True)
        regions.append(Region(page * PAGE_SIZE, count, 0x203, **options))
        page += count

    def add_part(layer: tuple[Backing, memoryview], first: int, count: int) -> None:
        content = layer[1][first * PAGE_SIZE : (first + count) * PAGE_SIZE]
        add(count, content=content, file_page=first, layer=layer[0])

    for number in range(pieces):
        count = chance.choice((1, 2, 5, 17))
        which = number % (len(layers) + 1) - 1
        if which < 0:
            add(count, content=chance.randbytes(count * PAGE_SIZE - chance.choice((0, 0, 100))))
        else:
            last = len(layers[which][1]) // PAGE_SIZE - count
            add_part(layers[which], chance.randrange(last), count)
        if number % 7 == 0:
            add(1, fill=number + 1)
            add(2, measured=False)
    for layer in layers:
        half = len(layer[1]) // PAGE_SIZE // 2
        add_part(layer, half, half)
    packed, backing = pack(regions)
    return EnclaveImage(packed, size=1 << (page * PAGE_SIZE - 1).bit_length(), backing=backing)


def bytes_of(image: EnclaveImage) -> bytes:
    out = b""
    for region in image.regions:
        content = bytes(region.content or b"") or region.fill.to_bytes(4, "little") * (region.size // 4)
        out += content.ljust(region.size, b"\0")
    return out


def until_as_before(before: dict[str, str]) -> None:
    """Descriptors are given back by the launch's thread, a moment after the verdict."""
    deadline = time.monotonic() + WAIT
    while descriptors() != before:
        assert time.monotonic() < deadline, (descriptors(), before)
        time.sleep(1e-3)


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[list[tuple[Backing, memoryview]]]:
    gc.collect()  # what other tests left would go in the middle of one that counts descriptors
    made = [read_layer(tmp_path / "layer", 200, 1), mapped_layer(150, 2)]
    yield made
    made.clear()


@pytest.mark.parametrize("workers", [2, 0])
@pytest.mark.parametrize(("strategy", "prefer"), SCHEDULES)
def test_pages_of_three_files(
    layers: list[tuple[Backing, memoryview]], strategy: str, prefer: Preference, workers: int
) -> None:
    """Workers, or the host alone, copy each page from its file; nothing stays open."""
    image = mixed_image(layers)
    expected, content = image.measure(), bytes_of(image)
    with Runtime(epc="16MiB", workers=workers) as runtime:
        assert runtime.warm(WAIT)
        before = descriptors()
        for _ in range(3):
            with runtime.launch(image, expected=expected, startup=strategy, prefer=prefer) as enclave:
                assert enclave.wait_verified(WAIT) == expected.digest
                place = enclave._start.place
                assert bytes(runtime.memory.epc.pages(place.first_page, image.page_count)) == content
                if strategy == "enturbo":
                    assert int(runtime.memory.launches.copy_mode[place.slot]) == MODES[prefer]
            until_as_before(before)
        assert runtime.workers_see_files
        assert runtime.stats()["worker_deaths"] == 0
    image.close()


def test_the_heap_of_a_layered_image_may_come_by_eaug(layers: list[tuple[Backing, memoryview]]) -> None:
    image = mixed_image(layers)
    edmm = image.as_edmm()
    expected = edmm.measure()
    assert expected != image.measure()
    with Runtime(epc="16MiB", workers=2) as runtime, runtime.launch(edmm, expected=expected) as enclave:
        assert enclave.wait_verified(WAIT) == expected.digest
        assert int(runtime.memory.launches.copy_mode[enclave._start.place.slot]) == COPY_FIRST
    image.close()


@pytest.mark.parametrize("workers", [2, 0])
@pytest.mark.parametrize("prefer", list(MODES))
def test_a_layer_that_was_cut_off_rejects_the_launch(
    layers: list[tuple[Backing, memoryview]], tmp_path: Path, prefer: Preference, workers: int
) -> None:
    """A clear error and no SIGBUS; the layer's other users, and other launches, go on."""
    image, other = mixed_image(layers), mixed_image(layers[1:])
    expected, good = image.measure(), other.measure()
    os.truncate(tmp_path / "layer", 5000)
    with Runtime(epc="16MiB", workers=workers) as runtime:
        assert runtime.warm(WAIT)
        before = descriptors()
        with runtime.launch(image, expected=expected, prefer=prefer) as enclave:
            with pytest.raises(ImageFormatError, match="the image's file or one of its layers"):
                enclave.wait_verified(WAIT)
            assert enclave.state is EnclaveState.REJECTED
        until_as_before(before)
        with runtime.launch(other, expected=good, prefer=prefer) as enclave:
            assert enclave.wait_verified(WAIT) == good.digest
        assert runtime.stats()["worker_deaths"] == 0
    image.close()
    other.close()


def test_closing_an_image_leaves_its_layers(layers: list[tuple[Backing, memoryview]]) -> None:
    """Another image has them, too; they close with the last one."""
    before = len(descriptors())
    one, two = mixed_image(layers), mixed_image(layers)
    expected = two.measure()
    one.close()
    with pytest.raises(ValueError, match="released"):
        bytes(next(r.content for r in one.regions if r.content is not None and r.layer is None))
    assert two.measure() == expected
    assert len(descriptors()) == before + 1  # the other's own file
    two.close()
    assert min(layer.fd for layer, _ in layers) >= 0
    del one, two
    layers.clear()
    gc.collect()
    assert len(descriptors()) == before - 2


def test_an_image_may_be_closed_while_it_starts(layers: list[tuple[Backing, memoryview]]) -> None:
    """Once the launch is open all copying is from descriptors of its own."""
    image = mixed_image(layers)
    expected = image.measure()
    with Runtime(epc="16MiB", workers=0) as runtime:
        assert runtime.warm(WAIT)
        with runtime.launch(image, expected=expected) as enclave:
            deadline = time.monotonic() + WAIT
            while not runtime.memory.launches.generations[enclave._start.place.slot]:
                assert time.monotonic() < deadline
                time.sleep(1e-4)
            image.close()
            assert enclave.wait_verified(WAIT) == expected.digest


def test_starts_at_the_same_time_share_descriptors(layers: list[tuple[Backing, memoryview]]) -> None:
    """An image of many layers that is launched often at once costs each descriptor once."""
    (file, _), _ = layers
    before = len(descriptors())
    lent = [file.lend() for _ in range(5)]
    assert len({each.fd for each in lent}) == 1
    assert len(descriptors()) == before + 1
    assert os.path.sameopenfile(lent[0].fd, file.fd)
    lent.pop()
    fd = lent[0].fd
    file.close()
    assert file.fd == -1
    assert os.pread(fd, 1, 0)
    lent.clear()
    assert str(fd) not in descriptors()
    with pytest.raises(OSError, match="descriptor"):
        file.lend()


# ------------------------------------------------------------------------------------ in the EPCM and workers


def test_an_entry_holds_any_descriptor_and_page() -> None:
    memory = Memory.create(4, 1)
    try:
        while memory.allocate_step():
            pass
        epcm = memory.epcm
        for fd, page in itertools.product((0, 3, MAX_SOURCE_FD), (0, 7, MAX_SOURCE_PAGE - 1)):
            epcm.set_file_source(1, 2, fd, page)
            words = epcm.sources(1, 2).tolist()
            assert [_file_and_page(word) for word in words] == [(fd, page), (fd, page + 1)]
            assert epcm.sources(0, 1)[0] == epcm.sources(3, 1)[0] == 0
        for fd, page in ((-1, 0), (MAX_SOURCE_FD + 1, 0), (0, -1), (0, MAX_SOURCE_PAGE)):
            with pytest.raises(ValueError, match="expected 0"):
                epcm.set_file_source(1, 2, fd, page)
        # The last page of a file and the first of the next are no run.
        epcm.set_file_source(0, 2, 8, MAX_SOURCE_PAGE - 1)
        epcm.set_file_source(2, 2, 9, 0)
        assert _runs(epcm.sources(0, 4)) == [(0, 2), (2, 4)]
    finally:
        memory.close()


def test_a_worker_opens_each_file_once_and_keeps_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of the host's descriptors are the same file; some stay open when no launch uses them."""
    monkeypatch.setattr(filling, "KEPT_SOURCES", 3)
    sources = Sources(os.getpid())
    with ExitStack() as stack:
        files = [stack.enter_context(open(tmp_path / str(number), "w+b")) for number in range(6)]
        mapped = [mapped_layer(1, number)[0] for number in range(6)]
        again = os.dup(files[0].fileno())
        stack.callback(os.close, again)
        before = len(descriptors())
        used = [sources.get(file.fileno()) for file in files]
        assert sources.get(again) is used[0]
        assert len(descriptors()) == before + 6
        del used[1:]
        used += [sources.get(each.fd) for each in mapped]
        assert len({id(source) for source in used}) == 7
        used.clear()
        assert len(descriptors()) == before + 3 + filling.KEPT_MAPPINGS
        assert sources.get(files[0].fileno()) is sources.get(again)  # used last, so kept
        sources.forget()
        assert len(descriptors()) == before


def test_the_host_opens_nothing_for_itself(layers: list[tuple[Backing, memoryview]]) -> None:
    """Its own descriptors are there anyway, and it has a measurer or two for each launch."""
    before = descriptors()
    sources = Sources()
    used = [sources.get(layer.fd) for layer, _ in layers]
    target = bytearray(2 * PAGE_SIZE)
    for source, (_, content) in zip(used, layers, strict=True):
        source.copy(memoryview(target), 3)
        assert target == content[3 * PAGE_SIZE : 5 * PAGE_SIZE]
    assert descriptors() == before
    used.clear()
    sources.forget()
    assert descriptors() == before
