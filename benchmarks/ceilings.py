"""What no contender can pass: the memory's own speed over as many bytes, measured in the same turns.

A step that changes its tensors in place is held against the stream; a loss that writes a gradient beside its logits,
and everything on a GPU, against the copy.
"""

from __future__ import annotations

import math

import torch

from .runner import Contender, relative_error

STREAM, COPY = "stream", "copy"


def stream(nbytes: int, device: str = "cpu") -> Contender:
    """Read and write every byte of a float32 array, in place; `nbytes` are both together."""
    x = torch.ones(max(1, nbytes // 8), device=device)
    factor = -1.0

    def error() -> float:
        before = x[:1024].double()
        x.mul_(factor)
        return relative_error(x[:1024], before * factor, x.dtype)

    return Contender(STREAM, lambda: x.mul_(factor), error)


def copy(nbytes: int, device: str = "cpu") -> Contender:
    """Read a float32 array and write another, into memory that is there already."""
    x = torch.ones(max(1, nbytes // 8), device=device)
    y = torch.empty_like(x)

    def error() -> float:
        y.copy_(x)
        return 0.0 if torch.equal(x[:1024], y[:1024]) else math.inf

    return Contender(COPY, lambda: y.copy_(x), error)


def memory(nbytes: int, device: str = "cpu") -> list[Contender]:
    """Of a case that changes its tensors in place."""
    return [copy(nbytes, device) if device == "cuda" else stream(nbytes)]
