"""Cross entropy on a matrix of logits: the autograd function, and the operators registered for torch.compile.

Eager calls go straight to the backend: dispatch through a registered operator costs more than a small loss.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import backends
from fusedopt.nn import composed


class Rule(NamedTuple):
    """What makes a loss of logits and targets; backends take it with `weight` contiguous in the compute dtype."""

    weight: Tensor | None = None  # (V,)
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Stats(NamedTuple):
    """Statistics of each row of s = logit_scale * logits, then s = softcap * tanh(s / softcap); no gradient flows.

    Each has the index target's shape. Ignored rows have them too.
    """

    lse: Tensor  # logsumexp(s), NaN where it is infinite; compute dtype (float32; float64 for float64 logits)
    argmax: (
        Tensor  # int64: the class of the largest logit_scale * logits, as torch.argmax says; the cap keeps the order
    )
    correct: Tensor  # bool: argmax is the target, or the class of the largest target probability; False where ignored
    entropy: Tensor  # -sum p log p of p = softmax(s), compute dtype, with 0 log 0 = 0


def check_extras(z_loss: float, softcap: float | None, logit_scale: float, *, prefix: str = "") -> None:
    """Raise unless a loss can be told so; `prefix` completes the names of the last two.

    Raises:
        TypeError: one is no number; a tensor among them, whose gradient would be lost.
        ValueError: one is out of its range.
    """
    named = {"z_loss": z_loss, f"{prefix}softcap": softcap, f"{prefix}logit_scale": logit_scale}
    for name, value in named.items():
        if not isinstance(value, (int, float)) and not (name.endswith("softcap") and value is None):
            raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} must be finite and at least 0")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{prefix}softcap={softcap} must be finite and above 0; None is for no cap")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{prefix}logit_scale={logit_scale} must be finite")


def apply(
    logits: Tensor,  # (N, V), or (B, V, P)
    target: Tensor,  # (N,) or (B, P) int64; or probabilities of the logits' shape
    rule: Rule,
    reduction: str,
    inplace: bool,
    return_stats: bool,
    backend: str,  # of backends.for_losses
) -> tuple[Tensor, Stats | None]:
    """The loss, () or (N,) or (B, P), attached to the graph of `logits` and of probability targets; the statistics."""
    if torch.compiler.is_compiling():
        at_forward = grad_at_forward(logits, reduction) and torch.is_grad_enabled() and logits.requires_grad
        at_forward = at_forward and not target.requires_grad
        loss, _, *stats = torch.ops.fusedopt.cross_entropy(
            logits, target, *rule, reduction, at_forward, return_stats, backend
        )
        return loss, Stats(*stats) if return_stats else None
    stats = _new_stats(logits) if return_stats else None
    return _CrossEntropy.apply(logits, target, rule, reduction, inplace, stats, backends.module(backend)), stats


def _index_shape(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:]


def _new_stats(logits: Tensor) -> Stats:
    shape, dtype = _index_shape(logits), composed.compute_dtype(logits.dtype)
    dtypes = Stats(dtype, torch.int64, torch.bool, dtype)
    return Stats(*(torch.empty(shape, dtype=d, device=logits.device) for d in dtypes))


def grad_at_forward(logits: Tensor, reduction: str) -> bool:
    """Whether the gradient can be written before the upstream gradient is known.

    Not in float16: 1 / N underflows before GradScaler's scale arrives.
    """
    return reduction != "none" and logits.dtype != torch.float16


def dense_rows(matrix: Tensor) -> Tensor:
    """`matrix`, copied where its last dimension is not contiguous."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def overlaps(matrix: Tensor) -> bool:
    """Whether elements may share memory (an expanded tensor): they cannot hold a gradient each."""
    reach = 0
    for stride, size in sorted(zip(matrix.stride(), matrix.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _prepared(logits: Tensor, target: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Rule]:
    """What a backend takes."""
    target = dense_rows(target) if target.is_floating_point() else target.reshape(-1).contiguous()
    if rule.weight is not None:
        rule = rule._replace(weight=rule.weight.to(composed.compute_dtype(logits.dtype)).contiguous())
    return dense_rows(logits), target, rule


def _forward(
    logits: Tensor,
    target: Tensor,
    rule: Rule,
    reduction: str,
    grad: Tensor | None,
    stats: Stats | None,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exps; `grad` and `stats`, if given, are filled."""
    shape = _index_shape(logits)
    logits, target, rule = _prepared(logits, target, rule)
    factor = kernels.target_factor(target, rule, logits.shape[1], reduction == "mean")
    rows = torch.empty(shape.numel(), dtype=composed.compute_dtype(logits.dtype), device=logits.device)
    flat = None if stats is None else Stats(*(s.view(-1) for s in stats))
    lse = torch.empty_like(rows) if flat is None else flat.lse
    kernels.cross_entropy_forward(logits, target, rule, grad, factor, rows, lse, flat)
    if reduction == "none":
        return rows.view(shape), lse.view(shape)
    return kernels.total_loss(rows, factor), lse.view(shape)


def _backward(
    upstream: Tensor, logits: Tensor, target: Tensor, rule: Rule, reduction: str, lse: Tensor, kernels: ModuleType
) -> Tensor:
    """The gradient from saved logits and log-sum-exps, rounded once."""
    logits, target, rule = _prepared(logits, target, rule)
    factor = kernels.target_factor(target, rule, logits.shape[1], reduction == "mean")
    grad = kernels.new_gradient(logits)
    rows = None
    if reduction == "none":
        rows = upstream.to(lse.dtype).reshape(-1).contiguous()
    else:
        factor = factor * upstream
    kernels.cross_entropy_backward(logits, target, rule, grad, factor, rows, lse.reshape(-1))
    return grad


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        rule: Rule,
        reduction: str,
        inplace: bool,
        stats: Stats | None,
        kernels: ModuleType,
    ) -> Tensor:
        ctx.rule, ctx.reduction, ctx.kernels = rule._replace(weight=None), reduction, kernels
        ctx.grad = None
        ctx.inplace = False
        for_logits, for_target = ctx.needs_input_grad[:2]
        x = dense_rows(logits)
        if for_logits and grad_at_forward(x, reduction):
            ctx.inplace = inplace and not for_target and not overlaps(x)
            ctx.grad = x if ctx.inplace else kernels.new_gradient(x)
        loss, lse = _forward(x, target, rule, reduction, ctx.grad, stats, kernels)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # whoever saved the logits learns that they are gone
        elif for_logits or for_target:
            ctx.save_for_backward(logits, target, rule.weight, lse)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * 5
        for_logits, for_target = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph: torch's operators know how to differentiate again
            return *_differentiable(ctx, upstream), *rest
        grad = _logits_grad(ctx, upstream) if for_logits else None
        target_grad = None
        if for_target:
            logits, _, weight, lse = ctx.saved_tensors
            target_grad = composed.target_grad(upstream, logits, lse, ctx.rule._replace(weight=weight), ctx.reduction)
        return grad, target_grad, *rest


def _logits_grad(ctx: Any, upstream: Tensor) -> Tensor:
    if not _at_forward_done(ctx):
        logits, target, weight, lse = ctx.saved_tensors
        return _backward(upstream, logits, target, ctx.rule._replace(weight=weight), ctx.reduction, lse, ctx.kernels)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return ctx.grad * upstream
    grad, ctx.grad = ctx.grad, None
    return ctx.kernels.scale_(grad, upstream) if grad.is_contiguous() else grad.mul_(upstream)


def _at_forward_done(ctx: Any) -> bool:
    """Whether forward wrote the gradient; raises if a backward without retain_graph has already used it up."""
    if ctx.grad is not None:
        return True
    if ctx.inplace:
        raise RuntimeError(
            "Trying to backward through the graph a second time: cross_entropy(inplace=True) has handed its gradient "
            "on. Specify retain_graph=True if you need to backward through the graph a second time."
        )
    logits = ctx.saved_tensors[0]  # raises autograd's own error once freed
    return grad_at_forward(logits, ctx.reduction)


def _differentiable(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients of logits and targets as differentiable functions of them and of upstream."""
    if ctx.inplace:
        raise RuntimeError(
            "cross_entropy(inplace=True) overwrote the logits, so it cannot be differentiated twice; use inplace=False"
        )
    logits, target, weight, _ = ctx.saved_tensors
    loss = composed.cross_entropy(logits, target, ctx.rule._replace(weight=weight), ctx.reduction)
    needs = ctx.needs_input_grad[:2]
    inputs = [t for t, needed in zip((logits, target), needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


# --- torch.compile sees these two, opaque, with their shapes ---


@torch.library.custom_op("fusedopt::cross_entropy", mutates_args=())
def _op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    with_grad: bool,
    with_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient (empty unless with_grad), log-sum-exps, and the other statistics (empty unless with_stats)."""
    rule = Rule(weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    kernels = backends.module(backend)
    grad = kernels.new_gradient(logits) if with_grad else None
    stats = _new_stats(logits) if with_stats else None
    loss, lse = _forward(logits, target, rule, reduction, grad, stats, kernels)
    none = [logits.new_empty(0, dtype=d) for d in (torch.int64, torch.bool, lse.dtype)]
    return loss, logits.new_empty(0) if grad is None else grad, lse, *(none if stats is None else stats[1:])


@_op.register_fake
def _(logits, target, *options):  # type: ignore[no-untyped-def]
    *_, reduction, with_grad, with_stats, _ = options
    lse, *rest = _new_stats(logits)
    loss = torch.empty_like(lse) if reduction == "none" else lse.new_empty(())
    grad = logits.new_empty(logits.shape if with_grad else (0,))
    return loss, grad, lse, *(rest if with_stats else [r.new_empty(0) for r in rest])


@torch.library.custom_op("fusedopt::cross_entropy_backward", mutates_args=())
def _backward_op(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    lse: Tensor,
    backend: str,
) -> Tensor:
    rule = Rule(weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return _backward(upstream, logits, target, rule, reduction, lse, backends.module(backend))


@_backward_op.register_fake
def _(upstream, logits, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *rule, ctx.reduction, ctx.with_grad, _, ctx.backend = inputs
    _, grad, lse, *rest = output
    ctx.mark_non_differentiable(grad, lse, *rest)
    ctx.rule = Rule(None, *rule[1:])
    ctx.save_for_backward(*((grad,) if ctx.with_grad else (logits, target, rule[0], lse)))


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    rest = (None,) * 10
    if ctx.with_grad:
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, *rest
    logits, target, weight, lse = ctx.saved_tensors
    rule = ctx.rule._replace(weight=weight)
    grad = target_grad = None
    if ctx.needs_input_grad[0]:
        grad = torch.ops.fusedopt.cross_entropy_backward(
            upstream, logits, target, *rule, ctx.reduction, lse, ctx.backend
        )
    if ctx.needs_input_grad[1]:
        target_grad = composed.target_grad(upstream, logits, lse, rule, ctx.reduction)
    return grad, target_grad, *rest


_op.register_autograd(_op_backward, setup_context=_setup_context)
