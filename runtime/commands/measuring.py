"""``measure`` and ``verify``: what a file measures to, against what was signed. No EPC is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from ...shm.errors import EnturboError, SignatureError, UntrustedSigner
from ..inspection import signature_checks
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
from .examine import examine, examine_all
from .examined import Examined


def measure(
    files: options.ImageFiles,
    scheme: Annotated[
        options.Scheme | None,
        typer.Option(
            help="Measure this way; without it as the SIGSTRUCT says, else sgx, .enclave files enturbo.",
            show_default=False,
        ),
    ] = None,
    domains: options.Domains = DEFAULT_DOMAINS,
    block: options.Block = DEFAULT_BLOCK,
    sigstruct: options.SigstructFile = None,
    edmm: options.Edmm = False,
    json: options.Json = False,
) -> None:
    """MRENCLAVE of enclave files, and whether their SIGSTRUCTs agree.

    Exits with 0 if all match or are unsigned, 1 for a mismatch, a bad signature or a file whose metadata
    blocks measure differently, 2 for a file that cannot be read; the other files are measured all the same.
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
    """Check an enclave file against its SIGSTRUCT: signature, Q1, Q2, ENCLAVEHASH, signer.

    Without --signer the signature only says that the file is what some signer, whom it names, has signed.
    """
    signers = [parse_signer(text) for text in signer or ()]
    with progress(f"measuring {image}"):
        examined = examine(image, sigstruct, edmm=edmm)
    if examined.sigstruct is None:
        raise UntrustedSigner(
            f"{image}: it is unsigned: no SIGSTRUCT was given, and {image}.sig is not there"
        )
    refusal = _refusal(examined, signers, min_svn, product_id)
    signed = examined.sigstruct.enclavehash.hex()
    trusted = examined.sigstruct.mrsigner in signers if signers else None
    # Of the first SIGSTRUCT; if a file has more of them, a flaw in another one is told as the refusal.
    checks = signature_checks(examined.sigstruct) | {"enclavehash": examined.match is True}
    if json:
        print_json(
            {
                **examined.row(),
                "signed_mrenclave": signed,
                "svn": examined.sigstruct.svn,
                "product_id": examined.sigstruct.product_id,
                "checks": checks,
                "signer_trusted": trusted,
                "verified": refusal is None,
            }
        )
    else:
        texts = {name: "holds" if checks[name] else "DOES NOT HOLD" for name in ("signature", "q1", "q2")}
        trust = {True: "trusted", False: "NOT TRUSTED", None: "not checked: no --signer is given"}[trusted]
        verdict = "REFUSED"
        if refusal is None:
            verdict = "VERIFIED" if signers else "as its signer signed it"
        print_facts(
            {
                **examined.facts(),
                "signed": signed,
                "svn": examined.sigstruct.svn,
                "product id": examined.sigstruct.product_id,
                "signature": texts["signature"],
                "Q1": texts["q1"],
                "Q2": texts["q2"],
                "ENCLAVEHASH": "matches" if checks["enclavehash"] else "DOES NOT MATCH",
                "signer": trust,
                "verdict": verdict,
            },
            str(image),
        )
    if refusal is not None:
        complain(f"{image}: {refusal}")
        raise typer.Exit(REFUSED)


def _refusal(examined: Examined, signers: list[bytes], min_svn: int, product_id: int | None) -> str | None:
    """Why the file is refused; None: all holds that was asked for."""
    from ..trust import check_trust

    if examined.problem is not None:
        return examined.problem
    for block in examined.blocks:
        try:
            check_trust(
                block.sigstruct,
                signers=signers,
                min_svn=min_svn,
                product_id=product_id,
                any_signer=not signers,
            )
        except (SignatureError, UntrustedSigner) as error:
            return str(error)
        if not block.match and block.sigstruct is not None:
            signed = block.sigstruct.enclavehash.hex()
            return f"it is not what was signed: expected {signed}, measured {block.measured.digest.hex()}"
    return None
