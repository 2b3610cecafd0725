"""Distillation through a linear layer: the divergence of a student from a teacher, logits a chunk of rows at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fusedopt import backends
from fusedopt.nn import chunks
from fusedopt.nn import divergence as divergences
from fusedopt.nn.cross_entropy import check_extras
from fusedopt.nn.distillation_passes import Call, LinearDistillation, Teacher, apply_op, composed
from fusedopt.nn.linear import DTYPES, product_dtype


def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """How far a student's predictions are from a teacher's, and from the labels; neither's logits are ever whole.

        s = softcap tanh(logit_scale (input @ linear_weight.T + linear_bias) / softcap)     q = softmax(s / temperature)
        t = the teacher's likewise, with its own softcap and scale                          p = softmax(t / temperature)
        loss = (1 - hard_weight) temperature^2 D(p, q)
               + hard_weight (cross_entropy(s, target) + z_loss logsumexp(s)^2)

        D = KL(p || q)                                   "forward_kl"
            KL(q || p)                                   "reverse_kl"
            beta KL(p || m) + (1 - beta) KL(q || m),     "jsd"
            where m = beta p + (1 - beta) q

    The square of the temperature keeps the gradient's size, as in Hinton et al.; Liger's losses leave it out.

    The rows are walked in chunks, with the memory of `fusedopt.nn.functional.linear_cross_entropy` and the teacher's
    logits beside the student's. For "mean" and "sum" the gradients of input, weight and bias are made during forward;
    "none" makes the logits again in backward. The teacher gets no gradient. Rows with target `ignore_index` count
    neither in the divergence nor in the mean, and on the CPU take part in no product.

    Args:
        input (Tensor): the student's hidden states (..., H), float32, bfloat16, float16 or float64.
        linear_weight (Tensor): the student's head (V, H), in input's dtype.
        teacher_input (Tensor): the teacher's hidden states (..., Ht), of the same rows.
        teacher_weight (Tensor): the teacher's head (V, Ht), in teacher_input's dtype.
        target (Tensor): int64 class indices (...): labels, and which rows count. None: all rows count.
        linear_bias, teacher_bias (Tensor): (V).
        teacher_logits (Tensor): (..., V) in place of teacher_input and teacher_weight. -inf is allowed.
        divergence (str): "forward_kl", "reverse_kl" or "jsd".
        beta (float): the teacher's share of the mixture m, in (0, 1); for "jsd" only.
        temperature (float): above 0.
        hard_weight (float): share of the labels' cross entropy, in [0, 1].
        ignore_index (int): targets that add neither loss nor gradient.
        label_smoothing (float): of the labels, in [0, 1].
        z_loss (float): factor of the squared log-sum-exp, a part of the hard loss.
        softcap, teacher_softcap (float): bound of the logits, by tanh; of given teacher_logits too.
        logit_scale, teacher_logit_scale (float): factor of the logits, before the softcap.
        reduction (str): "mean" (over the rows that count), "sum" or "none".
        chunk_bytes (int): what the logits of a chunk, both sides', may take: by default 64 MiB on the CPU and 1 GiB on
            other devices.
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (PyTorch's operations, whole logits).

    Returns:
        The loss: a scalar, or of shape (...) for "none"; float32 (float64 for float64 logits).

    Raises:
        ValueError: a number is out of its range, or a name unknown; the teacher is given twice, or not at all.
        TypeError: z_loss, a softcap or a scale is no number.
        RuntimeError: shapes, dtypes or devices do not go together.
        IndexError: a target outside [0, V) that is not ignore_index, on the CPU. Nothing has been computed by then.

    Source: Hinton, Vinyals & Dean 2015 (forward KL, temperature); Gu et al. 2024 (MiniLLM: reverse KL); Agarwal et al.
    2024 (GKD: generalised JSD).
    """
    tensors = (input, linear_weight, teacher_input, teacher_weight, target, linear_bias, teacher_bias, teacher_logits)
    if has_torch_function(tuple(t for t in tensors if t is not None)):
        return handle_torch_function(
            linear_distillation, tuple(t for t in tensors if t is not None),
            input, linear_weight, teacher_input, teacher_weight, target, linear_bias=linear_bias,
            teacher_bias=teacher_bias, teacher_logits=teacher_logits, divergence=divergence, beta=beta,
            temperature=temperature, hard_weight=hard_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale,
            teacher_softcap=teacher_softcap, teacher_logit_scale=teacher_logit_scale, reduction=reduction,
            chunk_bytes=chunk_bytes, backend=backend,
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        backends.check(backend)
    check_options(divergence, beta, temperature, hard_weight, label_smoothing, reduction)
    check_extras(z_loss, softcap, logit_scale)
    check_extras(0.0, teacher_softcap, teacher_logit_scale, prefix="teacher_")
    student_dtype = product_dtype(input)
    teacher_dtype = teacher_logits.dtype if teacher_input is None and teacher_logits is not None else student_dtype
    if teacher_input is not None:
        teacher_dtype = product_dtype(teacher_input)
    _check(*tensors, hard_weight)

    x = input.reshape(-1, input.shape[-1])

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1, tensor.shape[-1])

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()

    teacher = Teacher(rows(teacher_input), constant(teacher_weight), constant(teacher_bias), rows(teacher_logits))
    flat = None if target is None else target.reshape(-1)
    call = Call(
        divergence, beta, temperature, hard_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
        teacher_softcap, teacher_logit_scale, reduction, student_dtype, teacher_dtype,
        chunk_bytes or chunks.budget(x.device), backend,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        loss = apply_op(x, linear_weight, linear_bias, call, flat, *teacher)
    elif backend == "reference" or not _walkable(tensors):
        loss = composed(x, linear_weight, linear_bias, teacher, flat, call)
    else:
        loss = LinearDistillation.apply(x, linear_weight, linear_bias, call, flat, *teacher)
    return loss.reshape(input.shape[:-1]) if reduction == "none" else loss


class LinearDistillationLoss(torch.nn.Module):
    """`fusedopt.nn.functional.linear_distillation` as a module, which holds its options and no parameters.

    Args: divergence, beta, temperature, hard_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
    teacher_softcap, teacher_logit_scale, reduction, chunk_bytes and backend of the function.

    Shape: `loss(input, linear_weight, teacher_input, teacher_weight, target=None, *, linear_bias=None,
    teacher_bias=None, teacher_logits=None)` as the function's; output a scalar, or (...) for reduction "none".

    Raises:
        ValueError: a number is out of its range, or a name unknown.
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        reduction: str = "mean",
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(divergence, beta, temperature, hard_weight, label_smoothing, reduction)
        check_extras(z_loss, softcap, logit_scale)
        check_extras(0.0, teacher_softcap, teacher_logit_scale, prefix="teacher_")
        self.options = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "hard_weight": hard_weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "teacher_softcap": teacher_softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "reduction": reduction,
            "chunk_bytes": chunk_bytes,
            "backend": backends.check(backend),
        }

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_input: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        target: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor:
        return linear_distillation(
            input, linear_weight, teacher_input, teacher_weight, target, **tensors, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _walkable(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are ordinary tensors that no transform looks inside; others are computed with whole logits."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)  # not DTensor, ...


# --- what is refused ---


def check_options(
    divergence: str, beta: float, temperature: float, hard_weight: float, label_smoothing: float, reduction: str
) -> None:
    """Raise ValueError unless a distillation can be told so."""
    if divergence not in divergences.NAMES:
        raise ValueError(f"divergence={divergence!r} is not one of {', '.join(map(repr, divergences.NAMES))}")
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta={beta} must be in (0, 1); at its ends the divergence is a KL: name that")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be finite and above 0")
    for name, share in (("hard_weight", hard_weight), ("label_smoothing", label_smoothing)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name}={share} must be in [0, 1]")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")


def _check(
    x: Tensor, weight: Tensor, teacher_x: Tensor | None, teacher_weight: Tensor | None, target: Tensor | None,
    bias: Tensor | None, teacher_bias: Tensor | None, teacher_logits: Tensor | None, hard_weight: float,
) -> None:  # fmt: skip
    if (teacher_logits is None) == (teacher_x is None and teacher_weight is None):
        raise ValueError("give the teacher either as teacher_input and teacher_weight, or as teacher_logits")
    if teacher_logits is None and (teacher_x is None or teacher_weight is None):
        raise ValueError("teacher_input and teacher_weight go together")
    if teacher_logits is not None and teacher_bias is not None:
        raise ValueError("teacher_bias belongs to teacher_weight; teacher_logits have it in them")
    if hard_weight and target is None:
        raise ValueError(f"hard_weight={hard_weight} needs a target")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"expected input (..., H) and linear_weight (V, H), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    rows, classes = tuple(x.shape[:-1]), weight.shape[0]
    if classes == 0:
        raise RuntimeError("expected at least one class")
    expected = {"linear_bias": (bias, (classes,)), "teacher_bias": (teacher_bias, (classes,))}
    expected |= {"teacher_logits": (teacher_logits, (*rows, classes)), "target": (target, rows)}
    if teacher_x is not None and teacher_weight is not None:
        expected["teacher_input"] = (teacher_x, (*rows, teacher_x.shape[-1] if teacher_x.dim() else 0))
        expected["teacher_weight"] = (teacher_weight, (classes, teacher_x.shape[-1] if teacher_x.dim() else 0))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise RuntimeError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"expected {name} on {x.device}, as input is, got {tensor.device}")
    if target is not None and target.dtype != torch.int64:
        raise RuntimeError(f"expected target of class indices in torch.int64, got {target.dtype}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for first, others in ((x, (weight, bias)), (teacher_x, (teacher_weight, teacher_bias))):
        for other in others:
            if other is not None and ((other.dtype != first.dtype and not autocast) or other.dtype not in DTYPES):
                raise RuntimeError(f"expected one floating dtype, got {first.dtype} and {other.dtype}")
    if teacher_logits is not None and teacher_logits.dtype not in DTYPES:
        raise RuntimeError(f"expected teacher_logits of a floating dtype, got {teacher_logits.dtype}")
