"""Options that several commands take, described once."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Scheme(enum.StrEnum):
    """How pages are measured."""

    ENTURBO = "enturbo"
    SGX = "sgx"


class Startup(enum.StrEnum):
    """Who measures, and when."""

    ENTURBO = "enturbo"
    SERIAL = "serial"


class WrlockChoice(enum.StrEnum):
    """What a store to a page that is not measured does, as of ``Runtime``."""

    WAIT = "wait"
    SHADOW = "shadow"


class GateChoice(enum.StrEnum):
    """What waits for a page's measurement."""

    WRITE = "write"
    EXECUTE = "execute"


class Prefer(enum.StrEnum):
    """Which end of the start matters more."""

    START = "start"
    VERIFIED = "verified"


ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="An enclave file.", show_default=False)]
ImageFiles = Annotated[list[Path], typer.Argument(metavar="FILE…", help="Enclave files.", show_default=False)]
InspectedFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="An enclave file, or a SIGSTRUCT alone.", show_default=False)
]
SigstructFile = Annotated[
    Path | None,
    typer.Option(
        "--sigstruct",
        metavar="S",
        help="The SIGSTRUCT; without it the one inside the file, else FILE.sig, and NAME.sig of NAME.sgxs.",
        show_default=False,
    ),
]
Edmm = Annotated[bool, typer.Option("--edmm", help="SGXv2: the heap comes by EAUG, so MRENCLAVE differs.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]
Domains = Annotated[int, typer.Option(metavar="D", help="Hash domains of scheme enturbo, 1..32.")]
Block = Annotated[int, typer.Option(metavar="B", help="Pages a block of scheme enturbo, 1..1024.")]
Signers = Annotated[
    list[str] | None,
    typer.Option(
        "--signer",
        metavar="M",
        help="A trusted MRSIGNER (64 hexadecimal digits) or a key file; may be repeated.",
        show_default=False,
    ),
]
MinSvn = Annotated[int, typer.Option(metavar="N", help="The least security version that is accepted.")]
ProductId = Annotated[
    int | None, typer.Option(metavar="N", help="The only product id that is accepted.", show_default=False)
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=256,
        metavar="N",
        help="Measuring processes; without it the usable cores, at most 8.",
        show_default=False,
    ),
]
Event = Annotated[
    str, typer.Option("--event", metavar="JSON", help="The event; @FILE reads a file, - reads stdin.")
]
