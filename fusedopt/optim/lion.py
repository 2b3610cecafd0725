"""Lion, which torch.optim does not have: constructor, checks and plain update follow torch.optim's manner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt.optim.engine import FusedStep


def lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Lion's update of lists of tensors, in plain torch operations: what runs where no kernel does."""
    for param, grad, exp_avg in zip(params, grads, exp_avgs, strict=True):
        grad = -grad if maximize else grad
        if param.is_complex():
            param, grad, exp_avg = map(torch.view_as_real, (param, grad.resolve_conj(), exp_avg))
        direction = torch.lerp(exp_avg, grad.to(exp_avg.dtype), 1 - beta1).sign_()
        param.mul_(1 - lr * weight_decay).sub_(direction * lr)
        exp_avg.lerp_(grad.to(exp_avg.dtype), 1 - beta2)


class _Lion(Optimizer):
    """Lion as torch.optim would have it, less the step."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]
    ) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            params.append(p)
            grads.append(p.grad)
            state = self.state[p]
            if len(state) == 0:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            exp_avgs.append(state["exp_avg"])


class Lion(FusedStep, _Lion):
    """Lion in one fused pass: one state, and every element moves by lr.

        p <- p (1 - lr * weight_decay) - lr sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    Args:
        params: parameters, named parameters or groups, as for every torch.optim class.
        lr (float or 1-element Tensor): learning rate; about a third to a tenth of AdamW's suits (default: 1e-4).
        betas (tuple[float, float]): of the direction and of the average (default: (0.9, 0.99)).
        weight_decay (float): decoupled, as AdamW's; about 3 to 10 times AdamW's suits (default: 0).
        maximize (bool): maximize the objective (default: False).
        and the keywords that `fusedopt.optim.Adam` adds.

    Raises:
        ValueError: a negative lr or weight_decay, a beta outside [0, 1).

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
    """

    rule, states = "lion", ("exp_avg",)
    hyper = ("lr", "beta1", "beta2", "weight_decay")
    functional = staticmethod(lion)
