"""What ``--weights``, ``--state`` and ``--ema`` make of a contender, stock's nearest to it, and the bytes they take."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from .cli import STATES, WEIGHTS


def weight_dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32 if args.weights == "f32" else torch.bfloat16


def fused_options(args: argparse.Namespace) -> dict[str, Any]:
    """fusedopt's keywords for all that is to happen within the step; none for a plain one."""
    options = {"max_norm": args.max_norm or None, "ema_decay": args.ema, **STATES[args.state], **WEIGHTS[args.weights]}
    if options["state_dtype"] == weight_dtype(args):
        del options["state_dtype"]  # as stock keeps them
    return {name: value for name, value in options.items() if value is not None}


def stock_falls_short(args: argparse.Namespace) -> str:
    """What stock does instead of what was asked for; "" where it does the same."""
    as_weights = "f32" if args.weights == "f32" else "bf16"
    if args.state == as_weights and args.weights in ("f32", "bf16"):
        return ""
    named = {"f32": "float32", "bf16": "bfloat16"}[as_weights]
    return (
        f"stock has {named} weights and states, rounded to nearest: "
        f"torch's optimizers have no --weights {args.weights} --state {args.state}"
    )


def bytes_per_parameter(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> dict[str, float]:
    """Of this process's tensors that last from step to step: weights, optimizer states, masters, average."""
    params = list(model.parameters())
    held = {"weights": sum(map(_bytes_here, params)), "states": 0, "masters": 0, "average": 0}
    held["average"] += sum(map(_bytes_here, average.parameters())) if average is not None else 0
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                held[{"master": "masters", "ema": "average"}.get(key, "states")] += _bytes_here(value)
    count = sum(p.numel() for p in params)
    return {name: round(total / count, 4) for name, total in held.items()}


def _bytes_here(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes  # of a DTensor this rank's part
