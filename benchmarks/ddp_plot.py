"""ddp.png: a panel per wrapping, a bar per contender, the step in its parts; what the optimizer exposes in figures."""

from __future__ import annotations

from pathlib import Path

from . import store
from .ddp_report import OPTIMIZERS, PLOT, TITLES, caption, latest, parts
from .ddp_split import CLIPPED, NO_COMMUNICATION, NO_OPTIMIZER, PARTS
from .tables import by_case, where

# greys for what is the same for all, colours for what an optimizer adds (Okabe and Ito's)
COLOURS = {
    "forward": "#D9D9D9",
    "backward": "#B3B3B3",
    "communication": "#808080",
    "clip": "#E69F00",
    "optimizer": "#D55E00",
}
LABELS = {"communication": "exposed communication", "clip": "norm and clip"}
ORDER = [NO_COMMUNICATION, NO_OPTIMIZER, *(name + clip for clip in ("", CLIPPED) for name in OPTIMIZERS)]


def draw(folder: Path) -> None:
    """Write the plot from the folder's rows; nothing where there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = latest(store.read(folder / "ddp.jsonl"))
    grouped = by_case(rows)
    if not grouped:
        return
    lines = -(-(len(grouped) + 1) // 2)
    fig = Figure(figsize=(14, 1.2 + 3.1 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(lines, 2, squeeze=False).ravel()
    for ax in axes[len(grouped) :]:
        ax.set_axis_off()
    for ax, contenders in zip(axes, grouped.values(), strict=False):
        names = [name for name in ORDER if name in contenders]
        longest = max(row.get("median_ms", 0.0) for row in contenders.values())
        for place, name in enumerate(names):
            row = contenders[name]
            if "median_ms" not in row:
                ax.text(longest * 0.01, place, row["verdict"].split(":")[0], va="center", fontsize=9, color="#AA0000")
                continue
            left = 0.0
            for part, ms in zip(PARTS, parts(row), strict=True):
                ax.barh(place, max(ms, 0.0), left=left, color=COLOURS[part], height=0.78)
                left += max(ms, 0.0)
            text = f"{row['median_ms']:.1f} ms"
            if "exposed_optimizer_ms" in row:
                share = row["exposed_optimizer_ms"] / row["median_ms"]
                text += f", optimizer exposes {row['exposed_optimizer_ms']:.2f} ms = {share:.0%}"
            ax.text(left + longest * 0.01, place, text, va="center", fontsize=9)
        labels = [name if contenders[name]["verdict"] != "wrong" else f"{name} (wrong)" for name in names]
        ax.set_yticks(range(len(names)), labels, fontsize=9)
        for label, name in zip(ax.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if name.startswith("fusedopt") else "normal")
        ax.invert_yaxis()
        ax.set_xlim(0, longest * 1.95)
        first = contenders[names[0]]
        ax.set_title(TITLES[first["wrapping"]], loc="left", fontsize=11, fontweight="bold")
        ax.set_xlabel("milliseconds per step", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOURS[part], label=LABELS.get(part, part)) for part in PARTS]
    axes[len(grouped)].legend(handles=handles, loc="center", fontsize=12, frameon=False, title="a step, slowest rank")
    first = rows[0]
    fig.suptitle(
        f"AdamW on {first['ranks']} ranks, {first['parameters'] / 1e6:.1f} M parameters; medians of interleaved steps. "
        f"{where(first)}, torch {first['torch']}\n{caption(first)}",
        fontsize=10,
    )
    fig.savefig(folder / PLOT)
