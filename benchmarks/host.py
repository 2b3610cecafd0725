"""Host time of a GPU step, without a GPU: the tests' simulated one checks and counts every launch, and runs none."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .machine import ROOT

CASE, CONTENDER = "host", "fusedopt"
TENSORS = 1000
TITLE = f"host time of a CUDA step, AdamW, {TENSORS} tensors, no pointer changed, launches left out"
LIMIT_MICROSECONDS = 0.25  # per tensor


def claim(row: dict[str, Any]) -> list[str]:
    """The README's cells."""
    each = row["median_ms"] * 1e3 / TENSORS
    reached = "reached" if each <= LIMIT_MICROSECONDS else "not reached"
    return [TITLE, f"{each:.3f} us a tensor", f"<= {LIMIT_MICROSECONDS:g} us: {reached}"]


def measure(
    args: argparse.Namespace, out: Path, keep: Callable[[list[dict[str, Any]]], None], tell: Callable[[str], None]
) -> None:
    """Step in a process that holds the simulated library; hand the row to `keep`.

    Raises:
        RuntimeError: this machine cannot build or run that library; the message says why.
    """
    from tests.simt import build  # a checkout has it, as it has the benchmarks

    if reason := build.missing("plain"):
        raise RuntimeError(f"the simulated GPU is not to be had: {reason}")
    tell("building the simulated GPU")
    library = build.build("plain", "_native.so")
    tell("stepping")
    command = [sys.executable, ROOT / "tests/simt/host.py", library, str(TENSORS), str(100 if args.quick else 5000)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"tests/simt/host.py failed:\n{run.stderr}")
    told = json.loads(run.stdout.splitlines()[-1])
    low, median, high = (round(float(q) * 1e3, 4) for q in np.quantile(told["seconds"], (0.2, 0.5, 0.8)))
    row = {"case": CASE, "contender": CONTENDER, "median_ms": median, "p20_ms": low, "p80_ms": high}
    row |= {"repeats": len(told["seconds"]), "bytes": None, "launches": told["launches"], "error": 0.0}
    keep([row | {"error_limit": 0.0, "verdict": "ok" if told["launches"] == 2 else "wrong"}])
