"""Fused loss functions with torch.nn.functional's signatures; every other name resolves to torch's own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import has_torch_function_variadic

from fusedopt import backends
from fusedopt.nn import composed
from fusedopt.nn import cross_entropy as _fused
from fusedopt.nn.composed import class_dim, is_dtensor, sharded_classes
from fusedopt.nn.cross_entropy import Stats, check_extras
from fusedopt.nn.distillation import linear_distillation
from fusedopt.nn.linear import linear_cross_entropy
from fusedopt.nn.mse import mse_loss

__all__ = ["Stats", "cross_entropy", "linear_cross_entropy", "linear_distillation", "mse_loss"]

PIXELS = 16  # fewer neighbours do not fill a vector: copying them into rows costs less


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
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    return_stats: bool = False,
    tp_group: Any = None,
    vocab_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    """Same as `torch.nn.functional.cross_entropy`, with loss and gradient in one pass over the logits.

        s_i    = logit_scale x_i,  then  softcap tanh(s_i / softcap)  if softcap is given
        loss_i = -w[y_i] log softmax(s_i)[y_i]  +  z_loss logsumexp(s_i)^2

    "mean" divides the z-loss by what it divides the loss by: the summed weight of the targets, or the number of rows of
    probabilities.

    (N, C, d1, ...) is read as it lies, and the gradient lies likewise: neither is copied into rows of classes, unless
    d1 ... are fewer than 16 elements or cannot be walked with one stride.

    For reductions "mean" and "sum" the gradient is written during forward, so backward only multiplies by the upstream
    gradient; "none" and float16 keep the log-sum-exp and write the gradient, rounded once, in backward. Between forward
    and backward the logits may be changed in place in the first case, as with stock; in the second, or where
    probability targets need a gradient, autograd raises.

    The classes may lie on several ranks, cut as one likes. `input` is then a DTensor sharded over them by one dimension
    of its mesh, of which the others replicate it or shard its first dimension; or each rank's logits are a plain
    tensor, and `tp_group` and `vocab_range` say which they are. Forward reads the logits, takes one all-gather of 2
    float32 a row (3 with label smoothing, 3 more with return_stats; the first call with a `vocab_range` takes another),
    and reads them again for the gradient; backward takes none. Each rank gives all targets and all of `weight`, and
    gets the whole loss, within a rounding of its log-sum-exp. DTensors give a DTensor: replicated, or placed as the
    targets for "none"; where rows are sharded, "mean" and "sum" are over all of them, by one all-reduce of 2 numbers.
    Targets must be class indices; the gradient has no second derivative.

    Args:
        input (Tensor): logits (C), (N, C) or (N, C, d1, ...), float32, bfloat16, float16 or float64.
        target (Tensor): int64 class indices of the input's shape without C, or probabilities of the input's shape and
            dtype, which may need a gradient.
        weight (Tensor): per class (C), input's dtype. One that needs a gradient is left to torch, which has none of it
            for class indices.
        size_average, reduce: deprecated, as in torch.
        ignore_index (int): targets that add neither loss nor gradient.
        reduction (str): "none", "mean" or "sum".
        label_smoothing (float): in [0, 1].
        z_loss (float): at least 0; keeps the log-sum-exp near 0. Liger calls it lse_square_scale.
        softcap (float): above 0; keeps s within (-softcap, softcap).
        logit_scale (float): multiplies the logits, as a reciprocal temperature does.
        inplace (bool): let the gradient overwrite the logits: half the memory. `input` must not be used afterwards.
        return_stats (bool): return `Stats` beside the loss, from the same pass.
        tp_group (ProcessGroup): the ranks that hold the classes of a plain `input`; each must call.
        vocab_range ((int, int)): the first class of this rank's `input`, and the one past its last; the ranks' ranges
            must together be [0, V), in any order, empty ones allowed.
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (PyTorch's own kernels).

    Returns:
        The loss: a scalar, or of the index target's shape for "none"; float32 (float64 for float64 logits). With
        return_stats, `(loss, Stats(lse, argmax, correct, entropy))`.

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; nothing has been computed.
        TypeError, ValueError: z_loss, softcap or logit_scale is no number, or out of its range.
        TypeError, ValueError: tp_group and vocab_range do not fit each other or the logits; or the ranks' ranges, rows
            or options do not fit together, told on every rank in the first call with a vocab_range. Later calls tell
            of options on the CPU; different numbers of rows are then found by TORCH_DISTRIBUTED_DEBUG=DETAIL alone.
        What torch raises, for everything else that it raises on.

    Source: `torch.nn.functional.cross_entropy`; Milakov & Gimelshein 2018 for the online normaliser; Chowdhery et al.
    2022 (PaLM) for the z-loss; Gemma Team 2024 (Gemma 2) for the soft cap.
    """
    check_extras(z_loss, softcap, logit_scale)
    extras = return_stats or z_loss != 0.0 or softcap is not None or logit_scale != 1.0
    if has_torch_function_variadic(input, target, weight) and not extras:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    rule = _fused.Rule(weight, ignore_index, label_smoothing, float(z_loss), softcap, float(logit_scale))
    if tp_group is not None or vocab_range is not None or sharded_classes(input):
        from fusedopt.distributed import vocab_loss  # torch may have been built without torch.distributed

        return vocab_loss.cross_entropy(
            input, target, rule, reduction, inplace, return_stats, tp_group, vocab_range, backend
        )
    kernels = _kernels(input, target, weight, reduction, label_smoothing, backend)
    if not kernels:
        loss = composed.cross_entropy(input, target, rule, reduction)
        return (loss, Stats(*composed.statistics(input, target, rule))) if return_stats else loss

    rows_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    logits, target = _matrices(input, target, backends.takes_pixels(kernels))
    loss, stats = _fused.apply(logits, target, rule, reduction, inplace, return_stats, kernels)
    if reduction == "none":
        loss = loss.reshape(rows_shape)
    return (loss, Stats(*(s.reshape(rows_shape) for s in stats))) if return_stats else loss


def _matrices(input: Tensor, target: Tensor, takes_pixels: bool) -> tuple[Tensor, Tensor]:
    """(N, C, d1, ...) and its targets as (rows, C), or (N, C, pixels) where that is how the logits lie."""
    pixels = math.prod(input.shape[2:])
    if takes_pixels and input.dim() > 2 and input.stride(1) != 1 and pixels >= PIXELS:
        logits = input.flatten(2)
        return logits, target.flatten(2) if target.is_floating_point() else target.flatten(1)

    def rows(tensor: Tensor) -> Tensor:
        classes_last = tensor.movedim(1, -1) if tensor.dim() > 2 else tensor
        return classes_last.reshape(-1, classes_last.shape[-1])

    return rows(input), rows(target) if target.is_floating_point() else target.reshape(-1)


def _kernels(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float, backend: str
) -> str:
    """The backend that takes the call; what none takes, "", is torch's to compute or to refuse."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)) or input.dim() == 0 or input.numel() == 0:
        return ""
    if not torch.compiler.is_compiling():
        backends.check(backend)
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return ""
        if input.is_neg() or target.is_neg():  # DLPack does not tell that the values are negated
            return ""
    if has_torch_function_variadic(input, target, weight) or is_dtensor(input, target, weight):
        return ""
    kernels = backends.for_losses(backend, input.device, input.dtype)
    if not kernels:
        return ""
    classes = class_dim(input)
    index_shape = input.shape[:classes] + input.shape[classes + 1 :]
    if target.shape == input.shape:
        fits = target.dtype == input.dtype
    else:
        fits = target.dtype == torch.int64 and target.shape == index_shape
    if weight is not None:
        fits = fits and weight.dtype == input.dtype and weight.shape == (input.shape[classes],)
        fits = fits and weight.device == input.device
        fits = fits and not (torch.is_grad_enabled() and weight.requires_grad)
    fits = (
        fits
        and target.device == input.device
        and input.layout == target.layout == torch.strided
        and reduction in ("none", "mean", "sum")
        and 0.0 <= label_smoothing <= 1.0
    )
    return kernels if fits else ""


def __getattr__(name: str) -> Any:
    return getattr(F, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(F)})
