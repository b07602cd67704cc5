"""Tables that more than one command prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..compare import Comparison


def milliseconds(seconds: float | None) -> str:
    """Three figures or so."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def comparison_table(comparison: Comparison) -> Table:
    """The combinations side by side; medians."""
    from rich.table import Table

    # Fits 80 columns.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="cyan")
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("startup\n+ scheme", no_wrap=True)
    for title in ("first\ninstr.", "\nVERIFIED", "\nresult", "startup\nshare", "\nspeed-up", "vs\nsgx2"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in comparison.rows:
        speed_up, other = comparison.speed_up(row), comparison.speed_up_sgx2(row)
        share = row.startup_share
        ours = row.combination.startup == "enturbo"
        table.add_row(
            row.combination.name,
            f"{row.combination.startup}+{row.combination.scheme}",
            milliseconds(row.first),
            milliseconds(row.verified),
            milliseconds(row.life),
            "-" if share is None else f"{share:.1%}",
            "-" if speed_up is None else f"{speed_up.median:.2f} x",
            "-" if other is None else f"{other.median:.2f} x",
            style="green" if ours else None,
        )
    return table


TERMS = (
    "Milliseconds after launch(), medians of interleaved rounds; 1: heap by EADD, 2: heap by EAUG. First"
    " instruction: stamped in the enclave just before the handler is called. Result: delivered to the caller."
    " Startup share: 1 - the same call's time in the warm enclave / time to result. Speed-up: of the time to"
    " result, against sgx1. serial*: what hashing lanes give apart from processes and overlap."
)
