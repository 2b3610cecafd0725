"""LAMB, which torch.optim does not have: constructor, checks and plain update follow torch.optim's manner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt.optim.engine import FusedStep


def lamb(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    always_adapt: bool,
    maximize: bool,
    sum_over_parts: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> None:
    """LAMB's update of lists of tensors, in plain torch operations: what runs where no kernel does.

    `sum_over_parts`: (n, 2) sums of squares over the n tensors, of which each may be a part of one that processes
    share -> over the whole tensors.
    """
    moves, directions = [], []
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True):
        step += 1
        grad = (-grad if maximize else grad).to(exp_avg.dtype)
        if param.is_complex():
            grad = grad.resolve_conj()
            param, grad, exp_avg, exp_avg_sq = map(torch.view_as_real, (param, grad, exp_avg, exp_avg_sq))
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = ((1 - beta ** step.double()).to(exp_avg.dtype) for beta in (beta1, beta2))
        denominator = (exp_avg_sq / correction2).sqrt_().add_(eps)
        moves.append(param)
        directions.append((exp_avg / correction1).div_(denominator).add_(param, alpha=weight_decay))
    if (weight_decay != 0 or always_adapt) and moves:
        squares = [[_sum_of_squares(t) for t in pair] for pair in zip(moves, directions, strict=True)]
        norms = sum_over_parts(torch.stack([torch.stack(pair) for pair in squares])).sqrt()
        length, stride = norms.unbind(1)
        ratios = torch.where((length > 0) & (stride > 0), length / stride, 1.0)
        wide = [torch.promote_types(direction.dtype, torch.float32) for direction in directions]
        directions = [d.to(w) * ratio.to(w) for d, w, ratio in zip(directions, wide, ratios, strict=True)]
    for param, direction in zip(moves, directions, strict=True):
        param.sub_(direction * lr)


def _sum_of_squares(tensor: Tensor) -> Tensor:
    """() float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).double().square()


class _LAMB(Optimizer):
    """LAMB as torch.optim would have it, less the step."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        always_adapt: bool = False,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "always_adapt": always_adapt, "maximize": maximize})

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("LAMB does not support sparse gradients")
            params.append(param)
            grads.append(param.grad)
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            state_steps.append(state["step"])


class LAMB(FusedStep, _LAMB):
    """LAMB for large batches: AdamW's direction, made as long as the tensor that it moves.

        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g^2
        u <- m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
        p <- p - lr |p| / |u| u

    A pass for the two norms of every tensor, then the update: as many launches, however many tensors.

    Args:
        params (iterable): parameters, named parameters or groups of either.
        lr (float or Tensor): learning rate.
        betas ((float, float)): decay of both moments.
        eps (float): added to the denominator.
        weight_decay (float): decoupled, inside of the trust ratio.
        always_adapt (bool): scale tensors without weight decay too (biases, norms); otherwise |p| / |u| is 1 there, as
            it is where either norm is 0.
        maximize (bool): ascend.

    And the keywords of `fusedopt.optim.Adam`. The paper's clipping of the whole gradient is `max_norm=1.0`.

    Raises: as `torch.optim.Adam` for values out of range.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020, algorithm 2,
    with phi the identity.
    """

    rule, states, norms = "lamb", ("exp_avg", "exp_avg_sq"), True
    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay", "always_adapt")
    functional = staticmethod(lamb)
