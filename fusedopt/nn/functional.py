"""Fused loss functions with torch.nn.functional's signatures; every other name resolves to torch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import has_torch_function_variadic

from fusedopt import backends
from fusedopt.backends import cpu
from fusedopt.nn import cross_entropy as _fused
from fusedopt.nn.linear import linear_cross_entropy
from fusedopt.nn.mse import mse_loss

__all__ = ["cross_entropy", "linear_cross_entropy", "mse_loss"]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Same as `torch.nn.functional.cross_entropy`, with loss and gradient in one pass over the logits.

        loss_i = -w[y_i] log softmax(x_i)[y_i]

    For reductions "mean" and "sum" the gradient is written during forward, so backward only multiplies by the upstream
    gradient; "none" and float16 keep the log-sum-exp and write the gradient, rounded once, in backward. Between forward
    and backward the logits may be changed in place in the first case, as with stock; in the second autograd raises.

    Args:
        input (Tensor): logits (C), (N, C) or (N, C, d1, ...), float32, bfloat16, float16 or float64.
        target (Tensor): int64 class indices of the input's shape without C, or probabilities of the input's shape.
        weight (Tensor): per class (C), input's dtype.
        size_average, reduce: deprecated, as in torch.
        ignore_index (int): targets that add neither loss nor gradient.
        reduction (str): "none", "mean" or "sum".
        label_smoothing (float): in [0, 1].
        inplace (bool): let the gradient overwrite the logits: half the memory. `input` must not be used afterwards.
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (PyTorch's own kernels).

    Returns:
        The loss: a scalar, or of the index target's shape for "none"; float32 (float64 for float64 logits).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; nothing has been computed.
        What torch raises, for everything else that it raises on.

    Source: `torch.nn.functional.cross_entropy`; Milakov & Gimelshein 2018 for the online normaliser.
    """
    if has_torch_function_variadic(input, target, weight):
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not _fusable(input, target, weight, reduction, label_smoothing, backend):
        if input.dtype in (torch.bfloat16, torch.float16):  # the loss is float32 whoever computes it
            input = input.float()
            target = target.float() if target.is_floating_point() else target
            weight = None if weight is None else weight.float()
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    classes_last = input.movedim(1, -1) if input.dim() > 2 else input
    rows_shape = classes_last.shape[:-1]
    logits = classes_last.reshape(-1, classes_last.shape[-1])
    if target.is_floating_point():
        target = target.movedim(1, -1) if target.dim() > 2 else target
        target = target.reshape(-1, classes_last.shape[-1])
    else:
        target = target.reshape(-1)
    loss = _fused.apply(logits, target, weight, reduction, ignore_index, label_smoothing, inplace)
    return loss.reshape(rows_shape) if reduction == "none" else loss


def _fusable(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float, backend: str
) -> bool:
    """Whether the fused path takes the call; what it leaves is stock's to compute or to refuse."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)) or input.dim() == 0 or input.numel() == 0:
        return False
    if not torch.compiler.is_compiling():
        backends.check(backend)
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return False
        if input.is_neg() or target.is_neg():  # DLPack does not tell that the values are negated
            return False
    if backend == "reference" or input.device.type != "cpu" or not cpu.READY:
        return False
    class_dim = 0 if input.dim() == 1 else 1
    index_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.shape == input.shape:
        fits = target.dtype == input.dtype
    else:
        fits = target.dtype == torch.int64 and target.shape == index_shape
    if weight is not None:
        fits = fits and weight.dtype == input.dtype and weight.shape == (input.shape[class_dim],)
        fits = fits and weight.device == input.device
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (target, weight))
    return (
        fits
        and not differentiable
        and input.dtype in _fused.DTYPES
        and target.device == input.device
        and input.layout == target.layout == torch.strided
        and reduction in ("none", "mean", "sum")
        and 0.0 <= label_smoothing <= 1.0
    )


def __getattr__(name: str) -> Any:
    return getattr(F, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(F)})
