"""Vocabulary shards among real processes: the collectives counted, and ranks that disagree told so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

WORLD = 3
SCRIPT = Path(__file__).parent / "vocab_parallel_ranks.py"


def test_three_processes(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(WORLD), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TORCH_DISTRIBUTED_DEBUG": "DETAIL"},
        )
        for rank in range(WORLD)
    ]
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, text in zip(ranks, told, strict=True):
        assert rank.returncode == 0 and "done\n" in text, text[-4000:]
