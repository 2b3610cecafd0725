"""The whole step as a training loop takes it: clip by the global norm, update, average; and from 8-bit states."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from fusedopt import optim as fused

from . import peers
from .cases_optim import GPT2_SMALL, Build, Oracle, by_torch, contender, local
from .runner import STREAM, Case, Contender, Target, relative_error

MAX_NORM = 1.0
DECAY = 0.999
# Stock sums the squares in float32: the norm of 124 M elements, and with it every update, is off by 4e-4 of itself.
LIMIT = 8192.0
CODES_LIMIT = 32.0  # arithmetic on states that are good to a hundredth may be good to 4e-6


FOUR_MILLION = [(1024, 1024)] * 4  # as much as a peer on the CPU does in half a second


def coefficient(gradients: list[Tensor]) -> float:
    norm = math.sqrt(sum(float(local(g).double().square().sum()) for g in gradients))
    return min(1.0, MAX_NORM / (norm + 1e-6))


def clip_and_step(optimizer: Optimizer, params: list[Tensor]) -> None:
    clip_grad_norm_(params, MAX_NORM)
    optimizer.step()


def clip_step_and_average(optimizer: Optimizer, params: list[Tensor]) -> None:
    clip_and_step(optimizer, params)
    states = [optimizer.state[p] for p in params]
    for p, state in zip(params, states, strict=True):
        if "ema" not in state:  # beside stock's own, where the check looks
            state["ema"] = p.detach().clone()
    with torch.no_grad():
        torch._foreach_lerp_([state["ema"] for state in states], params, 1 - DECAY)


def averaged(oracle: Oracle) -> Oracle:
    def step(p: Tensor, g: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
        ema = states.pop("ema")
        after = oracle(p, g, states)
        return after | {"ema": ema + (1 - DECAY) * (after["param"].detach() - ema)}

    return step


def case(
    name: str, title: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, *targets: Target, ema: bool = False
) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        initial, gradients = (
            [(torch.randn(shape, generator=generator) * size).to(dtype) for shape in shapes] for size in (0.02, 0.01)
        )
        oracle = averaged(by_torch(AdamW)) if ema else by_torch(AdamW)
        by_hand = clip_step_and_average if ema else clip_and_step
        contenders = [
            contender(label, make, oracle, initial, [g.clone() for g in gradients], by_hand, coefficient)
            for label, make in (("torch fused", partial(AdamW, fused=True)), ("torch default", AdamW))
        ]
        ours = partial(fused.AdamW, max_norm=MAX_NORM, ema_decay=DECAY if ema else None)
        return [*contenders, contender("fusedopt", ours, oracle, initial, gradients, factor=coefficient)]

    # read the gradients once for their norm; then as the step alone, and the average read and written
    return Case(name, title, numel * (8 * dtype.itemsize + (8 if ema else 0)), LIMIT, build, targets)


def first_step_error(make: Build, device: str = "cpu") -> float:
    """What an optimizer keeps in its codes differs, so that its first step is what is checked."""
    generator = torch.Generator(device).manual_seed(0)
    p = torch.randn(1 << 16, generator=generator, device=device) * 0.02
    exact, p = p.double().requires_grad_(), p.requires_grad_()
    p.grad = torch.randn(1 << 16, generator=generator, device=device) * 0.01
    exact.grad = p.grad.double()
    for optimizer in (make([p]), AdamW([exact], foreach=False)):
        optimizer.step()
    return relative_error(p.detach().double(), exact.detach(), torch.float32)


def of_codes(name: str, title: str, shapes: list[tuple[int, ...]], contenders: dict[str, Build], *targets: Target,
             others: str = "") -> Case:  # fmt: skip
    """8-bit states, ours and those of the peers of a kind."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(shape, generator=generator) * 0.01 for shape in shapes]
        makes = {**peers.found(others, "cpu"), **contenders}

        def steps(make: Build) -> Optimizer:
            params = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            return make(params)

        return [Contender(label, steps(make).step, partial(first_step_error, make)) for label, make in makes.items()]

    # parameter and gradient read, parameter written, two codes read and written
    return Case(name, title, numel * 16, CODES_LIMIT, build, targets, absent=partial(peers.absent, others, "cpu"))


def cases() -> list[Case]:
    ours = partial(fused.AdamW, state_dtype="8bit")
    faster, near = Target("fusedopt", "torch fused", 1.5), Target("fusedopt", STREAM, 0.9)
    return [
        case("clip-adamw-gpt2-small-f32", "clip + AdamW, GPT-2 small, f32", GPT2_SMALL, torch.float32, faster, near),
        case("clip-adamw-gpt2-small-bf16", "clip + AdamW, GPT-2 small, bf16", GPT2_SMALL, torch.bfloat16),
        case("clip-adamw-ema-gpt2-small-f32", "clip + AdamW + EMA, GPT-2 small, f32", GPT2_SMALL, torch.float32,
             Target("fusedopt", "torch fused", 1.6), near, ema=True),
        of_codes("adamw-8bit-gpt2-small-f32", "AdamW, 8-bit states, GPT-2 small, f32", GPT2_SMALL,
                 {"fusedopt, f32 states": fused.AdamW, "fusedopt": ours},
                 Target("fusedopt", "fusedopt, f32 states", 1.0)),
        of_codes("adamw-8bit-4m-f32", "AdamW, 8-bit states, 4 M parameters, f32", FOUR_MILLION,
                 {"fusedopt": ours}, *(Target("fusedopt", name, 2.0) for name in ("torchao", "bitsandbytes")),
                 others="adamw-8bit"),
    ]  # fmt: skip
