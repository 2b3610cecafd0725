"""Steps of parameters that processes share (DTensors), in one process: what is left is the time to find them."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

from fusedopt import optim as fused

from . import ceilings
from .cases_optim import LIMIT, by_torch, contender, stock
from .cases_step import LIMIT as CLIPPED_LIMIT
from .cases_step import MAX_NORM, clip_and_step, coefficient
from .runner import Case, Contender, Target

COUNT, NUMEL = 300, 64  # tensors, and elements of each


def _sharded(tensors: list[Tensor]) -> list[Tensor]:
    """As fully_shard leaves them in a world of one process, which is made if there is none."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]


def _case(name: str, title: str, clipped: bool, ratio: float) -> Case:
    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        initial, gradients = (
            _sharded([torch.randn(NUMEL, generator=generator) * size for _ in range(COUNT)]) for size in (0.02, 0.01)
        )
        makes = stock(AdamW)
        if not clipped:
            makes["fusedopt"] = fused.AdamW
            return [contender(label, make, by_torch(AdamW), initial, gradients) for label, make in makes.items()]
        by_hand = [
            contender(label, make, by_torch(AdamW), initial, [g.clone() for g in gradients], clip_and_step, coefficient)
            for label, make in makes.items()
        ]
        ours = partial(fused.AdamW, max_norm=MAX_NORM)
        return [*by_hand, contender("fusedopt", ours, by_torch(AdamW), initial, gradients, factor=coefficient)]

    limit = CLIPPED_LIMIT if clipped else LIMIT
    nbytes = COUNT * NUMEL * (32 if clipped else 28)
    targets = (Target("fusedopt", "torch fused", ratio),)
    return Case(name, title, nbytes, limit, build, partial(ceilings.memory, nbytes), targets, in_a_row=10, cache="warm")


def cases(suite: str) -> list[Case]:
    """Of `optim`, or of `step`."""
    if suite == "optim":
        return [_case("adamw-300-dtensors-f32", f"AdamW, {COUNT} DTensors of {NUMEL}, one process, f32", False, 15.0)]
    title = f"clip + AdamW, {COUNT} DTensors of {NUMEL}, one process, f32"
    return [_case("clip-adamw-300-dtensors-f32", title, True, 12.0)]
