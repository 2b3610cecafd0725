"""Rows as tables: for the terminal every contender against ours, for the README every claim and if it is reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from fusedopt.train.report import LABELS

from . import store
from .registry import COMPARED, SINGLE, STUDIES, registry
from .runner import Case
from .tables import (
    CEILINGS,
    OURS,
    Row,
    by_case,
    digits,
    fastest_other,
    fraction,
    markdown,
    named,
    provenance,
    ratio,
    speed,
    timed,
)


def terminal(suite: str, rows: list[Row]) -> Table:
    """Every contender of every case."""
    grouped = by_case(rows)
    ours = [name for name in OURS if any(name in contenders for contenders in grouped.values())]
    table = Table(title=f"{suite}: median, middle 60 %, and each contender's time over ours", title_justify="left")
    table.add_column("case / contender", no_wrap=True)
    for heading in ("ms", "p20", "p80", "speed", "of ceiling", "error, eps", "verdict", *(f"/ {n}" for n in ours)):
        words = {"max_width": 24, "overflow": "ellipsis"} if heading == "verdict" else {}  # an error may say much
        table.add_column(heading, justify="right", no_wrap=True, **words)
    for name, contenders in grouped.items():
        table.add_section()
        table.add_row(f"[bold]{name}")
        for row in contenders.values():
            verdict = row["verdict"] if row["verdict"] == "ok" else f"[bold red]{row['verdict']}"
            if row["median_ms"] is None:
                table.add_row("  " + row["contender"], *[""] * 6, verdict)
                continue
            cells = [digits(row[key]) if key in row else "" for key in ("median_ms", "p20_ms", "p80_ms")]
            cells += [speed(row), fraction(row) if "ceiling_fraction" in row else ""]
            ratios = [f"{ratio(row, contenders[o]):.2f}" if o in contenders else "" for o in ours]
            table.add_row("  " + row["contender"], *cells, f"{row['error']:.3g}", verdict, *ratios)
    return table


def terminal_study(suite: str, rows: list[Row]) -> Table:
    """What the README shows of a study."""
    header, cells, note = STUDIES[suite].table(rows)
    table = Table(title=suite, title_justify="left", caption=note, caption_justify="left")
    for place, heading in enumerate(header):
        table.add_column(heading, justify="left" if place < STUDIES[suite].WORDS else "right")
    for line in cells:
        table.add_row(*map(escape, line))  # an error's words may have brackets
    return table


def comparisons(case: Case, contenders: dict[str, Row]) -> Iterator[list[str]]:
    """README rows of a case: what was asked for, and the fastest of the others, whoever that is."""
    present = timed(contenders)
    required = {(t.figure, t.against, t.ours): t.ratio for t in case.targets}
    for figure in ("median_ms", "host_ms"):
        for ours in filter(present.get, OURS):
            fastest = fastest_other(present, figure)
            for against in present:
                wanted = required.get((figure, against, ours))
                if against in OURS or (wanted is None and (figure == "host_ms" or present[against] is not fastest)):
                    continue
                other, mine = present[against], present[ours]
                got = ratio(other, mine, figure)
                yield [
                    case.title + (", host time" if figure == "host_ms" else ""),
                    named(other),
                    named(mine),
                    f"{digits(other[figure])} ms",
                    f"{digits(mine[figure])} ms",
                    fraction(mine) if figure == "median_ms" else "",
                    f"{got:.2f}x",
                    "" if wanted is None else f"{wanted:g}x: {'reached' if got >= wanted else 'not reached'}",
                ]
    yield from peaks(case, present)


def peaks(case: Case, contenders: dict[str, Row]) -> Iterator[list[str]]:
    """README rows of the memory that a case takes, where there is an allowance."""
    ours = next((contenders[name] for name in OURS if "allowed_mib" in contenders.get(name, {})), None)
    if ours is None:
        return
    title, mine = f"{case.title}, peak memory", f"{ours['peak_mib']:.0f} MiB"
    for name, row in contenders.items():
        if row is not ours and name not in CEILINGS and "peak_mib" in row:
            got = f"{row['peak_mib'] / ours['peak_mib']:.2f}x"
            yield [title, named(row), named(ours), f"{row['peak_mib']:.0f} MiB", mine, "", got, ""]
    allowed = ours["allowed_mib"]
    reached = "reached" if ours["peak_mib"] <= allowed else "not reached"
    got = f"{allowed / ours['peak_mib']:.2f}x"
    yield [title, "allowed", named(ours), f"{allowed:.0f} MiB", mine, "", got, f"1x: {reached}"]


def suite_block(suite: str, folder: Path) -> str:
    """The README's table of a suite on one machine; "" where it was not measured."""
    rows = store.read(folder / f"{suite}.jsonl")
    if not rows:
        return ""
    if suite in STUDIES:
        header, cells, note = STUDIES[suite].table(rows)
        table = "\n\n".join(filter(None, [markdown(header, cells, STUDIES[suite].WORDS), note]))
    elif suite in SINGLE:
        table = markdown(["what", "time", "required"], [SINGLE[suite].claim(rows[0])])
    else:
        assert suite in COMPARED
        grouped = by_case(rows)
        told = [case for case in registry(suite) if not case.sweep]
        cells = [line for case in told for line in comparisons(case, grouped.get(case.name, {}))]
        header = ["case", "against", "ours", "its time", "our time", "ours of ceiling", "ratio", "required"]
        table = markdown(header, cells)
    return f"{table}\n\n{provenance(suite, rows)}"


def plot_block(folder: Path, shown: str) -> str:
    """The plots of the suites and of the curves; `shown` is the folder as the page sees it."""
    images = [name for name in PLOTS if (folder / name).exists()]
    return "\n".join(f"![{PLOTS[name]}]({shown}/{name})" for name in images)


TRAINED = ("train", "train_fsdp")  # folders of runs of fusedopt.train
PLOTS = {
    "optim.png": "Optimizer steps: time of every contender, and the ceiling",
    "step.png": "Whole steps: time of every contender, and the ceiling",
    "loss.png": "Losses: time of every contender, and the ceiling",
    "linear_loss.png": "Head and loss: time of every contender, and the ceiling",
    "tensors.png": "Time of a step against the number of tensors",
    "vocabulary.png": "Time of cross entropy against the vocabulary",
}


def train_block(folder: Path, shown: str, run: str = "train") -> str:
    """Stock and fused over a whole training run, from the summary.json of `python -m fusedopt.train --compare`."""
    path = folder / run / "summary.json"
    if not path.exists():
        return ""
    summary = json.loads(path.read_text(encoding="utf-8"))
    stock, fused = summary["contenders"]["stock"], summary["contenders"]["fused"]
    ratios = summary["stock_over_fused"]
    cells = []
    for phase, label in LABELS.items():
        pair = [f"{digits(figures['ms'][phase]['median'])} ms" for figures in (stock, fused)]
        cells.append([label, *pair, f"{ratios[phase]:.2f}x"])
    speed = [f"{figures['tokens_per_second']:,.0f}" for figures in (stock, fused)]
    cells.append(["tokens per second", *speed, f"{fused['tokens_per_second'] / stock['tokens_per_second']:.2f}x"])
    if "peak_mib" in ratios:
        peaks = [f"{figures['peak_mib']:.0f} MiB" for figures in (stock, fused)]
        cells.append(["peak memory", *peaks, f"{ratios['peak_mib']:.2f}x"])
    difference = f"{summary['val_loss_fused_minus_stock']:+.1e}"
    cells.append(["validation loss", f"{stock['val_loss']:.4f}", f"{fused['val_loss']:.4f}", difference])
    versions = summary["versions"]
    line = (
        f"{summary['machine']['line']}, fusedopt {versions['fusedopt']}, Python {versions['python']}; "
        f"{summary['parameters'] / 1e6:.2f} M parameters; `{_train_command(summary)}`"
    )
    plots = [name for name in ("loss.png", "timing.png") if (folder / run / name).exists()]
    images = "\n".join(f"![{Path(name).stem}]({shown}/{run}/{name})" for name in plots)
    table = markdown(["median per step", "stock", "fused", "ratio"], cells)
    return "\n\n".join(filter(None, [table, line, images]))


def _train_command(summary: Row) -> str:
    """As one would type it; a folder's place on the machine that ran it says nothing to the reader."""
    processes = summary["machine"]["processes"]
    start = "python -m" if processes == 1 else f"torchrun --nproc-per-node={processes} -m"
    shown = [Path(word).name if Path(word).is_absolute() else word for word in summary["command"][1:]]
    return " ".join([f"{start} fusedopt.train", *shown])
