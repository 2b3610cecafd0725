"""Adagrad."""

from __future__ import annotations

import torch
from torch.optim.adagrad import adagrad

from fusedopt.optim.engine import FusedStep


class Adagrad(FusedStep, torch.optim.Adagrad):
    """Same as `torch.optim.Adagrad`, in one fused pass. Sparse gradients go to PyTorch's own kernels.

        s <- s + g^2
        p <- p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    Args: those of `torch.optim.Adagrad`, and the keywords that `fusedopt.optim.Adam` adds.

    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods", 2011; `torch.optim.Adagrad`.
    """

    rule, states = "adagrad", ("sum",)
    hyper = ("lr", "lr_decay", "eps", "weight_decay")
    functional = staticmethod(adagrad)
