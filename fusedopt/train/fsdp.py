"""`--parallel fsdp`: weights, gradients and states in shards, a block's weights whole only while it computes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .parallel import Alone


class FullyShard(Alone):
    """FSDP2: `fully_shard` of each block, and of the root, whose weights (the head's too) are whole until backward."""

    def place(self, args: argparse.Namespace) -> None:
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        for block in blocks(self.model):
            if args.compile:
                block.compile()
            fully_shard(block, mesh=mesh)  # moves it to the device, too
        fully_shard(self.module, mesh=mesh)

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager:
        self.module.set_requires_gradient_sync(not more)
        return contextlib.nullcontext()

    def logits(self, tokens: Tensor) -> Tensor:
        logits = self.model.logits(self.module(tokens))
        self.module.reshard()  # no backward will: a step would leave the whole weights behind
        return logits

    def weights(self) -> dict[str, Tensor]:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: a language model's layers."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)
