"""``run`` and ``compare``: enclaves that live."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...shm.errors import EnturboError, HandlerError
from . import options
from .common import (
    REFUSED,
    InputError,
    Refused,
    complain,
    console,
    find_sigstruct,
    load_image,
    load_key,
    parse_event,
    parse_signer,
    print_json,
    progress,
    reading,
)

if TYPE_CHECKING:
    from ..enclave import Enclave
    from ..sigstruct import Sigstruct


def run(
    image: options.ImageFile,
    event: options.Event = "{}",
    signer: options.Signers = None,
    any_signer: Annotated[bool, typer.Option("--any-signer", help="Trust whoever signed.")] = False,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Run without a SIGSTRUCT: MEASURED, never VERIFIED.")
    ] = False,
    min_svn: options.MinSvn = 0,
    product_id: options.ProductId = None,
    sigstruct: options.SigstructFile = None,
    edmm: options.Edmm = False,
    startup: Annotated[
        options.Startup, typer.Option(help="Who measures, and when.")
    ] = options.Startup.ENTURBO,
    prefer: Annotated[
        options.Prefer, typer.Option(help="Copy everything first (start), or as it is hashed (verified).")
    ] = options.Prefer.START,
    gate: Annotated[
        options.GateChoice, typer.Option(help="What waits for a page's measurement.")
    ] = options.GateChoice.WRITE,
    wrlock: Annotated[
        options.WrlockChoice, typer.Option(help="A store to an unmeasured page: waits, or goes to a copy.")
    ] = options.WrlockChoice.WAIT,
    require_enforcement: Annotated[
        bool, typer.Option("--require-enforcement", help="Refuse to run where the kernel enforces nothing.")
    ] = False,
    read: Annotated[
        list[str] | None,
        typer.Option("--read", metavar="PATH", help="A path of the host that the handler may read."),
    ] = None,
    write: Annotated[
        list[str] | None,
        typer.Option("--write", metavar="DIR", help="A folder in which it may write after VERIFIED."),
    ] = None,
    connect: Annotated[
        list[str] | None,
        typer.Option(
            "--connect",
            metavar="TARGET",
            help="What it may connect to after VERIFIED: host:port, udp:host:port, unix:/path.",
        ),
    ] = None,
    workers: options.Workers = None,
    epc: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of the EPC; without it the image's.", show_default=False),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="What the handler may take.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="T.json", help="Write the timeline; Perfetto opens it.", show_default=False),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="The runtime's log and the handler's traceback on stderr.")
    ] = False,
) -> None:
    """Start an enclave, call its handler with one event, print the result as JSON.

    Nothing else goes to stdout. In the result, bytes are base64 text; NaN and infinities are null. What the
    enclave printed goes to stderr once it is released. A signer must be named, or --any-signer.
    """
    from ..compare import epc_size
    from ..host import Runtime
    from ..policy import Policy

    given = parse_event(event)
    policy = Policy(read=tuple(read or ()), write=tuple(write or ()), connect=tuple(connect or ()))
    signers = [parse_signer(text) for text in signer or ()]
    if trace is not None:
        with reading(trace):
            trace.touch()  # rather now than with a result in hand
    with _log_on_stderr(verbose), load_image(image, edmm) as loaded:
        if loaded.handler is None:
            raise InputError(f"{image}: it names no handler: it can be measured and verified, not called")
        signed = find_sigstruct(image, loaded, sigstruct)
        _check_policy(image, signed, bool(signers) or any_signer, allow_unsigned)
        with (
            Runtime(
                epc=epc_size(loaded, wrlock.value) if epc is None else epc,
                workers=workers,
                signers=signers,
                any_signer=any_signer,
                allow_unsigned=allow_unsigned,
                min_svn=min_svn,
                product_id=product_id,
                gate=gate.value,
                wrlock=wrlock.value,
                require_enforcement=require_enforcement,
                policy=policy,
            ) as runtime,
            runtime.launch(loaded, signed, startup=startup.value, prefer=prefer.value) as enclave,
        ):
            try:
                result = _call(enclave, given, timeout, verbose)
            finally:
                if trace is not None:
                    _save_trace(enclave, loaded.page_count, trace)
    print_json(result)


def _check_policy(image: Path, signed: Sigstruct | None, trusting: bool, allow_unsigned: bool) -> None:
    """Say in the command line's own words what is missing."""
    if signed is None and not allow_unsigned:
        raise Refused(
            f"{image}: it is unsigned: sign it, name a SIGSTRUCT with --sigstruct, or say --allow-unsigned"
        )
    if signed is not None and not trusting:
        raise Refused(
            f"{image}: nothing says whom to trust: pass --signer {signed.mrsigner.hex()}"
            " if you know that signer, or --any-signer"
        )


def _call(enclave: Enclave, event: Any, timeout: float | None, verbose: bool) -> Any:
    """Call the handler; its result. What fails is said here, before what the enclave printed."""
    from ..messages import MessageError

    try:
        return enclave.submit(event, timeout=timeout).result()
    except MessageError as error:
        raise InputError(f"event: {error}") from None
    except EnturboError as error:
        complain(error)
        if verbose and isinstance(error, HandlerError):
            print(error.remote_traceback, file=sys.stderr)
        raise typer.Exit(REFUSED) from None
    finally:
        for output in (enclave.stdout, enclave.stderr):
            print(output.decode("utf-8", "replace"), end="", file=sys.stderr)
        if verbose:
            print(f"enturbo: {enclave.timeline}", file=sys.stderr)


def _save_trace(enclave: Enclave, pages: int, trace: Path) -> None:
    from ..compare import measurers

    if enclave.mrenclave is not None:
        measurers(enclave, pages)  # until the workers have told what they did
    with reading(trace):
        enclave.timeline.save(trace)


@contextlib.contextmanager
def _log_on_stderr(wanted: bool) -> Iterator[None]:
    logger = logging.getLogger("enturbo")
    level, handler = logger.level, logging.StreamHandler()
    handler.setFormatter(logging.Formatter("enturbo: %(message)s"))
    if wanted:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def compare(
    image: options.ImageFile,
    key: Annotated[
        Path,
        typer.Option(metavar="K.pem", help="A key that signs the combinations.", show_default=False),
    ],
    event: options.Event = "{}",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Starts of each combination.")] = 5,
    workers: options.Workers = None,
    json: options.Json = False,
) -> None:
    """The combinations of startup and scheme on one image, side by side.

    sgx1, sgx2: measured serially, scheme sgx; enturbo1, enturbo2: in parallel, scheme enturbo; the heap by
    EADD (1) or by EAUG (2). A fifth row measures scheme enturbo serially.
    """
    from ..compare import COMBINATIONS, epc_size, prepare
    from ..compare import compare as run_all
    from ..host import Runtime
    from .tables import TERMS, comparison_table

    given = parse_event(event)
    with load_image(image) as loaded:
        signing = load_key(key)
        with progress(f"measuring and signing {image}"):
            candidates = prepare(loaded, signing)
        with (
            Runtime(epc=epc_size(loaded), workers=workers, signers=[signing.mrsigner]) as runtime,
            progress("starting enclaves", (rounds + 1) * len(COMBINATIONS)) as step,
        ):
            comparison = run_all(runtime, candidates, given, rounds=rounds, on_start=step)
            measurers = runtime.workers
    if json:
        print_json({"workers": measurers, "rows": comparison.to_list()})
        return
    out = console()
    out.print(f"{image}: {loaded.page_count} pages, {measurers} workers", markup=False)
    out.print(comparison_table(comparison))
    out.print()
    out.print(TERMS, style="dim")
