"""Native code: told at build time, laid out as R-X pages; what it needs comes along, or is the platform's."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enturbo import EnclaveImage
from enturbo.runtime import bundle as tables
from enturbo.runtime.bundle import Bundle
from enturbo.runtime.distributions import find
from enturbo.runtime.files import Files
from enturbo.runtime.labels import distribution_facts
from enturbo.runtime.libraries import Libraries, MemoryFiles
from enturbo.runtime.manifests import HEADER, Library
from enturbo.runtime.natives import check_needed, is_native, read_library
from enturbo.runtime.program import Program
from enturbo.shm.errors import ImageFormatError

R, RX, RW = 0x201, 0x205, 0x203
NUMPY = importlib.metadata.version("numpy")


def extension_of(distribution: str) -> bytes:
    """The first extension module of an installed distribution."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (found,) = find([distribution])
    return next(file for file in found.files if file.name.endswith(suffix)).read()


def test_what_a_library_needs_is_read() -> None:
    (numpy,) = find(["numpy"])
    blas = next(file for file in numpy.files if "openblas" in file.name and ".so" in file.name)
    library = read_library(blas.read(), blas.name)
    assert library.soname == blas.name.rpartition("/")[2]
    assert "libc.so.6" in library.needed
    umath = next(
        file for file in numpy.files if "_multiarray_umath" in file.name and file.name.endswith(".so")
    )
    assert library.soname in read_library(umath.read(), umath.name).needed


def test_only_shared_objects_are_native() -> None:
    content = extension_of("xxhash")
    assert is_native(content)
    assert not is_native(b"")
    assert not is_native(b"\x7fELF")
    assert not is_native(content[:16] + b"\x01\x00" + content[18:])  # an object file
    assert not is_native(b"MZ" + content[2:])


def test_libraries_and_platform() -> None:
    libraries = {
        "pkg/ext.so": Library("", ("libx-1.so.2", "libc.so.6", "libstdc++.so.6")),
        "pkg.libs/libx-1.so.2": Library("libx-1.so.2", ("libm.so.6",)),
    }
    check_needed(libraries, {})
    with pytest.raises(ImageFormatError, match=r"pkg/ext\.so: pkg 1\.0 needs libx-1\.so\.2.*found neither"):
        check_needed({"pkg/ext.so": libraries["pkg/ext.so"]}, {"pkg/ext.so": "pkg 1.0"})
    with pytest.raises(ImageFormatError, match=r"calls itself libx-1\.so\.2.*which calls itself nothing"):
        check_needed(libraries | {"pkg.libs/libx-1.so.2": Library("", ())}, {})
    for path in ("/usr/lib/libc.so.6", "./libx-1.so.2"):
        with pytest.raises(ImageFormatError, match="a path: the loader would open it on the host"):
            check_needed(libraries | {"other.so": Library(path, (path,))}, {})
    with pytest.raises(ImageFormatError, match=r"needs libGL\.so\.1"):
        check_needed({"pkg/ext.so": Library("", ("libGL.so.1",))}, {})


def test_a_library_that_is_left_out_is_missed_at_build_time(function: Callable[..., Path]) -> None:
    with pytest.raises(ImageFormatError, match=rf"numpy {NUMPY} needs lib\S*openblas"):
        EnclaveImage.from_function(function(), requirements=["numpy"], exclude=["numpy.libs/*"])


def test_another_machines_code_and_damaged_code_are_refused(function: Callable[..., Path]) -> None:
    content = extension_of("xxhash")
    other = content[:18] + (0xF3).to_bytes(2, "little") + content[20:]  # RISC-V
    for odd, message in ((other, "machine"), (content[:64], "inside the file")):
        with pytest.raises(ImageFormatError, match=message) as caught:
            EnclaveImage.from_function(function(), files={"own.so": odd})
        assert caught.value.file == "own.so"


def test_pages_and_labels(function: Callable[..., Path]) -> None:
    """Python and data are R, native code is R-X, each distribution by itself; the file tells all of it."""
    image = EnclaveImage.from_function(
        function(), requirements=["xxhash", "msgpack"], heap="1MiB", files={"own.so": extension_of("msgpack")}
    )
    versions = {name: importlib.metadata.version(name) for name in ("xxhash", "msgpack")}
    assert [(region.label, region.flags, region.chunks) for region in image.regions] == [
        ("program manifest", R, 0xFFFF),
        ("function", R, 0xFFFF),
        ("function, native code", RX, 0xFFFF),
        (f"msgpack {versions['msgpack']}", R, 0xFFFF),
        (f"msgpack {versions['msgpack']}, native code", RX, 0xFFFF),
        (f"xxhash {versions['xxhash']}", R, 0xFFFF),
        (f"xxhash {versions['xxhash']}, native code", RX, 0xFFFF),
        ("heap", RW, 0),
    ]
    ends = [region.end for region in image.regions]
    starts = [region.offset for region in image.regions]
    assert all(start - end >= 4096 for end, start in zip(ends[1:], starts[2:], strict=False))  # guard pages
    program = image.program
    assert program is not None
    assert [(at.name, at.version) for at in program.bundles] == sorted(versions.items())
    assert set(program.libraries) == {"own.so"}
    facts = {each["name"]: each for each in distribution_facts(image.regions)}
    assert facts["xxhash"]["native_files"] == 1
    assert facts["xxhash"]["pages"] > facts["xxhash"]["code_pages"] > 0


def test_a_bundle_is_the_same_in_every_image(function: Callable[..., Path]) -> None:
    one = EnclaveImage.from_function(function(), requirements=["xxhash"], heap=0)
    two = EnclaveImage.from_function(function(), requirements=["xxhash", "msgpack"], heap=0, data=b"x" * 9000)

    def contents(image: EnclaveImage) -> list[bytes]:
        regions = (region for region in image.regions if region.label.startswith("xxhash"))
        return [bytes(region.content) for region in regions if region.content is not None]

    assert contents(one) == contents(two)
    assert len(contents(one)) == 2


TABLE = Bundle(
    "Some-Name", "1.0", {"a.py": (4096, 5), "ext.so": (12288, 9)}, {"ext.so": Library("x", ("libc.so.6",))}
)


def test_tables_of_contents() -> None:
    encoded = tables.encode(TABLE)
    assert encoded[:8] == b"ENTURBOB"
    assert tables.decode(encoded + b"more") == TABLE
    assert tables.peek_length(encoded[: HEADER.size]) == len(encoded)
    for cut in range(0, len(encoded), 7):
        with pytest.raises(ImageFormatError):
            tables.decode(encoded[:cut])
    for at in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[at] ^= 0xFF
        try:
            tables.decode(damaged)
        except ImageFormatError:
            continue


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"version": 1},
        {"files": {"a.py": (0, -1)}},
        {"files": {"": (0, 1)}},
        {"files": {}},  # the library is no file then
    ],
)
def test_odd_tables_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ImageFormatError):
        tables.encode(Bundle(**{**vars(TABLE), **changes}))


def test_a_library_of_the_interpreters_is_never_taken_for_the_images() -> None:
    """The loader would bind to the one that is there, which nobody has measured."""
    program = Program(
        "handler:handler",
        {"handler.py": (0, 0), "ext.so": (0, 0), "libm.so.6": (0, 0)},
        {"ext.so": Library("", ("libm.so.6",)), "libm.so.6": Library("libm.so.6", ())},
    )
    files = Files(program, lambda offset, size: memoryview(b""))
    libraries = Libraries(files, MemoryFiles(files))
    message = r"ext\.so needs the image's libm\.so\.6.*another library"
    with pytest.raises(ImportError, match=message), libraries.opened("ext.so"):
        pytest.fail("it was opened")


def stand_ins() -> tuple[Libraries, list[str], list[str]]:
    """A module that needs two libraries in turn; what the loader is given, and what it is to refuse."""
    program = Program(
        "handler:handler",
        dict.fromkeys(("handler.py", "ext.so", "libone-0123456789.so", "libtwo-0123456789.so"), (0, 0)),
        {
            "ext.so": Library("", ("libone-0123456789.so",)),
            "libone-0123456789.so": Library("libone-0123456789.so", ("libtwo-0123456789.so",)),
            "libtwo-0123456789.so": Library("libtwo-0123456789.so", ("libc.so.6",)),
        },
    )
    files = Files(program, lambda offset, size: memoryview(b""))
    libraries = Libraries(files, MemoryFiles(files))
    loaded: list[str] = []
    refused: list[str] = []

    def load(path: str, mode: int) -> int:
        if "/" not in path:
            raise OSError("not loaded")  # RTLD_NOLOAD: the interpreter has none of that name
        name = os.readlink(path).partition(":")[2].partition(" ")[0]
        if name in refused:
            raise OSError(f"cannot load {name}")
        loaded.append(name)
        return 1

    libraries._dlopen = load
    return libraries, loaded, refused


def test_after_a_load_that_failed_the_next_one_starts_anew() -> None:
    """Else the loader would look for what is missing on the host."""
    libraries, loaded, refused = stand_ins()
    refused.append("libtwo-0123456789.so")
    for _ in range(2):
        with pytest.raises(ImportError, match="cannot load libtwo"), libraries.opened("ext.so"):
            pytest.fail("it was opened")
    assert loaded == []
    refused.clear()
    with libraries.opened("ext.so"):
        pass
    assert loaded == ["libtwo-0123456789.so", "libone-0123456789.so"]


def test_one_library_has_one_path() -> None:
    """By which the loader knows that it has it; what failed meanwhile does not count."""
    libraries, loaded, _ = stand_ins()
    with contextlib.suppress(RuntimeError), libraries.opened("libone-0123456789.so"):
        raise RuntimeError
    paths = []
    for _ in range(2):
        with libraries.opened("libone-0123456789.so") as path:
            paths.append(path)
    assert paths[0] == paths[1]
    with libraries.opened("ext.so"):
        pass
    assert loaded == ["libtwo-0123456789.so"]  # the other one was given to whoever opened it


def test_a_modules_own_code_runs_without_the_lock() -> None:
    """It imports others, perhaps one that another thread is importing, which needs the lock."""
    libraries, _, _ = stand_ins()
    done = threading.Event()

    def other() -> None:
        with libraries.opened("libtwo-0123456789.so"):
            done.set()

    with libraries.opened("ext.so"):
        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(20)
    thread.join(20)


def test_libraries_that_stand_for_others_are_refused() -> None:
    """DT_FILTER and DT_AUXILIARY: the loader would look for the other one on the host."""
    content = extension_of("xxhash")
    needed = read_library(content, "ext.so").needed
    assert needed
    at = next(
        at
        for at in range(0, len(content) - 16, 8)
        if content[at : at + 8] == (1).to_bytes(8, "little")  # DT_NEEDED
        and content[at + 16 : at + 24] in ((1).to_bytes(8, "little"), (12).to_bytes(8, "little"))
    )
    for tag, name in ((0x7FFFFFFF, "DT_FILTER"), (0x7FFFFFFD, "DT_AUXILIARY")):
        changed = content[:at] + tag.to_bytes(8, "little") + content[at + 8 :]
        with pytest.raises(ImageFormatError, match=name):
            read_library(changed, "ext.so")


def test_circles_need_long_names() -> None:
    """In their copies the names are written over with paths."""
    long, short = "libone-0123456789.so.1", "libone.so"
    for name, right in ((long, True), (short, False)):
        libraries = {
            "one": Library(name, ("libtwo-0123456789.so.1",)),
            "two": Library("libtwo-0123456789.so.1", (name,)),
        }
        if right:
            check_needed(libraries, {})
            continue
        with pytest.raises(
            ImageFormatError, match=r"two: the function: libraries that need each other.*libone\.so"
        ):
            check_needed(libraries, {})
