"""Rows of logits in torch operations, in float32 (float64 for float64): for devices and features without a kernel.

The same two functions, with the same arguments, as a backend's kernels offer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.nn.composed import compute_dtype
from fusedopt.nn.cross_entropy import Rule, Stats

TEMPORARIES = 4  # float32 matrices of the logits' size that are alive at once


def scores(logits: Tensor, rule: Rule) -> Tensor:
    """s = softcap * tanh(logit_scale * x / softcap), in the compute dtype."""
    s = logits.to(compute_dtype(logits.dtype))
    if rule.logit_scale != 1.0:
        s = s * rule.logit_scale
    return s if rule.softcap is None else rule.softcap * torch.tanh(s / rule.softcap)


def counted(target: Tensor, rule: Rule) -> Tensor:  # (N,) bool
    """The rows that have a loss."""
    if target.dim() == 2:
        return torch.ones_like(target[:, 0], dtype=torch.bool)
    return target != rule.ignore_index


def total(target: Tensor, rule: Rule, classes: int) -> Tensor:
    """The mean's denominator, a scalar on the device: the number, or summed weight, of the rows that count."""
    rows = counted(target, rule)
    if target.dim() == 2 or rule.weight is None:
        return rows.sum(dtype=torch.float64)
    return rule.weight[target.clamp(0, classes - 1)].double().mul(rows).sum()


class _Targets:
    """Row by row y[c] = one_hot [c == label] + dense[c], as csrc/softmax.h has it."""

    def __init__(self, target: Tensor, rule: Rule, classes: int, dtype: torch.dtype) -> None:
        self.rows = counted(target, rule)
        spread = rule.label_smoothing / classes
        keep = 1.0 - rule.label_smoothing
        self.label, self.dense = None, None
        if target.dim() == 2:
            self.valid = self.rows
            self.dense = target.to(dtype) * keep + spread  # (N, V)
            self.dense = self.dense if rule.weight is None else self.dense.mul_(rule.weight)
            self.mass = self.dense.sum(1)
            return
        self.valid = (target >= 0) & (target < classes)
        self.label = target.clamp(0, classes - 1)  # a wrong one must not be read with; its loss becomes NaN
        self.one_hot = torch.full(target.shape, keep, dtype=dtype, device=target.device)
        if rule.weight is not None:
            self.one_hot *= rule.weight[self.label]
        self.mass = self.one_hot
        if spread:
            self.dense = rule.weight * spread if rule.weight is not None else self.one_hot.new_full((classes,), spread)
            self.mass = self.mass + self.dense.sum()

    def dot(self, s: Tensor) -> Tensor:  # (N, V) -> (N,)
        """sum_c y[c] s[c]"""
        if self.label is None:
            return (self.dense * s).sum(1)
        picked = self.one_hot * s.gather(1, self.label[:, None])[:, 0]
        return picked if self.dense is None else picked + s @ self.dense

    def subtract_from(self, p: Tensor) -> Tensor:
        """p - y, over p."""
        if self.dense is not None:
            p.sub_(self.dense)
        return p if self.label is None else p.scatter_add_(1, self.label[:, None], -self.one_hot[:, None])


def cross_entropy_forward(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64, or (N, V) probabilities
    rule: Rule,
    grad: Tensor | None,  # (N, V), written if given; may be the logits
    factor: float | Tensor,
    loss: Tensor,  # (N,) compute dtype, written
    lse: Tensor,  # (N,) compute dtype, written
    stats: Stats | None = None,  # written if given
) -> None:
    s = scores(logits, rule)
    y = _Targets(target, rule, s.shape[1], s.dtype)
    top, argmax = s.max(1)
    p = s - top[:, None]  # from the maximum: mass * lse and sum y s alone may each be 1e4 times the loss
    dot = y.dot(p)
    p.exp_()
    exps = p.sum(1)
    log_sum = exps.log()
    lse.copy_(top + log_sum)
    value = y.mass * log_sum - dot
    if rule.z_loss:
        value += rule.z_loss * lse.square()
    loss.copy_(value.masked_fill(~y.valid, torch.nan).masked_fill(~y.rows, 0))
    p.div_(exps[:, None])
    if stats is not None:
        best = target.argmax(1) if y.label is None else target
        stats.argmax.copy_(argmax)
        stats.correct.copy_((argmax == best) & y.rows)
        # where p is 0, s may be -inf
        stats.entropy.copy_(log_sum - (s - top[:, None]).clamp_(min=-1e3).mul_(p).sum(1))
    if grad is not None:
        _write_grad(p, s, y, rule, grad, factor, None, lse)


def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    rule: Rule,
    grad: Tensor,
    factor: float | Tensor,
    upstream: Tensor | None,  # (N,) compute dtype
    lse: Tensor,
) -> None:
    """The gradient from the saved log-sum-exps, times `factor` and each row's `upstream`, rounded once."""
    s = scores(logits, rule)
    y = _Targets(target, rule, s.shape[1], s.dtype)
    _write_grad((s - lse[:, None]).exp_(), s, y, rule, grad, factor, upstream, lse)


def _write_grad(
    p: Tensor, s: Tensor, y: _Targets, rule: Rule, grad: Tensor, factor: float | Tensor, upstream: Tensor | None,
    lse: Tensor,
) -> None:  # fmt: skip
    """grad = factor * upstream * ((mass + 2 z_loss lse) p - y) ds/dx; p is overwritten."""
    mass = y.mass + 2 * rule.z_loss * lse if rule.z_loss else y.mass
    g = y.subtract_from(p.mul_(mass[:, None]))
    scale = factor * rule.logit_scale
    g.mul_(scale) if upstream is None else g.mul_((upstream * scale)[:, None])
    if rule.softcap is not None:
        g.mul_((s / rule.softcap).square_().neg_().add_(1))
    grad.copy_(g.masked_fill_(~y.rows[:, None], 0))  # a product with 0 would leave NaN


def reference_loss(logits: Tensor, target: Tensor, rule: Rule, reduction: str) -> Tensor:
    """The loss of (N, V) logits as a differentiable function of everything in it."""
    s = scores(logits, rule)
    loss = torch.nn.functional.cross_entropy(
        s,
        target.to(s.dtype) if target.is_floating_point() else target,
        None if rule.weight is None else rule.weight.to(s.dtype),
        reduction=reduction,
        ignore_index=rule.ignore_index,
        label_smoothing=rule.label_smoothing,
    )
    if rule.z_loss:
        z = rule.z_loss * s.logsumexp(1).square().masked_fill(~counted(target, rule), 0)
        if reduction == "none":
            return loss + z
        z = z.sum()
        loss = loss + (z / total(target, rule, s.shape[1]).to(z.dtype) if reduction == "mean" else z)
    return loss


def reference_stats(logits: Tensor, target: Tensor, rule: Rule) -> Stats:
    s = scores(logits, rule)
    stats = new_stats(s.shape[0], s.dtype, s.device)
    cross_entropy_forward(logits, target, rule, None, 1.0, torch.empty_like(stats.lse), stats.lse, stats)
    return stats


def new_stats(rows: int, dtype: torch.dtype, device: torch.device) -> Stats:
    def column(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=device)

    return Stats(column(dtype), column(torch.int64), column(torch.bool), column(dtype))
