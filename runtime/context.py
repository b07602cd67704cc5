"""What a handler gets beside its event: the image's files, its data, its heap and the host's functions.

Every access goes through the enclave's gate and waits for its own pages alone. Standard library only.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .gate import Gate
from .program import Program

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


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


class _RawFile(io.RawIOBase):
    """A file of the image: reading waits for the pages that are read, and for no others."""

    def __init__(self, name: str, gate: Gate, offset: int, size: int) -> None:
        super().__init__()
        self.name = name
        self.mode = "rb"
        self._gate = gate
        self._offset = offset
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}.get(whence)
        if start is None or start + offset < 0:
            raise ValueError(f"cannot seek to {offset} from {whence}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer).cast("B") as target:
            count = max(0, min(len(target), self._size - self._at))
            target[:count] = self._gate.read_view(self._offset + self._at, count)
        self._at += count
        return count


class Context:
    """The second argument of ``handler(event, context)``."""

    def __init__(self, program: Program, gate: Gate, ocall: Callable[[str, tuple[Any, ...]], Any]) -> None:
        self._program = program
        self._gate = gate
        self._ocall = ocall

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the image's files."""
        return tuple(self._program.files)

    def open(self, name: str) -> io.BufferedReader:
        """A binary file object on a file of the image. Raises FileNotFoundError, which lists the names."""
        return io.BufferedReader(_RawFile(name, self._gate, *self._extent(name)), 1 << 16)

    def view(self, name: str) -> memoryview:
        """A read-only view of a whole file without a copy, once all of it may be read."""
        return self._gate.read_view(*self._extent(name))

    @property
    def data(self) -> Memory:
        """The image's measured writable region. Raises LookupError if it has none."""
        return self._memory("data", self._program.data)

    @property
    def heap(self) -> Memory:
        """Zeroed memory in the EPC. Raises LookupError if the image has none."""
        return self._memory("heap", self._program.heap)

    def ocall(self, name: str, *args: Any) -> Any:
        """Call a function that the host registered, and wait for its answer.

        The host does not look at the call before the enclave is VERIFIED. Raises OcallError if the host
        refuses or its function fails, MessageError for arguments that a message cannot carry.
        """
        return self._ocall(name, args)

    def _extent(self, name: str) -> tuple[int, int]:
        extent = self._program.files.get(name)
        if extent is None:
            known = sorted(self._program.files)
            listed = ", ".join(known[:20]) + (f", … ({len(known)} files)" if len(known) > 20 else "")
            raise FileNotFoundError(f"the enclave carries no file {name!r}; it has: {listed or 'none'}")
        return extent

    def _memory(self, name: str, extent: tuple[int, int] | None) -> Memory:
        if extent is None:
            raise LookupError(f"the image has no {name} region")
        return Memory(name, self._gate, *extent)
