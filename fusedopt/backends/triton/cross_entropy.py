"""Cross entropy on rows of logits: one program per row, which it reads once or, for its gradient, twice.

Rows of any length and at any address are read in whole 16-byte vectors, less the ragged ends: nothing is compiled anew
for another shape, only for another power of two that covers a row, up to the largest block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt.backends.triton.options import options
from fusedopt.backends.triton.softmax import absorb, dense_targets, nothing, scaled

_RUN_TIME = [
    *("logits", "target", "weight", "grad", "rows", "lse", "argmax", "correct", "entropy", "upstream", "factor"),
    *("logits_stride", "target_stride", "grad_stride", "classes", "ignore_index"),
    *("keep", "spread", "z_loss", "softcap", "logit_scale"),
]


@triton.jit
def _extent(x, classes, ALIGNED: tl.constexpr):
    """A row's elements before its first 16-byte boundary, and in whole vectors behind it."""
    SIZE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // SIZE
    head = 0
    if ALIGNED:
        past = (x.to(tl.int64) % 16).to(tl.int32)
        head = tl.minimum((16 - past) % 16 // SIZE, classes)
    return head, tl.multiple_of((classes - head) // VECTOR * VECTOR, VECTOR)


@triton.jit
def _from(pointer, head, ALIGNED: tl.constexpr):
    pointer += head
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # said of the pointer itself, or every element is loaded alone
    return pointer


@triton.jit
def _edges(x, head, body, classes):
    """Columns of the ragged ends, and which of them there are."""
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    i = tl.arange(0, 2 * VECTOR)
    cols = tl.where(i < VECTOR, i, head + body + i - VECTOR)
    return cols, tl.where(i < VECTOR, i < head, cols < classes)


@triton.jit
def _label(target, weight, row, classes, ignore_index, keep):
    """A row's class or -1, what y is there beyond its dense part, and whether the row counts or is ignored.

    NaN where there is no such class: it makes the row's loss and gradient NaN.
    """
    label = tl.load(target + row)
    counts = label != ignore_index
    valid = counts & (label >= 0) & (label < classes)
    hot = tl.where(valid, keep, tl.where(counts, float("nan"), 0.0))
    if weight is not None:
        hot *= tl.load(weight + label, valid, other=1.0)
    return tl.where(valid, label, -1).to(tl.int32), hot, counts


@triton.jit
def _sum_targets(mass, probabilities, weight, head, body, keep, spread, BLOCK: tl.constexpr):
    for begin in range(0, body, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        y, _ = dense_targets(probabilities, weight, at, head + at, at < body, keep, spread)
        mass += tl.sum(y, 0)
    return mass


@triton.jit
def _read_tile(
    sums,
    x,
    probabilities,
    weight,
    at,
    mask,
    head,  # the row's column at x
    keep,
    spread,
    softcap,
    logit_scale,
    DENSE: tl.constexpr,
    STATS: tl.constexpr,
):
    s, _ = scaled(tl.load(x + at, mask, other=0.0, eviction_policy="evict_last").to(tl.float32), logit_scale, softcap)
    y, t = dense_targets(probabilities, weight, at, head + at, mask, keep, spread)
    return absorb(sums, s, y, t, head + at, mask, DENSE, STATS and probabilities is not None, STATS)


@triton.jit
def _write_tile(
    x,
    grad,
    probabilities,
    weight,
    at,
    mask,
    head,  # the row's column at x
    label,
    hot,
    shift,
    scale,
    factor,
    keep,
    spread,
    softcap,
    logit_scale,
    DENSE: tl.constexpr,
):
    """grad = (scale * exp(s - shift) - factor * y) * ds/dx"""
    values = tl.load(x + at, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    s, slope = scaled(values, logit_scale, softcap)
    y = tl.where(head + at == label, hot, 0.0)
    if DENSE:
        dense, _ = dense_targets(probabilities, weight, at, head + at, mask, keep, spread)
        y += dense
    g = (scale * tl.exp(s - shift) - factor * y) * slope
    tl.store(grad + at, g.to(grad.dtype.element_ty), mask, eviction_policy="evict_first")


@triton.jit
def _write_gradient(
    x,
    grad,
    probabilities,
    weight,
    classes,
    label,
    hot,
    counts,
    shift,
    scale,
    factor,
    keep,
    spread,
    softcap,
    logit_scale,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's gradient, which may lie over its logits. Backwards: the end of the row was read last."""
    head, body = _extent(x, classes, ALIGNED)
    last = (body - 1) // BLOCK * BLOCK
    x_body, grad_body = _from(x, head, ALIGNED), _from(grad, head, ALIGNED)
    probabilities_body = None if probabilities is None else _from(probabilities, head, ALIGNED)
    for begin in range(0, tl.where(counts, body, 0), BLOCK):
        at = last - begin + tl.arange(0, BLOCK)
        # fmt: off
        _write_tile(x_body, grad_body, probabilities_body, weight, at, at < body, head, label,
                    hot, shift, scale, factor, keep, spread, softcap, logit_scale, DENSE)
        # fmt: on
    for begin in range(0, tl.where(counts, 0, body), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(grad_body + at, tl.zeros([BLOCK], grad.dtype.element_ty), at < body)
    cols, mask = _edges(x, head, body, classes)
    # fmt: off
    _write_tile(x, grad, probabilities, weight, cols, mask & counts, 0, label,
                hot, shift, scale, factor, keep, spread, softcap, logit_scale, DENSE)
    # fmt: on
    tl.store(grad + cols, tl.zeros_like(cols).to(grad.dtype.element_ty), mask & (counts == 0))


@triton.jit(do_not_specialize=_RUN_TIME)
def forward(
    logits,  # (N, V)
    target,  # (N,) int64, or (N, V) probabilities
    weight,  # (V,) float32 or None
    grad,  # (N, V) or None; may be logits
    rows,  # (N,) float32
    lse,  # (N,) float32
    argmax,  # (N,) int64 or None
    correct,  # (N,) uint8 or None
    entropy,  # (N,) float32 or None
    factor,  # float, or a pointer to one
    logits_stride,
    target_stride,
    grad_stride,
    classes,
    ignore_index,
    keep,
    spread,
    z_loss,
    softcap,  # None: not capped
    logit_scale,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    STATS: tl.constexpr = argmax is not None
    DENSE: tl.constexpr = PROBABILITIES or SMOOTHED
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    if PROBABILITIES:
        probabilities = target + row * target_stride
        label, hot, counts = -1, 0.0, tl.program_id(0) >= 0
        at_label = 0.0
    else:
        probabilities = None
        label, hot, counts = _label(target, weight, row, classes, ignore_index, keep)
        at_label, _ = scaled(tl.load(x + label, label >= 0, other=0.0).to(tl.float32), logit_scale, softcap)

    # an ignored row is read for its statistics only
    head, body = _extent(x, classes, ALIGNED)
    x_body = _from(x, head, ALIGNED)
    probabilities_body = None if probabilities is None else _from(probabilities, head, ALIGNED)
    cols, mask = _edges(x, head, body, classes)
    whole = body
    if not STATS:
        mask &= counts
        whole = tl.where(counts, body, 0)
    sums = nothing()
    # fmt: off
    sums = _read_tile(sums, x, probabilities, weight, cols, mask, 0,
                      keep, spread, softcap, logit_scale, DENSE, STATS)
    for begin in range(0, whole, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        sums = _read_tile(sums, x_body, probabilities_body, weight, at, at < body, head,
                          keep, spread, softcap, logit_scale, DENSE, STATS)
    # fmt: on
    largest, index, total, mass, dot, moment, likeliest, _ = sums

    log_total = tl.log(total)
    lse_row = largest + log_total
    mass += hot
    if not PROBABILITIES:
        dot += hot * (at_label - largest)
    loss = mass * log_total - dot + z_loss * lse_row * lse_row
    tl.store(rows + row, tl.where(counts, loss, 0.0))
    tl.store(lse + row, lse_row if STATS else tl.where(counts, lse_row, 0.0))
    if STATS:
        tl.store(argmax + row, index.to(tl.int64))
        tl.store(correct + row, (index == (likeliest if PROBABILITIES else label)).to(tl.uint8))
        tl.store(entropy + row, log_total - moment / total)
    if grad is not None:
        tl.debug_barrier()  # the gradient may lie over the logits: all warps must have read them
        weighed = tl.load(factor).to(tl.float32) if FACTOR_ON_DEVICE else factor
        scale = weighed * (mass + 2 * z_loss * lse_row) / total
        # fmt: off
        _write_gradient(x, grad + row * grad_stride, probabilities, weight, classes, label, hot, counts,
                        largest, scale, weighed, keep, spread, softcap, logit_scale, DENSE, ALIGNED, BLOCK)
        # fmt: on


@triton.jit(do_not_specialize=_RUN_TIME)
def backward(
    logits,  # (N, V)
    target,  # (N,) int64, or (N, V) probabilities
    weight,  # (V,) float32 or None
    grad,  # (N, V); may be logits
    upstream,  # (N,) float32 or None
    lse,  # (N,) float32
    factor,  # float, or a pointer to one
    logits_stride,
    target_stride,
    grad_stride,
    classes,
    ignore_index,
    keep,
    spread,
    z_loss,
    softcap,  # None: not capped
    logit_scale,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    if PROBABILITIES:
        probabilities = target + row * target_stride
        label, hot, counts = -1, 0.0, tl.program_id(0) >= 0
    else:
        probabilities = None
        label, hot, counts = _label(target, weight, row, classes, ignore_index, keep)
    mass = hot
    if PROBABILITIES or SMOOTHED:
        head, body = _extent(x, classes, ALIGNED)
        cols, mask = _edges(x, head, body, classes)
        y, _ = dense_targets(probabilities, weight, cols, cols, mask, keep, spread)
        mass += tl.sum(y, 0)
        probabilities_body = None if probabilities is None else _from(probabilities, head, ALIGNED)
        mass = _sum_targets(mass, probabilities_body, weight, head, body, keep, spread, BLOCK)
    weighed = tl.load(factor).to(tl.float32) if FACTOR_ON_DEVICE else factor
    if upstream is not None:
        weighed *= tl.load(upstream + row)
    lse_row = tl.load(lse + row)
    scale = weighed * (mass + 2 * z_loss * lse_row)
    # fmt: off
    _write_gradient(x, grad + row * grad_stride, probabilities, weight, classes, label, hot, counts,
                    lse_row, scale, weighed, keep, spread, softcap, logit_scale,
                    PROBABILITIES or SMOOTHED, ALIGNED, BLOCK)
    # fmt: on


def cross_entropy_forward(
    logits: Tensor,  # (N, V) float32, bfloat16 or float16, class stride 1
    target: Tensor,  # (N,) int64, or (N, V) probabilities in logits' dtype, class stride 1
    rule: Any,  # weight (V,) float32 or None, ignore_index, label_smoothing, z_loss, softcap, logit_scale
    grad: Tensor | None,  # (N, V), written if given; may be logits itself
    factor: float | Tensor,  # of the gradient; a tensor () is read on the device
    rows: Tensor,  # (N,) float32, written: the losses
    lse: Tensor,  # (N,) float32, written
    stats: Any = None,  # argmax (N,) int64, correct (N,) bool, entropy (N,) float32, written
) -> None:
    """Row losses and log-sum-exps, with `grad` the gradient times `factor`, with `stats` the rows' statistics.

    A class that is not there makes its row's loss and gradient NaN. NaN logits count as infinite in the argmax.
    """
    correct = None if stats is None else stats.correct.view(torch.uint8)
    outputs = (grad, rows, lse, getattr(stats, "argmax", None), correct, getattr(stats, "entropy", None))
    _launch(forward, logits, target, rule, grad, outputs, factor, stats is not None)


def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    rule: Any,
    grad: Tensor,  # may be logits itself
    factor: float | Tensor,
    upstream: Tensor | None,  # (N,) float32
    lse: Tensor,
) -> None:
    """The gradient from the saved log-sum-exps, times `factor` and each row's `upstream`, rounded once."""
    _launch(backward, logits, target, rule, grad, (grad, upstream, lse), factor)


def _launch(
    kernel: Any,
    logits: Tensor,
    target: Tensor,
    rule: Any,
    grad: Tensor | None,
    between: tuple[Tensor | None, ...],
    factor: float | Tensor,
    stats: bool = False,
) -> None:
    n, classes = logits.shape
    if n == 0:
        return
    probabilities, smoothed = target.dim() == 2, rule.label_smoothing != 0
    others = [t for t in (grad, target if probabilities else None) if t is not None]
    plain = not (probabilities or smoothed or stats or rule.softcap is not None)
    block, threads = _plan(classes, plain)
    with torch.accelerator.device_index(logits.device.index if logits.device.type != "cpu" else None):
        kernel[(n,)](
            *(logits, target, rule.weight, *between, factor),
            *(logits.stride(0), target.stride(0), 0 if grad is None else grad.stride(0), classes, rule.ignore_index),
            *(1 - rule.label_smoothing, rule.label_smoothing / classes, rule.z_loss, rule.softcap, rule.logit_scale),
            PROBABILITIES=probabilities,
            SMOOTHED=smoothed,
            FACTOR_ON_DEVICE=isinstance(factor, Tensor),
            ALIGNED=all(_in_step(logits, other) for other in others),
            BLOCK=block,
            # scale * x - max, contracted, leaves the rounding error of max where 0 is due: 1e-4 of a logit of 3000
            **{**options(logits.device, threads), "enable_fp_fusion": False},
        )


def _plan(classes: int, plain: bool) -> tuple[int, int]:
    """Elements that a row is walked by, and threads: as many elements each as find registers with all features on.

    Long rows get most of a multiprocessor each: those under way then stay in the L2 cache until they are read again.
    """
    each, largest = (16, 16384) if plain else (8, 4096)
    block = min(max(triton.next_power_of_2(classes), 2048), largest)
    return block, block // each


def _in_step(a: Tensor, b: Tensor) -> bool:
    """Whether 16-byte boundaries fall on the same columns in every row of both."""
    strides = a.shape[0] == 1 or (a.stride(0) - b.stride(0)) * a.itemsize % 16 == 0
    return strides and (a.data_ptr() - b.data_ptr()) % 16 == 0
