"""Picture of what benchmarks/fewshot.py measured: how each method trades variety for likeness, step by step."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from rows import Row, by_step, mean_of
from standing import DEFAULT, PAPER, anchors, is_honest, leaves_many

COLOURS = {
    DEFAULT: ("#c2185b", "studio (the default)"),
    "domainstudio": ("#1565c0", "domainstudio (the paper's terms)"),
    "finetune": ("#555555", "finetune"),
    "domainstudio_released": ("#7cb342", "domainstudio_released"),
    "ant": ("#f9a825", "ant"),
    PAPER: ("#90caf9", "domainstudio, averaged as published"),
}
TITLES = {
    "sunglasses": "sunglasses (attribute)",
    "grey": "grey (colour)",
    "watercolour": "watercolour (near style)",
    "ink": "ink (far style)",
    "smiles": "smiles (another anatomy)",
}
REAL = "#2e7d32"
KID_TICKS = (20, 25, 30, 40, 50, 60, 70, 80, 100, 120, 150, 200, 250)


def draw(results: list[Row], path: Path) -> None:
    """An SVG with a panel a domain: KID against Intra-LPIPS along the steps, means over seeds."""
    # text stays text; the same rows give the same bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fronts", "font.size": 8}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(2, 3).flatten()
        for panel in axes:
            panel.axis("off")
        measured = {row["domain"] for row in results}
        for panel, domain in zip(axes, (domain for domain in TITLES if domain in measured), strict=False):
            panel.axis("on")
            _draw_domain(panel, [row for row in results if row["domain"] == domain])
            panel.set_title(TITLES[domain], fontweight="bold")
        _explain(axes[-1])
        figure.savefig(path, metadata={"Date": None})


def _draw_domain(panel: Axes, rows: list[Row]) -> None:
    real, source = anchors(rows)
    wanted, error = real["intra_lpips"], real["intra_lpips_error"]
    panel.axhspan(wanted - error, wanted + error, color=REAL, alpha=0.15, lw=0)
    panel.axhline(wanted, color=REAL, lw=1)
    for name, (colour, _) in reversed(COLOURS.items()):
        steps = by_step(rows, name)
        groups = [[source], *steps.values()]
        kid, intra = ([mean_of(group, key) for group in groups] for key in ("kid", "intra_lpips"))
        panel.plot(kid, intra, color=colour, lw=2.2 if name == DEFAULT else 1.2)
        for group, *at in zip(groups[1:], kid[1:], intra[1:], strict=True):
            panel.plot(
                *at,
                marker="o" if is_honest(group, real["copy_rate"]) else "x",
                markersize=5 if name == DEFAULT else 4,
                color=colour,
                markerfacecolor="white" if leaves_many(group) else colour,
            )
    panel.plot(source["kid"], source["intra_lpips"], marker="s", color="black", markersize=5)
    panel.set(xscale="log", xlabel="KID x10³ (likeness: to the left)", ylabel="Intra-LPIPS (variety)")
    panel.xaxis.set_major_locator(FixedLocator(KID_TICKS))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.spines[["top", "right"]].set_visible(False)


def _explain(panel: Axes) -> None:
    """The legend, where a sixth domain would be."""
    lines = [
        *(Line2D([], [], color=colour, lw=2, label=label) for colour, label in COLOURS.values()),
        Line2D([], [], color="black", marker="s", lw=0, label="the source, where all begin"),
        Line2D([], [], color="black", marker="o", lw=0, label="a checkpoint"),
        Line2D([], [], color="black", marker="o", markerfacecolor="white", lw=0, label="> 10 % not adapted yet"),
        Line2D([], [], color="black", marker="x", lw=0, label="> 3 % copies"),
        Patch(facecolor=REAL, alpha=0.4, label="real pictures' variety ± its standard error"),
    ]
    panel.legend(handles=lines, loc="center", frameon=False, title="wanted: left, on the green line")
