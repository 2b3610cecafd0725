"""The whole step as a training loop takes it: clip by the global norm, then update."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from fusedopt import optim as fused

from .cases_optim import GPT2_SMALL, by_torch, contender
from .runner import Case, Contender, Target

MAX_NORM = 1.0
# Stock sums the squares in float32: the norm of 124 M elements, and with it every update, is off by 4e-4 of itself.
LIMIT = 8192.0


def coefficient(gradients: list[Tensor]) -> float:
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    return min(1.0, MAX_NORM / (norm + 1e-6))


def clip_and_step(optimizer: Optimizer, params: list[Tensor]) -> None:
    clip_grad_norm_(params, MAX_NORM)
    optimizer.step()


def case(name: str, title: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, *targets: Target) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        initial, gradients = (
            [(torch.randn(shape, generator=generator) * size).to(dtype) for shape in shapes] for size in (0.02, 0.01)
        )
        contenders = [
            contender(label, make, by_torch(AdamW), initial, [g.clone() for g in gradients], clip_and_step, coefficient)
            for label, make in (("torch fused", partial(AdamW, fused=True)), ("torch default", AdamW))
        ]
        ours = partial(fused.AdamW, max_norm=MAX_NORM)
        return [*contenders, contender("fusedopt", ours, by_torch(AdamW), initial, gradients, factor=coefficient)]

    # read the gradients once for their norm; then as the step alone
    return Case(name, title, numel * 8 * dtype.itemsize, LIMIT, build, targets)


def cases() -> list[Case]:
    faster = Target("fusedopt", "torch fused", 1.5)
    return [
        case("clip-adamw-gpt2-small-f32", "clip + AdamW, GPT-2 small, f32", GPT2_SMALL, torch.float32, faster),
        case("clip-adamw-gpt2-small-bf16", "clip + AdamW, GPT-2 small, bf16", GPT2_SMALL, torch.bfloat16),
    ]
