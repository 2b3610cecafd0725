"""Optimizer steps on a GPU: large models against the device's own copy, small tensors against stock's host time."""

from __future__ import annotations

from functools import partial

import torch
from torch.optim import Adagrad, Adam, AdamW, RMSprop

from fusedopt import backends
from fusedopt import optim as fused

from . import cases_optim
from .cases_optim import Build, Compiled, by_torch, stock
from .ceilings import COPY
from .runner import Case, Target
from .shapes import TENSOR_COUNTS

DEVICE = "cuda"
IN_A_ROW = 10  # as in training nobody waits for a step before the next is queued


def _ours(cls: type[torch.optim.Optimizer]) -> dict[str, Build]:
    """The default, and Triton beside it where that is another."""
    if backends.available()["cuda"] is not True:
        return {"fusedopt triton": partial(cls, backend="triton")}
    on = {"fusedopt": cls}
    return on | ({"fusedopt triton": partial(cls, backend="triton")} if backends.available()["triton"] is True else {})


def cases() -> list[Case]:
    case = partial(cases_optim.case, device=DEVICE, in_a_row=IN_A_ROW)
    of_copy = Target("fusedopt", COPY, 0.93)
    adamw = stock(AdamW, "fused", "foreach") | _ours(fused.AdamW)
    every = adamw | {"torch compiled": Compiled}
    large = (
        Target("fusedopt", "torch fused", 1.1),
        Target("fusedopt", "torch foreach", 1.5),
        Target("fusedopt triton", "torch fused", 1.0),
    )
    many = (Target("fusedopt", "torch fused", 8.0), Target("fusedopt triton", "torch fused", 3.0))
    host = (
        Target("fusedopt", "torch fused", 10.0, "host_ms"),
        Target("fusedopt triton", "torch fused", 3.0, "host_ms"),
    )
    rule = by_torch(AdamW)
    return [
        case("adam", "one-1b", "f32", 7, by_torch(Adam), _ours(fused.Adam), of_copy),
        case("rmsprop", "one-1b", "f32", 5, by_torch(RMSprop), _ours(fused.RMSprop), of_copy),
        case("adagrad", "one-1b", "f32", 5, by_torch(Adagrad), _ours(fused.Adagrad), of_copy),
        case("adam", "one-1b", "bf16", 7, by_torch(Adam), _ours(fused.Adam), of_copy),
        case("adamw", "gpt2-small", "f32", 7, rule, every, *large, others="adamw"),
        case("adamw", "gpt2-small", "bf16", 7, rule, adamw, *large, others="adamw"),
        case("adamw", "gpt2-xl", "bf16", 7, rule, adamw, *large, others="adamw"),
        case("adamw", "llama-1b-shard", "f32", 7, rule, adamw, *large, others="adamw"),
        case("adamw", "llama-7b-shard", "f32", 7, rule, adamw, *large, others="adamw"),
        case("adamw", "vit-tiny", "f32", 7, rule, adamw, others="adamw"),
        case("adamw", "2000x1000", "f32", 7, rule, adamw, *many, others="adamw", cache="warm"),
        case("adamw", "1000x64", "f32", 7, rule, adamw, *host, others="adamw", cache="warm"),
        *(case("adamw", f"{count}x64", "f32", 7, rule, adamw, cache="warm", sweep=("tensors", count), suffix="sweep")
          for count in TENSOR_COUNTS),
    ]  # fmt: skip
