"""From a distribution to its bundle, built once: pages that every image with that distribution carries.

    files ─► table of contents, data, native code ─► an object of the store ─► regions of an image

The form is :mod:`enturbo.runtime.bundle`'s. Building reads every file and compares it with its RECORD. A
store remembers by names, sizes, times and recorded hashes what came of it, so the same distribution is not
read again; the object itself is named by its content, and is measured in every image like all else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..shm.errors import ImageFormatError
from ..shm.layout import PAGE_SIZE
from . import bundle as tables
from . import bytecode
from .bundle import Bundle
from .distributions import Distribution
from .files import SITE_MOUNT
from .manifests import HEADER, Extent
from .natives import natives
from .region import EXECUTE, READ, TYPE_REG, Region
from .sizes import pages_of

if TYPE_CHECKING:
    from .backing import Backing
    from .store import Store

log = logging.getLogger("enturbo.build")

_READ_ONLY: Final = TYPE_REG | READ
_CODE: Final = TYPE_REG | READ | EXECUTE
_ALIGN: Final = 16  # bytes; sources are small and many


@dataclass(frozen=True)
class BuiltBundle:
    """A bundle's table and its pages: ``pages`` holds data pages, then directly the code pages.

    ``layer``: the file of the store that has them; None: they are in memory.
    """

    table: Bundle
    data_pages: int
    pages: memoryview
    layer: Backing | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes in an enclave, with the guard page before its code."""
        return len(self.pages) + (PAGE_SIZE if self.code_pages else 0)

    @property
    def code_pages(self) -> int:
        """Pages of native code."""
        return len(self.pages) // PAGE_SIZE - self.data_pages

    def regions(self, offset: int) -> Iterator[Region]:
        """Its regions in an enclave, from ``offset`` on."""
        split = self.data_pages * PAGE_SIZE
        for start, pages, flags in ((0, self.data_pages, _READ_ONLY), (split, self.code_pages, _CODE)):
            if pages:
                yield Region(
                    offset + start + (PAGE_SIZE if start else 0),
                    pages,
                    flags,
                    content=self.pages[start : start + pages * PAGE_SIZE],
                    file_page=None if self.layer is None else start // PAGE_SIZE,
                    layer=self.layer,
                )


def bundle_of(distribution: Distribution, store: Store, *, with_bytecode: bool = False) -> BuiltBundle:
    """The bundle of a distribution, from the store if it has it. Raises ImageFormatError and OSError.

    ``with_bytecode``: its modules compiled, too (:mod:`enturbo.runtime.bytecode`). Where the store
    cannot be written the pages are in memory.
    """
    key = _key(distribution, bytecode.tag() if with_bytecode else "")
    layer = _kept(store, key)
    if layer is None:
        built = _in_memory(distribution, with_bytecode)
        try:
            digest = store.put([built.pages])
            store.remember(key, digest)
        except OSError as error:
            log.warning("%s is built, and not kept: %s", distribution, error)
            return built
        layer = store.open(digest)
    view = layer.view
    table = tables.decode(view[: tables.peek_length(view[: HEADER.size])])
    return BuiltBundle(table, _data_pages(table, len(view) // PAGE_SIZE), view, layer)


def _kept(store: Store, key: str) -> Backing | None:
    """What the store has under this key; None, too, for an object that is damaged, which goes away."""
    digest = store.lookup(key)
    if digest is None:
        return None
    try:
        return store.open(digest)
    except ImageFormatError as error:
        log.warning("built again: %s", error)
        with contextlib.suppress(OSError):
            store.path(digest).unlink(missing_ok=True)
    except OSError as error:
        log.warning("built again: %s", error)
    return None


def _key(distribution: Distribution, interpreter: str) -> str:
    rows = [(file.name, file.size, file.modified, file.digest) for file in distribution.files]
    text = repr(("bundle", tables.VERSION, interpreter, distribution.name, distribution.version, rows))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _data_pages(table: Bundle, pages: int) -> int:
    """Code follows the data and a guard page, so its first page tells."""
    starts = [table.files[name][0] for name in table.libraries]
    return min(starts) // PAGE_SIZE - 1 if starts else pages


def _in_memory(distribution: Distribution, with_bytecode: bool) -> BuiltBundle:
    contents = {file.name: file.read() for file in distribution.files}
    if with_bytecode:
        contents |= bytecode.compiled(contents, SITE_MOUNT)
    try:
        libraries = natives(contents.items())
    except ImageFormatError as error:
        raise ImageFormatError(
            f"{distribution}: {error.what}",
            file=error.file,
            offset=error.offset,
            expected=error.expected,
            found=f"{error.found}; such a file can be left out (--exclude)",
        ) from None
    others = [name for name in contents if name not in libraries]
    table_pages = 1
    while True:  # the table's own size moves all that follows it, so try until it fits
        extents, data_end = _place(contents, others, table_pages * PAGE_SIZE, _ALIGN)
        code_start = pages_of(data_end) * PAGE_SIZE + PAGE_SIZE
        code, code_end = _place(contents, sorted(libraries), code_start, PAGE_SIZE)
        files: dict[str, Extent] = dict(sorted((extents | code).items()))
        table = Bundle(distribution.name, distribution.version, files, dict(sorted(libraries.items())))
        try:
            encoded = tables.encode(table)
        except ImageFormatError as error:
            raise ImageFormatError(
                f"{distribution}: {error.what}",
                expected=f"{error.expected}; leave files out (--exclude)",
                found=error.found,
            ) from None
        if pages_of(len(encoded)) <= table_pages:
            break
        table_pages = pages_of(len(encoded))
    data_pages = pages_of(data_end)
    code_size = pages_of(code_end - code_start) * PAGE_SIZE if libraries else 0
    pages = bytearray(data_pages * PAGE_SIZE + code_size)
    pages[: len(encoded)] = encoded
    for name, (offset, size) in files.items():
        at = offset - PAGE_SIZE if name in libraries else offset  # no guard page here
        pages[at : at + size] = contents[name]
    return BuiltBundle(table, data_pages, memoryview(pages).toreadonly())


def _place(
    contents: Mapping[str, bytes], names: Iterable[str], start: int, align: int
) -> tuple[dict[str, Extent], int]:
    """Where each file stands, from ``start`` on, each at a multiple of ``align``, and where they end."""
    end, extents = start, {}
    for name in names:
        end += -end % align
        extents[name] = (end, len(contents[name]))
        end += len(contents[name])
    return extents, end
