"""Mean squared error: the sum of squares and the gradient in one pass over input and target."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt.backends.triton.options import options

THREADS = 256
BLOCK = 16 * THREADS
PROGRAMS = 4096  # at most: their shares of the sum are added by one


@triton.jit
def _walk(input, target, grad, at, mask, factor):
    """Squares of the differences, and their gradient."""
    x = tl.load(input + at, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    y = tl.load(target + at, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    difference = x - y
    if grad is not None:
        tl.store(grad + at, (factor * difference).to(grad.dtype.element_ty), mask, eviction_policy="evict_first")
    return difference * difference


# specialised on whether input, target and grad are aligned: not on their size
@triton.jit(do_not_specialize=["upstream", "partial", "numel", "factor"])
def squares(
    input,
    target,
    grad,  # or None
    upstream,  # () float32 or None
    partial,  # (programs,) float64 or None
    numel,
    factor,  # of the gradient, beside upstream
    BLOCK: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    if upstream is not None:
        factor *= tl.load(upstream)
    whole = tl.multiple_of(numel // VECTOR * VECTOR, VECTOR)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += _walk(input, target, grad, at, at < whole, factor)
    ragged = whole + tl.arange(0, VECTOR)
    rest = _walk(input, target, grad, ragged, (ragged < numel) & (tl.program_id(0) == 0), factor)
    if partial is not None:
        sum = tl.sum(total.to(tl.float64), 0) + tl.sum(rest.to(tl.float64), 0)
        tl.store(partial + tl.program_id(0), sum)


@triton.jit(do_not_specialize=["partial", "loss", "n", "factor"])
def finish(partial, loss, n, factor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(loss, (tl.sum(tl.load(partial + i, i < n, other=0.0), 0) * factor).to(tl.float32))


def squared_error(
    input: Tensor, target: Tensor, factor: float, grad: Tensor | None = None, grad_factor: float = 0.0
) -> Tensor:
    """() float32: `factor` times the sum of squares, in an order that depends on size and alignment; two launches.

    With `grad`, the difference times `grad_factor`, in the same pass. All three are dense, of one dtype, shape and
    strides.
    """
    loss = torch.empty((), dtype=torch.float32, device=input.device)
    partial = torch.empty(PROGRAMS, dtype=torch.float64, device=input.device)
    with _current(input):
        n = _launch(input, target, grad, None, partial, grad_factor)
        finish[(1,)](partial, loss, n, factor, BLOCK=PROGRAMS, **options(input.device, THREADS))
    return loss


def squared_error_backward(input: Tensor, target: Tensor, grad: Tensor, grad_factor: float, upstream: Tensor) -> None:
    """`grad`: the difference times `grad_factor` and the () float32 `upstream`, rounded once; one launch."""
    with _current(input):
        _launch(input, target, grad, upstream, None, grad_factor)


def _current(tensor: Tensor) -> torch.accelerator.device_index:
    return torch.accelerator.device_index(tensor.device.index if tensor.device.type != "cpu" else None)


def _launch(
    input: Tensor,
    target: Tensor,
    grad: Tensor | None,
    upstream: Tensor | None,
    partial: Tensor | None,
    factor: float,
) -> int:
    """Returns the number of programs."""
    numel = input.numel()
    programs = min(triton.cdiv(numel, BLOCK), PROGRAMS)
    squares[(programs,)](
        *(input, target, grad, upstream, partial, numel, factor),
        BLOCK=BLOCK,
        **options(input.device, THREADS),
    )
    return programs
