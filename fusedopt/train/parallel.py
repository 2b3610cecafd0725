"""How a model and its optimizer are spread over processes: a class for each `--parallel`, alike in what they offer."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .distributed import World
from .losses import Loss, Trunk
from .models import LanguageModel

# name: where its class is; torch.distributed's parts take a second to import, and are left to those who use them
WRAPPINGS = {
    "ddp": ("parallel", "DataParallel"),
    "zero1": ("zero", "ZeRO1"),
    "fsdp": ("fsdp", "FullyShard"),
    "tp": ("tensor_parallel", "TensorParallel"),
}


class Alone:
    """One process, which has all of the model; and the defaults of the others."""

    def __init__(self, model: LanguageModel, args: argparse.Namespace, world: World):
        self.model, self.world, self.device = model, world, world.device(args.device)
        self.module: nn.Module = Trunk(model)  # what is called in training: tokens (B, T) -> hidden states (B, T, H)
        self.place(args)

    def place(self, args: argparse.Namespace) -> None:
        """Put the model where it is trained, and change what is called."""
        self.model.to(self.device)
        if args.compile:
            self.module.compile()

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch: if `more` of the same step follow, its gradients need not be reduced yet."""
        return contextlib.nullcontext()

    def loss(self, loss: Loss) -> Loss:
        """A loss of this rank's hidden states and head."""
        return loss

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        """As in an evaluation, which leaves nothing for a backward."""
        return self.model(tokens)

    def optimizer(self, optimizer_class: type[Optimizer], groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        return optimizer_class(groups, **options)

    def holder(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that has this rank's states."""
        return optimizer

    def averaged(self, optimizer: Optimizer) -> contextlib.AbstractContextManager:
        """fusedopt's averages in the model's place."""
        return optimizer.ema_weights()

    def weights(self) -> dict[str, Tensor]:
        """The whole model's state_dict; every rank must ask."""
        return self.model.state_dict()


class DataParallel(Alone):
    """DistributedDataParallel: everything on every rank, gradients averaged."""

    def place(self, args: argparse.Namespace) -> None:
        super().place(args)
        self.module = DistributedDataParallel(
            self.module, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager:
        return self.module.no_sync() if more else contextlib.nullcontext()


def wrap(model: LanguageModel, args: argparse.Namespace, world: World) -> Alone:
    """The model as `--parallel` asks; a process alone needs none."""
    if not world.launched:
        return Alone(model, args, world)
    module, name = WRAPPINGS[args.parallel]
    return getattr(importlib.import_module(f".{module}", __package__), name)(model, args, world)
