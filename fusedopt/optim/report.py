"""Which tensors run where, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Placement(NamedTuple):
    """Where one parameter's update runs, and why there."""

    group: int
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str
    reason: str
