"""The plots of a run. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import atomic
from .loop import FUSED, PHASES, STOCK

LOSS, TIMING = "loss.png", "timing.png"
COLOURS = {STOCK: "#E69F00", FUSED: "#0072B2"}
PHASE_COLOURS = {"model": "#BBBBBB", "loss": "#D55E00", "optimizer": "#009E73"}
PHASE_LABELS = {
    "model": "model, forward + backward",
    "loss": "head and loss, forward + backward",
    "optimizer": "optimizer",
}


def figure(heights: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, one above the other; no display needed, no global state touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    fig = Figure(layout="constrained", dpi=150, **options)
    FigureCanvasAgg(fig)
    return fig, fig.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)


def save(fig: Any, path: Path) -> None:
    with atomic(path) as file:
        fig.savefig(file, format="png")


def series(rows: list[dict[str, Any]], name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``key``, where the contender's rows have it."""
    points = [(row["step"], row[key]) for row in rows if row["contender"] == name and key in row]
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last ``width`` values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def loss(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Training and validation loss of each contender over the steps; with two, their difference below."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    train = {name: series(rows, name, "loss") for name in names}
    validation = {name: series(rows, name, "val_loss") for name in names}
    averaged = {name: series(rows, name, "val_loss_ema") for name in names if any("val_loss_ema" in r for r in rows)}
    two = len(names) > 1
    fig, axes = figure((3, 2) if two else (1,), figsize=(8, 7 if two else 4.5))
    top = axes[0, 0]
    steps, values = train[names[0]]
    width = max(1, len(steps) // 40)
    top.plot(steps, values, color="#CCCCCC", linewidth=0.6, label=f"{names[0]}, training, each step")
    for name in names:
        # the curves lie on each other: stock is a broad line and a ring, fused a line and a cross inside
        under = two and name == STOCK
        steps, values = train[name]
        look = {"linewidth": 5, "alpha": 0.6} if under else {"linewidth": 1.5}
        label = f"{name}, training, mean of {width} steps"
        top.plot(steps, running_mean(values, width), color=COLOURS[name], label=label, **look)
        look = {"marker": "o", "markersize": 12, "markerfacecolor": "white"} if under else {"marker": "x"}
        label = f"{name}, validation"
        look |= {"linestyle": "none", "markeredgewidth": 2, "zorder": 3}
        top.plot(*validation[name], color=COLOURS[name], label=label, **look)
        if name in averaged:
            look |= {"marker": "^", "markersize": 15} if under else {"marker": "+"}
            top.plot(*averaged[name], color=COLOURS[name], label=f"{name}, validation of the average", **look)
    top.set_ylabel("cross entropy (nats per token)")
    top.legend()
    top.grid(alpha=0.3)
    top.set_title("Loss\n" + title, fontsize=10)
    if two:
        bottom = axes[1, 0]
        bottom.axhline(0, color="black", linewidth=0.8)
        steps, stock = train[STOCK]
        bottom.plot(steps, train[FUSED][1] - stock, color="#999999", linewidth=0.8, label="training, each step")
        steps, stock = validation[STOCK]
        points = {"linestyle": "none", "marker": "x", "markeredgewidth": 2, "color": COLOURS[FUSED]}
        bottom.plot(steps, validation[FUSED][1] - stock, label="validation", **points)
        if averaged:
            points |= {"marker": "^", "markerfacecolor": "none"}
            steps, stock = averaged[STOCK]
            bottom.plot(steps, averaged[FUSED][1] - stock, label="validation of the average", **points)
        bottom.set_ylabel("fused - stock (nats per token)")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        bottom.legend()
        bottom.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("optimizer step")
    save(fig, path)


def timing(path: Path, figures: dict[str, Any], title: str) -> None:
    """Where the time of a step goes: one stacked bar per contender, from the median of each phase."""
    names = list(figures)
    fig, axes = figure((1,), figsize=(8, 2.0 + 0.8 * len(names)))
    axis = axes[0, 0]
    left = np.zeros(len(names))
    longest = max(sum(figures[name]["ms"][phase]["median"] for phase in PHASES) for name in names)
    for phase in PHASES:
        widths = np.array([figures[name]["ms"][phase]["median"] for name in names])
        bars = axis.barh(names, widths, left=left, height=0.6, color=PHASE_COLOURS[phase], label=PHASE_LABELS[phase])
        axis.bar_label(
            bars,
            [f"{width:.1f}" if width > 0.05 * longest else "" for width in widths],
            label_type="center",
            color="black" if phase == "model" else "white",
        )
        left += widths
    for row, total in enumerate(left):
        axis.text(total + 0.01 * longest, row, f"{total:.1f} ms", va="center")
    axis.set_xlim(0, 1.15 * longest)
    axis.invert_yaxis()
    axis.set_xlabel("time per step (ms, median of each phase)")
    axis.set_title("Time of a training step\n" + title, fontsize=10)
    fig.legend(loc="outside lower center", ncols=len(PHASES), frameon=False)
    save(fig, path)
