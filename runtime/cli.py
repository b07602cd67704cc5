"""``enturbo``: the command line. This module puts the commands together and turns errors into exit codes.

    0    done; all that was checked holds
    1    refused: signer, signature, measurement; or what ran has failed
    2    input that cannot be used: a file, an option, an event
    130  interrupted

An error is one line on stderr. What takes time to import is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..shm.errors import EnturboError
from .commands import differing, images, inspecting, machine, measuring, running
from .commands.common import INTERRUPTED, OK, REFUSED, complain, exit_code

app = typer.Typer(
    name="enturbo",
    help="Start measured enclaves in parallel, on a simulated EPC in shared memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    machine.demo,
    images.build,
    images.keygen,
    images.sign,
    measuring.measure,
    measuring.verify,
    inspecting.inspect,
    differing.diff,
    running.run,
    running.compare,
    machine.doctor,
):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        print(f"enturbo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; None: the process's own); the exit code."""
    # What the library logs it also raises: without this each refusal would be said twice.
    quiet = logging.NullHandler()
    logger = logging.getLogger("enturbo")
    logger.addHandler(quiet)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not try to flush it again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except (EnturboError, OSError) as error:
        complain(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        logger.removeHandler(quiet)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(None if arguments is None else list(arguments), prog_name="enturbo")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else OK
    return OK


if __name__ == "__main__":
    sys.exit(main())
