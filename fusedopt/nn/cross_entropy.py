"""Cross entropy on rows of logits: the autograd function, and the operators registered for torch.compile.

Eager calls go straight to the backend: dispatch through a registered operator costs more than a small loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt.backends import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def apply(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64 or (N, V) probabilities
    weight: Tensor | None,  # (V,)
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    inplace: bool,
) -> Tensor:
    """The loss, () or (N,), attached to the graph of `logits`."""
    if torch.compiler.is_compiling():
        at_forward = _at_forward(logits, reduction) and torch.is_grad_enabled() and logits.requires_grad
        return torch.ops.fusedopt.cross_entropy(
            logits, target, weight, reduction, ignore_index, label_smoothing, at_forward
        )[0]
    return _CrossEntropy.apply(logits, target, weight, reduction, ignore_index, label_smoothing, inplace)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _at_forward(logits: Tensor, reduction: str) -> bool:
    """Whether the gradient can be written before the upstream gradient is known.

    Not in float16: 1 / N underflows before GradScaler's scale arrives.
    """
    return reduction != "none" and logits.dtype != torch.float16


def _factor(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int) -> float:
    """What the sum of row losses is multiplied by: 1, or the mean's reciprocal denominator."""
    total = cpu.target_total(target, weight, ignore_index, logits.shape[1])  # checks the range before all else
    if reduction != "mean":
        return 1.0
    return 1.0 / total if total != 0.0 else float("inf")  # all ignored: the mean is 0 * inf = NaN, as in stock


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exps; `grad`, if given, receives the gradient."""
    dtype = _compute_dtype(logits.dtype)
    factor = _factor(logits, target, weight, reduction, ignore_index)
    rows, lse = torch.empty(2, logits.shape[0], dtype=dtype).unbind()
    cpu.cross_entropy_forward(logits, target, weight, ignore_index, label_smoothing, grad, factor, rows, lse)
    if reduction == "none":
        return rows, lse
    return (rows.sum(dtype=torch.float64) * factor).to(dtype), lse


def _backward(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient from saved logits and log-sum-exps, rounded once."""
    factor = _factor(logits, target, weight, reduction, ignore_index)
    grad = cpu.scratch.empty(logits.shape, logits.dtype)
    rows = None
    if reduction == "none":
        rows = upstream.to(lse.dtype).contiguous()
    else:
        factor *= float(upstream)
    cpu.cross_entropy_backward(logits, target, weight, ignore_index, label_smoothing, grad, factor, rows, lse)
    return grad


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        inplace: bool,
    ) -> Tensor:
        x = _rows(logits)
        target = _rows(target) if target.dim() == 2 else target.contiguous()
        scale = weight if weight is None else weight.detach().to(_compute_dtype(x.dtype)).contiguous()
        ctx.options = (reduction, ignore_index, label_smoothing)
        ctx.grad = None
        ctx.inplace = False
        ctx.needs = ctx.needs_input_grad[0]
        if ctx.needs and _at_forward(x, reduction):
            # rows that overlap (an expanded tensor) cannot hold a gradient each
            ctx.inplace = inplace and (x.shape[0] == 1 or x.stride(0) >= x.shape[1])
            ctx.grad = x if ctx.inplace else cpu.scratch.empty(x.shape, x.dtype)
        loss, lse = _forward(x, target, scale, reduction, ignore_index, label_smoothing, ctx.grad)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # whoever saved the logits learns that they are gone
        elif ctx.needs:
            ctx.save_for_backward(logits, target, weight, lse)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * 6
        if not ctx.needs:
            return None, *rest
        reduction, ignore_index, label_smoothing = ctx.options
        if torch.is_grad_enabled():  # create_graph: stock knows how to differentiate again
            if ctx.inplace:
                raise RuntimeError(
                    "cross_entropy(inplace=True) overwrote the logits, so it cannot be differentiated twice; "
                    "use inplace=False"
                )
            logits, target, weight, _ = ctx.saved_tensors
            return _stock_grad(upstream, logits, target, weight, *ctx.options), *rest
        if not _at_forward_done(ctx):
            logits, target, weight, lse = ctx.saved_tensors
            scale = weight if weight is None else weight.to(lse.dtype).contiguous()
            x = _rows(logits)
            return _backward(upstream, x, target, scale, lse, reduction, ignore_index, label_smoothing), *rest
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return ctx.grad * upstream, *rest
        grad, ctx.grad = ctx.grad, None
        if float(upstream) != 1.0:
            grad.mul_(upstream)
        return grad, *rest


def _at_forward_done(ctx: Any) -> bool:
    """Whether forward wrote the gradient; raises if a backward without retain_graph has already used it up."""
    if ctx.grad is not None:
        return True
    reduction = ctx.options[0]
    if ctx.inplace:
        raise RuntimeError(
            "Trying to backward through the graph a second time: cross_entropy(inplace=True) has handed its gradient "
            "on. Specify retain_graph=True if you need to backward through the graph a second time."
        )
    logits = ctx.saved_tensors[0]  # raises autograd's own error once freed
    return _at_forward(logits, reduction)


def _stock_grad(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient as a differentiable function of logits and upstream, by stock's kernels."""
    dtype = _compute_dtype(logits.dtype)
    loss = F.cross_entropy(
        logits.to(dtype),
        target.to(dtype) if target.is_floating_point() else target,
        None if weight is None else weight.to(dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return torch.autograd.grad(loss, logits, upstream, create_graph=True)[0]


# --- torch.compile sees these two, opaque, with their shapes ---


@torch.library.custom_op("fusedopt::cross_entropy", mutates_args=(), device_types="cpu")
def _op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient (empty unless with_grad) and log-sum-exps."""
    x = _rows(logits)
    target = _rows(target) if target.dim() == 2 else target.contiguous()
    scale = weight if weight is None else weight.to(_compute_dtype(x.dtype)).contiguous()
    grad = cpu.scratch.empty(x.shape, x.dtype) if with_grad else None
    loss, lse = _forward(x, target, scale, reduction, ignore_index, label_smoothing, grad)
    return loss.clone(), x.new_empty(0) if grad is None else grad, lse.clone()


@_op.register_fake
def _(logits, target, weight, reduction, ignore_index, label_smoothing, with_grad):  # type: ignore[no-untyped-def]
    dtype = _compute_dtype(logits.dtype)
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty(logits.shape if with_grad else (0,)), logits.new_empty((rows,), dtype=dtype)


@torch.library.custom_op("fusedopt::cross_entropy_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    target = _rows(target) if target.dim() == 2 else target.contiguous()
    scale = weight if weight is None else weight.to(lse.dtype).contiguous()
    x = logits.contiguous()
    return _backward(upstream, x, target, scale, lse, reduction, ignore_index, label_smoothing)


@_backward_op.register_fake
def _(upstream, logits, target, weight, lse, reduction, ignore_index, label_smoothing):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, reduction, ignore_index, label_smoothing, ctx.with_grad = inputs
    _, grad, lse = output
    ctx.mark_non_differentiable(grad, lse)
    ctx.options = (reduction, ignore_index, label_smoothing)
    ctx.save_for_backward(*((grad,) if ctx.with_grad else (logits, target, weight, lse)))


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.with_grad:
        grad = ctx.saved_tensors[0] * upstream.to(ctx.saved_tensors[0].dtype)
    else:
        grad = torch.ops.fusedopt.cross_entropy_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None, None, None


_op.register_autograd(_op_backward, setup_context=_setup_context)
