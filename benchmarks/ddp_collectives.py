"""The collectives that torch issues, counted where they are dispatched; and the same ones again, alone.

One mode sees them all: DDP's buckets (its reducer calls the dispatcher), ZeroRedundancyOptimizer's broadcasts, FSDP2's
gathers and scatters, and the functional ones of DTensor. torch's CommDebugMode counts the same calls, without bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_coalesced": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}
STILL = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")  # move nothing


@dataclass(frozen=True)
class Call:
    """One collective: its kind, the bytes of the whole tensor (gathered, or before it is scattered), its ranks."""

    kind: str
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, by the ring convention; of a broadcast, the mean over the ranks of a chain."""
        share = (self.ranks - 1) / self.ranks
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Collectives(TorchDispatchMode):
    """`with Collectives() as seen: step()`, then `seen.calls`.

    Raises:
        RuntimeError: a collective that is none of `KINDS`; its bytes would be missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor first: what it issues comes here again
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in STILL:
                self.calls.append(_call(name, args, kwargs or {}, result))
        return result


def _call(name: str, args: Any, kwargs: Any, result: Any) -> Call:
    if name not in KINDS:
        raise RuntimeError(f"a collective that the benchmark cannot count: {name}; known are {', '.join(KINDS)}")
    kind = KINDS[name]
    given = sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, Tensor))
    second = sum(t.nbytes for t in tree_leaves(args[1]) if isinstance(t, Tensor)) if len(args) > 1 else 0
    made = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor))
    # c10d's take (output, input), the functional ones take the input and return the output
    whole = given if kind in ("all-reduce", "broadcast") else max(given, second, made)
    return Call(kind, whole, _ranks([*args, *kwargs.values()]))


def _ranks(values: list[Any]) -> int:
    for value in values:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value).size()
            except RuntimeError:
                continue  # a ReduceOp
        if isinstance(value, str):
            try:
                return dist.distributed_c10d._resolve_process_group(value).size()
            except (RuntimeError, LookupError):
                continue  # the name of a reduction
    raise RuntimeError(f"a collective without a process group among its arguments: {values}")


def summed(calls: list[Call]) -> dict[str, list[int]]:
    """kind -> [calls, bytes]."""
    totals: dict[str, list[int]] = {}
    for call in calls:
        total = totals.setdefault(call.kind, [0, 0])
        total[0] += 1
        total[1] += call.bytes
    return totals


def again(calls: list[Call], group: dist.ProcessGroup, device: torch.device) -> Callable[[], None]:
    """A function that issues the same collectives, float32, one after another."""
    n = group.size()
    root = dist.get_global_rank(group, 0)

    def tensor(nbytes: int) -> Tensor:
        return torch.zeros(max(1, nbytes // 4), device=device)

    work: list[Callable[[], Any]] = []
    for call in calls:
        whole = tensor(-(-call.bytes // (4 * n)) * 4 * n)
        part = whole[: len(whole) // n].clone()
        work.append(
            {
                "all-reduce": lambda whole=whole: dist.all_reduce(whole, group=group),
                "broadcast": lambda whole=whole: dist.broadcast(whole, root, group=group),
                # torch.distributed's own names for these changed after 2.11
                "all-gather": lambda whole=whole, part=part: group._allgather_base(whole, part).wait(),
                "reduce-scatter": lambda whole=whole, part=part: group._reduce_scatter_base(part, whole).wait(),
            }[call.kind]
        )

    def run() -> None:
        for collective in work:
            collective()

    return run
