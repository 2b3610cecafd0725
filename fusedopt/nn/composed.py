"""Cross entropy composed of torch's operators: differentiable any number of times, under every transform, anywhere.

It is what the fused path falls back to, and what differentiates it twice.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def is_dtensor(*tensors: Tensor | None) -> bool:
    """Whether one is a DTensor, without importing torch.distributed: where there is one, it has been."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def sharded_classes(tensor: Tensor, dim: int | None = None) -> bool:
    """Whether each rank holds some of the classes alone: dimension `dim`, or the logits' own."""
    if not is_dtensor(tensor):
        return False
    dim = class_dim(tensor) if dim is None else dim
    return any(p.is_shard(dim) for p in tensor.placements)


def scaled(logits: Tensor, rule: Any) -> Tensor:
    """What softmax sees of the logits, in the compute dtype."""
    s = logits.to(compute_dtype(logits.dtype))
    if rule.logit_scale != 1.0:
        s = s * rule.logit_scale
    return s if rule.softcap is None else torch.tanh(s / rule.softcap) * rule.softcap


def cross_entropy(logits: Tensor, target: Tensor, rule: Any, reduction: str) -> Tensor:
    """The loss in the compute dtype; raises what torch raises."""
    s, weight = scaled(logits, rule), rule.weight
    if s.dtype != logits.dtype:  # the loss of half logits is float32 whoever computes it
        target = target.to(s.dtype) if target.is_floating_point() else target
        weight = None if weight is None else weight.to(s.dtype)
    loss = F.cross_entropy(
        s,
        target,
        weight,
        ignore_index=rule.ignore_index,
        reduction=reduction,
        label_smoothing=rule.label_smoothing,
    )
    if rule.z_loss == 0.0:
        return loss
    squares = s.logsumexp(class_dim(s)).square()
    total: Tensor | int = squares.numel()
    if not target.is_floating_point():
        counts = target != rule.ignore_index
        squares = squares.where(counts, 0.0)
        each = counts.to(s.dtype) if weight is None else weight[target.where(counts, 0).long()].where(counts, 0.0)
        total = each.sum()
    if reduction == "none":
        return loss + rule.z_loss * squares
    z = rule.z_loss * squares.sum()
    return loss + (z / total if reduction == "mean" else z)


def target_grad(upstream: Tensor, logits: Tensor, lse: Tensor, rule: Any, reduction: str) -> Tensor:
    """The gradient of probability targets: -w (1 - label_smoothing) log softmax(s), times upstream, over N for "mean".

    logits (N, V) or (B, V, P); lse, and upstream for "none", of that shape without V.
    """
    factor = logits.shape[1] / logits.numel() if reduction == "mean" else 1.0
    per_row = upstream * ((1.0 - rule.label_smoothing) * factor)
    grad = (lse.unsqueeze(1) - scaled(logits, rule)) * (per_row.unsqueeze(1) if per_row.dim() else per_row)
    if rule.weight is not None:
        grad = grad * rule.weight.to(grad.dtype).view(-1, *[1] * (logits.dim() - 2))
    return grad.to(logits.dtype)


def statistics(logits: Tensor, target: Tensor, rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, argmax, correct and entropy of each row; see `fusedopt.nn.functional.Stats`."""
    dim = class_dim(logits)
    s = scaled(logits.detach(), rule)
    lse = s.logsumexp(dim)
    lse = lse.where(lse.isfinite(), torch.nan)
    log_p = s - lse.unsqueeze(dim)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(dim)
    argmax = (logits.detach().to(s.dtype) * rule.logit_scale).argmax(dim)
    if target.is_floating_point():
        return lse, argmax, argmax == target.detach().argmax(dim), entropy
    return lse, argmax, (argmax == target) & (target != rule.ignore_index), entropy
