"""What surrounds a loss's kernels: the mean's denominator, targets out of range, the upstream gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt.backends.triton.options import options

THREADS = 256


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"])
def _check_targets(
    target,  # (N,) int64
    weight,  # (V,) float32 or None
    factor,  # () float32 or None
    report,  # (3,) int64, see fusedopt.backends.bad_target
    rows,
    classes,
    ignore_index,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, rows, BLOCK):
        row = at + tl.arange(0, BLOCK).to(tl.int64)
        there = row < rows
        label = tl.load(target + row, there, other=0)
        counts = there & (label != ignore_index)
        valid = counts & (label >= 0) & (label < classes)
        if weight is None:
            total += valid.to(tl.float32)
        else:
            total += tl.load(weight + label, valid, other=0.0)
        first = tl.min(tl.where(counts & (valid == 0), row, 0x7FFFFFFFFFFFFFFF), 0)
        if first != 0x7FFFFFFFFFFFFFFF:  # noqa: SIM102 - `and` would read the report every time
            if tl.load(report) == 0:
                tl.store(report + 1, first)
                tl.store(report + 2, tl.sum(tl.where(row == first, label, 0), 0))
                tl.atomic_xchg(report, 2, sem="release", scope="sys")
    if factor is not None:
        tl.store(factor, 1.0 / tl.sum(total, 0))


def check_targets(target: Tensor, rule: Any, classes: int, factor: Tensor | None, report: Tensor) -> None:
    """Report a target out of range; `factor`, if given, becomes the reciprocal of the targets' total weight."""
    with torch.accelerator.device_index(target.device.index if target.device.type != "cpu" else None):
        _check_targets[(1,)](
            *(target, rule.weight, factor, report, target.shape[0], classes, rule.ignore_index),
            BLOCK=4 * THREADS,
            **options(target.device, THREADS),
        )


@triton.jit(do_not_specialize=["numel"])
def _scale(tensor, factor, numel, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        for at in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0) * BLOCK):
            i = at + tl.arange(0, BLOCK)
            x = tl.load(tensor + i, i < numel)
            tl.store(tensor + i, (x.to(tl.float32) * by).to(x.dtype), i < numel)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a dense tensor by a () float32 on its device; where that is 1, nothing is read or written."""
    if tensor.numel() == 0:
        return
    block = 8 * THREADS
    with torch.accelerator.device_index(tensor.device.index if tensor.device.type != "cpu" else None):
        _scale[(min(4096, triton.cdiv(tensor.numel(), block)),)](
            tensor, factor, tensor.numel(), BLOCK=block, **options(tensor.device, THREADS)
        )
