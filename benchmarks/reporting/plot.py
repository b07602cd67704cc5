"""The picture of growth, as SVG: equal samples give equal files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.ticker import FuncFormatter

from .page_times import ceiling_page_time, page_times
from .rounds import Group

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "enturbo"

import matplotlib.pyplot as plt  # noqa: E402 - the backend must be chosen before

# Told apart by marker and dashes as well: colours alone are not for everybody, nor for paper.
STYLES = {
    "serial": ("startup serial, scheme sgx", "#000000", "o", "-"),
    "early": ('enturbo, prefer="start"', "#D55E00", "s", "--"),
    "fused": ('enturbo, prefer="verified"', "#0072B2", "^", "-."),
}


def draw(group: Group, path: Path) -> None:
    """Launch to VERIFIED by size, in whole and per page; whiskers are the range of the rounds."""
    figure, (whole, per_page) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    sizes = group.facts["sizes"]
    for way, (label, colour, marker, dashes) in STYLES.items():
        known = page_times(group, way)
        for axes, factor in ((whole, lambda size: size * 256 * 1e3), (per_page, lambda _: 1e6)):
            middle = [value.median * factor(size) for size, value in known.items()]
            below = [(value.median - value.least) * factor(size) for size, value in known.items()]
            above = [(value.most - value.median) * factor(size) for size, value in known.items()]
            axes.errorbar(
                list(known),
                middle,
                yerr=[below, above],
                label=label,
                color=colour,
                marker=marker,
                linestyle=dashes,
                markersize=5,
                linewidth=1.3,
                capsize=2.5,
            )
    ceiling = ceiling_page_time(group)
    label = "ceiling: hashing alone, two processes"
    whole.plot(
        sizes, [ceiling * size * 256 * 1e3 for size in sizes], color="#555555", linestyle=":", label=label
    )
    per_page.axhline(ceiling * 1e6, color="#555555", linestyle=":", label=label)
    for axes in (whole, per_page):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("image, MiB")
        axes.grid(alpha=0.3)
    whole.set_yscale("log")
    whole.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    whole.set_ylabel("launch → VERIFIED, ms")
    whole.set_title("Time")
    per_page.set_ylim(bottom=0)
    per_page.set_ylabel("launch → VERIFIED, µs a page")
    per_page.set_title("Time per page")
    whole.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
