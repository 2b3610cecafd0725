"""The README's table of what each loss does where is what was found by doing it; run this file to write it anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from simt import build  # noqa: E402

from benchmarks import features  # noqa: E402


def found(backend: str) -> dict[str, dict[str, str]]:
    """loss -> feature -> how, from a process of its own."""
    command = [sys.executable, ROOT / "tests/loss_features.py", backend]
    if backend == "cuda":
        if reason := build.missing("plain"):
            pytest.skip(f"the CUDA sources were not run on the CPU: {reason}")
        command.append(build.build("plain", "_native.so"))
    if backend == "triton":
        pytest.importorskip("triton")
    interpreted = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    run = subprocess.run(command, env={**os.environ, **interpreted}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", features.BACKENDS)
def test_the_table_says_what_was_found(backend):
    assert features.read()[backend] == found(backend), f"write it anew: python {Path(__file__).relative_to(ROOT)}"


def test_every_hole_is_explained():
    table = features.table()
    assert table.count("\n") > 20
    assert all(f"[{i}]" in table for i in range(1, len(features.NOTES) + 1))


if __name__ == "__main__":
    features.write({backend: found(backend) for backend in features.BACKENDS})
