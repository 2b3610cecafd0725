"""The run: contenders in turn on the same batches; log, validation, checkpoints, signals, and the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from . import checkpoint, data, report
from .cli import flag
from .display import Display
from .distributed import World
from .errors import NonFiniteLoss, UsageError
from .loop import FUSED, STOCK, Contender
from .memory import peak_memory
from .precision import bytes_per_parameter, stock_falls_short

# The checkpoint of a run with another value of one of these is not a checkpoint of this run.
# fmt: off
ESSENTIAL = ("model", "layers", "dim", "heads", "vocab_size", "seq_len", "optimizer", "lr", "weight_decay",
             "momentum", "schedule", "warmup", "steps", "max_norm", "seed",
             "dtype", "ema", "state", "weights", "distill", "distill_divergence", "distill_temperature", "distill_hard")
# fmt: on
# As far as only the order of sums depends on it, which is the case where their product is the same.
SHARES = ("batch_size", "accumulate")
SEQUENCES = "the number of sequences of a step"
# What may differ from process to process: files may have other places on other machines.
OWN = ("data", "out", "init_from", "distill", "threads")


def run(args: argparse.Namespace, world: World, command: list[str]) -> int:
    """Train as ``args`` ask and write the report. Returns 0, or 128 + the signal that stopped it."""
    started = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    training = Run(args, world)
    stopped_by = training.train()
    if stopped_by:
        return 128 + stopped_by
    if args.model == "pretrained" and not args.compare:
        training.save_pretrained()
    held = {
        c.name: bytes_per_parameter(c.model, c.parallel.holder(c.optimizer), c.average) for c in training.contenders
    }
    training.contenders.clear()
    if world.is_main:
        torch.cuda.empty_cache()  # room for the processes that measure
        memory = {name: peak_memory(name, args) for name in training.names} if args.compare else {}
        seconds = time.perf_counter() - started
        report.write(training.out, args, world, memory, held, training.parameters, command, seconds)
    return 0


class Run:
    """Everything of one run: the text, the contenders, and how far they have come."""

    def __init__(self, args: argparse.Namespace, world: World):
        self.args, self.world, self.out = args, world, Path(args.out)
        self.display = Display(args.steps, enabled=world.is_main)
        with world.agreeing(), world.local_main_first():
            self.display.line("reading the text ...")
            self.corpus = data.load(args)
        told = {flag(name): value for name, value in vars(args).items() if name not in OWN}
        world.same({**told, "the digest of the --data": self.corpus.digest})
        self.validation = data.validation_batches(args, self.corpus, world.data_rank, world.data_size)
        self.names = [STOCK, FUSED] if args.compare else [STOCK] if args.stock else [FUSED]
        self.contenders = [Contender(name, args, world, self.corpus.digest) for name in self.names]
        if FUSED in self.names and args.loss == "linear" and self.contenders[-1].model.head is None:
            args.loss = "logits"
            self.display.line("the model's head is more than a linear layer, a scale and a cap: using --loss logits")
        if args.compare and (short := stock_falls_short(args)):
            self.display.line(short)
        self.parameters = sum(parameter.numel() for parameter in self.contenders[0].model.parameters())
        self.essential = {flag(name): getattr(args, name) for name in ESSENTIAL}
        self.essential["the digest of the --data"] = self.corpus.digest
        self.sequences = args.accumulate * world.data_size * args.batch_size
        self.essential["the list of contenders"] = self.names
        self.shares = {flag(name): getattr(args, name) for name in SHARES}
        if not args.distill:
            self.essential = {name: value for name, value in self.essential.items() if "--distill" not in name}
        if args.schedule == "constant":
            del self.essential["--steps"]  # no step depends on it: the run may be made longer
        self.sharded = world.launched  # whether checkpoints are folders, which all ranks write
        self.done = self.resume() if args.resume else 0
        self.display.line(
            f"{len(self.corpus.train):,} training and {len(self.corpus.validation):,} validation tokens, "
            f"vocabulary {args.vocab_size:,}; {args.model} of {self.parameters:,} parameters; "
            f"{args.device}, {world.size} process(es){f' ({args.parallel})' if world.launched else ''}, "
            f"{torch.get_num_threads()} thread(s)" + (f"; resuming after step {self.done}" if self.done else "")
        )

    def resume(self) -> int:
        """Load the checkpoint; return its step."""
        world = self.world
        with world.agreeing():
            path = checkpoint.latest(self.out)
            state = checkpoint.read(path)
            self.sharded |= path.is_dir()
            checkpoint.compare(path, state, self.essential)
            if self.sharded:
                self.compare_sequences(path, state["args"][SEQUENCES])
            else:
                checkpoint.compare(path, state, self.shares)
        world.same({"the step of the checkpoint in --out": state["step"]})
        if self.sharded:
            from . import sharded  # torch.distributed's parts take a second to import

            sharded.load(path, state, self.contenders, world)
            return state["step"]
        for contender in self.contenders:
            contender.load_state_dict(state["contenders"][contender.name])
        return state["step"]

    def compare_sequences(self, path: Path, before: int) -> None:
        """The sequences of a step are the same ones for as long as they are as many, whoever has them."""
        args, processes = self.args, self.world.data_size
        if before == self.sequences:
            return
        share = before // processes
        remedy = f"give --batch-size {share} --accumulate 1" if share * processes == before else (
            f"start a number of processes that divides {before}"
        )  # fmt: skip
        raise UsageError(
            f"--resume: a step had {before} sequences when {path} was written, and would have {self.sequences} now "
            f"(--batch-size {args.batch_size} x --accumulate {args.accumulate} x {processes} process(es) with data of "
            f"their own); {remedy}, or start afresh with --overwrite or another --out"
        )

    def prepare_out(self) -> None:
        """Drop from the folder what a continued run writes again; for a fresh run, all of an older one."""
        self.out.mkdir(parents=True, exist_ok=True)
        for cut_short in self.out.glob(".*.tmp"):  # by a kill while it was written
            checkpoint.remove(cut_short)
        if self.done:
            checkpoint.truncate_log(self.out, self.done)
            return
        for path in checkpoint.checkpoints(self.out):
            checkpoint.remove(path)
        for name in (checkpoint.LOG, *report.FILES):
            (self.out / name).unlink(missing_ok=True)

    def train(self) -> int:
        """The steps that are left; returns the signal that ended them early, or 0."""
        args, world = self.args, self.world
        world.barrier()  # every rank has read before the first one writes
        with world.agreeing():
            if world.is_main:
                self.prepare_out()
        path = self.out / checkpoint.LOG if world.is_main else os.devnull
        with caught_signals() as caught, self.display, open(path, "a", encoding="utf-8") as log:
            if self.done == 0:
                write(log, [{"step": 0, "contender": c.name, **c.validate(self.validation)}
                            for c in self.contenders])  # fmt: skip
            for step in range(self.done + 1, args.steps + 1):
                rows, signalled = self.step(step, caught)
                write(log, rows)
                self.display.update(rows)
                if signalled or step % args.checkpoint_every == 0 or step == args.steps:
                    self.save(step, log)
                if signalled:
                    self.display.line(f"stopped by a signal after step {step}; continue with --resume")
                    return caught[0] if caught else signal.SIGTERM
        return 0

    def step(self, step: int, caught: list[int]) -> tuple[list[dict[str, Any]], bool]:
        """One step of each contender: the rows of the log, and whether any rank was told to stop.

        The contenders take turns in going first, so that neither always finds the caches that the other left.
        """
        args, world = self.args, self.world
        batches = data.train_batches(args, self.corpus, step, world.data_rank, world.data_size)
        order = self.contenders if step % 2 else self.contenders[::-1]
        by_name = {contender.name: contender.step(batches, step) for contender in order}
        results = [by_name[name] for name in self.names]
        flags = [float(bool(caught))]
        *losses, signalled = world.mean([r.loss for r in results] + flags, world.device(args.device))
        rows = []
        for contender, result, loss in zip(self.contenders, results, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss of the {contender.name} contender is {loss} at step {step} "
                    f"(lr {result.lr:g}); {remedies(args)}"
                )
            row = {
                "step": step,
                "contender": contender.name,
                "loss": loss,
                "lr": result.lr,
                "tokens": self.sequences * args.seq_len,
                "ms": {phase: round(ms, 4) for phase, ms in result.ms.items()},
            }
            if step % args.eval_every == 0 or step == args.steps:
                row |= contender.validate(self.validation)
            rows.append(row)
        return rows, signalled > 0

    def save(self, step: int, log: IO[str]) -> None:
        """Replace the checkpoint; it never knows more steps than the log."""
        if self.world.is_main:
            os.fsync(log.fileno())
        essential = {**self.essential, **self.shares, SEQUENCES: self.sequences}
        if self.sharded:
            from . import sharded

            sharded.save(self.out, step, essential, self.contenders, self.world)
        else:
            states = {contender.name: contender.state_dict() for contender in self.contenders}
            checkpoint.save(self.out, step, essential, states)

    def save_pretrained(self) -> None:
        """The trained model as transformers keeps it."""
        weights = self.contenders[0].parallel.weights()
        if self.world.is_main:
            weights = {name.removeprefix("causal_lm."): value for name, value in weights.items()}
            self.contenders[0].model.causal_lm.save_pretrained(self.out / "model", state_dict=weights)


def write(log: IO[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to the log, past this process's own buffers."""
    log.writelines(json.dumps(row) + "\n" for row in rows)
    log.flush()


def remedies(args: argparse.Namespace) -> str:
    """What to change after a non-finite loss, and only what is not yet so."""
    tips = ["a lower --lr", "a longer --warmup"]
    tips += [] if args.max_norm else ["--max-norm 1"]
    if args.dtype != "float32":
        tips.append("--dtype float32" if args.weights == "f32" else "--weights f32")
    return f"try {', '.join(tips[:-1])} or {tips[-1]}"


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in the list that is yielded, to be acted on after the step.

    A second one of the same kind does what it did before.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to no other
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handler(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
