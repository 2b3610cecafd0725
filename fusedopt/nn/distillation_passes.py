"""The passes of the linear distillation loss over chunks of rows, and how autograd and torch.compile see them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import backends
from fusedopt.nn import chunks, linear_passes
from fusedopt.nn import rows as torch_rows
from fusedopt.nn.chunks import Products
from fusedopt.nn.composed import compute_dtype
from fusedopt.nn.cross_entropy import Rule
from fusedopt.nn.divergence import differentiable, divergence, log_softmax

# Rows of a chunk are taken in blocks of so many float32 bytes: about eight matrices of that size are alive at once.
BLOCK = {"cpu": 1 << 20}
DEVICE_BLOCK = 64 << 20


class Call(NamedTuple):
    """How one call computes, its tensors apart."""

    divergence: str
    beta: float
    temperature: float
    hard_weight: float
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    teacher_softcap: float | None
    teacher_logit_scale: float
    reduction: str
    dtype: torch.dtype  # of the student's product
    teacher_dtype: torch.dtype  # of the teacher's
    chunk_bytes: int
    backend: str

    @property
    def rule(self) -> Rule:
        """Of the hard loss; its softcap and logit_scale are the student's in both."""
        return Rule(None, self.ignore_index, self.label_smoothing, self.z_loss, self.softcap, self.logit_scale)

    @property
    def teacher_rule(self) -> Rule:
        return Rule(softcap=self.teacher_softcap, logit_scale=self.teacher_logit_scale)


class Teacher(NamedTuple):
    """Hidden states and head, or logits."""

    input: Tensor | None  # (N, Ht)
    weight: Tensor | None  # (V, Ht)
    bias: Tensor | None  # (V,)
    logits: Tensor | None  # (N, V)


# --- one block of rows ---


def _kernels(logits: Tensor, backend: str) -> Any:
    name = backends.for_losses(backend, logits.device, logits.dtype)
    return backends.module(name) if name else torch_rows


def _block(
    student: Tensor,  # (n, V), the gradient's place if with_grad
    teacher: Tensor,  # (n, V)
    target: Tensor | None,  # (n,)
    call: Call,
    factor: float | Tensor,
    upstream: Tensor | None,  # (n,)
    loss: Tensor,  # (n,), written
    with_grad: bool,
) -> None:
    """Row losses; the student's logits become their gradient, rounded once."""
    compute = loss.dtype
    s = student.to(compute)
    soft = 1 - call.hard_weight
    grad = None
    loss.zero_()
    if soft:
        seen = torch_rows.scores(s, call.rule)
        log_p = log_softmax(torch_rows.scores(teacher.to(compute), call.teacher_rule), call.temperature)
        log_q = log_softmax(seen, call.temperature)
        rows, grad = divergence(log_p, log_q, call.divergence, call.beta, with_grad)
        loss.add_(rows, alpha=soft * call.temperature**2)
        if target is not None:
            ignored = target == call.ignore_index
            loss.masked_fill_(ignored, 0)
            if grad is not None:
                grad.masked_fill_(ignored[:, None], 0)
        if grad is not None:
            grad.mul_(factor * (soft * call.temperature * call.logit_scale))
            if call.softcap is not None:
                grad.mul_((seen / call.softcap).square_().neg_().add_(1))
    if call.hard_weight:
        rows, lse = torch.empty_like(loss), torch.empty_like(loss)
        hard = s if with_grad else None  # over the logits, which nobody reads any more
        _kernels(s, call.backend).cross_entropy_forward(
            s, target, call.rule, hard, factor * call.hard_weight, rows, lse
        )
        loss.add_(rows, alpha=call.hard_weight)
        grad = hard if grad is None else grad.add_(hard)
    if with_grad:
        student.copy_(grad if upstream is None else grad.mul_(upstream[:, None]))


# --- all rows ---


@linear_passes.without_autocast
def walk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Teacher,
    target: Tensor | None,
    call: Call,
    needs: tuple[bool, bool, bool],
    upstream: Tensor | None = None,  # (N,)
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], float | Tensor]:
    """Row losses (N,), the gradients of their sum times the mean's factor, and a factor that those still lack."""
    compute = torch.promote_types(compute_dtype(call.dtype), compute_dtype(call.teacher_dtype))
    factor, keep = _factor(x, weight.shape[0], target, call), None
    if target is not None and target.device.type == "cpu":
        keep = (target != call.ignore_index).nonzero()[:, 0]
        keep = None if keep.shape[0] == target.shape[0] else keep
    counting = target if keep is None else target.index_select(0, keep)
    late = call.dtype == torch.float16 and upstream is None
    n, classes = x.shape[0] if keep is None else keep.shape[0], weight.shape[0]
    row_bytes = classes * (call.dtype.itemsize + call.teacher_dtype.itemsize)
    row_bytes += 2 * (x.shape[1] + (0 if teacher.input is None else teacher.input.shape[1])) * call.dtype.itemsize
    chunk = chunks.rows_per_chunk(n, row_bytes, call.chunk_bytes, None)
    student = Products(x, weight, bias, call.dtype, keep=keep, chunk=chunk, needs=needs, wide=late)
    if teacher.logits is None:
        taught = Products(teacher.input, teacher.weight, teacher.bias, call.teacher_dtype, keep=keep, chunk=chunk)
    loss = torch.empty(n, dtype=compute, device=x.device)
    upstream = upstream if upstream is None or keep is None else upstream.index_select(0, keep)
    block = max(1, BLOCK.get(x.device.type, DEVICE_BLOCK) // (4 * classes))
    for rows in student.chunks():
        s = student.logits(rows)
        if teacher.logits is None:
            t = taught.logits(rows)
        else:
            t = teacher.logits[rows] if keep is None else teacher.logits.index_select(0, keep[rows])
        for part in range(0, len(s), block):
            at = slice(part, part + block)
            of_all = slice(rows.start + part, min(rows.stop, rows.start + part + block))
            _block(
                s[at], t[at], None if counting is None else counting[of_all], call, 1.0 if late else factor,
                None if upstream is None else upstream[of_all], loss[of_all], any(needs),
            )  # fmt: skip
        if any(needs):
            student.accumulate(rows, s)
    if keep is not None:
        loss = loss.new_zeros(x.shape[0]).index_copy_(0, keep, loss)
    return loss, student.gradients(), factor if late else 1.0


def _factor(x: Tensor, classes: int, target: Tensor | None, call: Call) -> float | Tensor:
    """What the sum of the row losses is multiplied by. Checks the targets' range before all else, on the CPU."""
    if target is not None:
        return linear_passes.target_factor(
            target, call.rule, classes, call.reduction == "mean", call.dtype, call.backend
        )
    if call.reduction != "mean":
        return 1.0
    return 1.0 / len(x) if len(x) else float("nan")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, target: Tensor | None, call: Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], float | Tensor]:  # fmt: skip
    """The loss, and for "mean" and "sum" the gradients that are needed, less a factor."""
    if call.reduction == "none":
        return walk(x, weight, bias, teacher, target, call, (False, False, False))[0], (None, None, None), 1.0
    rows, gradients, scale = walk(x, weight, bias, teacher, target, call, needs)
    factor = _factor(x, weight.shape[0], target, call)
    return (rows.sum(dtype=torch.float64) * factor).to(rows.dtype), gradients, scale


def backward(
    upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, target: Tensor | None,
    call: Call, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients for reduction "none", from logits that are made again."""
    return walk(x, weight, bias, teacher, target, call, needs, upstream.contiguous())[1]


def composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, target: Tensor | None, call: Call
) -> Tensor:
    """The loss from whole logits, by torch's operations, which differentiate it any number of times."""
    compute = torch.promote_types(compute_dtype(call.dtype), compute_dtype(call.teacher_dtype))
    s = _linear(x, weight, bias, call.dtype).to(compute)
    t = teacher.logits
    if t is None:
        t = _linear(teacher.input, teacher.weight, teacher.bias, call.teacher_dtype)
    p_scores = torch_rows.scores(t.detach().to(compute), call.teacher_rule)
    q_scores = torch_rows.scores(s, call.rule)
    rows = differentiable(p_scores, q_scores, call.temperature, call.divergence, call.beta)
    counts = torch.ones_like(rows, dtype=torch.bool) if target is None else target != call.ignore_index
    rows = (rows * ((1 - call.hard_weight) * call.temperature**2)).where(counts, 0)
    if call.hard_weight:
        rows = rows + call.hard_weight * torch_rows.reference_loss(s, target, call.rule, "none")
    if call.reduction == "none":
        return rows
    return rows.sum() / counts.sum() if call.reduction == "mean" else rows.sum()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# --- for autograd ---


class LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, target: Tensor | None,
        *teacher: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.call, ctx.needs = call, tuple(ctx.needs_input_grad[:3])
        loss, ctx.gradients, ctx.scale = forward(x, weight, bias, Teacher(*teacher), target, call, ctx.needs)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        if any(ctx.needs):
            ctx.save_for_backward(x, weight, bias, target, *teacher)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        others = (None,) * 6
        if torch.is_grad_enabled():  # create_graph
            x, weight, bias, target, *teacher = ctx.saved_tensors
            loss = composed(x, weight, bias, Teacher(*teacher), target, ctx.call)
            inputs = [t for t, need in zip((x, weight, bias), ctx.needs, strict=True) if need]
            found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs), *others
        if ctx.call.reduction == "none":
            x, weight, bias, target, *teacher = ctx.saved_tensors
            return *backward(upstream, x, weight, bias, Teacher(*teacher), target, ctx.call, ctx.needs), *others
        return *linear_passes.deliver(ctx, upstream), *others


# --- for torch.compile: opaque operators, with their shapes ---


@torch.library.custom_op("fusedopt::linear_distillation", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    upstream: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    reduction: str,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    chunk_bytes: int,
    backend: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; gradients of x, weight and bias, and their scale. Empty where not needed; "none" needs an upstream."""
    call = Call(
        divergence, beta, temperature, hard_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
        teacher_softcap, teacher_logit_scale, reduction, dtype, teacher_dtype, chunk_bytes, backend,
    )  # fmt: skip
    teacher = Teacher(teacher_input, teacher_weight, teacher_bias, teacher_logits)
    needs = (need_x, need_weight, need_bias)
    if upstream is None:
        loss, gradients, scale = forward(x, weight, bias, teacher, target, call, needs)
    else:
        loss, scale = upstream.new_empty(()), 1.0
        gradients = backward(upstream, x, weight, bias, teacher, target, call, needs)
    scale = torch.as_tensor(scale, dtype=compute_dtype(dtype), device=x.device)
    return loss.clone(), *(x.new_empty(0) if g is None else g for g in gradients), scale.clone()


@_op.register_fake
def _(x, weight, bias, target, teacher_input, teacher_weight, teacher_bias, teacher_logits, upstream,
      *options):  # type: ignore[no-untyped-def]  # fmt: skip
    *_, reduction, dtype, teacher_dtype, _, _ = options[:-3]
    needs = options[-3:]
    compute = torch.promote_types(compute_dtype(dtype), compute_dtype(teacher_dtype))
    rows = () if reduction != "none" or upstream is not None else x.shape[:1]
    made = reduction != "none" or upstream is not None
    wide = torch.float32 if dtype == torch.float16 and upstream is None else None
    gradients = [
        torch.empty_like(t, dtype=d) if need and made else x.new_empty(0)
        for t, need, d in zip((x, weight, bias), needs, (None, wide, wide), strict=True)
    ]
    return x.new_empty(rows, dtype=compute), *gradients, x.new_empty((), dtype=compute_dtype(dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[9:]
    ctx.at_forward = ctx.options[Call._fields.index("reduction")] != "none"
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*(output[1:] if ctx.at_forward else inputs[:8]))


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.at_forward:
        *gradients, scale = ctx.saved_tensors
        # a tensor of no dimension alone would be rounded to the gradient's dtype
        gradients = [g.to(scale.dtype) * (upstream * scale) for g in gradients]
    else:
        _, *gradients, _ = torch.ops.fusedopt.linear_distillation(*ctx.saved_tensors, upstream, *ctx.options)
    needs = ctx.options[-3:]
    gradients = [g.to(d) if need else None for g, d, need in zip(gradients, ctx.dtypes, needs, strict=True)]
    return *gradients, *(None for _ in range(6 + len(ctx.options)))


_op.register_autograd(_op_backward, setup_context=_setup_context)


def apply_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, target: Tensor | None, *teacher: Tensor | None
) -> Tensor:
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    return torch.ops.fusedopt.linear_distillation(x, weight, bias, target, *teacher, None, *call, *needs)[0]
