"""Optimizer steps on a GPU: large models against the device's own copy, small tensors against stock's host time."""

from __future__ import annotations

from functools import partial

import torch
from torch.optim import Adagrad, Adam, AdamW, RMSprop

from fusedopt import backends
from fusedopt import optim as fused

from .cases_optim import GPT2_SMALL, Build, by_torch, case
from .runner import STREAM, Case, Target

BILLION = [(8192, 8192)] * 15  # 1.007e9 parameters
# one of 16 shards of Llama 7B, as FSDP cuts it along the first dimension: 421 M parameters
_LAYER = [*[(256, 4096)] * 4, (688, 4096), (688, 4096), (256, 11008), (256,), (256,)]
LLAMA_7B_SHARD = [(2000, 4096), *(_LAYER * 32), (256,), (2000, 4096)]
IN_A_ROW = 10  # as in training nobody waits for a step before the next is queued


def _ours(cls: type[torch.optim.Optimizer]) -> dict[str, Build]:
    """The default, and Triton beside it where that is another."""
    if backends.available()["cuda"] is not True:
        return {"fusedopt triton": partial(cls, backend="triton")}
    on = {"fusedopt": cls}
    return on | ({"fusedopt triton": partial(cls, backend="triton")} if backends.available()["triton"] is True else {})


def cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    on_gpu = partial(case, in_a_row=IN_A_ROW, device="cuda")
    of_copy = Target("fusedopt", STREAM, 0.93)
    stock_adamw = {"torch fused": partial(AdamW, fused=True), "torch foreach": partial(AdamW, foreach=True)}
    adamw = stock_adamw | _ours(fused.AdamW)
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
    return [
        on_gpu("gpu-adam-1b-f32", "Adam, 1 B parameters, f32", BILLION, f32, 28, by_torch(Adam), _ours(fused.Adam),
               of_copy),
        on_gpu("gpu-rmsprop-1b-f32", "RMSprop, 1 B parameters, f32", BILLION, f32, 20, by_torch(RMSprop),
               _ours(fused.RMSprop), of_copy),
        on_gpu("gpu-adagrad-1b-f32", "Adagrad, 1 B parameters, f32", BILLION, f32, 20, by_torch(Adagrad),
               _ours(fused.Adagrad), of_copy),
        on_gpu("gpu-adam-1b-bf16", "Adam, 1 B parameters, bf16", BILLION, bf16, 14, by_torch(Adam), _ours(fused.Adam),
               of_copy),
        on_gpu("gpu-adamw-gpt2-small-f32", "AdamW, GPT-2 small, f32", GPT2_SMALL, f32, 28, by_torch(AdamW), adamw,
               *large),
        on_gpu("gpu-adamw-gpt2-small-bf16", "AdamW, GPT-2 small, bf16", GPT2_SMALL, bf16, 14, by_torch(AdamW), adamw,
               *large),
        on_gpu("gpu-adamw-llama-7b-shard-f32", "AdamW, 1/16 of Llama 7B, f32", LLAMA_7B_SHARD, f32, 28,
               by_torch(AdamW), adamw, *large),
        on_gpu("gpu-adamw-2000x1000-f32", "AdamW, 2000 tensors of 1000, f32", [(1000,)] * 2000, f32, 28,
               by_torch(AdamW), adamw, *many),
        on_gpu("gpu-adamw-1000x64-f32", "AdamW, 1000 tensors of 64, f32", [(64,)] * 1000, f32, 28, by_torch(AdamW),
               adamw, *host),
    ]  # fmt: skip
