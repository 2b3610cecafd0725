"""Mean squared error: loss and gradient in one pass over input and target."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import has_torch_function_variadic

from fusedopt import backends
from fusedopt.backends import cpu
from fusedopt.nn.chunks import HALVES


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Same as `torch.nn.functional.mse_loss`, with loss and gradient in one pass.

        loss = mean or sum of (input - target)^2

    The gradient of "mean" and "sum" is written during forward, of input and target alike; in float16, where 2 / N
    underflows, in backward. Nothing waits for a GPU, and the sum's order depends on the size alone: same inputs, same
    bits. torch computes: reduction "none", a `weight`, inputs that are broadcast or of different dtypes, strides that
    differ or have gaps, float64 on a GPU, other devices, and all of it under torch.compile, which fuses it itself.

    Args:
        input (Tensor): of any shape; float32, bfloat16, float16 or float64.
        target (Tensor): of input's shape and dtype.
        size_average, reduce: deprecated, as in torch.
        reduction (str): "none", "mean" or "sum".
        weight (Tensor): of input's shape.
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (PyTorch's own kernels).

    Returns:
        The loss: for "mean" and "sum" a scalar, float32 for half-precision inputs; for "none" as torch's.

    Raises:
        What torch raises.

    Source: `torch.nn.functional.mse_loss`.
    """
    if has_torch_function_variadic(input, target, weight):
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not torch.compiler.is_compiling():
        backends.check(backend)
        if weight is None and (kernels := _kernels(input, target, reduction, backend)):
            return _MSE.apply(input, target, reduction, backends.module(kernels))
    if reduction in ("mean", "sum"):  # the loss is float32 whoever computes it
        input, target, weight = (
            t.float() if t is not None and t.dtype in HALVES else t for t in (input, target, weight)
        )
    return F.mse_loss(input, target, reduction=reduction, weight=weight)


class MSELoss(torch.nn.MSELoss):
    """Same as `torch.nn.MSELoss`, with loss and gradient in one pass; see `fusedopt.nn.functional.mse_loss`.

    Args: those of `torch.nn.MSELoss`, and

        backend (str): "auto", "cpu", "cuda", "triton" or "reference".

    Shape: input and target of any one shape; output a scalar, or input's shape for reduction "none".

    Source: `torch.nn.MSELoss`.
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.backend = backends.check(backend)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction, backend=self.backend)


def _kernels(input: Tensor, target: Tensor, reduction: str, backend: str) -> str:
    """The backend that takes the call; what none takes, "", is torch's to compute or to refuse."""
    fits = (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in (input, target))
        and input.layout == target.layout == torch.strided
        and input.device == target.device
        and input.dtype == target.dtype
        and input.shape == target.shape
        and input.stride() == target.stride()
        and input.numel() > 0
        and reduction in ("mean", "sum")
        and not (torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0)
        and not (input.is_neg() or target.is_neg())
    )
    kernels = backends.for_losses(backend, input.device, input.dtype) if fits else ""
    return "" if kernels and cpu.obstacle(input) else kernels


class _MSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str, kernels: ModuleType) -> Tensor:
        mean = 1.0 / input.numel() if reduction == "mean" else 1.0
        ctx.kernels = kernels
        ctx.needs = ctx.needs_input_grad[:2]
        ctx.factor = (2.0 if ctx.needs[0] else -2.0) * mean  # the target's gradient is input's, negated
        ctx.late = input.dtype == torch.float16
        ctx.grad = _gradient(input, kernels) if any(ctx.needs) and not ctx.late else None
        if any(ctx.needs):
            ctx.save_for_backward(input, target)
        return kernels.squared_error(input, target, mean, ctx.grad, ctx.factor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            input, target = ctx.saved_tensors
            grad = ((input.to(upstream.dtype) - target.to(upstream.dtype)) * (ctx.factor * upstream)).to(input.dtype)
        elif ctx.late:
            input, target = ctx.saved_tensors
            grad = _gradient(input, ctx.kernels)
            ctx.kernels.squared_error_backward(input, target, grad, ctx.factor, upstream)
        else:
            if ctx.grad is None:
                _ = ctx.saved_tensors  # raises autograd's own error: the graph is freed
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            grad = ctx.kernels.scale_(ctx.grad.clone() if keep else ctx.grad, upstream)
            if not keep:
                ctx.grad = None
        if not ctx.needs[0]:
            return None, grad, None, None
        return grad, -grad if ctx.needs[1] else None, None, None


def _gradient(input: Tensor, kernels: ModuleType) -> Tensor:
    """Uninitialised, with the strides of a dense tensor."""
    return kernels.new_gradient(input).as_strided(input.shape, input.stride())
