"""``measure`` and ``verify``: what a file measures to, against what was signed. No EPC is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from ...shm.errors import EnturboError, SignatureError, UntrustedSigner
from ..measurement import DEFAULT_BLOCK, DEFAULT_DOMAINS
from . import options
from .common import (
    BAD_INPUT,
    OK,
    REFUSED,
    InputError,
    complain,
    parse_signer,
    print_facts,
    print_json,
    progress,
)
from .examine import Examined, examine, examine_all


def measure(
    files: options.ImageFiles,
    scheme: Annotated[
        options.Scheme | None,
        typer.Option(
            help="Measure this way; without it as the SIGSTRUCT says, else enturbo.", show_default=False
        ),
    ] = None,
    domains: options.Domains = DEFAULT_DOMAINS,
    block: options.Block = DEFAULT_BLOCK,
    sigstruct: options.SigstructFile = None,
    edmm: options.Edmm = False,
    json: options.Json = False,
) -> None:
    """MRENCLAVE of enclave files, and whether their SIGSTRUCTs agree.

    Exits with 0 if all match or are unsigned, 1 for a mismatch or a bad signature, 2 for a file that cannot
    be read; the other files are measured all the same.
    """
    if sigstruct is not None and len(files) > 1:
        raise InputError(f"--sigstruct belongs to one file, found {len(files)}")
    wanted = None if scheme is None else (scheme.value, domains, block)
    code = OK
    found: list[Examined] = []
    with progress("measuring", len(files)) as step:
        results = examine_all(files, sigstruct, wanted=wanted, edmm=edmm, step=step)
    for result in results:
        if isinstance(result, EnturboError):
            complain(result)
            code = BAD_INPUT
        else:
            found.append(result)
    if json:
        print_json([each.row() for each in found])
    for each in found:
        if each.problem is not None:
            complain(f"{each.file}: {each.problem}")
        if not json:
            print_facts(each.facts(), str(each.file))
    if code == OK and not all(each.good for each in found):
        code = REFUSED
    raise typer.Exit(code)


def verify(
    image: options.ImageFile,
    signer: options.Signers = None,
    min_svn: options.MinSvn = 0,
    product_id: options.ProductId = None,
    sigstruct: options.SigstructFile = None,
    edmm: options.Edmm = False,
    json: options.Json = False,
) -> None:
    """Check an enclave file against its SIGSTRUCT: signature, signer, measurement.

    Without --signer the signature only says that the file is what some signer, whom it names, has signed.
    """
    from ..trust import check_trust

    signers = [parse_signer(text) for text in signer or ()]
    with progress(f"measuring {image}"):
        examined = examine(image, sigstruct, edmm=edmm)
    if examined.sigstruct is None:
        raise UntrustedSigner(
            f"{image}: it is unsigned: no SIGSTRUCT was given, and {image}.sig is not there"
        )
    refusal = examined.problem
    if refusal is None:
        try:
            check_trust(
                examined.sigstruct,
                signers=signers,
                min_svn=min_svn,
                product_id=product_id,
                any_signer=not signers,
            )
        except (SignatureError, UntrustedSigner) as error:
            refusal = str(error)
    signed = examined.sigstruct.enclavehash.hex()
    if refusal is None and not examined.match:
        refusal = f"it is not what was signed: expected {signed}, measured {examined.measured.digest.hex()}"
    if json:
        print_json(
            {
                **examined.row(),
                "signed_mrenclave": signed,
                "svn": examined.sigstruct.svn,
                "product_id": examined.sigstruct.product_id,
                "signer_trusted": examined.sigstruct.mrsigner in signers if signers else None,
                "verified": refusal is None,
            }
        )
    else:
        trust = "trusted" if signers else "not checked: no --signer is given"
        numbers = {"svn": examined.sigstruct.svn, "product id": examined.sigstruct.product_id}
        verdict = {"verdict": "REFUSED"}
        if refusal is None:
            verdict = {"signer": trust, "verdict": "VERIFIED" if signers else "as its signer signed it"}
        print_facts({**examined.facts(), "signed": signed, **numbers, **verdict}, str(image))
    if refusal is not None:
        complain(f"{image}: {refusal}")
        raise typer.Exit(REFUSED)
