"""Linear cross entropy: a linear layer and its loss together, the logits a chunk of rows at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedopt import backends
from fusedopt.nn import chunks, linear_op
from fusedopt.nn import rows as torch_rows
from fusedopt.nn.composed import compute_dtype, sharded_classes
from fusedopt.nn.cross_entropy import Rule, Stats
from fusedopt.nn.linear_passes import Call, LinearCrossEntropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
    tp_group: Any = None,
    vocab_range: tuple[int, int] | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    """Same as `torch.nn.functional.linear_cross_entropy`, but the logits are never whole in memory.

        loss = cross_entropy(softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap), target)
               + z_loss * logsumexp^2

    The rows are walked in chunks. For "mean" and "sum" the gradients of input, weight and bias are made during forward,
    from each chunk's logits while they are there, and backward multiplies them by the upstream gradient; "none" makes
    the logits of each chunk again in backward. What is taken beyond the gradients themselves is `chunk_bytes`, a
    float32 copy of the weight's gradient where that has 16 bits and there is more than one chunk (there is one where
    its logits take no more than both), and under autocast the weight in its dtype. The weight's gradient is summed over
    the chunks in float32. What needs no gradient costs no product, and on the CPU rows with target `ignore_index` take
    part in none.

    In float16 the gradients are kept as for "sum", the weight's in float32, and divided by the mean's denominator when
    the upstream gradient, with GradScaler's scale in it, has come: 1 / N alone would underflow.

    The classes may lie on several ranks: `linear_weight` and `linear_bias` are DTensors sharded over them (dimension 0)
    by one dimension of a mesh, and `input` and `target` plain or replicated DTensors; or all are plain tensors, and
    `tp_group` and `vocab_range` say which classes this rank's weight and bias hold. Each rank gives the same input, all
    targets and all of `weight`, and gets the whole loss (a DTensor if linear_weight is one). Forward takes one
    all-gather of 2 float32 a row, as `cross_entropy` there; backward one all-reduce of the input's gradient, in its
    dtype. The gradient waits for that all-gather, so the logits of all chunks but the last are made again: with k
    chunks, 2 N H V (k - 1) / k flops more than the 6 N H V of one, V the classes of a rank.

    Args:
        input (Tensor): (H), (N, H) or (..., H), float32, bfloat16, float16 or float64.
        linear_weight (Tensor): (V, H), or (V, d1, ..., H) with an input (N, H), in input's dtype.
        target (Tensor): int64 class indices (), (N) or (...), or probabilities (..., V); with d1, ... as in torch.
        linear_bias (Tensor): (V), or (V, d1, ...).
        weight (Tensor): per class (V).
        reduction (str): "none", "mean" or "sum".
        ignore_index (int): class index that adds neither loss nor gradient; None means -100.
        label_smoothing (float): in [0, 1].
        options (torch.nn.LinearCrossEntropyOptions): of it `batch_chunk_size`, the most rows of a chunk, is obeyed.
        z_loss (float): factor of the squared log-sum-exp.
        softcap (float): bound of the logits, by tanh.
        logit_scale (float): factor of the logits, before the softcap.
        return_stats (bool): return `(loss, Stats(lse, argmax, correct, entropy))`, from the same pass.
        tp_group (ProcessGroup), vocab_range ((int, int)): the ranks that hold the classes, and this rank's first class
            and the one past its last; see `cross_entropy`.
        chunk_bytes (int): what a chunk's logits, and what is computed beside them, may take: by default 64 MiB on the
            CPU and 1 GiB on other devices, see fusedopt/nn/chunks.py.
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (PyTorch's kernels, whole logits).

    Returns:
        The loss: a scalar, or of the index target's shape for "none"; float32 (float64 for float64 logits). Under
        autocast the logits have autocast's dtype.

    Raises:
        IndexError: a target outside [0, V) that is not ignore_index, on the CPU; nothing has been computed.
        TypeError, ValueError, RuntimeError: tp_group and vocab_range as for `cross_entropy`.
        What torch raises, for everything else that it raises on.

    Source: `torch.nn.functional.linear_cross_entropy` (torch >= 2.12); Zhang et al. 2017 for the chunks, z_loss as in
    PaLM (Chowdhery et al. 2022), softcap as in Gemma 2.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options, z_loss=z_loss,
            softcap=softcap, logit_scale=logit_scale, return_stats=return_stats, tp_group=tp_group,
            vocab_range=vocab_range, chunk_bytes=chunk_bytes, backend=backend,
        )  # fmt: skip
    _check(input, linear_weight, target, linear_bias, ignore_index)
    if not torch.compiler.is_compiling():
        backends.check(backend)
    ignore = -100 if ignore_index is None else ignore_index
    dtype = product_dtype(input)
    rule = Rule(weight, ignore, label_smoothing, z_loss, softcap, logit_scale)
    call = Call(
        rule,
        reduction,
        dtype,
        chunk_bytes or chunks.budget(input.device),
        getattr(options, "batch_chunk_size", None),
        return_stats,
        backend,
    )
    if tp_group is not None or vocab_range is not None or sharded_classes(linear_weight, 0):
        from fusedopt.distributed import vocab_linear  # torch may have been built without torch.distributed

        return vocab_linear.linear_cross_entropy(input, linear_weight, target, linear_bias, call, tp_group, vocab_range)
    tensors = (input, linear_weight, target, linear_bias, weight)
    if backend == "reference" or reduction not in ("none", "mean", "sum") or not _fusable(*tensors, dtype, rule):
        return _whole(input, linear_weight, target, linear_bias, rule, reduction, return_stats)

    classes = linear_weight.shape[0]
    index_shape = input.shape[:-1]
    x = input.reshape(-1, input.shape[-1])
    flat = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    scale = None if weight is None else weight.detach().to(compute_dtype(dtype)).contiguous()
    call = call._replace(rule=rule._replace(weight=scale))
    apply = linear_op.apply if torch.compiler.is_compiling() else LinearCrossEntropy.apply
    loss, *stats = apply(x, linear_weight, linear_bias, flat, call)
    loss = loss.reshape(index_shape) if reduction == "none" else loss
    return (loss, Stats(*(s.reshape(index_shape) for s in stats))) if return_stats else loss


class LinearCrossEntropyLoss(getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.modules.loss._WeightedLoss)):
    """Same as `torch.nn.LinearCrossEntropyLoss`, but the logits are never whole in memory; see
    `fusedopt.nn.functional.linear_cross_entropy`.

    Args: those of `torch.nn.LinearCrossEntropyLoss`, and of the function: z_loss, softcap, logit_scale, return_stats,
    tp_group, vocab_range, chunk_bytes, backend. With a vocab_range (first, last) the layer holds these of num_classes.

    Shape: input (H), (N, H) or (..., H); target as the function's; output a scalar, or the index target's shape for
    reduction "none"; with return_stats the pair of it and Stats.

    Source: `torch.nn.LinearCrossEntropyLoss` (torch >= 2.12; here with every torch).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        return_stats: bool = False,
        tp_group: Any = None,
        vocab_range: tuple[int, int] | None = None,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        # not the namesake's own __init__, which older torch has not; what it sets is set here
        torch.nn.modules.loss._WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        if vocab_range is not None and not 0 <= vocab_range[0] <= vocab_range[1] <= num_classes:
            raise ValueError(
                f"vocab_range={vocab_range} must be (first, last) with 0 <= first <= last <= {num_classes}"
            )
        self.held = num_classes if vocab_range is None else vocab_range[1] - vocab_range[0]
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=self.held), bias=bias, device=device, dtype=dtype
        )
        self.options = options
        self.extras = {
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "return_stats": return_stats,
            "tp_group": tp_group,
            "vocab_range": vocab_range,
            "chunk_bytes": chunk_bytes,
            "backend": backends.check(backend),
        }

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Stats]:
        head, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            head = head.unflatten(0, (self.held, *self.out_features))
            bias = None if bias is None else bias.unflatten(0, (self.held, *self.out_features))
        return linear_cross_entropy(
            input,
            head,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.extras,
        )


# --- what the fused path takes ---


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check(input: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int | None) -> None:
    """torch's own checks, in torch's words, and no more of them."""
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality at least 1, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    out_shape = tuple(linear_weight.shape[:-1])
    if bias is not None and tuple(bias.shape) != out_shape:
        raise RuntimeError(f"expected linear_bias shape {out_shape}, got {tuple(bias.shape)}")
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got input with shape {tuple(input.shape)}"
        )
    if target.shape == (*input.shape[:-1], *out_shape) and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")


def _fusable(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, dtype: torch.dtype,
    rule: Rule,
) -> bool:  # fmt: skip
    """Whether the chunks can be walked; what they cannot is computed with whole logits, or refused, by torch."""
    given = [t for t in (x, linear_weight, target, bias, weight) if t is not None]
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return False
        if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg() for t in given):  # DTensor, ...
            return False
    if any(t.device != x.device or t.layout != torch.strided for t in given) or linear_weight.dim() != 2:
        return False
    classes = linear_weight.shape[0]
    if target.shape == (*x.shape[:-1], classes):
        fits = target.is_floating_point()
    else:
        fits = target.dtype == torch.int64 and target.shape == x.shape[:-1]
    products = [x, linear_weight] if bias is None else [x, linear_weight, bias]
    same = all(t.dtype == dtype for t in products)
    if torch.is_autocast_enabled(x.device.type):
        same = all(t.dtype in DTYPES and (t.dtype == torch.float64) == (dtype == torch.float64) for t in products)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (target, weight))
    return (
        fits
        and same
        and not differentiable
        and dtype in DTYPES
        and min(classes, x.shape[-1]) > 0
        and (weight is None or (weight.is_floating_point() and weight.shape == (classes,)))
        and 0.0 <= rule.label_smoothing <= 1.0
    )


def _whole(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, rule: Rule, reduction: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, Stats]:  # fmt: skip
    """The loss from whole logits by torch's operations, which differentiate everything, or refuse the call."""
    classes, *inner = linear_weight.shape[:-1]
    logits = torch.nn.functional.linear(x, linear_weight.flatten(0, -2), None if bias is None else bias.flatten())
    logits = logits.unflatten(-1, (classes, *inner))
    class_dim = x.dim() - 1
    probabilities = target.shape == logits.shape
    index_shape = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if not probabilities and target.shape != index_shape:
        raise RuntimeError(
            f"expected target of shape {tuple(index_shape)} (class indices) or {tuple(logits.shape)} (probabilities), "
            f"got {tuple(target.shape)}"
        )
    flat = logits.movedim(class_dim, -1).reshape(-1, classes)
    target = target.movedim(class_dim, -1).reshape(-1, classes) if probabilities else target.reshape(-1)
    loss = torch_rows.reference_loss(flat, target, rule, reduction)
    loss = loss.reshape(index_shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    with torch.no_grad():
        stats = torch_rows.reference_stats(flat, target, rule)
    return loss, Stats(*(s.reshape(index_shape) for s in stats))
