"""Training, stock and fused side by side: `python -m fusedopt.train --compare`, whose summary and plots are kept."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import ROOT

CASE = "train"
KEPT = ("summary.json", "loss.png", "timing.png")
LIMIT = 0.02  # nats: a seed's loss lies 0.13 from another's
QUICK = ("--steps", "12", "--eval-every", "6", "--vocab-size", "512")


def measure(
    args: argparse.Namespace, out: Path, keep: Callable[[list[dict[str, Any]]], None], tell: Callable[[str], None]
) -> None:
    """Train; hand a row of each contender to `keep`, and leave summary and plots in `out`/train.

    Raises:
        RuntimeError: the run failed; the message has what it said.
    """
    tell("training, stock and fused")
    with tempfile.TemporaryDirectory() as folder:
        command = ["fusedopt.train", "--compare", *(QUICK if args.quick else ())]
        where = ["--device", args.device, "--out", folder, "--overwrite"]
        run = subprocess.run([sys.executable, "-m", *command, *where], cwd=ROOT, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with status {run.returncode}:\n{run.stdout}{run.stderr}")
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        summary["command"] = command  # as one would type it
        (out / CASE).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(Path(folder) / name, out / CASE / name)
        (out / CASE / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    keep(rows(summary))


def rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a summary. The losses of the two must agree: that is what is checked."""
    apart = abs(summary["val_loss_fused_minus_stock"])
    found = []
    for name, figures in summary["contenders"].items():
        step = figures["ms"]["step"]
        row = {"case": CASE, "contender": name, "median_ms": step["median"], "p25_ms": step["p25"]}
        row |= {"p75_ms": step["p75"], "repeats": figures["steps"], "bytes": None}
        row |= {f"{part}_ms": figures["ms"][part]["median"] for part in ("model", "loss", "optimizer")}
        row |= {"tokens_per_second": figures["tokens_per_second"], "val_loss": figures["val_loss"]}
        if "peak_mib" in figures:
            row["peak_mib"] = figures["peak_mib"]
        row |= {"error": apart, "error_limit": LIMIT, "verdict": "ok" if apart <= LIMIT else "wrong"}
        found.append(row)
    return found
