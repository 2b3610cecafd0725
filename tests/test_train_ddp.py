"""The training loop under torchrun: two ranks have the same bits, and they stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

OPTIONS = [
    *("--tokenizer", "bytes", "--dim", "16", "--layers", "1", "--seq-len", "16", "--eval-batches", "4"),
    *("--threads", "1", "--device", "cpu"),
]

# Trains as the command does, then tells what only the ranks themselves can see: their weights.
EVERY_RANK = """
import gc, hashlib, json, sys
import torch.distributed as dist
from fusedopt.train import checks, cli, run
from fusedopt.train.distributed import World

def digests(args, world):
    training = run.Run(args, world)
    assert training.train() == 0
    mine = [hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in contender.model.parameters())).hexdigest()
            for contender in training.contenders]
    gathered = [None] * world.size
    dist.all_gather_object(gathered, mine)
    return gathered

args = cli.make_parser().parse_args(sys.argv[2:])
world = World.from_environment()
checks.check(args, world)
with world.joined(args.device, args.timeout):
    gathered = digests(args, world)
gc.collect()  # as main() does
if world.is_main:
    with open(sys.argv[1], "w") as file:
        json.dump(gathered, file)
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {
        **os.environ,
        "PYTHONPATH": path,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    draw = np.random.default_rng(0)
    path.write_text(" ".join(draw.choice(["one", "two", "three", "four", "five"], 2000)), encoding="utf-8")
    return path


def launch(environment: dict[str, str], *argv: object) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_two_ranks_have_the_same_bits_and_one_voice(tmp_path, text, environment):
    script = tmp_path / "every_rank.py"
    script.write_text(EVERY_RANK, encoding="utf-8")
    options = ["--data", str(text), *OPTIONS, "--compare", "--steps", "12", "--warmup", "0"]
    parts = ["--batch-size", "2", "--accumulate", "2", "--out", str(tmp_path / "two")]
    two = launch(environment, script, tmp_path / "digests.json", *options, *parts)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step 12/12") == 1  # one rank speaks for all
    first, second = json.loads((tmp_path / "digests.json").read_text(encoding="utf-8"))
    assert first == second


def test_all_ranks_stop_at_a_non_finite_loss(tmp_path, text, environment):
    options = ["--data", text, *OPTIONS, "--stock", "--optimizer", "sgd", "--lr", "1e30", "--steps", "20"]
    stopped = launch(environment, "-m", "fusedopt.train", *options, "--out", tmp_path / "out")
    assert stopped.returncode != 0
    assert stopped.stderr.count("fusedopt.train: error: the loss of the stock contender") == 1
    assert "at step" in stopped.stderr


def test_bad_input_is_told_once(tmp_path, text, environment):
    options = ["--data", text, *OPTIONS, "--seq-len", "100000"]
    stopped = launch(environment, "-m", "fusedopt.train", *options, "--out", tmp_path / "out")
    assert stopped.returncode != 0
    assert stopped.stderr.count("100001 are needed") == 1
    assert "fusedopt/train/run.py" not in stopped.stderr  # no traceback of ours
