"""Rows as tables: for the terminal every contender against ours, for the README every claim and if it is reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fusedopt.train.report import LABELS

from . import (
    cases_linear_loss,
    cases_linear_loss_gpu,
    cases_loss,
    cases_loss_dense,
    cases_loss_gpu,
    cases_optim,
    cases_optim_gpu,
    cases_shared,
    cases_step,
    codes,
    host,
    install,
    modes,
    store,
    trial,
)
from .runner import STREAM, Case

Row = dict[str, Any]
OURS = ("fusedopt", "fusedopt triton", "fusedopt inplace")


SINGLE = {"install": install, "host": host}  # suites of one row, measured in a way of their own
STUDIES = {"modes": modes, "codes": codes, "peers": trial}  # training runs, and whom else there is


def registry(suite: str, device: str | None = None) -> list[Case]:
    """The cases of a suite, of one device or of all."""
    sources = {
        "optim": (cases_optim, cases_optim_gpu),
        "step": (cases_step,),
        "loss": (cases_loss, cases_loss_dense, cases_loss_gpu),
        "linear_loss": (cases_linear_loss, cases_linear_loss_gpu),
    }.get(suite, ())
    found = [case for source in sources for case in source.cases()]
    found += cases_shared.cases(suite) if suite in ("optim", "step") else []
    return [case for case in found if device in (None, case.device)]


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """case -> contender -> row, in the order of the rows."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def digits(value: float) -> str:
    """Three significant digits, and all that stand before the point."""
    return f"{value:#.3g}".rstrip(".") if value < 100 else f"{value:.0f}"


def ratio(row: Row, ours: Row, figure: str = "median_ms") -> float:
    """How many times as long as ours."""
    return row[figure] / ours[figure]


def terminal(suite: str, rows: list[Row]) -> Table:
    """Every contender of every case."""
    grouped = by_case(rows)
    ours = [name for name in OURS if any(name in contenders for contenders in grouped.values())]
    table = Table(title=f"{suite}: median, middle 60 %, and each contender's time over ours", title_justify="left")
    table.add_column("case / contender", no_wrap=True)
    for heading in ("ms", "p20", "p80", "GB/s", "of stream", "error, eps", "verdict", *(f"/ {name}" for name in ours)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, contenders in grouped.items():
        table.add_section()
        table.add_row(f"[bold]{name}")
        for row in contenders.values():
            cells = [digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")]
            cells += [f"{row['gb_per_s']:.1f}", f"{row['ceiling_fraction']:.0%}"] if row["bytes"] else ["", ""]
            verdict = row["verdict"] if row["verdict"] == "ok" else f"[bold red]{row['verdict']}"
            ratios = [f"{ratio(row, contenders[o]):.2f}" if o in contenders else "" for o in ours]
            table.add_row("  " + row["contender"], *cells, str(row["error"]), verdict, *ratios)
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


def named(row: Row) -> str:
    return row["contender"] + ("" if row["verdict"] == "ok" else " (**wrong**)")


def comparisons(case: Case, contenders: dict[str, Row]) -> Iterator[list[str]]:
    """README rows of a case: each of torch's contenders against each of ours, and what was asked for."""
    required = {(t.figure, t.against, t.ours): t.ratio for t in case.targets}
    for figure in ("median_ms", "host_ms"):
        for ours in filter(contenders.get, OURS):
            for against in contenders:
                wanted = required.get((figure, against, ours))
                aside = figure == "host_ms" or (against == STREAM and len(contenders) > 2)  # shown where it is claimed
                if against in OURS or (aside and wanted is None):
                    continue
                stock, mine = contenders[against], contenders[ours]
                got = ratio(stock, mine, figure)
                yield [
                    case.title + (", host time" if figure == "host_ms" else ""),
                    named(stock),
                    named(mine),
                    f"{digits(stock[figure])} ms",
                    f"{digits(mine[figure])} ms",
                    f"{got:.2f}x",
                    "" if wanted is None else f"{wanted:g}x: {'reached' if got >= wanted else 'not reached'}",
                ]
    yield from peaks(case, contenders)


def peaks(case: Case, contenders: dict[str, Row]) -> Iterator[list[str]]:
    """README rows of the memory that a case takes, where that was counted."""
    ours = next((contenders[name] for name in OURS if "peak_mib" in contenders.get(name, {})), None)
    if ours is None:
        return
    title, mine = f"{case.title}, peak memory", f"{ours['peak_mib']:.0f} MiB"
    for row in contenders.values():
        if "peak_mib" in row and row is not ours:
            got = f"{row['peak_mib'] / ours['peak_mib']:.2f}x"
            yield [title, named(row), named(ours), f"{row['peak_mib']:.0f} MiB", mine, got, ""]
    allowed = ours["allowed_mib"]
    reached = "reached" if ours["peak_mib"] <= allowed else "not reached"
    yield [
        title,
        "allowed",
        named(ours),
        f"{allowed:.0f} MiB",
        mine,
        f"{allowed / ours['peak_mib']:.2f}x",
        f"1x: {reached}",
    ]


def markdown(header: list[str], rows: list[list[str]], words: int = 3) -> str:
    """A table; figures, which follow the first columns of `words`, to the right."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def where(row: Row) -> str:
    if "gpu" in row:
        return f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}"
    return f"{row['machine']}, {row['cores']} cores, {row['threads']} threads ({row['instruction_set']})"


def provenance(suite: str, rows: list[Row]) -> str:
    """Machine, versions, date and the command; one line for each way in which the rows differ."""
    lines = dict.fromkeys(
        f"{where(r)}; torch {r['torch']}, "
        f"fusedopt {r['fusedopt']} at {r['commit']}, Python {r['python']}; {r['date']}; `python -m benchmarks {suite}`"
        + (f"; not installed: {', '.join(r['absent'])}" if "absent" in r else "")
        for r in rows
    )
    return "\n\n".join(lines)


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
        grouped = by_case(rows)
        cells = [line for case in registry(suite) for line in comparisons(case, grouped.get(case.name, {}))]
        table = markdown(["case", "against", "ours", "its time", "our time", "ratio", "required"], cells)
    return f"{table}\n\n{provenance(suite, rows)}"


def plot_block(folder: Path, shown: str) -> str:
    """The summary plot; `shown` is the folder as the README sees it."""
    return f"![Times of every contender]({shown}/summary.png)" if (folder / "summary.png").exists() else ""


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
