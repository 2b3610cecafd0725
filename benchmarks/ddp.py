"""`torchrun --nproc-per-node=N -m benchmarks ddp`: what the optimizer costs a distributed step.

Every case is a wrapping of the model on some ranks; its contenders take turns, step by step, and each step is as long
as its slowest rank's. After the turns every contender's parameters are compared with a float64 oracle in one process.
Without torchrun the command starts itself under it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import ddp_split, runner
from .ddp_collectives import Call, Collectives, again, summed
from .ddp_contenders import SIZES, WRAPPINGS, Contender, Entry, Size, entries, oracle
from .ddp_split import NO_COMMUNICATION, NO_OPTIMIZER
from .machine import ROOT

# float32 trajectories of AdamW stay within 2e-4 of float64's, measured over 3 to 30 steps; a learning rate that is
# wrong by a thousandth is 1e-3 to 3e-3 away, no weight decay 6e-4 to 1e-3.
LIMIT = 5e-4
BATCHES = 4  # that the steps go through again and again
STREAM_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of the array; beyond the caches
TIMEOUT = datetime.timedelta(minutes=10)  # after which ranks that wait for a lost one give up; torchrun is faster
HOST_RUNS = 15

Row = dict[str, Any]
Keep = Callable[[list[Row]], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A case: a wrapping on the first `ranks` ranks."""

    wrapping: str
    ranks: int
    scaling: str  # "weak": the batch of a rank stays; "strong": that of all ranks together does

    @property
    def name(self) -> str:
        return f"{self.wrapping}-{self.ranks}-{self.scaling}"


@dataclass(frozen=True)
class Turns:
    warmup: int
    timed: int
    before: int = 3  # steps before the turns: two for states and DDP's buckets to be there, one that is looked into

    @property
    def steps(self) -> int:
        return self.before + self.warmup + self.timed


def launched() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_main() -> bool:
    """Of the ranks, the one that writes and tells."""
    return not launched() or os.environ["RANK"] == "0"


def use_own_threads() -> None:
    """Ranks on one machine share its cores evenly; at every number of ranks, so that these compare."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))


def plans(world: int, scaling: bool, batch: int, cases: str) -> list[Plan]:
    """The cases that a run of `world` ranks measures."""
    counts = [n for n in (2**i for i in range(world.bit_length())) if n < world] if scaling else []
    found = [Plan(wrapping, n, "weak") for n in [*counts, world] for wrapping in WRAPPINGS]
    if scaling:
        shares = [n for n in [*counts, world] if n > 1 and batch % n == 0]
        found += [Plan(wrapping, n, "strong") for n in shares for wrapping in WRAPPINGS]
    return [plan for plan in found if cases in plan.name]


def spawn(args: argparse.Namespace, out: Path) -> int:
    """This command under torchrun; its status. Ctrl-C reaches the ranks by themselves."""
    ranks = args.nproc_per_node or (torch.cuda.device_count() if args.device == "cuda" else 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks", "ddp", "--spawned", "--out", str(out), "--device", args.device]
    command += ["--cases", args.cases, *(["--model", args.model] if args.model else [])]
    command += [flag for flag, on in (("--quick", args.quick), ("--scaling", args.scaling)) if on]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # torchrun warns without
    child = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise


def measure(args: argparse.Namespace, keep: Keep, tell: Tell) -> None:
    """One rank's part of the run; rank 0 hands the rows of each case to `keep`."""
    cuda = args.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend "fake"

    name = args.model or ("tiny" if args.quick else "gpt2" if cuda else "small")
    turns = Turns(1, 4) if args.quick else Turns(3, 25)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    gc.freeze()  # what importing made is no garbage, and takes a fifth of a second to look through each time
    try:
        world, rank = dist.get_world_size(), dist.get_rank()
        todo = plans(world, args.scaling, SIZES[name].batch, args.cases)
        groups = {  # every rank makes every group, in one order
            n: (dist.new_group(list(range(n))), dist.new_group(list(range(n)), backend="fake"))
            for n in sorted({plan.ranks for plan in todo})
        }
        expected: dict[tuple[int, bool], list[Tensor]] = {}
        for plan in todo:
            if rank < plan.ranks:
                size = SIZES[name]
                if plan.scaling == "strong":
                    size = replace(size, batch=size.batch // plan.ranks)
                case = Case(plan, name, size, turns, *groups[plan.ranks], device, expected, tell)
                rows = case.measure()
                if rank == 0:
                    keep(rows)
                del case
            dist.barrier()  # ranks that have no part in a case wait here
    finally:
        dist.destroy_process_group()


class Case:
    """One case, as one of its ranks sees it."""

    def __init__(self, plan: Plan, model: str, size: Size, turns: Turns, group: dist.ProcessGroup,
                 fake: dist.ProcessGroup, device: torch.device,
                 expected: dict[tuple[int, bool], list[Tensor]], tell: Tell):  # fmt: skip
        self.plan, self.model, self.size, self.turns, self.device = plan, model, size, turns, device
        self.group, self.fake, self.expected = group, fake, expected
        self.tell = lambda text: tell(f"{plan.name}: {text}")
        self.entries = entries()
        self.contenders: dict[str, Contender] = {}
        self.told: dict[str, Row] = {}  # what each contender's row says beside times
        generator = torch.Generator().manual_seed(1)
        shape = (BATCHES, plan.ranks * size.batch, size.seq + 1)  # (batch, sequence, token)
        self.tokens = torch.randint(size.vocab, shape, generator=generator).to(device)

    def batch(self, step: int) -> Tensor:
        """(B, T + 1): this rank's part of a step's."""
        start = self.group.rank() * self.size.batch
        return self.tokens[step % BATCHES, start : start + self.size.batch]

    def measure(self) -> list[Row]:
        """Rows of every contender, on the group's rank 0."""
        for entry in self.entries:
            self.tell(f"{entry.name}: first steps")
            self.start(entry)
        self.turns_of = [name for name in self.told if name in self.contenders]
        with collection_off():
            times, beside = self.take_turns()
        for name, contender in self.contenders.items():
            self.tell(f"{name}: check")
            self.told[name] |= self.checked(contender)
        gathered = [torch.empty_like(times) for _ in range(self.plan.ranks)]
        dist.all_gather(gathered, times, group=self.group)
        slowest = self.gathered(beside).amax(0)
        return self.rows(torch.stack(gathered).cpu().numpy(), slowest.numpy()) if self.group.rank() == 0 else []

    def gathered(self, values: Tensor) -> Tensor:
        """(ranks, ...): each rank's."""
        every: list[Any] = [None] * self.plan.ranks
        dist.all_gather_object(every, values.cpu(), group=self.group)
        return torch.stack(every)

    def start(self, entry: Entry) -> None:
        """Build a contender and take its first steps; if it raises, on any rank, its row says what."""
        gc.collect()
        self.told[entry.name] = {}
        reason, calls, figures = "", [], torch.zeros(3, dtype=torch.float64)
        try:
            group = self.fake if entry.name == NO_COMMUNICATION else self.group
            contender = Contender(entry, self.plan.wrapping, self.size, group, self.device)
            self.contenders[entry.name] = contender
            *before, last = (self.batch(step) for step in range(self.turns.before))
            for tokens in before:
                contender.step(tokens)
            with Collectives() as seen:
                peak = contender.held() + runner.peak_bytes(lambda: contender.step(last), self.device.type)
            calls = seen.calls
            parameters = sum(p.numel() for p in contender.stepped())
            figures = torch.tensor([peak, parameters, host_ms(contender)], dtype=torch.float64)
        except Exception as error:  # whatever a contender raises is its result
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        reasons: list[Any] = [None] * self.plan.ranks
        dist.all_gather_object(reasons, reason, group=self.group)
        if any(reasons):
            self.contenders.pop(entry.name, None)
            if entry.name in (NO_OPTIMIZER, NO_COMMUNICATION):
                raise RuntimeError(f"{self.plan.name}: {entry.name!r} raised {next(filter(None, reasons))}")
            self.told[entry.name] = {"verdict": f"raised {next(filter(None, reasons))}"[:300]}
            return
        if entry.name == NO_OPTIMIZER:
            self.alone = again(calls, self.group, self.device)
        peak, parameters, host = self.gathered(figures).amax(0).tolist()
        self.told[entry.name] |= {"host_ms": host, "peak_mib": peak / 2**20, "local_parameters": int(parameters)}
        self.told[entry.name] |= collectives_of(calls if entry.name != NO_COMMUNICATION else [])

    def take_turns(self) -> tuple[Tensor, Tensor]:
        """(turns, contenders, phases) milliseconds, and (turns, 3) of what runs beside them: the communication alone,
        a stream, and an all-reduce of one number."""
        stream = torch.ones(STREAM_BYTES[self.device.type] // 4, device=self.device)
        one = torch.ones(1, device=self.device)
        beside = [self.alone, lambda: stream.mul_(-1.0), lambda: dist.all_reduce(one, group=self.group)]
        shape = (self.turns.warmup + self.turns.timed, len(self.contenders), len(ddp_split.PHASES))
        times, aside = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], len(beside), dtype=torch.float64)
        for turn in range(shape[0]):
            self.tell(f"turn {turn + 1} of {shape[0]}")
            tokens = self.batch(self.turns.before + turn)
            for i in range(len(self.contenders)):
                place = (turn + i) % len(self.contenders)
                self.meet()
                clock = self.contenders[self.turns_of[place]].step(tokens)
                times[turn, place] = torch.tensor(clock.milliseconds())
            for place, run in enumerate(beside):
                self.meet()
                aside[turn, place] = timed(run, self.device)
        return times[self.turns.warmup :].to(self.device), aside[self.turns.warmup :]

    def meet(self) -> None:
        """No rank starts before all are there, their devices idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.group)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def checked(self, contender: Contender) -> Row:
        """How far the parameters are from where they ought to be, on the worst rank."""
        initial = [p.detach().to(self.device) for p in self.size.model().parameters()]
        stays = contender.entry.name in (NO_OPTIMIZER, NO_COMMUNICATION)
        wanted = initial if stays else self.oracle(bool(contender.entry.clips))
        off, moved = 0.0, 0.0
        for p, q, before in zip(contender.whole(), wanted, initial, strict=True):
            off += float((p.double() - q).square().sum())
            moved += float((q - before.double()).square().sum())
        error = math.sqrt(off / moved) if moved else (math.inf if off else 0.0)
        worst = torch.tensor(error if math.isfinite(error) else math.inf, dtype=torch.float64, device=self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group)
        error = float(worst)
        told = float(f"{error:.3g}") if math.isfinite(error) else "inf"
        return {"error": told, "error_limit": LIMIT, "verdict": "ok" if error <= LIMIT else "wrong"}

    def oracle(self, clip: bool) -> list[Tensor]:
        """The parameters after all steps, float64: computed by rank 0 on every rank's sequences, and sent on.

        What depends on the whole batch only is kept for the next wrapping.
        """
        key = (self.plan.ranks * self.size.batch, clip)
        if self.group.rank() == 0 and key not in self.expected:
            self.tell("oracle")
            whole = [self.tokens[step % BATCHES] for step in range(self.turns.steps)]
            self.expected[key] = oracle(self.size, whole, clip, self.device)
        known = self.expected.get(key)
        if known is None:
            params = self.size.model().parameters()
            known = [torch.empty_like(p, dtype=torch.float64, device=self.device) for p in params]
        for param in known:
            dist.broadcast(param, 0, group=self.group)
        return known

    def rows(self, times: ddp_split.Times, beside: ddp_split.Times) -> list[Row]:
        """`times`: (ranks, turns, contenders, phases); `beside`: (turns, 3), the slowest rank's."""
        slowest = ddp_split.slowest(times)
        by_name = {name: slowest[:, i] for i, name in enumerate(self.turns_of)}
        figures = ddp_split.split(by_name, {entry.name for entry in self.entries if entry.clips == "inside"})
        alone, stream, small = (float(ms) for ms in np.median(beside, axis=0))
        tokens = self.size.batch * self.size.seq
        shared: Row = {"wrapping": self.plan.wrapping, "ranks": self.plan.ranks, "scaling": self.plan.scaling}
        shared |= {"model": self.model, "parameters": sum(p.numel() for p in self.size.model().parameters())}
        shared |= {"tokens_per_rank": tokens, "repeats": self.turns.timed, "communication_alone_ms": alone}
        shared |= {"stream_gb_per_s": 2 * STREAM_BYTES[self.device.type] / stream * 1e-6, "small_all_reduce_ms": small}
        shared |= {"tensors": sum(1 for _ in self.size.model().parameters())}
        rows = []
        for name, told in self.told.items():
            row: Row = {"case": self.plan.name, "contender": name, **shared, **told}
            if name in figures:
                row |= figures[name] | {"tokens_per_s": 1e3 * tokens / figures[name]["median_ms"]}
                if self.plan.ranks > 1 and name != NO_COMMUNICATION:
                    row["overlap"] = ddp_split.overlap(row["communication_ms"], alone)
            rows.append(ddp_split.rounded(row))
        return rows


@contextlib.contextmanager
def collection_off() -> Iterator[None]:
    """No garbage collection among the timed steps."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds until the work is done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def host_ms(contender: Contender) -> float:
    """Median time until clipping and step() return, where there is next to nothing to compute."""
    run, times = contender.host_twin(), []
    for _ in range(HOST_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if contender.device.type == "cuda":
            torch.cuda.synchronize()
    return float(np.median(times)) * 1e3


def collectives_of(calls: list[Call]) -> Row:
    return {"collectives": summed(calls), "sent_bytes": round(sum(call.sent for call in calls))}
