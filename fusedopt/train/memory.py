"""Peak memory of one contender, in a process of its own: ``python -m fusedopt.train.memory``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch

from . import data
from .distributed import World
from .loop import Contender

STEPS = 3  # the optimizer's state appears in the first, the allocator settles in the second


def peak_memory(name: str, args: argparse.Namespace) -> float | None:
    """MiB that weights, gradients, optimizer state and activations take at most, in one process without DDP.

    On the CPU: the high-water mark of resident memory after a few steps, less the mark before the model is
    built (interpreter, torch, text). On CUDA: ``torch.cuda.max_memory_allocated``. None if there is neither.

    glibc is told to give freed tensors back at once. As it comes it keeps some, and the peak of the very same run
    moves by 15 %.
    """
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in torchrun}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    request = json.dumps({"name": name, "args": {**vars(args), "threads": torch.get_num_threads()}})
    child = subprocess.run(
        [sys.executable, "-m", "fusedopt.train.memory"],
        input=request,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def high_water_mark() -> float | None:
    """MiB of resident memory at its highest so far, of this process alone."""
    if sys.platform == "linux":  # not ru_maxrss: it starts at the parent's peak
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM")), None)
    if sys.platform == "darwin":
        import resource  # does not exist on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return None


def measure(name: str, args: argparse.Namespace) -> float | None:
    """Train ``STEPS`` steps and read the peak."""
    torch.set_num_threads(args.threads)
    corpus = data.load(args)
    # what torch and its libraries set up in a first step (70 MiB on a CPU) is no contender's
    small = {"model": "lstm" if args.model == "lstm" else "gpt", "layers": 1, "dim": 8, "heads": 1, "vocab_size": 16}
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    small |= {"seq_len": 2, "distill": None}
    Contender(name, argparse.Namespace(**{**vars(args), **small}), World()).step([(tokens, tokens)], 0)
    before = high_water_mark()
    contender = Contender(name, args, World(), corpus.digest)
    for step in range(STEPS):
        contender.step(data.train_batches(args, corpus, step, rank=0, world_size=1), step)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    after = high_water_mark()
    return None if before is None or after is None else after - before


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(json.dumps(measure(request["name"], argparse.Namespace(**request["args"]))))
