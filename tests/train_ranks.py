"""Ranks of the training loop, started without torchrun: the same environment, and no agent that ends those left over.

Run as a program, a rank takes the jobs of a file in turn, in one process group, and writes what became of each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

WAIT = 250  # seconds for what takes a few, on a machine that has more to do


@contextlib.contextmanager
def started(count: int, *argv: object, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """`python *argv` as each of `count` ranks; none outlives the body."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        **environment,
    }
    command = [sys.executable, *map(str, argv)]
    ranks = []
    try:
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen(command, env={**common, **place}, **pipes))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()
            process.stderr.close()


def run_jobs(count: int, folder: Path, jobs: list[dict], wait: float = WAIT) -> list[dict[str, str]]:
    """Of each rank: what each job, {"name", "argv", perhaps "others": argv of the ranks after 0}, complained of."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    with started(count, __file__, folder) as ranks:
        ends = [process.communicate(timeout=wait)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * count, "\n".join(ends)
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def rank_main(folder: Path) -> None:
    from dataclasses import replace
    from functools import partialmethod

    import torch

    from fusedopt.train import checks, cli, run
    from fusedopt.train.distributed import World
    from fusedopt.train.errors import Stop

    jobs = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    # what is compiled is of interest, not by what: inductor takes minutes
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    world, complaints = World.from_environment(), {}

    def do(job: dict) -> str:
        args = cli.make_parser().parse_args(job["others"] if world.rank and "others" in job else job["argv"])
        here = replace(world, split=args.parallel == "tp")
        try:
            with here.agreeing():
                checks.check(args, here)
            return str(run.Run(args, here).train() or "")
        except Stop as stop:
            return f"{type(stop).__name__}: {stop}"

    with world.joined("cpu", WAIT):
        for job in jobs:
            complaints[job["name"]] = do(job)
            gc.collect()
    (folder / f"rank{world.rank}.json").write_text(json.dumps(complaints), encoding="utf-8")


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
