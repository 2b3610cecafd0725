"""Every precision of fusedopt.train's default run: what it costs, and what it does to the validation loss.

Losses and bytes come from whole runs, a seed and a mode at a time; times from a short run of its own, `--cases times`,
in which the modes take turns step by step.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedopt.train import checks, cli, data
from fusedopt.train.distributed import World
from fusedopt.train.loop import FUSED, Contender
from fusedopt.train.precision import bytes_per_parameter

Row = dict[str, Any]
WORDS = 1  # columns of the table that hold words


@dataclass(frozen=True)
class Mode:
    name: str
    state: str  # --state
    weights: str  # --weights
    claimed: bool = False  # that its loss stays within what another seed changes


BASE = Mode("f32", "f32", "f32")
MODES = (
    BASE,
    Mode("8-bit states", "8bit", "f32", claimed=True),
    Mode("8-bit states, squares at random", "8bit-stochastic", "f32", claimed=True),
    Mode("bf16 states", "bf16", "f32"),
    Mode("bf16 weights", "f32", "bf16"),
    Mode("bf16 weights, master", "f32", "bf16-master", claimed=True),
    Mode("bf16 weights, stochastic", "f32", "bf16-stochastic", claimed=True),
    Mode("8-bit states, bf16 weights, master", "8bit", "bf16-master", claimed=True),
    Mode("8-bit states, bf16 weights, stochastic", "8bit", "bf16-stochastic", claimed=True),
)
SEEDS = (0, 1, 2)
STEPS, QUICK_STEPS = 300, 12  # of a run: the default of fusedopt.train takes 700
TIMED, WARMUP = 60, 5  # steps of each mode; steps before them
TIMES = "times"


def loss_case(mode: Mode, seed: int) -> str:
    return f"{mode.name}, seed {seed}"


LOSSES = {loss_case(mode, seed): (mode, seed) for seed in SEEDS for mode in MODES}


def cases(quick: bool = False) -> list[str]:
    """Names, in the order in which they run and stand in the file."""
    return [name for name, (_, seed) in LOSSES.items() if not quick or seed == SEEDS[0]] + [TIMES]


def keeps(row: Row) -> bool:
    """Whether a row of an earlier run stands, so that this one need not repeat it."""
    return row["case"] != TIMES


def measure(case: str, args: argparse.Namespace, tell: Callable[[str], None]) -> list[Row]:
    """The rows of one case."""
    if case == TIMES:
        return _times(args, tell)
    mode, seed = LOSSES[case]
    steps = QUICK_STEPS if args.quick else STEPS
    contender, corpus = _contender(mode, seed, steps, args.device)
    for step in range(1, steps + 1):
        if step % 10 == 0:
            tell(f"step {step}/{steps}")
        contender.step(data.train_batches(contender.args, corpus, step, 0, 1), step)
    loss = contender.validate(data.validation_batches(contender.args, corpus))["val_loss"]
    held = bytes_per_parameter(contender.model, contender.optimizer, contender.average)
    row = {"case": case, "contender": mode.name, "seed": seed, "steps": steps, "text": corpus.digest, "val_loss": loss}
    row |= {f"{name}_bytes": held[name] for name in ("weights", "states", "masters")}
    row |= {"bytes_per_parameter": round(sum(held.values()), 4), "verdict": "ok" if math.isfinite(loss) else "wrong"}
    return [row]


@functools.cache
def _corpus() -> data.Corpus:
    return data.load(_arguments(BASE, 0, STEPS, "cpu"))


def _arguments(mode: Mode, seed: int, steps: int, device: str) -> argparse.Namespace:
    words = ["--state", mode.state, "--weights", mode.weights, "--seed", seed, "--steps", steps, "--device", device]
    args = cli.make_parser().parse_args([*map(str, words), "--overwrite"])  # nothing is written: the loop is ours
    checks.check(args)
    return args


def _contender(mode: Mode, seed: int, steps: int, device: str) -> tuple[Contender, data.Corpus]:
    return Contender(FUSED, _arguments(mode, seed, steps, device), World()), _corpus()


def _times(args: argparse.Namespace, tell: Callable[[str], None]) -> list[Row]:
    timed = QUICK_STEPS if args.quick else TIMED
    contenders = {mode.name: _contender(mode, SEEDS[0], STEPS, args.device)[0] for mode in MODES}
    names = list(contenders)
    ms: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for step in range(1, WARMUP + timed + 1):
        tell(f"step {step}/{WARMUP + timed} of every mode")
        batches = data.train_batches(contenders[BASE.name].args, _corpus(), step, 0, 1)
        for turn in range(len(names)):  # each goes first as often as the others
            name = names[(step + turn) % len(names)]
            ms[name].append(contenders[name].step(batches, step).ms)
    rows = []
    for name in names:
        row = {"case": TIMES, "contender": name, "steps": timed, "verdict": "ok"}
        for phase in ("optimizer", "step"):
            quantiles = np.quantile([each[phase] for each in ms[name][WARMUP:]], (0.2, 0.5, 0.8))
            keys = (f"{phase}_p20_ms", f"{phase}_ms", f"{phase}_p80_ms")
            row |= {key: round(float(q), 4) for key, q in zip(keys, quantiles, strict=True)}
        rows.append(row)
    return rows


def table(rows: list[Row]) -> tuple[list[str], list[list[str]], str]:
    """Header, cells and a note, for the README."""
    losses = {(row["contender"], row["seed"]): row["val_loss"] for row in rows if row["case"] != TIMES}
    held = {row["contender"]: row for row in rows if row["case"] != TIMES}
    times = {row["contender"]: row for row in rows if row["case"] == TIMES}
    base = [losses[BASE.name, seed] for seed in SEEDS if (BASE.name, seed) in losses]
    spread = max(base) - min(base) if len(base) > 1 else math.nan
    header = ["mode", "bytes per parameter", "weights + states + master", "optimizer", "whole step"]
    header += ["validation loss", "less f32's", "largest", "within the seeds' spread"]
    cells = []
    for mode in MODES:
        line = [mode.name, *[""] * (len(header) - 1)]
        if mode.name in held:
            row = held[mode.name]
            parts = [row[f"{name}_bytes"] for name in ("weights", "states", "masters")]
            line[1] = f"{row['bytes_per_parameter']:.2f}"
            line[2] = " + ".join(f"{part:.3g}" for part in parts if part)
        if mode.name in times:
            line[3:5] = [f"{times[mode.name][f'{phase}_ms']:.3g} ms" for phase in ("optimizer", "step")]
        mine = {seed: losses[mode.name, seed] for seed in SEEDS if (mode.name, seed) in losses}
        if mine:
            line[5] = f"{np.mean(list(mine.values())):.4f}"
        differences = [loss - losses[BASE.name, seed] for seed, loss in mine.items() if (BASE.name, seed) in losses]
        if mode is not BASE and differences:
            largest = max(differences, key=abs)
            line[6:8] = [f"{np.mean(differences):+.4f}", f"{largest:+.4f}"]
            if mode.claimed and len(differences) == len(SEEDS):
                line[8] = "reached" if abs(largest) <= spread else "not reached"
        cells.append(line)
    seeds = len(base)
    note = f"AdamW, {STEPS} steps, {seeds} seeds; float32's own losses lie {spread:.4f} apart." if seeds > 1 else ""
    return header, cells, note
