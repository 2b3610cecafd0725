"""Linear cross entropy under a weight whose classes lie on several ranks.

The gradient of a chunk's logits needs the log-sum-exp of all ranks, which one all-gather gives for all chunks at once:
two sweeps over the chunks. With k chunks and a rank's V_local classes that is, forward and backward,

    2 N H V_local (3 + (k - 1) / k) flops

for logits, gradients of input and weight, and logits again of all chunks but the last: 8 N H V_local for many chunks,
and 6 N H V_local where one chunk holds all, which a shard of the vocabulary often does. Two other ways were counted and
left: keeping every chunk's logits takes N V_local elements, which the chunks are there to spare; and gradients from the
local log-sum-exp, brought right afterwards, spare the second logits for the input's gradient alone, whose rows
exp(lse_local - lse) multiplies, but not for the weight's, a sum over rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fusedopt import backends
from fusedopt.distributed import vocab, vocab_rows
from fusedopt.distributed.vocab import VocabShards
from fusedopt.distributed.vocab_loss import (
    Placed,
    check_options,
    check_target,
    checked_weight,
    kernels_for,
    ready,
    reduced,
    refuse_create_graph,
    replicated,
)
from fusedopt.nn.chunks import Products
from fusedopt.nn.cross_entropy import Stats
from fusedopt.nn.linear_passes import Call, chunk_rows, deliver, kept, target_factor, without_autocast


@torch.compiler.disable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    call: Call,
    tp_group: Any,
    vocab_range: tuple[int, int] | None,
) -> Tensor | tuple[Tensor, Stats]:
    """`fusedopt.nn.functional.linear_cross_entropy` of a rank's shard: plain tensors with a group, or DTensors."""
    backends.check(call.backend)
    check_options(call.rule, call.reduction)
    index_shape, rule, placed = input.shape[:-1], call.rule, None
    if isinstance(linear_weight, DTensor):
        if tp_group is not None or vocab_range is not None:
            raise ValueError("tp_group and vocab_range are for plain tensors; a DTensor knows its shards")
        mesh, placements = linear_weight.device_mesh, linear_weight.placements
        shards = vocab.from_mesh(mesh, placements, 0, linear_weight.shape[0], rows=None)
        placed = Placed(mesh, shards, [Replicate()] * mesh.ndim, index_shape)
        if linear_bias is not None and (
            not isinstance(linear_bias, DTensor)
            or (linear_bias.device_mesh, linear_bias.placements) != (mesh, placements)
        ):
            raise ValueError(f"linear_bias must be a DTensor that lies as linear_weight does, {placements} on its mesh")
        input, target = replicated(input, "input"), replicated(target, "target")
        rule = rule._replace(weight=replicated(rule.weight, "weight"))
        linear_weight = linear_weight.to_local()
        linear_bias = None if linear_bias is None else linear_bias.to_local()
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight {tuple(linear_weight.shape)}: over sharded classes it must be (V, H)")
    _check_products(input, linear_weight, linear_bias, call)
    check_target(target, index_shape, input.device)
    x, rows = input.reshape(-1, input.shape[-1]), index_shape.numel()
    classes = linear_weight.shape[0]
    digest = vocab.options_digest(
        rule[1:], rule.weight is None, call.reduction, call.return_stats, call.dtype, rows, x.shape[1]
    )
    if placed is None:
        shards = vocab.from_group(tp_group, vocab_range, classes, rows, x.device, digest)
    probe = torch.empty(0, dtype=call.dtype, device=x.device)
    call = call._replace(rule=rule._replace(weight=checked_weight(rule.weight, shards, probe)))
    loss, *stats = _VocabLinear.apply(x, linear_weight, linear_bias, target.reshape(-1), call, shards, digest)
    results = [loss.view(index_shape) if call.reduction == "none" else loss, *(s.view(index_shape) for s in stats)]
    if placed is not None:
        results = [placed.wrap(r, per_row=i > 0 or call.reduction == "none") for i, r in enumerate(results)]
    return (results[0], Stats(*results[1:])) if call.return_stats else results[0]


def _check_products(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> None:
    for name, tensor in ("linear_weight", weight), ("linear_bias", bias):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {x.device}")
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {tensor.dtype}, input {x.dtype}; they must agree, or autocast be on")


# --- the two sweeps ---


class _Sweeps:
    """The chunks of one call. Its rows are those that count, `keep`; statistics and upstream come for these alone."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call, shards: VocabShards,
        needs: tuple[bool, bool, bool], wide: bool = False,
    ) -> None:  # fmt: skip
        self.call, self.shards = call, shards
        self.keep = kept(target, call)
        self.target = target if self.keep is None else target.index_select(0, self.keep)
        self.targets = vocab_rows.targets_of(self.target, call.rule, shards)
        self.kernels = kernels_for(call.backend, x.device, call.dtype)
        # a rank without classes has no products, but takes part
        chunk = chunk_rows(self.keep, x, weight, target, call, needs, wide) if weight.shape[0] else 1
        self.products = Products(x, weight, bias, call.dtype, keep=self.keep, chunk=chunk, needs=needs, wide=wide)
        self.chunks = list(self.products.chunks()) if weight.shape[0] else []
        self.last: Tensor | None = None  # the last chunk's logits, while they are there

    def statistics(self, digest: int) -> Tensor:  # (world, column_count, n)
        call = self.call
        columns = vocab_rows.new_columns(
            call.rule, call.return_stats, self.target.shape[0], call.dtype, self.target.device
        )
        if not self.chunks:
            columns.values[0] = -torch.inf
        for rows in self.chunks:
            self.last = self.products.logits(rows)
            vocab_rows.statistics(
                self.last, self._targets(rows), call.rule, self.shards, columns.values[:, rows], call.return_stats,
                self.kernels,
            )  # fmt: skip
        return columns.gather(self.shards, digest)

    def gradients(self, lse: Tensor, from_target: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, this rank's part, weight and bias; from the last chunk on, whose logits may still be there."""
        for rows in reversed(self.chunks):
            logits = self.products.logits(rows) if self.last is None else self.last
            self.last = None
            vocab_rows.gradient(
                logits, self._targets(rows), self.call.rule, self.shards, lse[rows], from_target[rows], upstream[rows],
                logits, self.kernels,
            )  # fmt: skip
            self.products.accumulate(rows, logits)
        return self.products.gradients()

    def _targets(self, rows: slice) -> vocab_rows.Targets:
        return vocab_rows.Targets(*(None if t is None else t[rows] for t in self.targets))

    def all_rows(self, *columns: Tensor) -> Iterator[Tensor]:
        """(n,) of the rows that count as (N,), 0 elsewhere."""
        n = self.products.x.shape[0]
        for column in columns:
            yield column if self.keep is None else column.new_zeros(n).index_copy_(0, self.keep, column)


@without_autocast
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call, shards: VocabShards, digest: int,
    needs: tuple[bool, bool, bool],
) -> tuple[vocab_rows.Merged, Tensor, tuple[Tensor | None, ...], float | Tensor]:  # fmt: skip
    """Statistics of all rows; the loss; the gradients but for reduction "none", and what they are to be scaled by."""
    mean, late = call.reduction == "mean", call.dtype == torch.float16
    factor = target_factor(target, call.rule, shards.classes, mean, call.dtype, call.backend)
    now = needs if call.reduction != "none" else (False, False, False)
    sweeps = _Sweeps(x, weight, bias, target, call, shards, now, wide=late)
    gathered = sweeps.statistics(digest)
    rows = vocab_rows.merge(gathered, sweeps.target, sweeps.targets, call.rule, shards, call.return_stats)
    loss, factor = reduced(rows.loss, factor, call.reduction, shards)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(now):
        upstream = vocab_rows.per_row(1.0 if late else factor, rows.lse)
        gradients = sweeps.gradients(rows.lse, rows.from_target, upstream)
    row_loss, lse, from_target = sweeps.all_rows(*rows[:3])
    loss = row_loss if call.reduction == "none" else loss
    return rows._replace(loss=row_loss, lse=lse, from_target=from_target), loss, gradients, factor if late else 1.0


@without_autocast
def _backward(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, from_target: Tensor,
    call: Call, shards: VocabShards, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients for reduction "none", from logits that are made again."""
    sweeps = _Sweeps(x, weight, bias, target, call, shards, needs)
    columns = (lse, from_target, upstream.to(lse.dtype))
    if sweeps.keep is not None:
        columns = tuple(c.index_select(0, sweeps.keep) for c in columns)
    return sweeps.gradients(*columns)


class _VocabLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call, shards: VocabShards,
        digest: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.needs, target = tuple(ctx.needs_input_grad[:3]), ready(target)
        rows, loss, ctx.gradients, ctx.scale = _forward(x, weight, bias, target, call, shards, digest, ctx.needs)
        ctx.call, ctx.shards = call, shards
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        if any(ctx.needs):
            ctx.save_for_backward(x, weight, bias, target, rows.lse, rows.from_target)
        if rows.stats is None:
            return (loss,)
        ctx.mark_non_differentiable(*rows.stats)
        return (loss, *rows.stats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("linear_cross_entropy")
        if ctx.call.reduction == "none":
            dx, dw, db = _backward(upstream, *ctx.saved_tensors, ctx.call, ctx.shards, ctx.needs)
        else:
            dx, dw, db = deliver(ctx, upstream)
        if dx is not None:
            dx = dx.contiguous()
            dist.all_reduce(dx, group=ctx.shards.group)
        return dx, dw, db, None, None, None, None
