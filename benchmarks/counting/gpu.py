"""Launches of CUDA steps and losses, and the bytes that their kernels move, counted on the tests' simulated GPU."""

from __future__ import annotations

import json
import subprocess
import sys

from ..machine import ROOT

KIND = "counted"


def missing() -> str:
    from tests.simt import build  # a checkout has it, as it has the benchmarks

    return build.missing(KIND)


def count() -> dict[str, float]:
    """By name. Raises RuntimeError, with what was said, where tests/simt/counts.py fails."""
    from tests.simt import build

    command = [sys.executable, ROOT / "tests/simt/counts.py", build.build(KIND, "_native.so")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"tests/simt/counts.py failed:\n{done.stderr[-3000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    units = {"launches": "launches", "read": "bytes read each", "written": "bytes written each"}
    return {f"gpu {name}: {units[key]}": round(value, 4) for name, row in told.items() for key, value in row.items()}
