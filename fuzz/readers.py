"""Coverage-guided fuzzing of all readers: ``make fuzz``. Takes libFuzzer's options, too.

Whatever the bytes: an image, a SIGSTRUCT, or ImageFormatError or SignatureError; in at most one second of
processor time and 200 MiB. Anything else ends the run, and the input is left in the folder of findings::

    python fuzz/readers.py build/fuzz/crash-…      runs one input again
"""

from __future__ import annotations

import argparse
import contextlib
import os
import struct
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["enturbo.runtime", "enturbo.shm.errors"]):
    from enturbo import EnclaveImage, ImageFormatError, SignatureError, Sigstruct
    from enturbo.runtime import inspection, sigstruct
    from enturbo.runtime.formats import enclave_file

import seeds
import xxhash

SECONDS = 1.0
MEMORY = 200 << 20
FINDINGS = Path("build/fuzz")
MAX_LENGTH = 1 << 16  # bytes of an input
MEASURED_PAGES = 64  # of an image that is measured, too


class TooMuch(Exception):
    """An input took more time or memory than a file may."""


def one_input(data: bytes) -> None:
    """Load it as an enclave file and parse it as a SIGSTRUCT."""
    before = reset_peak()
    started = time.process_time()
    load(data)
    with contextlib.suppress(SignatureError):
        inspection.sigstruct_facts(Sigstruct.parse(data[: sigstruct.SIZE]))
    seconds, memory = time.process_time() - started, peak() - before
    if seconds > SECONDS or memory > MEMORY:
        raise TooMuch(f"{seconds:.2f} s, {memory >> 20} MiB")


def load(data: bytes) -> None:
    """From a file of its own: an image maps its file."""
    fd = os.memfd_create("fuzz")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        with EnclaveImage.load(f"/proc/self/fd/{fd}") as image:
            for each in (image, *image.variants):
                inspection.image_facts(each)
                for region in each.regions:
                    if region.content is not None:
                        # A view that is longer than its file would end this process here.
                        bytes(memoryview(region.content).cast("B")[-1:])
                if each.page_count <= MEASURED_PAGES:
                    each.measure("sgx", hasher="hashlib")
    except (ImageFormatError, SignatureError):
        pass
    finally:
        os.close(fd)


def reset_peak() -> int:
    """Bytes resident now, and the peak counted from here on (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """VmHWM, bytes."""
    status = Path("/proc/self/status").read_bytes()
    return int(status.partition(b"VmHWM:")[2].split()[0]) << 10


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's mutation; an ``.enclave`` file gets its checksums again, as no luck would hit them."""
    out = bytearray(atheris.Mutate(data, max_size))
    header = enclave_file.HEADER
    if out.startswith(enclave_file.MAGIC) and len(out) >= header.size and seed % 4:
        size = struct.unpack_from("<Q", out, header.offset("manifest_size"))[0]
        manifest = bytes(out[header.size : header.size + size]) if size < len(out) else b""
        sums = {"manifest_checksum": xxhash.xxh3_64_intdigest(manifest), "file_size": len(out)}
        for name, value in sums.items():
            struct.pack_into("<Q", out, header.offset(name), value)
        at = header.offset("header_checksum")
        struct.pack_into("<Q", out, at, xxhash.xxh3_64_intdigest(bytes(out[:at])))
    return bytes(out)


def main() -> None:
    """Write the seeds and fuzz; libFuzzer ends the process, with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--only", default="", help="seeds whose names begin so")
    ours, theirs = parser.parse_known_args()
    corpus = FINDINGS / f"corpus{ours.only}"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, data in seeds.seeds():
        if name.startswith(ours.only):
            (corpus / f"seed-{name}").write_bytes(data)
    arguments = [sys.argv[0], f"-max_len={MAX_LENGTH}", f"-artifact_prefix={FINDINGS}/", "-rss_limit_mb=0"]
    if not any(not each.startswith("-") for each in theirs):
        arguments += [f"-max_total_time={ours.seconds}", "-print_final_stats=1", str(corpus)]
    atheris.Setup([*arguments, *theirs], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
