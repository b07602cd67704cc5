"""EnclaveImage: what is loaded into an enclave, as a list of regions in EADD order.

Every way to get an image ends here (a function's folder, an image file, hand-made regions), and everything
that is done with one starts here: copying, measuring, signing, saving. An image is never materialised as
pages.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from ..shm.errors import ImageFormatError
from .labels import program_of
from .measurement import DEFAULT_BLOCK, DEFAULT_DOMAINS, Measurement
from .measuring import MeasureJob, measure_images
from .program import Program
from .region import MAX_PAGES, Buffer, Region

if TYPE_CHECKING:
    from .backing import Backing
    from .sigstruct import Sigstruct
    from .store import Store

__all__ = ["Buffer", "EnclaveImage", "Region"]

MAX_SIZE: Final = 1 << 63
PathLike = str | os.PathLike[str]


class EnclaveImage:
    """Regions in EADD order, and what ECREATE is told.

    Args:
        regions: added (EADD) and measured in this order.
        size: SECS.SIZE, bytes, a power of two.
        ssa_frame_size: SECS.SSAFRAMESIZE, pages.
        dynamic: zero regions that EAUG brings after EINIT's record stream (SGXv2); never measured.
        sigstructs: those that the file carried.
        backing: the file that holds the contents of the regions without a layer, where there is one.
        details: what the file's format says besides, for ``enturbo inspect``: plain values by name.
        variants: other images that the same file describes, for other loaders, with sigstructs of their own.

    Raises ImageFormatError for overlapping regions, regions outside ``size`` and the like.
    """

    def __init__(
        self,
        regions: Iterable[Region],
        *,
        size: int,
        ssa_frame_size: int = 1,
        dynamic: Iterable[Region] = (),
        sigstructs: Iterable[Sigstruct] = (),
        backing: Backing | None = None,
        details: Mapping[str, Any] | None = None,
        variants: Iterable[EnclaveImage] = (),
    ) -> None:
        self.regions: Final[tuple[Region, ...]] = tuple(regions)
        self.dynamic: Final[tuple[Region, ...]] = tuple(dynamic)
        self.size: Final = size
        self.ssa_frame_size: Final = ssa_frame_size
        self.sigstructs: Final[tuple[Sigstruct, ...]] = tuple(sigstructs)
        self.backing = backing
        self.details: Final[Mapping[str, Any]] = MappingProxyType(dict(details or {}))
        self.variants: Final[tuple[EnclaveImage, ...]] = tuple(variants)
        self._program: Program | None = None
        _check_secs(size, ssa_frame_size)
        _check_dynamic(self.dynamic)
        _check_places(self.regions + self.dynamic, size)

    @classmethod
    def from_function(
        cls,
        folder: PathLike,
        *,
        heap: int | str = "64MiB",
        data: bytes | PathLike | int | None = None,
        handler: str = "handler:handler",
        files: Mapping[str, PathLike | bytes] | None = None,
        exclude: Sequence[str] = (),
        requirements: Iterable[str] = (),
        site: Sequence[PathLike] | None = None,
        store: Store | None = None,
        bytecode: bool = False,
    ) -> EnclaveImage:
        """The image of a function: a folder of modules and data files, and what it requires.

        The same folder and the same distributions give the same image, on any machine.

        Args:
            folder: every ``.py`` file becomes a module (folders are packages), every file can be opened by
                its path in the folder. Left out: ``__pycache__``, ``*.pyc``, names that begin with a dot, and
                what ``exclude`` or the folder's ``enclave-ignore.txt`` (one pattern a line) names.
            heap: zero memory, bytes or a text such as ``"64MiB"``; rounded up to pages; 0: none.
            data: what the measured writable region holds: bytes, a file's content, or so many zero bytes.
            handler: ``"module:function"``.
            files: more read-only files, by name: a path or the bytes themselves.
            exclude: patterns as of ``fnmatch``, matched against a file's path in the folder and its name, and
                likewise for files of distributions, below site-packages.
            requirements: installed distributions that come along, and what they require in turn, as pip names
                them: ``["Pillow", "requests>=2.31"]``. They are found as they are installed; nothing is
                downloaded.
            site: folders where distributions are looked for; None: where this interpreter looks.
            store: where distributions are kept as pages, once for all images; None: the user's own
                (``Store.default()``). It is left alone where it cannot be used.
            bytecode: carry every module compiled, too. Imports are then faster, and the image depends on the
                exact version of the interpreter that builds it.

        Raises ImageFormatError (no such handler module, a link that leads out of the folder, a distribution
        that is not installed or needs a library that no wheel brings, …) and OSError.
        """
        from .function import build_image

        return build_image(
            folder,
            heap=heap,
            data=data,
            handler=handler,
            files=files or {},
            exclude=exclude,
            requirements=requirements,
            site=site,
            store=store,
            with_bytecode=bytecode,
        )

    @classmethod
    def load(cls, path: PathLike, *, store: Store | None = None) -> EnclaveImage:
        """Read an enclave file of any known format, told by its content.

        The file is mapped, not read; it must not be changed in place while the image is used
        (:meth:`save` replaces a file and never does that). ``store``: where layers are that the file names;
        None: the user's own (``Store.default()``). Raises ImageFormatError (no such layer, …) and OSError.
        """
        from .formats import load

        return load(path, store)

    def save(self, path: PathLike, *, store: Store | None = None) -> None:
        """Write an ``.enclave`` file; a file of that name is replaced atomically.

        Without a ``store`` everything stands in the file. With one the file names the layers that the image
        has from a store, and they are put into this one, where they are not. Raises OSError.
        """
        from .formats.enclave_file import save

        save(self, path, store)

    def as_edmm(self) -> EnclaveImage:
        """The same image for SGXv2: its heap comes by EAUG instead of EADD.

        The heap is then no part of the record stream, so MRENCLAVE differs, as on real hardware. Heap is
        every zero, unmeasured region with flags R|W|REG. Both images share one mapping of a file.
        """
        return EnclaveImage(
            (region for region in self.regions if not region.is_heap),
            size=self.size,
            ssa_frame_size=self.ssa_frame_size,
            dynamic=(*self.dynamic, *(region for region in self.regions if region.is_heap)),
            backing=self.backing,
        )

    def measure(
        self,
        scheme: str = "enturbo",
        *,
        domains: int = DEFAULT_DOMAINS,
        block: int = DEFAULT_BLOCK,
        workers: int = 0,
        hasher: str | None = None,
    ) -> Measurement:
        """MRENCLAVE of the image, without any EPC.

        Args:
            scheme: ``"enturbo"`` or ``"sgx"``.
            domains, block: D and B of scheme ``enturbo``; no part of ``sgx``.
            workers: how many hash at the same time; 0: as many as are of use. Never changes the value.
            hasher: ``"reference"``, ``"hashlib"`` or ``"native"``; None: the best there is.

        Raises SchemeError and EnturboError (no such hasher).
        """
        job = MeasureJob(self, scheme, domains, block)
        return measure_images([job], workers=workers, hasher=hasher)[0]

    @property
    def page_count(self) -> int:
        """Pages in the record stream (EADD)."""
        return sum(region.page_count for region in self.regions)

    @property
    def dynamic_pages(self) -> int:
        """Pages that EAUG brings."""
        return sum(region.page_count for region in self.dynamic)

    @property
    def epc_pages(self) -> int:
        """EPC pages that a launch needs."""
        return self.page_count + self.dynamic_pages

    @property
    def measured_pages(self) -> int:
        """Pages of which at least one chunk is measured."""
        return sum(region.page_count for region in self.regions if region.chunks)

    @property
    def program(self) -> Program | None:
        """The program manifest, if the first region stands at offset 0 and begins with its magic.

        Raises ImageFormatError if it is damaged. Nothing may be concluded from it before the image has been
        measured: an attacker writes what he likes here.
        """
        if self._program is None:
            self._program = program_of(self.regions)
        return self._program

    @property
    def handler(self) -> str | None:
        """``"module:function"``, or None for an image without a readable program manifest.

        A damaged manifest is None, too: such an image can still be measured, and is refused for its value.
        """
        try:
            return None if self.program is None else self.program.handler
        except ImageFormatError:
            return None

    def close(self) -> None:
        """Close the file behind the image, if any. Its ``as_edmm()`` cannot be used either then.

        Not before its launches are MEASURED: they read it. Without this it is closed with the image. Layers
        stay open: other images have them, too, and they close with the last one.
        """
        backing, self.backing = self.backing, None
        if backing is None:
            return
        for region in self.regions:
            if region.layer is None and isinstance(region.content, memoryview):
                with contextlib.suppress(
                    BufferError
                ):  # someone reads it: the mapping goes with the last view
                    region.content.release()
        backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        dynamic = f" + {self.dynamic_pages} by EAUG" if self.dynamic else ""
        return (
            f"<EnclaveImage {self.page_count} pages{dynamic} in {len(self.regions)} regions,"
            f" {self.measured_pages} measured, size {self.size:#x}, handler {self.handler}>"
        )


def _check_secs(size: int, ssa_frame_size: int) -> None:
    if type(size) is not int or not 1 <= size <= MAX_SIZE or size & (size - 1):
        raise ImageFormatError("SECS.SIZE", expected=f"a power of two in 1..{MAX_SIZE:#x}", found=repr(size))
    if type(ssa_frame_size) is not int or not 1 <= ssa_frame_size <= 0xFFFF_FFFF:
        raise ImageFormatError("SECS.SSAFRAMESIZE", expected="1..2**32-1 pages", found=repr(ssa_frame_size))


def _check_dynamic(regions: Sequence[Region]) -> None:
    for region in regions:
        if not region.is_heap:
            raise ImageFormatError(
                "dynamic region",
                offset=region.offset,
                expected="zero, unmeasured, flags R|W|REG: EAUG brings nothing else",
                found=f"flags {region.flags:#x}, measured chunks {region.chunks:#x}",
            )


def _check_places(regions: Sequence[Region], size: int) -> None:
    pages = 0
    end = 0
    for region in sorted(regions, key=lambda region: region.offset):
        if region.offset < end:
            raise ImageFormatError(
                "regions overlap",
                offset=region.offset,
                expected=f"none before {end:#x}",
                found=hex(region.offset),
            )
        end = region.end
        pages += region.page_count
    if end > size:
        raise ImageFormatError(
            "region outside SECS.SIZE", offset=end, expected=f"at most {size:#x}", found=hex(end)
        )
    if pages >= MAX_PAGES:
        raise ImageFormatError("pages", expected=f"fewer than {MAX_PAGES}", found=pages)
