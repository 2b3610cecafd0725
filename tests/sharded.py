"""Parameters that four processes share, and the same ones whole: what the distributed tests start from."""

from __future__ import annotations

import functools
from typing import Any

import torch
from optim_table import Case, values
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

CASES = [
    Case("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.01}),
    Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    Case("SGD", {"lr": 0.1}),
    Case("Lion", {"lr": 0.01}),
    Case("LAMB", {"lr": 0.01, "weight_decay": 0.1}),
]

# (shape, mesh, placements): even and uneven parts, empty ones, replicas, plain tensors; two meshes in one optimizer.
# Two of them are large enough for 8-bit states.
PLACED = [
    ((7, 5), "grid", (Shard(0), Replicate())),
    ((6, 900), "grid", (Shard(0), Shard(1))),
    ((3,), "grid", (Shard(0), Shard(0))),  # none is left for one of the processes
    ((5,), None, ()),
    ((1, 4), "grid", (Replicate(), Replicate())),
    ((4, 1100), "grid", (Replicate(), Shard(1))),
    ((2, 3), "line", (Shard(0),)),  # none for two of them
    ((13, 6), "line", (Shard(1),)),
    ((), "line", (Replicate(),)),
]


@functools.cache
def mesh(name: str) -> DeviceMesh:
    if name == "line":
        return init_device_mesh("cpu", (4,), mesh_dim_names=("line",))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))


def placed(whole: Tensor, index: int) -> Tensor:
    """As row `index` of PLACED has it; nothing is sent."""
    _, name, placements = PLACED[index]
    return whole if name is None else distribute_tensor(whole, mesh(name), placements, src_data_rank=None)


def here(tensor: Tensor) -> Tensor:
    """What of it lies in this process."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def make_params(dtype: torch.dtype, shared: bool) -> list[nn.Parameter]:
    wholes = [values(torch.Size(shape), seed).float().to(dtype) for seed, (shape, *_) in enumerate(PLACED)]
    return [nn.Parameter(placed(whole, i) if shared else whole.clone()) for i, whole in enumerate(wholes)]


@functools.cache
def gradients(dtype: torch.dtype, shared: bool, step: int) -> list[Tensor]:
    """Of one step: the same numbers in every dtype that holds them."""
    wholes = [
        values(torch.Size(shape), 1000 * step + seed).to(torch.bfloat16).to(dtype)
        for seed, (shape, *_) in enumerate(PLACED)
    ]
    return [placed(whole, i) for i, whole in enumerate(wholes)] if shared else wholes


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    shared = any(isinstance(param, DTensor) for param in params)
    for param, grad in zip(params, gradients(params[0].dtype, shared, step), strict=True):
        param.grad = grad


def pairs(shared: list[Tensor], whole: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(here, expected): a process's parts, and the parts of tensors that are whole in it."""
    return [(here(a), here(placed(b.detach(), i))) for i, (a, b) in enumerate(zip(shared, whole, strict=True))]


def states(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], key: str) -> list[Any]:
    return [optimizer.state.get(param, {}).get(key) for param in params]
