"""How long `pip install .` takes where torch is: fresh environment, clean copy of the tree, pip's own isolation."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .machine import ROOT

CASE, CONTENDER = "install", "pip install ."
TITLE = "`pip install .`, no CUDA, torch already there"
LIMIT_SECONDS = 40.0

# Is it whole? One step of the native engine against torch's in float64; prints the error in epsilons of float32.
PROBE = """
import torch
from fusedopt import backends, optim
assert backends.available()["cpu"] is True, backends.available()["cpu"]
p = torch.linspace(-1, 1, 1000)
p, q = p.clone().requires_grad_(), p.double().requires_grad_()
p.grad, q.grad = torch.cos(p.detach()), torch.cos(p.detach()).double()
ours, oracle = optim.AdamW([p], backend="cpu"), torch.optim.AdamW([q])
ours.step(), oracle.step()
print(float(((p.double() - q).abs() / q.abs().clamp_min(0.5)).max()) / torch.finfo(torch.float32).eps)
"""


def claim(row: dict[str, Any]) -> list[str]:
    """The README's cells."""
    seconds = row["median_ms"] / 1e3
    reached = "reached" if seconds < LIMIT_SECONDS and row["verdict"] == "ok" else "not reached"
    return [TITLE, f"{seconds:.1f} s", f"< {LIMIT_SECONDS:g} s: {reached}"]


def _copy_tree(to: Path) -> None:
    """What git would commit: tracked files and new ones, nothing ignored, so no build to be used again."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def _install_once(folder: Path) -> tuple[float, float]:
    """Seconds of the installation, and the probe's error."""
    tree, environment = folder / "tree", folder / "venv"
    _copy_tree(tree)
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    # this Python's packages, torch among them, after the environment's own; its editable fusedopt is not followed
    (own / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")

    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "."]
    start = time.perf_counter()
    env = os.environ | {"FUSEDOPT_CUDA": "0"}
    run = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - start
    if run.returncode != 0:
        raise RuntimeError(f"pip install . failed:\n{run.stdout}")
    probe = subprocess.run([str(python), "-c", PROBE], cwd=folder, capture_output=True, text=True)
    if probe.returncode != 0:
        print(probe.stderr, file=sys.stderr)
        return seconds, float("inf")
    return seconds, float(probe.stdout)


def measure(
    args: argparse.Namespace, out: Path, keep: Callable[[list[dict[str, Any]]], None], tell: Callable[[str], None]
) -> None:
    """Install once if quick, twice if not; hand the row to `keep`, after Ctrl-C too."""
    times: list[float] = []
    error = 0.0
    try:
        for i in range(1 if args.quick else 2):
            tell(f"installation {i + 1}")
            with tempfile.TemporaryDirectory() as folder:
                seconds, one_error = _install_once(Path(folder))
            times.append(seconds)
            error = max(error, one_error)
    finally:
        if times:
            low, median, high = (float(q) * 1e3 for q in np.quantile(times, (0.2, 0.5, 0.8)))
            row = {"case": CASE, "contender": CONTENDER, "median_ms": round(median), "p20_ms": round(low)}
            row |= {"p80_ms": round(high), "repeats": len(times), "bytes": None, "error": round(min(error, 1e9), 3)}
            keep([row | {"error_limit": 4.0, "verdict": "ok" if error <= 4.0 else "wrong"}])
