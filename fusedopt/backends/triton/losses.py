"""Losses on Triton's kernels, as fusedopt.backends says; the kernels are imported when a loss is first computed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fusedopt.backends import bad_target

LOSS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
takes_pixels = False


def _module(name: str) -> Any:
    return importlib.import_module(f"fusedopt.backends.triton.{name}")


def new_gradient(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the logits' shape and dtype."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def target_factor(target: Tensor, rule: Any, classes: int, mean: bool) -> Tensor:
    """What the sum of row losses is multiplied by, () float32: 1, or the reciprocal of the mean's denominator."""
    bad_target.raise_reported()
    factor = torch.empty((), dtype=torch.float32, device=target.device)
    if target.dim() > 1 or not mean:
        factor.fill_(1.0 / target.shape[0] if mean else 1.0)
    if target.dim() > 1:
        return factor
    _module("totals").check_targets(target, rule, classes, factor if mean else None, bad_target.report())
    return factor


def total_loss(rows: Tensor, factor: Tensor) -> Tensor:
    """() float32: `factor` times the sum of `rows` (N,) float32."""
    return rows.sum() * factor


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply a dense tensor by a () float32 on its device, in place; where that is 1, nothing moves."""
    _module("totals").scale_(tensor, factor)
    return tensor


def cross_entropy_forward(*arguments: Any) -> None:
    """See fusedopt.backends.triton.cross_entropy."""
    _module("cross_entropy").cross_entropy_forward(*arguments)


def cross_entropy_backward(*arguments: Any) -> None:
    """See fusedopt.backends.triton.cross_entropy."""
    _module("cross_entropy").cross_entropy_backward(*arguments)


def squared_error(*arguments: Any) -> Tensor:
    """See fusedopt.backends.triton.mse."""
    return _module("mse").squared_error(*arguments)


def squared_error_backward(*arguments: Any) -> None:
    """See fusedopt.backends.triton.mse."""
    _module("mse").squared_error_backward(*arguments)
