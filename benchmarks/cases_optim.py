"""Optimizer steps: all parameters of a model, gradients in place, every state present."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

from fusedopt import optim as fused

from .runner import Case, Contender, Target, relative_error

# GPT-2 small: 148 tensors, 124.4 M parameters
_BLOCK = [
    *[(768,), (768,)],  # ln_1
    *[(768, 2304), (2304,), (768, 768), (768,)],  # attention
    *[(768,), (768,)],  # ln_2
    *[(768, 3072), (3072,), (3072, 768), (768,)],  # mlp
]
GPT2_SMALL = [(50257, 768), (1024, 768), *(_BLOCK * 12), (768,), (768,)]
SMALL = [(64,)] * 2000

# The largest error of one step, in epsilons: an update is half a dozen operations, each rounded by at most half of one.
LIMIT = 3.0
SAMPLES = 128  # elements of each tensor that the oracle follows, both ends among them

Oracle = Callable[[Tensor, Tensor, dict[str, Tensor]], dict[str, Tensor]]  # p, g, states -> p and states, one step on
Build = Callable[[list[Tensor]], Optimizer]


def by_torch(cls: type[Optimizer], **options: Any) -> Oracle:
    """torch's own plain loop, in float64."""

    def step(p: Tensor, g: Tensor, states: dict[str, Tensor]) -> dict[str, Tensor]:
        p.grad = g
        optimizer = cls([p], foreach=False, **options)
        optimizer.state[p] = states
        optimizer.step()
        return {"param": p, **optimizer.state[p]}

    return step


def _lion(p: Tensor, g: Tensor, states: dict[str, Tensor], lr: float, weight_decay: float) -> dict[str, Tensor]:
    """Chen et al. 2023, written out; torch has no Lion."""
    m = states["exp_avg"]
    p = p * (1 - lr * weight_decay) - lr * torch.sign(0.9 * m + 0.1 * g)
    return {"param": p, "exp_avg": 0.99 * m + 0.01 * g}


def local(tensor: Tensor) -> Tensor:
    """What of a DTensor lies here: all of it, in the one process that measures."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _indices(tensor: Tensor) -> Tensor:
    count = min(tensor.numel(), SAMPLES)
    return torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64, device=tensor.device).long()


def contender(
    name: str,
    build: Build,
    oracle: Oracle,
    initial: list[Tensor],
    gradients: list[Tensor],
    step: Callable[[Optimizer, list[Tensor]], Any] = lambda optimizer, params: optimizer.step(),
    factor: Callable[[list[Tensor]], float] = lambda gradients: 1.0,
) -> Contender:
    """An optimizer over copies of the parameters; the gradients are shared if nobody changes them.

    `step` is what is timed; `factor` is what it multiplies the gradients by.
    """
    params = [p.clone() for p in initial]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer = build(params)
    where = [_indices(p) for p in params]

    def sample(tensors: list[Tensor]) -> Tensor:
        return torch.cat([local(t).reshape(-1)[i] for t, i in zip(tensors, where, strict=True)]).double().cpu()

    def states() -> dict[str, Tensor]:
        """Of the sampled elements; the step count is the same for all."""
        first = optimizer.state[params[0]]
        found = {key: sample([optimizer.state[p][key] for p in params]) for key in first if key != "step"}
        return found | ({"step": first["step"].to("cpu", copy=True)} if "step" in first else {})

    def error() -> float:
        grads = [p.grad for p in params]
        expected = oracle(sample(params), sample(grads) * factor(grads), states())
        step(optimizer, params)
        got = {"param": sample(params), **states()}
        if "step" in got and float(got.pop("step")) != float(expected.pop("step")):
            return float("inf")
        return max(relative_error(got[key], expected[key], params[0].dtype) for key in got)

    return Contender(name, partial(step, optimizer, params), error)


def case(
    name: str,
    title: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    bytes_per_parameter: int,
    oracle: Oracle,
    builds: dict[str, Build],
    *targets: Target,
    in_a_row: int = 1,
    device: str = "cpu",
) -> Case:
    numel = sum(torch.Size(shape).numel() for shape in shapes)

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> Tensor:
            return torch.empty(shape, device=device).normal_(0, scale, generator=generator).to(dtype)

        initial = [normal(shape, 0.02) for shape in shapes]
        gradients = [normal(shape, 0.01) for shape in shapes]
        return [contender(label, make, oracle, initial, gradients) for label, make in builds.items()]

    return Case(name, title, numel * bytes_per_parameter, LIMIT, build, targets, in_a_row, device)


def cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    adamw = by_torch(AdamW)
    adamw_builds = {"torch fused": partial(AdamW, fused=True), "torch default": AdamW, "fusedopt": fused.AdamW}
    adagrad = {"torch default": Adagrad, "torch fused": partial(Adagrad, fused=True), "fusedopt": fused.Adagrad}
    sgd = {"lr": 1e-3, "momentum": 0.9}
    sgd_builds = {
        "torch default": partial(SGD, **sgd),
        "torch fused": partial(SGD, fused=True, **sgd),
        "fusedopt": partial(fused.SGD, **sgd),
    }
    lion = {"lr": 1e-4, "weight_decay": 0.1}
    over_fused, over_default = partial(Target, "fusedopt", "torch fused"), partial(Target, "fusedopt", "torch default")
    of_stream = Target("fusedopt", "stream", 0.9)
    return [
        case("adamw-2000x64-f32", "AdamW, 2000 tensors of 64, f32", SMALL, f32, 28, adamw, adamw_builds,
             over_fused(15.0), in_a_row=10),
        case("adamw-gpt2-small-f32", "AdamW, GPT-2 small, f32", GPT2_SMALL, f32, 28, adamw, adamw_builds,
             over_fused(1.0), over_default(3.5), of_stream),
        case("adamw-gpt2-small-bf16", "AdamW, GPT-2 small, bf16", GPT2_SMALL, bf16, 14, adamw,
             {"torch fused": partial(AdamW, fused=True), "fusedopt": fused.AdamW}, over_fused(1.4)),
        case("rmsprop-gpt2-small-f32", "RMSprop, GPT-2 small, f32", GPT2_SMALL, f32, 20, by_torch(RMSprop),
             {"torch default": RMSprop, "fusedopt": fused.RMSprop}, over_default(3.3), of_stream),
        case("adagrad-gpt2-small-f32", "Adagrad, GPT-2 small, f32", GPT2_SMALL, f32, 20, by_torch(Adagrad), adagrad,
             over_default(3.0), of_stream),
        case("sgd-momentum-gpt2-small-f32", "SGD with momentum, GPT-2 small, f32", GPT2_SMALL, f32, 20,
             by_torch(SGD, **sgd), sgd_builds),
        case("lion-gpt2-small-f32", "Lion, GPT-2 small, f32", GPT2_SMALL, f32, 20, partial(_lion, **lion),
             {"fusedopt": partial(fused.Lion, **lion)}),
    ]  # fmt: skip
