"""The whole step as a training loop takes it: unscale, clip by the global norm, update, average; from 8-bit states."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from fusedopt import optim as fused

from . import ceilings, peers
from .cases_optim import DTYPES, Build, Oracle, by_torch, contender, local, shapes_of, stock
from .runner import Case, Contender, Target, compiler_here, relative_error
from .shapes import TITLES, Shape, numel

MAX_NORM = 1.0
IN_A_ROW = {"cpu": 1, "cuda": 10}  # as in training nobody waits for a step before the next is queued
DECAY = 0.999
# Stock sums the squares in float32: the norm of 124 M elements, and with it every update, is off by 4e-4 of itself.
LIMIT = 8192.0
CODES_LIMIT = 32.0  # arithmetic on states that are good to a hundredth may be good to 4e-6
SIXTEEN_MILLION = [(1024, 1024)] * 16  # as much as a peer on the CPU does in half a second


def coefficient(gradients: list[Tensor]) -> float:
    norm = math.sqrt(sum(float(local(g).double().square().sum()) for g in gradients))
    return min(1.0, MAX_NORM / (norm + 1e-6))


def clip_and_step(optimizer: Optimizer, params: list[Tensor]) -> None:
    clip_grad_norm_(params, MAX_NORM)
    optimizer.step()


def average(optimizer: Optimizer, params: list[Tensor]) -> None:
    states = [optimizer.state[p] for p in params]
    for p, state in zip(params, states, strict=True):
        if "ema" not in state:  # beside stock's own, where the check looks
            state["ema"] = p.detach().clone()
    with torch.no_grad():
        torch._foreach_lerp_([state["ema"] for state in states], params, 1 - DECAY)


Step = Callable[[Optimizer, list[Tensor]], Any]


def by_hand(amp: bool, ema: bool, device: str = "cpu") -> Step:
    """The loop around a stock optimizer."""
    scaler = scaling(device)

    def step(optimizer: Optimizer, params: list[Tensor]) -> None:
        if amp:
            scaler.unscale_(optimizer)
        clip_grad_norm_(params, MAX_NORM)
        if amp:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if ema:
            average(optimizer, params)

    return step


def by_us(amp: bool, device: str = "cpu") -> Step:
    """All of it is options of the optimizer."""
    scaler = scaling(device)

    def step(optimizer: Optimizer, params: list[Tensor]) -> None:
        if amp:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    return step


def scaling(device: str) -> torch.amp.GradScaler:
    """By 1: the gradients are there once and must not shrink from run to run."""
    scaler = torch.amp.GradScaler(device, init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.ones((), device=device))
    return scaler


def averaged(oracle: Oracle) -> Oracle:
    def step(p: Tensor, g: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
        ema = states.pop("ema")
        after = oracle(p, g, states)
        return after | {"ema": ema + (1 - DECAY) * (after["param"].detach() - ema)}

    return step


class Compiled:
    """Clipping and update compiled as one."""

    def __init__(self, params: list[Tensor]):
        self.optimizer = AdamW(params, lr=torch.tensor(1e-3))
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups
        self.step = torch.compile(partial(clip_and_step, self.optimizer, params))


def case(
    model: str, dtype_name: str, *targets: Target, amp: bool = False, ema: bool = False, compiled: bool = False,
    quick: bool = True, device: str = "cpu",
) -> Case:  # fmt: skip
    shapes, dtype = shapes_of(model), DTYPES[dtype_name]

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(device).manual_seed(0)
        initial, gradients = (
            [(torch.randn(shape, generator=generator, device=device) * size).to(dtype) for shape in shapes]
            for size in (0.02, 0.01)
        )
        oracle = averaged(by_torch(AdamW)) if ema else by_torch(AdamW)
        makes = {name: (make, by_hand(amp, ema, device)) for name, make in stock(AdamW).items()}
        if compiled and not quick and compiler_here():
            makes["torch compiled"] = Compiled, by_us(amp=False)
        contenders = [
            contender(label, make, oracle, initial, [g.clone() for g in gradients], step, coefficient)
            for label, (make, step) in makes.items()
        ]
        ours = partial(fused.AdamW, max_norm=MAX_NORM, ema_decay=DECAY if ema else None)
        return [*contenders, contender("fusedopt", ours, oracle, initial, gradients, by_us(amp, device), coefficient)]

    # read the gradients once for their norm; then as the step alone, and the average read and written
    each = 8 * dtype.itemsize + (8 if ema else 0)
    nbytes = numel(shapes) * each
    contenders = 4 + compiled
    memory = numel(shapes) * ((4 * contenders + 2) * dtype.itemsize + (4 * contenders if ema else 0)) + nbytes
    work = [*(["unscale"] if amp else []), "clip", "AdamW", *(["EMA"] if ema else [])]
    name = "-".join([*(["gpu"] if device == "cuda" else []), *(word.lower() for word in work), model, dtype_name])
    title = f"{' + '.join(work)}, {TITLES[model]}, {dtype_name}"
    return Case(name, title, nbytes, LIMIT, build, partial(ceilings.memory, nbytes, device), targets, dtype_name,
                device, in_a_row=IN_A_ROW[device], memory=memory, quick=quick)  # fmt: skip


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


def of_codes(name: str, title: str, shapes: list[Shape], contenders: dict[str, Build], *targets: Target,
             others: str = "", device: str = "cpu") -> Case:  # fmt: skip
    """8-bit states, ours and those of the peers of a kind."""

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(device).manual_seed(0)
        gradients = [torch.randn(shape, generator=generator, device=device) * 0.01 for shape in shapes]
        makes = {**contenders, **peers.found(others, device)}

        def steps(make: Build) -> Callable[[], Any]:
            params = [torch.randn(shape, generator=generator, device=device) * 0.02 for shape in shapes]
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            return make(params).step

        return [
            Contender(
                label,
                steps(make),
                partial(first_step_error, make, device),
                version=peers.version(label) if label in peers.BY_NAME else None,
            )
            for label, make in makes.items()
        ]

    # parameter and gradient read, parameter written, two codes read and written
    nbytes = numel(shapes) * 16
    memory = numel(shapes) * 12 * (2 + len(contenders) + len(targets)) + nbytes
    return Case(("gpu-" if device == "cuda" else "") + name, title, nbytes, CODES_LIMIT, build,
                partial(ceilings.memory, nbytes, device), targets, device=device, in_a_row=IN_A_ROW[device],
                absent=partial(peers.absent, others, device), memory=memory)  # fmt: skip


def cases() -> list[Case]:
    f32, ours = {"fusedopt, f32 states": fused.AdamW}, {"fusedopt": partial(fused.AdamW, state_dtype="8bit")}
    faster, near = partial(Target, "fusedopt", "torch fused"), Target("fusedopt", ceilings.STREAM, 0.9)
    of_codes_against = partial(of_codes, others="adamw-8bit")
    against = tuple(Target("fusedopt", name, 2.0) for name in ("torchao", "bitsandbytes"))
    large = ("adamw-8bit-gpt2-small-f32", "AdamW, 8-bit states, GPT-2 small, f32", shapes_of("gpt2-small"))
    return [
        case("gpt2-small", "f32", faster(1.5), near, compiled=True),
        case("gpt2-small", "bf16"),
        case("gpt2-small", "f32", faster(1.6), near, ema=True, quick=False),
        case("gpt2-small", "f32", amp=True, ema=True, quick=False),
        case("vit-tiny", "f32"),
        of_codes(*large, f32 | ours, Target("fusedopt", "fusedopt, f32 states", 1.0)),
        of_codes_against("adamw-8bit-16m-f32", "AdamW, 8-bit states, 16 M parameters, f32", SIXTEEN_MILLION, ours,
                         *against),
        *(case(model, "f32", faster(1.5), ema=ema, compiled=not ema, device="cuda")
          for model in ("gpt2-small", "llama-1b-shard") for ema in (False, True)),
        case("vit-tiny", "f32", device="cuda"),
        of_codes_against(*large, f32 | ours, *against, device="cuda"),
    ]  # fmt: skip
