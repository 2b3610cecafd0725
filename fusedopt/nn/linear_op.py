"""The linear cross entropy as operators that torch.compile sees: opaque, with their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt.nn import linear_passes
from fusedopt.nn.composed import compute_dtype
from fusedopt.nn.cross_entropy import Rule
from fusedopt.nn.linear_passes import Call


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Call) -> tuple[Tensor, ...]:
    """(loss, *stats), attached to the graph of x (N, H), weight (V, H) and bias (V)."""
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    loss, _, _, _, _, *stats = torch.ops.fusedopt.linear_cross_entropy(
        x, weight, bias, target, *call.rule, *call[1:], *needs
    )
    return (loss, *stats) if call.return_stats else (loss,)


@torch.library.custom_op("fusedopt::linear_cross_entropy", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    dtype: torch.dtype,
    chunk_bytes: int,
    max_rows: int | None,
    return_stats: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; gradients of x, weight and bias, and their scale; lse, argmax, correct, entropy. Empty where not needed."""
    rule = Rule(class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    call = Call(rule, reduction, dtype, chunk_bytes, max_rows, return_stats, backend)
    result = linear_passes.forward(x, weight, bias, target, call, (need_x, need_weight, need_bias))
    gradients = (x.new_empty(0) if g is None else g for g in result.gradients)
    scale = torch.as_tensor(result.scale, dtype=compute_dtype(dtype), device=x.device)
    compute = result.lse.dtype
    stats = result.stats or (result.lse, *(x.new_empty(0, dtype=d) for d in (torch.int64, torch.bool, compute)))
    return result.loss.clone(), *gradients, scale.clone(), *(s.clone() for s in stats)


@_op.register_fake
def _(x, weight, bias, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction,
      dtype, chunk_bytes, max_rows, return_stats, backend, need_x, need_weight, need_bias):  # type: ignore[no-untyped-def]  # fmt: skip
    compute, rows = compute_dtype(dtype), x.shape[0]
    at_forward = reduction != "none"
    wide = torch.float32 if dtype == torch.float16 else None

    def gradient(like: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_like(like, dtype=dtype) if needed and at_forward else x.new_empty(0)

    loss = x.new_empty(() if at_forward else (rows,), dtype=compute)
    others = [x.new_empty(rows if return_stats else 0, dtype=d) for d in (torch.int64, torch.bool, compute)]
    return (loss, gradient(x, need_x), gradient(weight, need_weight, wide), gradient(bias, need_bias, wide),
            x.new_empty((), dtype=compute), x.new_empty(rows, dtype=compute), *others)  # fmt: skip


@torch.library.custom_op("fusedopt::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    dtype: torch.dtype,
    chunk_bytes: int,
    max_rows: int | None,
    return_stats: bool,
    backend: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = Rule(class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    call = Call(rule, reduction, dtype, chunk_bytes, max_rows, return_stats, backend)
    needs = (need_x, need_weight, need_bias)
    gradients = linear_passes.backward(upstream, x, weight, bias, target, lse, call, needs)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@_backward_op.register_fake
def _(upstream, x, weight, bias, target, lse, class_weight, *options):  # type: ignore[no-untyped-def]
    return tuple(
        torch.empty_like(t) if need else x.new_empty(0) for t, need in zip((x, weight, bias), options[-3:], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, target, class_weight, *ctx.options = inputs
    _, dx, dw, db, scale, lse, *stats = output
    ctx.mark_non_differentiable(dx, dw, db, scale, lse, *stats)
    ctx.at_forward = ctx.options[5] != "none"
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    ctx.save_for_backward(*((dx, dw, db, scale) if ctx.at_forward else (x, weight, bias, target, lse, class_weight)))


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.options[-3:]
    if ctx.at_forward:
        *gradients, scale = ctx.saved_tensors
        # a tensor of no dimension alone would be rounded to the gradient's dtype
        products = (g.to(scale.dtype) * (upstream * scale) for g in gradients)
        gradients = [p.to(d) if need else None for p, d, need in zip(products, ctx.dtypes, needs, strict=True)]
    else:
        found = torch.ops.fusedopt.linear_cross_entropy_backward(upstream, *ctx.saved_tensors, *ctx.options)
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    return *gradients, *(None for _ in range(2 + len(ctx.options)))


_op.register_autograd(_op_backward, setup_context=_setup_context)
