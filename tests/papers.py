"""The optimizers that torch.optim does not have, by their papers' formulas, for oracles in float64."""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2. `direction`: whose sign the last step took."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = -p.grad if group["maximize"] else p.grad, self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                state["direction"] = beta1 * m + (1 - beta1) * g
                p.copy_(p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * state["direction"].sign())
                m.copy_(beta2 * m + (1 - beta2) * g)


class LAMB(torch.optim.Optimizer):
    """You et al. 2020, algorithm 2, phi the identity."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        always_adapt: bool = False,
        maximize: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "always_adapt": always_adapt, "maximize": maximize})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = -p.grad if group["maximize"] else p.grad, self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq"))
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"]) + decay * p
                ratio = 1.0
                if (decay or group["always_adapt"]) and p.norm() > 0 and u.norm() > 0:
                    ratio = p.norm() / u.norm()
                p.sub_(group["lr"] * ratio * u)
