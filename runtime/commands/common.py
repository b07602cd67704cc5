"""What all commands share: exit codes, ways to print, and reading what the command line names.

Imports nothing heavy: ``enturbo --help`` loads this module, so rich, numpy and cryptography are imported in
the functions that need them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from ...shm.errors import (
    EnclaveDestroyed,
    EnturboError,
    EPCExhausted,
    GateTimeout,
    HandlerError,
    LaunchTimeout,
    MeasurementMismatch,
    SharedMemoryFull,
    SignatureError,
    UntrustedSigner,
    WorkerLost,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..image import EnclaveImage
    from ..keys import SigningKey
    from ..sigstruct import Sigstruct

OK: Final = 0
REFUSED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130

SIGSTRUCT_SUFFIX: Final = ".sig"
SGXS_SUFFIX: Final = ".sgxs"
MAX_EVENT_FILE: Final = 16 << 20  # bytes; a message to an enclave is no longer
PLAIN_WIDTH: Final = 100  # columns where output is no terminal


class InputError(EnturboError):
    """A file, an option or an event cannot be used (exit code 2)."""


class Refused(EnturboError):
    """A check that the command exists for has failed (exit code 1)."""


_FAILURES: Final = (
    Refused,
    UntrustedSigner,
    SignatureError,
    MeasurementMismatch,
    HandlerError,
    EnclaveDestroyed,
    GateTimeout,
    LaunchTimeout,
    WorkerLost,
    EPCExhausted,
    SharedMemoryFull,
)


def exit_code(error: BaseException) -> int:
    """1 for what was refused or went wrong while it ran, 2 for input that cannot be used."""
    return REFUSED if isinstance(error, _FAILURES) else BAD_INPUT


def complain(error: BaseException | str) -> None:
    """One line on stderr, ``enturbo: …``."""
    text = str(error)
    if isinstance(error, HandlerError):
        text = f"the handler failed ({error.kind}): {text.partition(chr(10) * 2)[0]}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = " ".join(text.split()) or type(error).__name__
    print(f"enturbo: {printable(line)}", file=sys.stderr)


def printable(text: str) -> str:
    """Without control characters: names and messages may come from files and enclaves."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


# --------------------------------------------------------------------------------------------------- printing


def console(quiet: bool = False) -> Console:
    """Rich output on stdout. What is no terminal gets a fixed width, so that tables stay tables."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, highlight=False, quiet=quiet)


def print_json(value: object) -> None:
    """A JSON text on stdout."""
    print(json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False))


def jsonable(value: Any) -> Any:
    """``value`` as JSON has it: bytes become base64 text, keys text, NaN and infinities null."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(jsonable(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    return value


def print_facts(facts: Mapping[str, object], title: str) -> None:
    """Names and values in two columns, under a title."""
    typer.secho(printable(title), bold=True)
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        typer.echo(f"{typer.style('  ' + name.ljust(width), dim=True)}  {printable(str(value))}")


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A spinner, or a bar of ``total`` steps, on stderr while it is a terminal. Yields "one step done"."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = [] if total is None else [BarColumn()]
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *bar, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(printable(title), total=total)
        yield lambda: shown.advance(task)


# ---------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """What goes wrong in here is the fault of the file ``path``: InputError."""
    try:
        yield
    except SignatureError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def load_image(path: Path, edmm: bool = False) -> EnclaveImage:
    """The image of a file; ``edmm``: with the heap by EAUG."""
    from ..image import EnclaveImage

    with reading(path):
        image = EnclaveImage.load(path)
    return image.as_edmm() if edmm else image


def load_key(path: Path) -> SigningKey:
    """A signing key's file."""
    from ..keys import SigningKey

    with reading(path):
        return SigningKey.load(path)


def find_sigstruct(path: Path, image: EnclaveImage, given: Path | None) -> Sigstruct | None:
    """``given``, else the SIGSTRUCT in the image's file, else ``FILE.sig`` beside it, else None.

    Fortanix's tools put ``NAME.sig`` beside ``NAME.sgxs``: that is looked for last.
    """
    from ..sigstruct import SIZE, Sigstruct

    if given is None and image.sigstructs:
        return image.sigstructs[0]
    beside = [path.with_name(path.name + SIGSTRUCT_SUFFIX)]
    if path.suffix == SGXS_SUFFIX:
        beside.append(path.with_suffix(SIGSTRUCT_SUFFIX))
    where = given if given is not None else next((each for each in beside if each.exists()), None)
    if where is None:
        return None
    with reading(where):
        with where.open("rb") as file:
            data = file.read(SIZE + 1)
        return Sigstruct.parse(data, file=str(where))


def parse_signer(text: str) -> bytes:
    """An MRSIGNER: 64 hexadecimal digits, or the file of a key, whose MRSIGNER it then is."""
    with contextlib.suppress(ValueError):
        mrsigner = bytes.fromhex(text)
        if len(mrsigner) == 32:
            return mrsigner
    if Path(text).is_file():
        return load_key(Path(text)).mrsigner
    raise InputError(f"signer: expected 64 hexadecimal digits or a key file, found {text!r}")


def parse_event(text: str) -> Any:
    """An event: JSON, or ``@file`` with JSON in it, or ``-`` for stdin."""
    what = "event"
    if text == "-":
        what, text = "event on stdin", sys.stdin.read(MAX_EVENT_FILE + 1)
    elif text.startswith("@"):
        what = text[1:]
        with reading(what), open(what, encoding="utf-8") as file:
            try:
                text = file.read(MAX_EVENT_FILE + 1)
            except UnicodeDecodeError as error:
                raise InputError(f"{what}: not UTF-8: {error.reason} at offset {error.start}") from None
    if len(text) > MAX_EVENT_FILE:
        raise InputError(f"{what}: expected at most {MAX_EVENT_FILE} characters")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is none of its numbers")
