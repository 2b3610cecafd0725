"""The forward and backward passes of the linear cross entropy over chunks of rows, and its autograd function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import backends
from fusedopt.nn import chunks
from fusedopt.nn import rows as torch_rows
from fusedopt.nn.chunks import Products, scaled
from fusedopt.nn.composed import compute_dtype
from fusedopt.nn.cross_entropy import Rule, Stats


def without_autocast(function: Callable) -> Callable:
    """Autocast has chosen the products' dtype by then; the float32 arithmetic inside is not its to change."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return wrapped


class Call(NamedTuple):
    """How one call computes, its tensors apart."""

    rule: Rule
    reduction: str
    dtype: torch.dtype  # of the products
    chunk_bytes: int
    max_rows: int | None
    return_stats: bool
    backend: str


class Result(NamedTuple):
    """Of a forward pass. The gradients are to be multiplied by `scale`, in float16 the mean's factor, otherwise 1."""

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight, bias
    scale: float | Tensor
    stats: Stats | None
    lse: Tensor


# --- rows: the backend's kernel, or torch's operations ---


def _kernels(logits: Tensor, target: Tensor, backend: str) -> ModuleType:
    fits = target.dim() == 1 or (target.dtype == logits.dtype and (target.stride(1) == 1 or target.shape[1] == 1))
    name = backends.for_losses(backend, logits.device, logits.dtype)
    return backends.module(name) if name and fits else torch_rows


def _row_bytes(x: Tensor, classes: int, target: Tensor, call: Call, gathered: bool) -> int:
    """What one row of a chunk takes: its logits, temporaries, and x in another dtype or gathered, with its gradient."""
    copied = gathered or x.dtype != call.dtype
    probe = torch.empty(1, 1, dtype=call.dtype, device=x.device)
    fused = _kernels(probe, target, call.backend) is not torch_rows
    per_logit = call.dtype.itemsize + (0 if fused else torch_rows.TEMPORARIES * compute_dtype(call.dtype).itemsize)
    return classes * per_logit + 2 * copied * x.shape[1] * call.dtype.itemsize


def chunk_rows(
    keep: Tensor | None, x: Tensor, weight: Tensor, target: Tensor, call: Call, needs: tuple[bool, bool, bool],
    wide: bool = False,
) -> int:  # fmt: skip
    """Rows per chunk. All of them where that takes no more than smaller chunks and the float32 sum that they need."""
    n = x.shape[0] if keep is None else keep.shape[0]
    row_bytes = _row_bytes(x, weight.shape[0], target, call, keep is not None)
    summed = needs[1] and call.dtype in chunks.HALVES and weight.dtype == call.dtype and not wide
    spared = weight.numel() * 4 if summed else 0
    if n * row_bytes <= call.chunk_bytes + spared and n <= (call.max_rows or n):
        return max(1, n)
    return chunks.rows_per_chunk(n, row_bytes, call.chunk_bytes, call.max_rows)


# --- the two passes ---


def kept(target: Tensor, call: Call) -> Tensor | None:
    """The rows that count, where that can be known without waiting for a device, or None for all of them."""
    if target.dim() == 2 or target.device.type != "cpu" or call.return_stats:
        return None
    keep = (target != call.rule.ignore_index).nonzero()[:, 0]
    return None if keep.shape[0] == target.shape[0] else keep


def target_factor(
    target: Tensor, rule: Rule, classes: int, mean: bool, dtype: torch.dtype, backend: str
) -> float | Tensor:
    """What the sum of the row losses is multiplied by. Checks the targets' range before all else, on the CPU."""
    name = backends.for_losses(backend, target.device, dtype)
    if name:
        return backends.module(name).target_factor(target, rule, classes, mean)
    if target.device.type == "cpu" and target.dim() == 1:
        wrong = ((target < 0) | (target >= classes)) & (target != rule.ignore_index)
        if wrong.any():
            where = int(wrong.nonzero()[0, 0])
            raise IndexError(
                f"Target {int(target[where])} is out of bounds. (at flat position {where}; expected 0 <= target < "
                f"{classes} or ignore_index={rule.ignore_index})"
            )
    return torch_rows.total(target, rule, classes).reciprocal().to(compute_dtype(dtype)) if mean else 1.0


@without_autocast
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call, needs: tuple[bool, bool, bool]
) -> Result:
    """The loss, and for "mean" and "sum" the gradients that are needed."""
    classes, compute = weight.shape[0], compute_dtype(call.dtype)
    factor = target_factor(target, call.rule, classes, call.reduction == "mean", call.dtype, call.backend)
    keep = kept(target, call)
    counting = target if keep is None else target.index_select(0, keep)
    n = counting.shape[0]
    needs = needs if call.reduction != "none" else (False, False, False)
    late = call.dtype == torch.float16
    chunk = chunk_rows(keep, x, weight, target, call, needs, wide=late)
    products = Products(x, weight, bias, call.dtype, keep=keep, chunk=chunk, needs=needs, wide=late)
    loss, lse = torch.empty(2, n, dtype=compute, device=x.device).unbind()
    stats = torch_rows.new_stats(n, compute, x.device)._replace(lse=lse) if call.return_stats else None
    for rows in products.chunks():
        logits = products.logits(rows)
        grad = logits if any(needs) else None
        part = None if stats is None else Stats(*(s[rows] for s in stats))
        kernels = _kernels(logits, counting, call.backend)
        kernels.cross_entropy_forward(
            logits, counting[rows], call.rule, grad, 1.0 if late else factor, loss[rows], lse[rows], part
        )
        if grad is not None:
            products.accumulate(rows, grad)
    if keep is not None:
        loss, lse = (column.new_zeros(x.shape[0]).index_copy_(0, keep, column) for column in (loss, lse))
    if call.reduction != "none":
        loss = (loss.sum(dtype=torch.float64) * factor).to(compute)
    return Result(loss, products.gradients(), factor if late else 1.0, stats, lse)


@without_autocast
def backward(
    upstream: Tensor,  # (N,)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,  # (N,)
    call: Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients for reduction "none", from logits that are made again."""
    keep = kept(target, call)
    upstream = upstream.to(lse.dtype).contiguous()
    if keep is not None:
        target, upstream, lse = (column.index_select(0, keep) for column in (target, upstream, lse))
    chunk = chunk_rows(keep, x, weight, target, call, needs)
    products = Products(x, weight, bias, call.dtype, keep=keep, chunk=chunk, needs=needs)
    for rows in products.chunks():
        logits = products.logits(rows)
        kernels = _kernels(logits, target, call.backend)
        kernels.cross_entropy_backward(logits, target[rows], call.rule, logits, 1.0, upstream[rows], lse[rows])
        products.accumulate(rows, logits)
    return products.gradients()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call
    ) -> tuple[Tensor, ...]:
        ctx.needs = tuple(ctx.needs_input_grad[:3])
        result = forward(x, weight, bias, target, call, ctx.needs)
        ctx.call, ctx.gradients, ctx.scale = call, result.gradients, result.scale
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        if any(ctx.needs):
            ctx.save_for_backward(x, weight, bias, target, result.lse)
        if result.stats is None:
            return (result.loss,)
        ctx.mark_non_differentiable(*result.stats)
        return (result.loss, *result.stats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            x, weight, bias, target, _ = ctx.saved_tensors
            return *_differentiable_gradients(upstream, x, weight, bias, target, ctx.call, ctx.needs), None, None
        if ctx.call.reduction == "none":
            return *backward(upstream, *ctx.saved_tensors, ctx.call, ctx.needs), None, None
        return *deliver(ctx, upstream), None, None


def deliver(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that forward left in ctx.gradients, times ctx.scale and upstream, in ctx.dtypes."""
    if ctx.gradients is None:
        _ = ctx.saved_tensors  # raises autograd's own error: the graph is freed
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    gradients = ctx.gradients
    if not keep:
        ctx.gradients = None
    scale = upstream * ctx.scale
    return tuple(scaled(g, scale, dtype, keep) for g, dtype in zip(gradients, ctx.dtypes, strict=True))


def _differentiable_gradients(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients as differentiable functions of x, weight, bias and upstream, by torch's operations."""
    logits = torch.nn.functional.linear(
        x.to(call.dtype), weight.to(call.dtype), None if bias is None else bias.to(call.dtype)
    )
    loss = torch_rows.reference_loss(logits, target, call.rule, call.reduction)
    inputs = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
