"""Where this process stands among its peers. Alone, every method is a no-op."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import peers
from .errors import LostRank, Stop, UsageError


@dataclass(frozen=True)
class World:
    """Rank and size as torchrun tells them; ``launched`` is true under torchrun, even with one process.

    ``split``: every rank works on a part of each tensor, and so on the same data (tensor parallel).
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    launched: bool = False
    split: bool = False

    @classmethod
    def from_environment(cls, split: bool = False) -> World:
        """Read torchrun's RANK, LOCAL_RANK and WORLD_SIZE; a world of one without them."""
        if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
            return cls()
        rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return cls(rank, local_rank, size, launched=True, split=split)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of a step's sequences is this rank's."""
        return 0 if self.split else self.rank

    @property
    def data_size(self) -> int:
        """In how many shares a step's sequences are dealt out."""
        return 1 if self.split else self.size

    def device(self, name: str) -> torch.device:
        """This rank's device: ``cuda:<local rank>`` or ``cpu``."""
        return torch.device("cuda", self.local_rank) if name == "cuda" else torch.device("cpu")

    @contextlib.contextmanager
    def joined(self, device: str, timeout: float) -> Iterator[None]:
        """Join the process group (gloo, and nccl for what is on CUDA) and leave it at the end.

        Raises:
            UsageError: this machine has fewer GPUs than processes.
            LostRank: in place of the error of a collective in which a peer takes no part for ``timeout`` seconds.
        """
        if device == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UsageError(
                    f"--nproc-per-node: local rank {self.local_rank} has no GPU, there are {torch.cuda.device_count()} "
                    "here; start fewer processes, or use --device cpu"
                )
            torch.cuda.set_device(self.device(device))
        if not self.launched:
            yield
            return
        roll = peers.meet(self.rank, self.size, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=roll.store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout),
        )
        try:
            yield
        except BaseException as error:  # torch.distributed.checkpoint's are no Exception
            if isinstance(error, Stop) or not peers.is_of_a_collective(error):
                raise
            peers.end_by_ourselves()
            if gone := roll.gone(timeout):
                raise LostRank(f"{gone}; --resume goes on from the last whole checkpoint") from error
            raise
        finally:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Make what is wrong on one rank wrong on all, so that none waits for another that has left.

        The body's own collectives, if any, must be balanced whether it fails or not.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        told = self.everyones(None if mine is None else (isinstance(mine, UsageError), str(mine) or repr(mine)))
        if mine is not None and not isinstance(mine, UsageError):
            raise mine
        for rank, (is_usage, text) in ((rank, problem) for rank, problem in enumerate(told) if problem):
            if is_usage:
                raise UsageError(text if rank == 0 else f"rank {rank}: {text}")
            raise LostRank(f"rank {rank} failed: {text}")

    def same(self, values: dict[str, Any]) -> None:
        """Raise UsageError, on every rank, where one has another value than rank 0."""
        first, *others = self.everyones(values)
        for rank, theirs in enumerate(others, start=1):
            for name in first.keys() | theirs.keys():
                if first.get(name) != theirs.get(name):
                    raise UsageError(
                        f"{name} is {theirs.get(name)} on rank {rank} and {first.get(name)} on rank 0; "
                        "give every process the same command and the same files"
                    )

    def everyones(self, value: Any) -> list[Any]:
        """What each rank gave, in the order of ranks."""
        if not self.launched:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

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
        """Average over the ranks, elementwise, in one all-reduce. A NaN on one rank becomes NaN on all.

        Ranks that split tensors hold the same values, whose average they are.
        """
        if not self.launched:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return (summed / self.size).tolist()
