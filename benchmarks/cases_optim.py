"""Optimizer steps: all parameters of a model, gradients in place, every state present."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from fusedopt import optim as fused

from . import ceilings, peers
from .runner import Case, Contender, Target, compiler_here, relative_error
from .shapes import MODELS, TENSOR_COUNTS, TITLES, Shape, numel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
RULES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "sgd-momentum": "SGD with momentum",
    "lion": "Lion",
}

# The largest error of one step, in epsilons: an update is half a dozen operations, each rounded by at most half of one.
LIMIT = 3.0
COMPILED_LIMIT = 16.0  # torch compiles the scalars of a step as well, bias corrections among them: in float32
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
    peer: bool = False,
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

    def error() -> float:
        grads = [p.grad for p in params]
        expected = oracle(sample(params), sample(grads) * factor(grads), peers.states(optimizer, params, sample))
        step(optimizer, params)
        got = {"param": sample(params), **peers.states(optimizer, params, sample)}
        if "step" in got and float(got.pop("step")) != float(expected.pop("step")):
            return float("inf")
        return max(relative_error(got[key], expected[key], params[0].dtype) for key in got)

    about = {"version": peers.version(name), "limit": peers.BY_NAME[name].limit} if peer else {}
    if name == "torch compiled":
        about = {"limit": COMPILED_LIMIT}
    return Contender(name, partial(step, optimizer, params), error, **about)


def case(
    rule: str,
    model: str,
    dtype_name: str,
    elements_moved: int,
    oracle: Oracle,
    builds: dict[str, Build],
    *targets: Target,
    device: str = "cpu",
    others: str = "",
    **more: Any,
) -> Case:
    """One step of every tensor of a model; `elements_moved` per parameter, read and write each counted.

    `others`: the kind of the peers that take part.
    """
    shapes, dtype = shapes_of(model), DTYPES[dtype_name]
    nbytes = numel(shapes) * dtype.itemsize * elements_moved

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Shape, scale: float) -> Tensor:
            return torch.empty(shape, device=device).normal_(0, scale, generator=generator).to(dtype)

        initial = [normal(shape, 0.02) for shape in shapes]
        gradients = [normal(shape, 0.01) for shape in shapes]
        makes = dict(builds)
        if quick or not compiler_here():
            makes.pop("torch compiled", None)
        found = peers.found(others, device)
        return [
            contender(label, make, oracle, initial, gradients, peer=label in found)
            for label, make in (makes | found).items()
        ]

    name = "-".join(filter(None, ["gpu" if device == "cuda" else "", rule, model, dtype_name, more.pop("suffix", "")]))
    about = {"warm": ", data in the cache", "cold": ", cache emptied"}.get(more.get("cache", ""), "")
    named = TITLES.get(model) or "{} tensors of {}".format(*model.split("x"))
    title = f"{RULES[rule]}, {named}, {dtype_name}{about}"
    # a copy and the states for each, the first copy and the gradients, and the ceiling
    contenders = len(builds) + 4 * bool(others)
    memory = numel(shapes) * dtype.itemsize * (contenders * (elements_moved - 1) // 2 + 2) + nbytes
    return Case(name, title, nbytes, LIMIT, build, partial(ceilings.memory, nbytes, device), targets, dtype_name,
                device, memory=memory, absent=partial(peers.absent, others, device), **more)  # fmt: skip


def shapes_of(model: str) -> list[Shape]:
    """Of a name in the registry, or of `NxM`: N tensors of M elements."""
    if model in MODELS:
        return MODELS[model]
    count, size = map(int, model.split("x"))
    return [(size,)] * count


def stock(cls: type[Optimizer], *only: str, **options: Any) -> dict[str, Build]:
    """torch's own, as a user may ask for them; `only` some of them."""
    ways = {"fused": {"fused": True}, "default": {}, "foreach": {"foreach": True}}
    return {f"torch {way}": partial(cls, **ways[way], **options) for way in only or ways}


class Compiled:
    """A torch optimizer whose step() is compiled, with the learning rate a tensor, as torch's tutorial has it."""

    def __init__(self, params: list[Tensor], cls: type[Optimizer] = AdamW, lr: float = 1e-3):
        self.optimizer = cls(params, lr=torch.tensor(lr))
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups
        self.step = torch.compile(self.optimizer.step)


def cases() -> list[Case]:
    adamw = by_torch(AdamW)
    small, against = {**stock(AdamW), "fusedopt": fused.AdamW}, {"others": "adamw"}
    every = {**small, "torch compiled": Compiled}
    sgd, lion = {"lr": 1e-3, "momentum": 0.9}, {"lr": 1e-4, "weight_decay": 0.1}
    over_fused, over_default = partial(Target, "fusedopt", "torch fused"), partial(Target, "fusedopt", "torch default")
    of_stream = Target("fusedopt", ceilings.STREAM, 0.9)
    rmsprop = {**stock(RMSprop, "default", "foreach"), "fusedopt": fused.RMSprop}
    warm, cold = {"in_a_row": 10, "cache": "warm"}, {"cache": "cold", "suffix": "cold"}
    return [
        case("adamw", "2000x64", "f32", 7, adamw, small, over_fused(15.0), **warm, **against),
        case("adamw", "2000x64", "f32", 7, adamw, small, **cold),
        case("adamw", "gpt2-small", "f32", 7, adamw, every, over_fused(1.0), over_default(3.5), of_stream,
             **against),
        case("adamw", "gpt2-small", "bf16", 7, adamw, small, over_fused(1.4), **against),
        case("adamw", "vit-tiny", "f32", 7, adamw, small, **against),
        case("adamw", "vit-tiny", "bf16", 7, adamw, small, **against),
        case("adamw", "llama-1b-shard", "f32", 7, adamw, small, quick=False),
        case("adamw", "one-128m", "f32", 7, adamw, small, quick=False),
        case("adam", "gpt2-small", "f32", 7, by_torch(Adam), {**stock(Adam, "fused"), "fusedopt": fused.Adam},
             quick=False),
        case("rmsprop", "gpt2-small", "f32", 5, by_torch(RMSprop), rmsprop, over_default(3.3), of_stream),
        case("rmsprop", "gpt2-small", "bf16", 5, by_torch(RMSprop), rmsprop, quick=False),
        case("adagrad", "gpt2-small", "f32", 5, by_torch(Adagrad), {**stock(Adagrad), "fusedopt": fused.Adagrad},
             over_default(3.0), of_stream),
        *(case("sgd-momentum", "gpt2-small", dtype, 5, by_torch(SGD, **sgd),
               {**stock(SGD, **sgd), "fusedopt": partial(fused.SGD, **sgd)}, quick=False) for dtype in DTYPES),
        case("lion", "gpt2-small", "f32", 5, partial(_lion, **lion), {"fusedopt": partial(fused.Lion, **lion)}),
        case("lion", "gpt2-small", "bf16", 5, partial(_lion, **lion), {"fusedopt": partial(fused.Lion, **lion)},
             quick=False),
        *(case("adamw", f"{count}x64", "f32", 7, adamw, small, **warm, sweep=("tensors", count), suffix="sweep")
          for count in TENSOR_COUNTS),
    ]  # fmt: skip
