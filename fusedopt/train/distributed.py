"""Where this process stands among its peers. Alone, every method is a no-op."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank and size as torchrun tells them; ``launched`` is true under torchrun, even with one process."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls) -> World:
        """Read torchrun's RANK, LOCAL_RANK and WORLD_SIZE; a world of one without them."""
        if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
            return cls()
        rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return cls(rank, local_rank, size, launched=True)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This rank's device: ``cuda:<local rank>`` or ``cpu``."""
        return torch.device("cuda", self.local_rank) if name == "cuda" else torch.device("cpu")

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Join the process group (nccl on CUDA, gloo on CPU) and leave it at the end."""
        if device == "cuda":
            torch.cuda.set_device(self.device(device))
        if not self.launched:
            yield
            return
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One process of each machine runs the body, and fills the cache, before the others do.

        If it fails the others go on all the same, to fail for the same reason instead of for its absence.
        """
        if self.local_rank != 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()

    def barrier(self) -> None:
        if self.launched:
            dist.barrier()

    def mean(self, values: list[float], device: torch.device) -> list[float]:
        """Average over the ranks, elementwise, in one all-reduce. A NaN on one rank becomes NaN on all."""
        if not self.launched:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return (summed / self.size).tolist()
