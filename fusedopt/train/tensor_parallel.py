"""`--parallel tp`: heads of attention, columns of the MLP and classes of the head dealt out over all ranks."""

from __future__ import annotations

import argparse
import contextlib

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from .losses import Loss
from .parallel import Alone

BLOCK = {"qkv": ColwiseParallel, "out": RowwiseParallel, "up": ColwiseParallel, "down": RowwiseParallel}


class TensorParallel(Alone):
    """Megatron's layout (Shoeybi et al. 2019) of the gpt: two all-reduces per block forward, two backward.

    Norms and embeddings are replicated, as DTensors too: torch's clipping and scaling take lists of one kind of tensor.
    """

    def place(self, args: argparse.Namespace) -> None:
        super().place(args)
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        for block in self.model.blocks:
            parallelize_module(block, mesh, {name: style() for name, style in BLOCK.items()})
            replicate(block.norm1, mesh)
            replicate(block.norm2, mesh)
        for module in (self.model.tokens, self.model.positions, self.model.norm):
            replicate(module, mesh)
        vocabulary = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(self.model, mesh, {"head": vocabulary})

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager:
        return loss_parallel()  # backward too is inside of it

    def loss(self, loss: Loss) -> Loss:
        def local(hidden: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
            value = loss(hidden, targets, taught)
            return value.to_local() if isinstance(value, DTensor) else value

        return local

    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens).full_tensor()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.full_tensor() for name, value in self.model.state_dict().items()}


def replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Make its parameters DTensors, the same on every rank, and take and return plain tensors as before."""

    def enter(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(value, mesh, [Replicate()], run_check=False) for value in inputs)

    def leave(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()

    distribute_module(module, mesh, None, enter, leave)
