"""What a handler gets beside its event: the image's files, its data, its heap and the host's functions.

Every access goes through the enclave's gate and waits for its own pages alone. Standard library only.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .files import MOUNT, Files, name_of
from .gate import Gate
from .image_file import ImageFile
from .libraries import MemoryFiles
from .program import Program

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Memory:
    """A writable region of the enclave. Offsets and sizes are bytes from the region's start.

    ``context.data`` is measured: it can be read as soon as it is there and written once it has been
    measured. ``context.heap`` is zero at first and waits for neither. Raises IndexError outside of the
    region, and GateTimeout.
    """

    def __init__(self, name: str, gate: Gate, offset: int, size: int) -> None:
        self._name = name
        self._gate = gate
        self._offset = offset
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, offset: int = 0, n: int | None = None) -> bytes:
        """A copy of ``n`` bytes (all that follow, if None), once they are VALID."""
        return bytes(self._gate.read_view(*self._range(offset, n)))

    def view(self, offset: int = 0, n: int | None = None) -> memoryview:
        """A writable view without a copy, once the pages may be written."""
        return self._gate.write_view(*self._range(offset, n))

    def write(self, offset: int, data: ReadableBuffer) -> int:
        """Store ``data`` at ``offset``, once the pages may be written; the number of bytes."""
        with memoryview(data) as source:
            self._gate.write_view(*self._range(offset, source.nbytes))[:] = source.cast("B")
            return source.nbytes

    def _range(self, offset: int, n: int | None) -> tuple[int, int]:
        size = self.size - offset if n is None else n
        if offset < 0 or size < 0 or offset + size > self.size:
            raise IndexError(
                f"{self._name} has {self.size} bytes; offset {offset} and size {n} do not lie inside"
            )
        return self._offset + offset, size


class Context:
    """The second argument of ``handler(event, context)``.

    A file's name is its path in the function's folder, ``site-packages/…`` for one that a distribution
    brought along, or the path of either beneath ``/enclave``.
    """

    def __init__(
        self,
        program: Program,
        gate: Gate,
        files: Files,
        memory: MemoryFiles,
        ocall: Callable[[str, tuple[Any, ...]], Any],
    ) -> None:
        self._program = program
        self._gate = gate
        self._files = files
        self._memory = memory
        self._ocall = ocall

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files in the function's folder."""
        return tuple(self._program.files)

    def open(self, name: str) -> io.BufferedReader:
        """A binary file object on a file of the image. Raises FileNotFoundError, which lists the names."""
        name = self._known(name)
        return io.BufferedReader(ImageFile(name, name, self._files, self._memory), 1 << 16)

    def view(self, name: str) -> memoryview:
        """A read-only view of a whole file without a copy, once all of it may be read."""
        return self._gate.read_view(*self._files.extents[self._known(name)])

    def path(self, name: str) -> str:
        """A path by which C code can open a file of the image, which no path of the system leads to.

        It names a read-only copy in memory, made at the first call (below /proc/self/fd, so what goes by a
        file's ending has to be told otherwise), and is good until the enclave ends.
        """
        return self._memory.path(self._known(name))

    @property
    def data(self) -> Memory:
        """The image's measured writable region. Raises LookupError if it has none."""
        return self._region("data", self._program.data)

    @property
    def heap(self) -> Memory:
        """Zeroed memory in the EPC. Raises LookupError if the image has none."""
        return self._region("heap", self._program.heap)

    def ocall(self, name: str, *args: Any) -> Any:
        """Call a function that the host registered, and wait for its answer.

        The host does not look at the call before the enclave is VERIFIED. Raises OcallError if the host
        refuses or its function fails, MessageError for arguments that a message cannot carry.
        """
        return self._ocall(name, args)

    def _known(self, name: str) -> str:
        if name.startswith(MOUNT):
            name = name_of(name) or name
        if name not in self._files.extents:
            known = sorted(self._program.files)
            listed = ", ".join(known[:20]) + (f", … ({len(known)} files)" if len(known) > 20 else "")
            raise FileNotFoundError(f"the enclave carries no file {name!r}; it has: {listed or 'none'}")
        return name

    def _region(self, name: str, extent: tuple[int, int] | None) -> Memory:
        if extent is None:
            raise LookupError(f"the image has no {name} region")
        return Memory(name, self._gate, *extent)
