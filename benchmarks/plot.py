"""Rows as pictures: a panel of bars per case with its ceiling as a line, and curves over what grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import store
from .registry import COMPARED, titles
from .tables import CEILINGS, Row, by_case, digits, ratio, timed, where

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "fusedopt": "#0072B2",
    "fusedopt inplace": "#56B4E9",
    "fusedopt triton": "#56B4E9",
    "fusedopt, f32 states": "#56B4E9",
    "torch fused": "#E69F00",
    "torch compiled": "#F0E442",
    "torch default": "#D55E00",
    "torch eager": "#D55E00",
    "torch foreach": "#CC79A7",
    "torch whole logits": "#D55E00",
    "torch linear": "#E69F00",
    "torch linear chunked": "#CC79A7",
}
PEER = "#009E73"  # another library
MARKERS = "osD^vPX*"
LONG = 8.0  # how many times as long as ours a bar may be: a longer one is cut, and says so
CURVES = {  # what grows -> file, title, label of its axis
    "tensors": ("tensors.png", "AdamW, tensors of 64 elements", "number of tensors"),
    "vocabulary": ("vocabulary.png", "cross entropy, forward and backward", "vocabulary"),
}


def draw(folder: Path) -> None:
    """Write a picture of each suite's bars and of each curve from the folder's rows; nothing where there are none."""
    rows = {suite: store.read(folder / f"{suite}.jsonl") for suite in COMPARED}
    for suite, found in rows.items():
        if bars := [row for row in found if "sweep" not in row]:
            _bars(bars, suite, folder / f"{suite}.png")
    points = [row for found in rows.values() for row in found if "sweep" in row and row["median_ms"] is not None]
    for grows, (name, title, label) in CURVES.items():
        if curve := [row for row in points if row["sweep"][0] == grows]:
            _curves(curve, title, label, folder / name)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def _bars(rows: list[Row], suite: str, path: Path) -> None:
    grouped = by_case(rows)
    titled = titles()
    columns = 2
    lines = -(-len(grouped) // columns)
    bars = [max(len(c) for c in list(grouped.values())[i : i + columns]) for i in range(0, len(grouped), columns)]
    fig, axes = _figure(lines, columns, 14, 1.0 + sum(0.7 + 0.26 * n for n in bars))
    grid = axes[0][0].get_gridspec()
    grid.set_height_ratios([0.7 + 0.26 * n for n in bars])
    axes = axes.ravel()
    for ax in axes[len(grouped) :]:
        ax.set_axis_off()
    for ax, (name, contenders) in zip(axes, grouped.items(), strict=False):
        _panel(ax, titled.get(name, name), contenders)
    first = rows[0]
    fig.suptitle(
        f"{suite}: median time in ms and the middle 60 %, less is better; dashed: what the machine itself gave in the "
        f"same run\n{where(first)}, torch {first['torch']}",
        fontsize=11,
    )
    fig.savefig(path)


def _panel(ax: Any, title: str, contenders: dict[str, Row]) -> None:
    """Bars of one case. Far longer ones than ours are cut short: the rest of the picture is what one came for."""
    bars = {name: row for name, row in timed(contenders).items() if name not in CEILINGS}
    bars = {name: bars[name] for name in sorted(bars, key=lambda name: not name.startswith("fusedopt"))}  # ours first
    ceilings = {name: row["median_ms"] for name, row in timed(contenders).items() if name in CEILINGS}
    ours = bars.get("fusedopt")
    longest = max(row["p80_ms"] for row in bars.values())
    second = sorted(row["p80_ms"] for row in bars.values())[-2:][0]
    end = min(longest, max(LONG * ours["median_ms"], second) if ours else longest)
    end = max(end, *ceilings.values()) if ceilings else end
    for place, (name, row) in enumerate(bars.items()):
        time = row["median_ms"]
        colour = COLOURS.get(name, PEER)
        if time > end:
            ax.barh(place, end, color=colour)
            ax.text(end * 0.985, place, "//", va="center", ha="right", color="white", fontweight="bold")
        else:
            spread = [[time - row["p20_ms"]], [max(0.0, min(row["p80_ms"], end) - time)]]
            ax.barh(place, time, color=colour, xerr=spread, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        text = f"{digits(time)} ms"
        if ours and name != "fusedopt":
            text += f" = {ratio(row, ours):.3g}x ours"
        ax.text(min(row["p80_ms"], end) + end * 0.012, place, text, va="center", fontsize=9)
    sides = ["right", "left"] if len(ceilings) == 2 else ["center"]  # of their lines: no label lies on another
    for (name, time), side in zip(sorted(ceilings.items(), key=lambda item: item[1]), sides, strict=False):
        ax.axvline(time, color="#444444", linestyle="--", linewidth=1)
        side = "left" if side == "center" and time < 0.12 * end else side
        shift = {"left": 3, "center": 0, "right": -3}[side]
        ax.annotate(f"{name} {digits(time)} ms", (time, -0.62), (shift, 0), textcoords="offset points", fontsize=8,
                    ha=side, va="bottom", color="#444444")  # fmt: skip
    labels = [name if row["verdict"] == "ok" else f"{name} (wrong)" for name, row in bars.items()]
    ax.set_yticks(range(len(bars)), labels, fontsize=9)
    ax.set_ylim(len(bars) - 0.45, -0.95)
    ax.set_xlim(0, end * 1.32)
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _curves(rows: list[Row], title: str, label: str, path: Path) -> None:
    """A panel per dtype; time against what grows, both by powers."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    fig, axes = _figure(1, len(dtypes), 7.5 * len(dtypes), 5.5)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row["dtype"] == dtype:
                lines.setdefault(row["contender"], []).append(row)
        sizes = sorted({row["sweep"][1] for row in rows})
        for (name, points), marker in zip(lines.items(), MARKERS * 2, strict=False):
            points.sort(key=lambda row: row["sweep"][1])
            at = [row["sweep"][1] for row in points]
            if name in CEILINGS:
                style = {"color": "#444444", "linestyle": "--" if name == CEILINGS[0] else ":", "linewidth": 1.2}
            else:
                style = {"color": COLOURS.get(name, PEER), "marker": marker, "markersize": 5, "linewidth": 1.8}
            ax.plot(at, [row["median_ms"] for row in points], label=name, **style)
            ax.fill_between(at, [row["p20_ms"] for row in points], [row["p80_ms"] for row in points], alpha=0.15,
                            color=style["color"], linewidth=0)  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlabel(label)
        ax.set_ylabel("median time, ms")
        ax.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.set_title(f"{title}, {dtype}", loc="left", fontsize=11, fontweight="bold")
        ax.legend(fontsize=9, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    fig.suptitle(f"{where(first)}\ntorch {first['torch']}; shaded: the middle 60 %", fontsize=10)
    fig.savefig(path)
