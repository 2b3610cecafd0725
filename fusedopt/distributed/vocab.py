"""Which classes of a vocabulary lie on which rank, and the one collective by which a loss over them is made.

Imported when a loss is first told of shards: torch may be built without torch.distributed.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Range = tuple[int, int]
# the same under its new name, where torch warns of the old one
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclasses.dataclass(frozen=True)
class VocabShards:
    """The classes [first, last) of each rank of `group`; together [0, classes), in any order, some perhaps empty."""

    group: Any  # ProcessGroup
    rank: int  # in group
    ranges: tuple[Range, ...]
    row_groups: tuple[Any, ...] = ()  # over whose ranks the rows are sharded

    @property
    def first(self) -> int:
        return self.ranges[self.rank][0]

    @property
    def last(self) -> int:
        return self.ranges[self.rank][1]

    @property
    def classes(self) -> int:
        return max(last for _, last in self.ranges)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:  # (world, 1) int64 each
        """First and last of every rank."""
        return _bounds(self.ranges, device)[:2]

    def order(self, device: torch.device) -> Tensor:  # int64
        """The ranks that hold classes, in the order of these."""
        return _bounds(self.ranges, device)[2]


@functools.lru_cache(maxsize=64)  # a copy to a device waits for it
def _bounds(ranges: tuple[Range, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    first, last = torch.tensor(ranges, device=device).t().contiguous()[:, :, None]
    order = sorted((r for r in range(len(ranges)) if ranges[r][0] < ranges[r][1]), key=ranges.__getitem__)
    return first, last, torch.tensor(order, device=device)


# --- hand-made shards: the ranks tell each other once ---

_agreed: weakref.WeakKeyDictionary[Any, dict[Range, tuple[Range, ...]]] = weakref.WeakKeyDictionary()


def from_group(
    group: Any, vocab_range: Range | None, classes: int, rows: int, device: torch.device, digest: int
) -> VocabShards:
    """The shards that the ranks of `group` name; the first call with a range asks the others for theirs.

    Raises:
        TypeError, ValueError: group and range are not both given, or are none. On this rank.
        ValueError: a range and the classes of its rank disagree; the ranges do not tile [0, V); ranks call with
            different numbers of rows, or options. On every rank, where this is the first call with their ranges.
    """
    if group is None or vocab_range is None:
        raise ValueError(
            f"tp_group={group} and vocab_range={vocab_range} go together: the group whose ranks hold the classes, and "
            "which of them, (first, last), this rank holds"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group must be a torch.distributed.ProcessGroup, not {type(group).__name__}; "
            "of a DeviceMesh it is mesh.get_group(dim)"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("tp_group: this rank is not a member of it")
    mine = _range(vocab_range)
    known = _agreed.setdefault(group, {})
    if mine not in known:
        known[mine] = _agree(group, (*mine, classes, rows, digest), device)
    elif mine[1] - mine[0] != classes:
        raise ValueError(_misfit(rank, *mine, classes))
    return VocabShards(group, rank, known[mine])


def _range(vocab_range: Any) -> Range:
    first_last = tuple(vocab_range) if isinstance(vocab_range, Sequence) else ()
    if len(first_last) != 2 or not all(isinstance(i, int) for i in first_last):
        raise TypeError(f"vocab_range={vocab_range!r} must be two integers: the first class, and the one past the last")
    return first_last


def _agree(group: Any, told: tuple[int, ...], device: torch.device) -> tuple[Range, ...]:
    mine = torch.tensor(told, device=device)
    gathered = torch.empty(dist.get_world_size(group) * len(told), dtype=torch.int64, device=device)
    _all_gather(gathered, mine, group=group)
    ranks = gathered.view(-1, len(told)).tolist()
    for rank, (first, last, classes, *_) in enumerate(ranks):
        if first < 0 or last - first != classes:
            raise ValueError(_misfit(rank, first, last, classes))
    ranges = tuple((first, last) for first, last, *_ in ranks)
    end = 0
    for first, last in sorted(r for r in ranges if r[1] > r[0]):
        if first != end:
            wrong = "more than once" if first < end else "nowhere"
            raise ValueError(
                f"vocab_range: the ranks of tp_group hold {list(ranges)}, class {min(first, end)} {wrong}; together "
                "they must hold every class from 0 once"
            )
        end = last
    if end == 0:
        raise ValueError("vocab_range: no rank of tp_group holds a class")
    for what, column in ("numbers of rows", 3), ("options", 4):
        values = [rank[column] for rank in ranks]
        if len(set(values)) > 1:
            shown = f": {values}" if column == 3 else ""
            raise ValueError(
                f"the ranks of tp_group call the loss with different {what}{shown}; each must hold all rows"
            )
    return ranges


def _misfit(rank: int, first: int, last: int, classes: int) -> str:
    return (
        f"vocab_range=({first}, {last}) on rank {rank} of tp_group names {last - first} classes from {first}, but the "
        f"logits there have {classes}; it must be (first, first + {classes}) with first >= 0"
    )


# --- DTensors ---


def from_mesh(mesh: Any, placements: Sequence[Any], dim: int, classes: int, *, rows: int | None = 0) -> VocabShards:
    """The shards of a DTensor whose dimension `dim`, of `classes`, is sharded over one dimension of its mesh.

    `rows`: the dimension that may be sharded over the mesh's others; None if none may.
    """
    sharded = [i for i, p in enumerate(placements) if p.is_shard(dim)]
    others = [i for i in range(mesh.ndim) if i not in sharded]
    by_rows = [i for i in others if rows is not None and rows != dim and placements[i].is_shard(rows)]
    if len(sharded) != 1 or any(not placements[i].is_replicate() and i not in by_rows for i in others):
        allowed = "Replicate()" if rows is None else f"Replicate() or Shard({rows})"
        raise ValueError(
            f"placements {tuple(placements)}: the classes, dimension {dim}, may be sharded over one dimension of the "
            f"mesh, and the others must be {allowed}; redistribute before the loss"
        )
    (tp,) = sharded
    world = mesh.size(tp)
    each = -(-classes // world)  # as torch.chunk cuts
    ranges = tuple((min(classes, r * each), min(classes, (r + 1) * each)) for r in range(world))
    row_groups = tuple(mesh.get_group(i) for i in by_rows)
    return VocabShards(mesh.get_group(tp), mesh.get_local_rank(tp), ranges, row_groups)


# --- the collective ---


def options_digest(*options: Any) -> int:
    """The same on every rank that calls a loss with the same options; float32 has it exactly."""
    return zlib.crc32(repr(options).encode()) & 0xFFFFFF


class Columns:
    """Statistics per row, (columns, N), in the memory that `gather` sends."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sent = torch.zeros(columns * rows + 1, dtype=dtype, device=device)
        self.values = self.sent[:-1].view(columns, rows)

    def gather(self, shards: VocabShards, digest: int) -> Tensor:  # (world, columns, N)
        """Every rank's, by one all-gather.

        Raises:
            ValueError: a rank was called with other options; on the CPU, on every rank.
            RuntimeError: the backend tells that another rank sends more or less than this one, as it does under
                TORCH_DISTRIBUTED_DEBUG=DETAIL.
        """
        world, size = len(shards.ranges), self.sent.numel()
        received = self.sent.new_empty(world * size)
        per_rank = received.view(world, size)
        values = per_rank[:, :-1].view(world, *self.values.shape)
        if not self.values.numel():
            return values
        self.sent[-1] = digest
        try:
            _all_gather(received, self.sent, group=shards.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"the ranks did not exchange the statistics of their classes; each must call the loss with the same "
                f"rows, here {self.values.shape[1]}, and options: {error}"
            ) from error
        if received.device.type == "cpu" and (per_rank[:, -1] != digest).any():
            ranks = (per_rank[:, -1] != digest).nonzero()[:, 0].tolist()
            raise ValueError(f"ranks {ranks} of the group call the loss with other options than rank {shards.rank}")
        return values


def sum_over_rows(values: Tensor, shards: VocabShards) -> Tensor:
    """`values` summed over the groups that share the rows out."""
    for group in shards.row_groups:
        dist.all_reduce(values, group=group)
    return values
