"""Fused losses, drop-in for torch.nn's. Every other name of torch.nn resolves to torch's own.

criterion = nn.CrossEntropyLoss()      ->      criterion = fusedopt.nn.CrossEntropyLoss()
"""

from __future__ import annotations

from typing import Any

import torch.nn

from fusedopt.nn import functional
from fusedopt.nn.distillation import LinearDistillationLoss
from fusedopt.nn.linear import LinearCrossEntropyLoss
from fusedopt.nn.modules import CrossEntropyLoss
from fusedopt.nn.mse import MSELoss

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "LinearDistillationLoss", "MSELoss", "functional"]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
