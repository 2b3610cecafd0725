"""A contender: model, optimizer, schedule and scaler, and one training step with the time of its phases."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fusedopt import optim as fused_optim

from .cli import OPTIMIZERS
from .data import Batch
from .distributed import World
from .losses import fused_loss, load_teacher, stock_loss
from .models import build
from .parallel import wrap
from .precision import fused_options, weight_dtype

STOCK, FUSED = "stock", "fused"
PHASES = ("model", "loss", "optimizer")  # together they are the whole step


@dataclass(frozen=True)
class StepResult:
    """The mean loss of this rank's micro-batches, the learning rate used, milliseconds per phase."""

    loss: float
    lr: float
    ms: dict[str, float]


class PhaseClock:
    """Cuts a step into phases: CUDA events on the device's own time line, ``perf_counter`` on the CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        if self.cuda:
            torch.cuda.synchronize(device)  # the other contender's work is not ours
        self.mark("start")

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to ``phase``."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Sum per phase, and the whole as ``step``; waits for the device."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        between = (lambda a, b: a.elapsed_time(b)) if self.cuda else (lambda a, b: (b - a) * 1e3)
        ms = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            ms[phase] += between(before, after)
        return {**ms, "step": between(self.marks[0][1], self.marks[-1][1])}


class Contender:
    """One model in training, with stock or fused ends."""

    def __init__(self, name: str, args: argparse.Namespace, world: World, vocabulary: str = ""):
        self.name, self.args, self.world = name, args, world
        self.device = world.device(args.device)
        with world.agreeing():  # they may be read from files
            model = build(args).to(weight_dtype(args))
            teacher = load_teacher(args, vocabulary).to(self.device, weight_dtype(args)) if args.distill else None
        self.model, self.teacher = model, teacher
        self.parallel = wrap(self.model, args, world)
        optimizer_class, loss = ends(name, args)
        self.loss = self.parallel.loss(loss(self.model, self.teacher, args))
        # fusedopt clips and averages within the step, stock before and after it
        options = fused_options(args) if name == FUSED else {}
        self.optimizer = make_optimizer(
            functools.partial(self.parallel.optimizer, optimizer_class), self.model, args, **options
        )
        self.average = None
        if name == STOCK and args.ema is not None:
            self.average = AveragedModel(self.parameters(), multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.parts = ("model", "optimizer", "scheduler", "scaler") + ("average",) * (self.average is not None)
        self.scheduler = make_scheduler(self.optimizer, args)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.dtype == "float16")

    def autocast(self) -> contextlib.AbstractContextManager:
        mixed = self.args.dtype != "float32" and self.args.weights == "f32"
        return torch.autocast(self.device.type, getattr(torch, self.args.dtype), enabled=mixed)

    def step(self, batches: list[Batch], number: int) -> StepResult:
        """One optimizer step over the micro-batches.

        The phases partition the step. The loss is that of head and loss, forward, and backward up to the moment
        when the gradient of the hidden states is ready, which a hook on them tells: the graph is the one that a
        user's loop builds, with no detached leaf and no copy. A teacher belongs to the model, its head to the loss.
        The optimizer is unscaling, clipping, the update, the average, the schedule, and clearing the gradients.
        """
        # dropout is the same for both contenders, and after a resume
        entropy = np.random.SeedSequence((self.args.seed, number, self.world.data_rank))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
        batches = [(tokens.to(self.device), targets.to(self.device)) for tokens, targets in batches]
        self.model.train()
        total = torch.zeros((), device=self.device)
        clock = PhaseClock(self.device)
        for index, (tokens, targets) in enumerate(batches, start=1):
            with self.parallel.accumulating(more=index < len(batches)):
                with self.autocast():
                    hidden = self.parallel.module(tokens).flatten(0, 1)  # (B * T, H)
                    taught = self.taught(tokens)
                    clock.mark("model")
                    hidden.register_hook(lambda _: clock.mark("loss"))
                    loss = self.loss(hidden, targets.flatten(), taught)
                total += loss.detach()
                self.scaler.scale(loss / len(batches) if len(batches) > 1 else loss).backward()
                clock.mark("model")

        lr = self.optimizer.param_groups[0]["lr"]
        if self.args.max_norm and self.name == STOCK:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.parameters())
        self.optimizer.zero_grad()
        with warnings.catch_warnings():  # a step that the scaler skips is no mistake in the order of calls
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)`")
            self.scheduler.step()
        clock.mark("optimizer")
        ms = clock.milliseconds()
        return StepResult(total.item() / len(batches), lr, ms)

    @torch.no_grad()
    def taught(self, tokens: Tensor) -> Tensor | None:  # (B * T, Ht)
        return None if self.teacher is None else self.teacher.hidden(tokens).flatten(0, 1)

    def parameters(self) -> nn.ParameterList:
        """The model's, as modules of torch take them: this rank's part of each where they are in parts."""
        return nn.ParameterList(self.model.parameters())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place."""
        if self.average is None:
            with self.parallel.averaged(self.optimizer):
                yield
            return
        own = [parameter.detach().clone() for parameter in self.parameters()]
        self._set_weights(self.average.parameters())
        yield
        self._set_weights(own)

    @torch.no_grad()
    def _set_weights(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """``val_loss``, and with ``--ema`` ``val_loss_ema``: that of the averaged weights."""
        losses = {"val_loss": self.evaluate(batches)}
        if self.args.ema is not None:
            with self.averaged():
                losses["val_loss_ema"] = self.evaluate(batches)
        return losses

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Mean validation loss over all ranks' batches, by torch's cross entropy in float32 whatever the contender."""
        self.model.eval()
        total = 0.0
        for tokens, targets in batches:
            with self.autocast():
                logits = self.parallel.logits(tokens.to(self.device))
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(self.device)).item()
        return self.world.mean([total / len(batches)], self.device)[0]

    def state_dict(self) -> dict[str, Any]:
        return {part: getattr(self, part).state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            getattr(self, part).load_state_dict(state[part])


def ends(name: str, args: argparse.Namespace) -> tuple[type[torch.optim.Optimizer], Callable]:
    """The optimizer class and the maker of the loss: the only two lines in which contenders differ."""
    optimizer_name = OPTIMIZERS[args.optimizer]["name"]
    if name == STOCK:
        return getattr(torch.optim, optimizer_name), stock_loss
    return getattr(fused_optim, optimizer_name), fused_loss


def make_optimizer(
    optimizer_class: Callable[..., torch.optim.Optimizer], model: nn.Module, args: argparse.Namespace, **options: Any
) -> torch.optim.Optimizer:
    """Matrices decay, vectors (norms, biases) do not; what the command line leaves out is torch's default."""
    given = {name: getattr(args, name) for name in ("weight_decay", "momentum") if getattr(args, name) is not None}
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return optimizer_class([group for group in groups if group["params"]], lr=args.lr, **given, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> lr_scheduler.LRScheduler:
    """``--warmup`` steps up to ``--lr``, then the schedule over the steps that are left."""
    left = args.steps - args.warmup
    schedules: dict[str, Callable[[], lr_scheduler.LRScheduler]] = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / left)),
        "step": lambda: lr_scheduler.StepLR(optimizer, step_size=-(-left // 3), gamma=0.1),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=left),
    }
    if not args.warmup:
        return schedules[args.schedule]()
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (args.warmup + 1), total_iters=args.warmup)
    return lr_scheduler.SequentialLR(optimizer, [warmup, schedules[args.schedule]()], milestones=[args.warmup])
