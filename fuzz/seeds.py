"""Small files of every format to start from. The tests' builders make them: each part of a format once.

The builders stand in the conftest modules of the formats' tests, which are loaded from their paths.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from enturbo import EnclaveImage, Measurement, Region, SigningKey

TESTS = Path(__file__).resolve().parents[1] / "tests"


def seeds() -> Iterator[tuple[str, bytes]]:
    """(name, bytes)."""
    image = EnclaveImage(
        [
            Region(0, 2, 0x205, b"code" * 900),
            Region(0x3000, 1, 0x100, struct.pack("<QQQIIQ", 0, 0, 0x4000, 0, 2, 0x10)),
            Region(0x4000, 3, 0x203, fill=0xCCCC_CCCC, measured=0x00FF),
            Region(0x10000, 50, 0x203, measured=False),
        ],
        size=1 << 20,
        dynamic=[Region(0x80000, 4, 0x203, measured=False)],
    )
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder, "seed.enclave"))
        yield "enclave", Path(folder, "seed.enclave").read_bytes()
    key = SigningKey.generate()
    signed = key.sign(Measurement(bytes(32), "sgx"), svn=1).encode()
    yield "sigstruct", signed
    yield "sigstruct-enturbo", key.sign(image).encode()
    yield from _intel(signed)
    yield from _open_enclave(signed)
    yield from _sgxs()


def _intel(signed: bytes) -> Iterator[tuple[str, bytes]]:
    kit = builders("formats")
    segments = [
        kit.Seg(0, kit.pattern(0x2345, 1), flags=5),
        kit.Seg(0x3345, kit.pattern(0x1000, 2), flags=4),
        kit.Seg(0x5100, kit.pattern(0x800, 3), memsz=0x2800, flags=6),
    ]
    layout = [
        kit.Entry(0x10000, 4, attributes=1),
        kit.Entry(0x14000, 2, flags=0, attributes=0),
        kit.Entry(0x16000, 2, fill=0xCCCC_CCCC),
        kit.Entry(0x18000, 1, flags=0x100, content=kit.tcs(0x1000, 0x3000)),
        kit.Entry(0x19000, 2),
        kit.Entry(0x1B000, 1, content=b"thread data"),
        kit.Group(5, 2, 0x8000),
    ]
    for version in ((1, 3), (1, 4), (2, 4), (11, 5), (13, 2)):
        block = kit.Block(version=version, layout=layout, patches=[(0x100, b"patch")], sigstruct=signed)
        if version[0] > 10:
            block.elrange = (0x1000, 0, 1 << 21)
        yield f"intel-{version[0]}.{version[1]}", kit.SdkFile(segments, [block]).build()
    several = [kit.Block(version=version, layout=layout) for version in ((2, 4), (2, 1), (1, 4))]
    several.append(kit.Block(version=(11, 5), layout=layout, elrange=(0x1000, 0, 1 << 21)))
    relocated = {"rela": [(0x10, 8), (0x3FFC, 8)], "jmprel": [(0x5100, 7)], "dynamic": [(22, 0)]}
    yield "intel-several", kit.SdkFile(segments, several, **relocated).build()


def _open_enclave(signed: bytes) -> Iterator[tuple[str, bytes]]:
    kit = builders("formats_other")
    yield "open-enclave", kit.OpenEnclave(sigstruct=signed).build()
    yield "open-enclave-tls", kit.OpenEnclave(tdata=b"tdata" * 9, tls_align=64, tbss=100).build()
    yield "open-enclave-plain", kit.OpenEnclave(rela=None, heap=0, tcs=1).build()


def _sgxs() -> Iterator[tuple[str, bytes]]:
    kit = builders("formats_other")
    records = kit.ecreate() + kit.eadd(0, 0x205)
    records += b"".join(kit.chunk(at * 256, bytes([at]) * 256) for at in range(16))
    records += kit.eadd(0x1000, 0x203) + kit.chunk(0x1100, bytes(256))
    records += kit.chunk(0x1200, bytes(256), b"UNMEASRD") + kit.eadd(0x2000, 0x100) + kit.eadd(0x4000, 0x203)
    yield "sgxs", records
    yield "sgxs-unsized", kit.ecreate(tag=b"UNSIZED")


def builders(folder: str) -> ModuleType:
    """The conftest module of a folder of tests."""
    name = f"enturbo_seeds_{folder}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / folder / "conftest.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"no builders in {folder}")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
