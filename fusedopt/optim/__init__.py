"""Fused optimizers, drop-in for torch.optim: same constructors, defaults, errors, state_dict and numbers.

    import torch.optim as optim      ->      from fusedopt import optim

Each class subclasses its torch namesake and adds keywords: `backend`, "auto" (the fastest there is), "cpu", "cuda",
"triton" or "reference"; `max_norm` and `skip_non_finite`, clipping in the step; `state_dtype`, `master_weights`,
`stochastic_rounding` and `ema_decay`, at which precision states and weights are kept, and their average. Lion and LAMB
are added. Every other name of torch.optim is torch's own, `lr_scheduler` too.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.optim
from torch.optim import lr_scheduler, swa_utils

from fusedopt.optim.adagrad import Adagrad
from fusedopt.optim.adam import Adam, AdamW
from fusedopt.optim.lamb import LAMB
from fusedopt.optim.lion import Lion
from fusedopt.optim.rmsprop import RMSprop
from fusedopt.optim.sgd import SGD

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "lr_scheduler", "swa_utils"]

# `from fusedopt.optim.lr_scheduler import StepLR` works as it does with torch.optim
sys.modules[f"{__name__}.lr_scheduler"] = lr_scheduler
sys.modules[f"{__name__}.swa_utils"] = swa_utils


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})
