"""``build``, ``keygen``, ``sign``: from a function's folder to a signed enclave file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import (
    SIGSTRUCT_SUFFIX,
    InputError,
    load_image,
    load_key,
    print_facts,
    print_json,
    progress,
    reading,
)

DEFAULT_HEAP = "64MiB"


def build(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The function: modules and data files.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="F.enclave", help="The file to write.", show_default=False),
    ],
    handler: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="What is called with (event, context).")
    ] = "handler:handler",
    heap: Annotated[
        str, typer.Option(metavar="SIZE", help="Zero memory, not measured; 0: none.")
    ] = DEFAULT_HEAP,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|@FILE",
            help="The measured writable region: so many zero bytes, or a file's content.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files to leave out; may be repeated.", show_default=False),
    ] = None,
    requirements: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME",
            help="An installed distribution that comes along, with what it requires; may be repeated.",
            show_default=False,
        ),
    ] = None,
    requirements_file: Annotated[
        Path | None,
        typer.Option(
            "-r", "--requirements", metavar="FILE", help="The same, one a line.", show_default=False
        ),
    ] = None,
    site: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Where distributions are looked for (a venv's site-packages); may be repeated.",
            show_default=False,
        ),
    ] = None,
    bytecode: Annotated[
        bool,
        typer.Option(
            "--bytecode",
            help="Carry modules compiled, too: faster imports; the image then depends on this interpreter.",
        ),
    ] = False,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Put the distributions into the file, instead of naming them in the store of this user.",
        ),
    ] = False,
    edmm: options.Edmm = False,
    json: options.Json = False,
) -> None:
    """Make an enclave file of a function's folder. Equal folders give equal files."""
    from ..image import EnclaveImage
    from ..labels import distribution_facts
    from ..sizes import parse_size
    from ..store import Store

    region = None if data is None else Path(data[1:]) if data.startswith("@") else parse_size(data)
    wanted = list(requirements or ())
    if requirements_file is not None:
        wanted += _requirements(requirements_file)
    with reading(folder), progress(f"building {output}"):
        image = EnclaveImage.from_function(
            folder,
            handler=handler,
            heap=heap,
            data=region,
            exclude=exclude or (),
            requirements=wanted,
            site=site,
            bytecode=bytecode,
        )
    if edmm:
        image = image.as_edmm()
    with reading(output):
        image.save(output, store=None if whole else Store.default())
    distributions = distribution_facts(image.regions)
    facts = {
        "file": str(output),
        "handler": image.handler,
        "pages_added": image.page_count,
        "pages_measured": image.measured_pages,
        "pages_by_eaug": image.dynamic_pages,
        "size": image.size,
        "distributions": distributions,
    }
    if json:
        print_json(facts)
        return
    texts: dict[str, object] = {
        "handler": image.handler,
        "pages": f"{image.page_count} added, {image.measured_pages} measured, {image.dynamic_pages} by EAUG",
        "size": f"{image.size:#x}",
    }
    for each in distributions:
        native = f", {each['code_pages']} of them native code" if each["code_pages"] else ""
        texts[f"{each['name']} {each['version']}"] = f"{each['files']} files, {each['pages']} pages{native}"
    print_facts(texts, str(output))


def _requirements(file: Path) -> list[str]:
    """The requirements in a file as pip has them: one a line, comments, lines that go on after a backslash.

    Options of pip are no requirements: they are refused.
    """
    with reading(file):
        text = file.read_text("utf-8-sig").replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    for line in lines:
        if line.startswith("-") or " --" in line:
            raise InputError(f"{file}: {line!r}: names of distributions are expected, no options of pip")
    return [line for line in lines if line]


def keygen(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="K.pem", help="The file to write.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Make a signing key (RSA-3072, e = 3; PEM, mode 0600) and print its MRSIGNER. Never overwrites."""
    from ..keys import SigningKey

    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: there is a file already; a key is never overwritten")
    with progress("generating an RSA-3072 key"):
        key = SigningKey.generate()
    with reading(output):
        key.save(output)
    if json:
        print_json({"file": str(output), "mrsigner": key.mrsigner.hex()})
    else:
        print(key.mrsigner.hex())


def sign(
    image: options.ImageFile,
    key: Annotated[Path, typer.Option(metavar="K.pem", help="The signing key.", show_default=False)],
    scheme: Annotated[options.Scheme, typer.Option(help="What is measured.")] = options.Scheme.ENTURBO,
    domains: options.Domains = 32,
    block: options.Block = 16,
    svn: Annotated[int, typer.Option(min=0, max=0xFFFF, help="Security version.")] = 0,
    product_id: Annotated[int, typer.Option(min=0, max=0xFFFF, help="Product id.")] = 0,
    edmm: options.Edmm = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="S",
            help="The SIGSTRUCT to write; IMAGE.sig without it.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure an enclave file and sign the value: a SIGSTRUCT, 1808 bytes."""
    where = image.with_name(image.name + SIGSTRUCT_SUFFIX) if output is None else output
    with load_image(image, edmm) as loaded:
        signing = load_key(key)
        with progress(f"measuring {image}"):
            sigstruct = signing.sign(
                loaded, scheme.value, domains=domains, block=block, svn=svn, product_id=product_id
            )
    with reading(where):
        where.write_bytes(sigstruct.encode())
    measurement = sigstruct.measurement
    facts = {
        "file": str(where),
        "scheme": measurement.scheme,
        "domains": measurement.domains,
        "block": measurement.block,
        "mrenclave": measurement.digest.hex(),
        "mrsigner": sigstruct.mrsigner.hex(),
        "svn": svn,
        "product_id": product_id,
    }
    if json:
        print_json(facts)
    else:
        print_facts({"MRENCLAVE": measurement, "MRSIGNER": facts["mrsigner"]}, str(where))
