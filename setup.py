"""Builds the optional C extension; everything else stands in pyproject.toml.

``ENTURBO_NATIVE`` at build time: ``auto`` (default) builds ``enturbo.workers._sha256`` if a compiler works
and goes on without it otherwise; ``require`` makes a missing extension a build error; ``off`` leaves it out.
The extension uses the limited API, so one wheel serves CPython 3.11 and later. Without it the wheel is pure.
"""

from __future__ import annotations

import os

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, ExecError, PlatformError

CHOICES = ("auto", "require", "off")
NATIVE = os.environ.get("ENTURBO_NATIVE", "auto")
if NATIVE not in CHOICES:
    raise SystemExit(f"ENTURBO_NATIVE={NATIVE!r}: expected one of {', '.join(CHOICES)}")

FOLDER = "src/enturbo/workers"
SHA256 = Extension(
    "enturbo.workers._sha256",
    sources=[f"{FOLDER}/_sha256.c"],
    depends=[f"{FOLDER}/_sha256_{part}.h" for part in ("kernels", "x86", "arm", "lanes", "nt")],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    py_limited_api=True,
)


class BuildNative(build_ext):
    """With ``auto``, a compiler that is missing or fails costs speed, not the installation."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, ExecError, PlatformError, OSError) as error:
            if NATIVE == "require":
                what = f"ENTURBO_NATIVE=require, but the C extension cannot be built: {error}"
                raise PlatformError(what) from error
            print(
                f"enturbo: the C extension was not built ({error}).\n"
                "enturbo: going on without it: hashing uses hashlib + numpy, at about half the speed.\n"
                "enturbo: ENTURBO_NATIVE=require makes this an error.",
                flush=True,
            )
            # What was not built is neither installed nor named in the wheel's tag.
            self.extensions = []
            self.distribution.ext_modules = []


class Wheel(bdist_wheel):
    """Tags the wheel by what was built: cp311-abi3 with the extension, py3-none-any without it."""

    def run(self) -> None:
        self.run_command("build")
        if not self.distribution.has_ext_modules():
            self.root_is_pure = True
            self.py_limited_api = False
        super().run()


setup(
    ext_modules=[] if NATIVE == "off" else [SHA256],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
