"""The end of a run: its figures from the log, as a table and as ``summary.json``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import textwrap
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table

from fusedopt._version import __version__

from . import plots
from .checkpoint import atomic, read_log
from .distributed import World
from .loop import FUSED, PHASES, STOCK
from .precision import stock_falls_short

SUMMARY = "summary.json"
FILES = (SUMMARY, plots.LOSS, plots.TIMING)
VALIDATION = {"val_loss": "validation loss", "val_loss_ema": "of the average"}
LABELS = {"loss": "head and loss", "optimizer": "optimizer", "model": "model", "step": "whole step"}


def write(
    out: Path,
    args: argparse.Namespace,
    world: World,
    memory: dict[str, float | None],
    held: dict[str, dict[str, float]],
    parameters: int,
    command: list[str],
    seconds: float,
) -> None:
    """Print the table; write ``summary.json`` and the plots."""
    rows = read_log(out)
    figures = {
        name: figures_of([row for row in rows if row["contender"] == name], memory.get(name), held[name])
        for name in dict.fromkeys(row["contender"] for row in rows)
    }
    summary = {
        "contenders": figures,
        **comparison(figures),
        "stock_falls_short": stock_falls_short(args) if args.compare else "",
        "parameters": parameters,
        "args": vars(args),
        "seconds": round(seconds, 1),
        "machine": machine(args, world),
        "versions": versions(),
        "command": command,
    }
    with atomic(out / SUMMARY, "w") as file:
        json.dump(summary, file, indent=2)
    tokens = rows[-1]["tokens"]
    title = (
        f"{args.model}, {parameters / 1e6:.2f} M parameters, vocabulary {args.vocab_size:,}, "
        f"{args.optimizer}, {precision(args)}, {tokens:,} tokens per step"
    )
    title = textwrap.fill(title, 100, break_on_hyphens=False)  # as wide as the plots
    plots.loss(out / plots.LOSS, rows, title)
    plots.timing(out / plots.TIMING, figures, title + "\n" + summary["machine"]["line"])
    console = Console(highlight=False)
    console.print(table(figures, summary))
    for line in notes(summary, out):
        console.print(line, markup=False, soft_wrap=True)


def precision(args: argparse.Namespace) -> str:
    """Of the computation, and of weights and states where they are not float32."""
    kept = {"weights": args.weights, "states": args.state}
    return ", ".join([args.dtype, *(f"{what} {how}" for what, how in kept.items() if how != "f32")])


def figures_of(rows: list[dict[str, Any]], memory: float | None, held: dict[str, float]) -> dict[str, Any]:
    """One contender: milliseconds per phase with quartiles, tokens per second, last validation loss, bytes held."""
    steps = [row for row in rows if row["step"]]
    ms = {}
    for phase in (*PHASES, "step"):
        times = [row["ms"][phase] for row in steps]
        low, middle, high = quantiles(times, method="inclusive") if len(times) > 1 else times * 3
        ms[phase] = {"median": middle, "p25": low, "p75": high}
    return {
        "ms": ms,
        "tokens_per_second": steps[-1]["tokens"] / ms["step"]["median"] * 1e3,
        "peak_mib": memory,
        "bytes_per_parameter": held,
        **{key: row[key] for row in rows for key in VALIDATION if key in row},  # the last row's stay
        "steps": len(steps),
    }


def comparison(figures: dict[str, Any]) -> dict[str, Any]:
    """Ratios stock / fused, the difference in validation loss, the share of each phase in the stock step."""
    if len(figures) < 2:
        return {}
    stock, fused = figures[STOCK], figures[FUSED]
    median = {name: {phase: figures[name]["ms"][phase]["median"] for phase in (*PHASES, "step")} for name in figures}
    ratio = {phase: median[STOCK][phase] / median[FUSED][phase] for phase in (*PHASES, "step")}
    if stock["peak_mib"] and fused["peak_mib"]:
        ratio["peak_mib"] = stock["peak_mib"] / fused["peak_mib"]
    return {
        "stock_over_fused": ratio,
        **{f"{key}_fused_minus_stock": fused[key] - stock[key] for key in VALIDATION if key in fused},
        "share_of_stock_step": {phase: median[STOCK][phase] / median[STOCK]["step"] for phase in PHASES},
    }


def table(figures: dict[str, Any], summary: dict[str, Any]) -> Table:
    """Median and quartiles of each figure; with two contenders a column of ratios. Fits 80 columns."""
    ratio = summary.get("stock_over_fused", {})
    title = "per step: median (quartiles); loss (with the head) and model are forward + backward"
    result = Table(title=title, title_justify="left")
    result.add_column("", no_wrap=True)
    for name in figures:
        result.add_column(name, justify="right")
    if ratio:
        result.add_column("stock / fused", justify="right")

    def add(label: str, cells: list[str], key: str = "") -> None:
        result.add_row(label, *cells, *([f"{ratio[key]:.2f}" if key in ratio else ""] if ratio else []))

    for phase, label in LABELS.items():
        quartiles_of = [figure["ms"][phase] for figure in figures.values()]
        add(
            f"{label}, ms",
            [f"{digits(q['median'])} ({digits(q['p25'])}-{digits(q['p75'])})" for q in quartiles_of],
            phase,
        )
    add("tokens/s", [f"{figure['tokens_per_second']:,.0f}" for figure in figures.values()])
    if ratio:
        peaks = [figure["peak_mib"] for figure in figures.values()]
        add("peak memory, MiB", ["not measured" if peak is None else f"{peak:.0f}" for peak in peaks], "peak_mib")
    held = [figure["bytes_per_parameter"] for figure in figures.values()]
    for part in held[0]:
        if any(each[part] for each in held):
            add(f"{part}, bytes/param", [f"{each[part]:.2f}" for each in held])
    for key, label in VALIDATION.items():
        if all(key in figure for figure in figures.values()):
            add(label, [f"{figure[key]:.5f}" for figure in figures.values()])
    return result


def digits(value: float) -> str:
    """Three significant digits, and all that stand before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def notes(summary: dict[str, Any], out: Path) -> list[str]:
    """What a reader of the table must know."""
    lines = [summary["machine"]["line"]]
    share = summary.get("share_of_stock_step")
    if summary["stock_falls_short"]:
        lines.append(f"Not quite the same work: {summary['stock_falls_short']}.")
    if share:
        lines.append(
            f"Final validation loss, fused less stock: {summary['val_loss_fused_minus_stock']:+.2e} nats per token"
        )
        lines.append(
            f"Of the stock step head and loss are {share['loss']:.0%} and the optimizer {share['optimizer']:.0%}; "
            "the model up to its head is the same code on both sides."
        )
        lines.append(
            "Peak memory: weights, gradients, optimizer state and activations, each contender in a process of its own."
        )
    lines.append(f"{summary['seconds']:.0f} s in all; {', '.join((SUMMARY, *FILES[1:], 'log.jsonl'))} in {out}")
    return lines


def machine(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Device, cores, threads and processes, and the same as a line."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    ways = f" ({args.parallel})" if world.launched else ""
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": threads,
        "processes": world.size,
        "line": f"{device}, {threads} thread(s), {world.size} process(es){ways}, torch {torch.__version__}",
    }


def cpu_name() -> str:
    """The model name that Linux tells, or what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Of everything that a figure may depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "fusedopt": __version__,
    }
