"""All cases in one picture: a bar per contender, its time and its ratio to ours at the end."""

from __future__ import annotations

from pathlib import Path

from . import report, store
from .cases_linear_loss import PRODUCTS
from .runner import STREAM

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "fusedopt": "#0072B2",
    "fusedopt inplace": "#56B4E9",
    "fusedopt triton": "#56B4E9",
    "torch fused": "#E69F00",
    "torch compiled": "#E69F00",
    "torch default": "#D55E00",
    "torch foreach": "#D55E00",
    "torch eager": "#D55E00",
    "torch whole logits": "#D55E00",
    "torch linear": "#E69F00",
    "torch linear chunked": "#F0E442",
    PRODUCTS: "#BBBBBB",
    STREAM: "#BBBBBB",
}


def draw(folder: Path) -> None:
    """Write summary.png from the folder's rows; nothing where there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    rows = {suite: store.read(folder / f"{suite}.jsonl") for suite in ("optim", "step", "loss", "linear_loss")}
    grouped = report.by_case([row for suite in rows.values() for row in suite])
    titles = {case.name: case.title for suite in rows for case in report.registry(suite)}
    if not grouped:
        return
    columns = 2
    lines = -(-len(grouped) // columns)
    fig = Figure(figsize=(14, 0.8 + 1.75 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(grouped) :]:
        ax.set_axis_off()
    for ax, (name, contenders) in zip(axes, grouped.items(), strict=False):
        times = [row["median_ms"] for row in contenders.values()]
        spread = [[row["median_ms"] - row["p20_ms"] for row in contenders.values()],
                  [row["p80_ms"] - row["median_ms"] for row in contenders.values()]]  # fmt: skip
        labels = [label if row["verdict"] == "ok" else f"{label} (wrong)" for label, row in contenders.items()]
        colours = [COLOURS.get(label, "#009E73") for label in contenders]
        ax.barh(labels, times, color=colours, xerr=spread, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        ax.invert_yaxis()
        longest = max(row["p80_ms"] for row in contenders.values())
        ax.set_xlim(0, longest * 1.35)
        for place, row in enumerate(contenders.values()):
            text = f"{report.digits(row['median_ms'])} ms"
            if "fusedopt" in contenders and row["contender"] != "fusedopt":
                text += f" = {report.ratio(row, contenders['fusedopt']):.2f}x ours"
            ax.text(row["p80_ms"] + longest * 0.01, place, text, va="center", fontsize=9)
        ax.set_title(titles.get(name, name), loc="left", fontsize=10, fontweight="bold")
        ax.tick_params(labelsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    any_row = next(row for suite in rows.values() for row in suite)
    machine = f"{report.where(any_row)}, torch {any_row['torch']}"
    fig.suptitle(f"Median time, ms, and the middle 60 %; less is better. {machine}", fontsize=11)
    fig.savefig(folder / "summary.png")
