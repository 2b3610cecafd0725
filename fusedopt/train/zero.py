"""`--parallel zero1`: as ddp, but each rank keeps the optimizer's states of its share of the parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from .parallel import DataParallel


class ZeRO1(DataParallel):
    """ZeroRedundancyOptimizer (Rajbhandari et al. 2020, stage 1): each rank updates its share, and broadcasts it."""

    def optimizer(self, optimizer_class: type[Optimizer], groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        if "max_norm" in options:  # the norm of all shares, not of this rank's
            options["extra_groups"] = (dist.group.WORLD,)
        # not as ZeRO's own **options: it would make them options of each group, and copy process groups with those
        make = functools.partial(optimizer_class, **options)
        return ZeroRedundancyOptimizer(groups, make, parameters_as_bucket_view=True)

    @contextlib.contextmanager
    def averaged(self, optimizer: Optimizer) -> Iterator[None]:
        parameters = list(self.model.parameters())
        mine = {parameter for group in optimizer.optim.param_groups for parameter in group["params"]}
        owned = self.world.everyones([i for i, parameter in enumerate(parameters) if parameter in mine])
        others = [(parameter, parameter.detach().clone()) for parameter in parameters if parameter not in mine]
        with optimizer.optim.ema_weights(), torch.no_grad():
            for rank, indices in enumerate(owned):
                for index in indices:
                    dist.broadcast(parameters[index].data, src=rank)
            yield
            for parameter, own in others:
                parameter.copy_(own)

    def holder(self, optimizer: Optimizer) -> Optimizer:
        return optimizer.optim
