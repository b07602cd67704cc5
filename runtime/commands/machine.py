"""``demo`` and ``doctor``: see it work, and see what the machine offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .common import Refused, console, print_facts, print_json, printable, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..compare import Comparison
    from ..demo import Answer, ReadBack, Refusal

SIMULATED = (
    "Real: processes, shared memory, locks, SHA-256, signatures, time. Simulated: the SGX hardware. The host"
    " can read everything, so there is no confidentiality."
)


def demo(
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Starts of each combination.")] = 5,
    json: options.Json = False,
) -> None:
    """Build, sign, start and call an example in all combinations, and see what is refused."""
    # The one place below the examples that knows of them.
    from ...examples.cities.build import cities_image
    from ..compare import COMBINATIONS, ENTURBO1, compare, epc_size, prepare
    from ..demo import agreed, ask, example_event, read_back, refusals
    from ..host import Runtime
    from ..keys import SigningKey

    show = Shown(console(quiet=json))
    show.beginning()
    with progress("building (the first time: a database of the world's cities)"):
        image = cities_image()
    show.image(image.page_count, image.measured_pages)
    with progress("generating an RSA-3072 key, measuring and signing"):
        key = SigningKey.generate()
        candidates = prepare(image, key)
    show.signed(key.mrsigner, len({each.sigstruct for each in candidates}))
    genuine = next(each for each in candidates if each.combination == ENTURBO1)
    with Runtime(epc=epc_size(image), signers=[key.mrsigner]) as runtime:
        with progress("starting enclaves", (rounds + 1) * len(COMBINATIONS)) as step:
            comparison = compare(runtime, candidates, example_event(), rounds=rounds, on_start=step)
        show.comparison(comparison, runtime.workers, runtime.enforcement.level)
        answers = ask(runtime, genuine)
        same = agreed([row.answers[0] for row in comparison.rows])
        show.answers(answers, same)
        with progress("starting with 1, 2, 3 and 8 workers"):
            values = list(read_back(image, genuine.sigstruct))
        show.values(values)
        with progress("trying what must be refused"):
            refused = list(refusals(runtime, genuine))
        show.refusals(refused)
    if json:
        print_json(
            {
                "pages_added": image.page_count,
                "pages_measured": image.measured_pages,
                "rows": comparison.to_list(),
                "answers": [vars(answer) for answer in answers],
                "same_answers": same,
                "read_back": [{**vars(value), "mrenclave": value.mrenclave.hex()} for value in values],
                "refusals": [vars(refusal) for refusal in refused],
            }
        )
    if not (same and all(value.agrees for value in values) and all(each.refused for each in refused)):
        raise Refused("the demo did not show what it should: see above")


class Shown:
    """The demo's steps for people, one method each."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._number = 0

    def _heading(self, text: str) -> None:
        self._number += 1
        self._out.print(f"\n[bold cyan]{self._number}. {text}[/]")

    def beginning(self) -> None:
        """What this is."""
        self._out.print("[bold]EnTurbo: start measured enclaves in parallel[/]")
        self._out.print(SIMULATED, style="dim")

    def image(self, pages: int, measured: int) -> None:
        """The image is built."""
        self._heading("An enclave image")
        self._out.print(
            f"examples/cities: a handler and a SQLite database of the world's cities (GeoNames, CC BY 4.0)."
            f" {pages} pages, {pages * 4096 / 2**20:.0f} MiB; {measured} of them measured,"
            f" {measured * 4096 / 2**20:.0f} MiB; the rest is zero heap."
        )

    def signed(self, mrsigner: bytes, count: int) -> None:
        """The SIGSTRUCTs are made."""
        self._heading(f"A new RSA-3072 key, {count} SIGSTRUCTs")
        self._out.print(f"MRSIGNER {mrsigner.hex()}")
        self._out.print("Scheme sgx and scheme enturbo, each with the heap by EADD (SGXv1) and EAUG (SGXv2).")

    def comparison(self, comparison: Comparison, workers: int, level: str) -> None:
        """The table."""
        from .tables import TERMS, comparison_table

        self._heading("Start it, call it: five combinations")
        rounds = len(comparison.rows[0].samples)
        self._out.print(
            f"{workers} workers, {rounds} rounds, a new enclave process each time; enforcement: {level}."
            " Times in ms.\n"
        )
        self._out.print(comparison_table(comparison))
        self._out.print()
        self._out.print(TERMS, style="dim")

    def answers(self, answers: list[Answer], same: bool) -> None:
        """What the handler said."""
        self._heading("What one enclave answers, and its count of calls")
        for each in answers:
            self._out.print(
                f"nearest city to {each.lat}, {each.lon} is {each.city} ({each.country}),"
                f" {each.distance_km:.1f} km; call {each.calls}",
                markup=False,
            )
        self._out.print(
            "All combinations gave the same answer." if same else "THE COMBINATIONS GAVE DIFFERENT ANSWERS."
        )

    def values(self, values: list[ReadBack]) -> None:
        """One value for any number of workers."""
        self._heading("1, 2, 3, 8 workers: one MRENCLAVE, read back from the SMC")
        for value in values:
            shares = ", ".join(f"{who}: {pages}" for who, pages in sorted(value.measured_pages.items()))
            mark = "[green]equal[/]" if value.agrees else "[red]DIFFERENT[/]"
            self._out.print(f"{value.workers:2}  {value.mrenclave.hex()}  {mark}")
            self._out.print(f"    pages by {shares}", style="dim")

    def refusals(self, refusals: list[Refusal]) -> None:
        """What must not start."""
        from rich.padding import Padding
        from rich.text import Text

        self._heading("Refused, with nothing released")
        for each in refusals:
            mark = "[green]refused[/]" if each.refused else "[red]NOT REFUSED[/]"
            self._out.print(f"{mark}  {each.attempt}: [bold]{each.error}[/]")
            detail = (
                f"{printable(each.message)}\nenclave {each.state};"
                f" result delivered: {'YES' if each.delivered else 'no'}; bytes of output: {each.output}"
            )
            self._out.print(Padding(Text(detail, style="dim"), (0, 0, 0, 9), expand=False))


def doctor(json: options.Json = False) -> None:
    """Processors, hasher, what the gates enforce, /dev/shm, and what a start costs in memory."""
    from ..doctor import examine

    found = examine()
    if json:
        print_json(found)
        return
    for section, facts in found.items():
        print_facts({name.replace("_", " "): _fact(name, value) for name, value in facts.items()}, section)
    out = console()
    if found["hasher"].get("native_missing"):
        out.print(
            "The C extension is missing: measuring is several times slower. Install a C compiler, then"
            " reinstall with ENTURBO_NATIVE=require to see what fails.",
            style="yellow",
        )
    if found["gates"]["enforcement"] == "cooperative":
        out.print(
            "The gates are cooperative here: a handler that goes around the context it is given is not"
            " stopped by the kernel, and may let something out before VERIFIED. docs/security.md tells what"
            " is needed.",
            style="yellow",
        )


def _fact(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int) and name in ("size_bytes", "free_bytes"):
        return f"{value} ({value / 2**20:.0f} MiB)"
    return str(value)
