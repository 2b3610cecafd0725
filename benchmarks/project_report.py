"""The projection as tables for the terminal and the README, and project.png."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from . import store
from .ddp_report import TITLES
from .project_model import CONTENDERS, WRAPPINGS
from .tables import digits, markdown, provenance

Row = dict[str, Any]
PLOT = "project.png"
SHOWN = (1, 8, 64, 256, 1024)  # ranks in the tables
LABEL = "model, assumed bandwidths"
COLOURS = {"torch foreach": "#D55E00", "torch fused": "#E69F00", "fusedopt": "#0072B2"}
MARKS = {"torch foreach": "^", "torch fused": "s", "fusedopt": "o"}


def parted(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Projected rows and those of the check."""
    return [row for row in rows if "share" in row], [row for row in rows if "off" in row]


def assumptions(row: Row) -> str:
    given = row["assumptions"]
    node, tokens, hidden = given["ranks_per_node"], given["tokens"], row["hidden"]
    said = [
        f"{row['parameters'] / 1e9:.3g} billion parameters in {row['tensors']} tensors ",
        f"({row['layers']} layers of {hidden}), AdamW in float32, clipped, {tokens} tokens per rank. ",
        f"Assumed: memory {given['hbm'] / 1e12:g} TB/s, within a node of {node} {given['intra'] / 1e9:g} GB/s, ",
        f"between nodes {given['inter'] / 1e9:g} GB/s per GPU, {given['flops'] / 1e12:g} TFLOP/s ",
        f"of which {given['utilization']:.0%} are reached, {given['latency'] * 1e6:g} us a hop, ",
        f"{given['dtype_bytes']:g} bytes per communicated element. Host time is this machine's, of CPU tensors; ",
        "a GPU's foreach, which launches once for many, takes less.",
    ]
    return "".join(said)


def lines(rows: list[Row]) -> list[list[str]]:
    """Cells of each projected row."""
    found = []
    for row in rows:
        cells = []
        for n in SHOWN:
            at = row["ranks"].index(n)
            cells.append(f"{digits(row['exposed_ms'][at])} ms {row['share'][at]:.1%}")
        sent = f"{row['sent_bytes_per_parameter']:.2f}"
        told = [str(row["calls"]), str(row["norm_calls"]), sent, f"{row['host_us']:.2f} us"]
        found.append([row["case"], row["contender"], *told, *cells])
    return found


def header(rows: list[Row]) -> list[str]:
    world = rows[0]["world"] if rows else 0
    told = ["calls", "norm's", f"B/param at {world}", "host/tensor"]
    return ["exposed", "contender", *told, *(f"{n} rank{'s' if n > 1 else ''}" for n in SHOWN)]


def errors(rows: list[Row]) -> list[list[str]]:
    """Of the check: predicted, measured and how far off, per ranks, wrapping and contender."""
    return [
        [TITLES[row["wrapping"]], row["contender"], str(row["ranks"]), f"{row['predicted_ms']:.2f} ms",
         f"{row['measured_ms']:.2f} ms", "" if row["off"] is None else f"{row['off']:+.0%}"]
        for row in rows
    ]  # fmt: skip


CHECK = ["predicted and measured on this CPU", "contender", "ranks", "predicted", "measured", "off"]


def accuracy(checks: list[Row]) -> str:
    """The check in a sentence; "" without one."""
    ratios = np.array([row["predicted_ms"] / row["measured_ms"] for row in checks if row["measured_ms"] > 0])
    if not len(ratios):
        return ""
    low, middle, high = np.quantile(ratios, (0.2, 0.5, 0.8))
    negative = sum(row["measured_ms"] <= 0 for row in checks)
    told = f"Beside {len(checks)} figures measured on this CPU the same arithmetic gives, at the median, {middle:.2f} "
    told += f"times what was measured, {low:.2f} to {high:.2f} times in the middle 60 %"
    return told + (
        f"; {negative} were measured below 0, in the noise of a step, and are left out." if negative else "."
    )


def terminal(suite: str, rows: list[Row]) -> Group:
    main, checks = parted(rows)
    tables: list[Any] = []
    for head, cells in ((header(main), lines(main)), (CHECK, errors(checks))):
        table = Table()
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
        for line in cells:
            table.add_row(*line)
        tables.append(table)
    about = f"{suite} ({LABEL}): {assumptions(main[0])}" if main else suite
    return Group(about, *tables, accuracy(checks))


def block(folder: Path, shown: str) -> str:
    """The README's part of one machine; `shown` is the folder as the README sees it."""
    main, checks = parted(store.read(folder / "project.jsonl"))
    if not main:
        return ""
    image = f"![Share of the step that the optimizer exposes]({shown}/{PLOT})" if (folder / PLOT).exists() else ""
    title = f"**A {LABEL}; nothing in it was measured on a GPU.** "
    legend = (
        " Of each wrapping the collectives of a step, those for the norm, the bytes that a rank sends per parameter, "
        "the host time of clipping and step() per tensor; and what is exposed, with its share of the step."
    )
    table = markdown(header(main), lines(main))
    return "\n\n".join(
        filter(
            None,
            [title + assumptions(main[0]) + legend, table, accuracy(checks), provenance("project", main), image],
        )
    )


def draw(folder: Path) -> None:
    """Write project.png: share against ranks for each wrapping, and the check."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    main, checks = parted(store.read(folder / "project.jsonl"))
    if not main:
        return
    fig = Figure(figsize=(14, 8.6), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(2, 3).ravel()
    shares = [share for row in main for share in row["share"]]
    for ax, wrapping in zip(axes, WRAPPINGS, strict=False):
        for row in main:
            if row["case"] == wrapping:
                name = row["contender"]
                percent = [100 * share for share in row["share"]]
                ax.loglog(row["ranks"], percent, color=COLOURS[name], marker=MARKS[name], markersize=5, label=name)
        ax.set_title(wrapping, loc="left", fontsize=12, fontweight="bold")
        ax.set_ylim(100 * min(shares) / 1.5, 100 * max(shares) * 1.5)
        ax.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("ranks")
        ax.set_ylabel("exposed optimizer time,\nshare of the step")
        ax.grid(True, which="major", color="#DDDDDD")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=9, frameon=False)
    axes[5].set_axis_off()
    if checks:
        _draw_check(axes[4], checks)
    else:
        axes[4].set_axis_off()
    fig.suptitle(f"What AdamW exposes at scale: {LABEL}", fontsize=14, fontweight="bold")
    axes[5].text(0, 0.98, _wrapped(f"{assumptions(main[0])}\n\nCollectives were counted under torch's fake process "
                 f"group; host time was measured on {main[0]['machine']}, its CPU only. Nothing was measured on a GPU."
                 f"\n\n{accuracy(checks)}"), va="top", fontsize=10.5, linespacing=1.4)  # fmt: skip
    fig.savefig(folder / PLOT)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.fill(paragraph, 56) for paragraph in text.split("\n"))


def _draw_check(ax: Any, checks: list[Row]) -> None:
    known = [row for row in checks if row["measured_ms"] > 0]
    for name in CONTENDERS:
        for ranks, filled in ((1, False), (2, True)):
            of = [row for row in known if row["contender"].startswith(name) and row["ranks"] == ranks]
            colour = COLOURS[name]
            ax.loglog([row["measured_ms"] for row in of], [row["predicted_ms"] for row in of], linestyle="",
                      marker=MARKS[name], color=colour, markerfacecolor=colour if filled else "none",
                      label=f"{name}, {ranks} rank{'s' if ranks > 1 else ''}" if of else None)  # fmt: skip
    every = [row[key] for row in known for key in ("measured_ms", "predicted_ms")]
    if every:
        ends = [min(every) / 1.5, max(every) * 1.5]
        ax.plot(ends, ends, color="#888888", linewidth=1)
        ax.set_xlim(ends)
        ax.set_ylim(ends)
    ax.set_title("the same arithmetic on this CPU", loc="left", fontsize=12, fontweight="bold")
    ax.set_xlabel("measured, ms; on the line both agree")
    ax.set_ylabel("predicted, ms")
    ax.grid(True, which="major", color="#DDDDDD")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
