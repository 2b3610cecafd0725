"""RMSprop."""

from __future__ import annotations

import torch
from torch.optim.rmsprop import rmsprop

from fusedopt.optim.engine import FusedStep


class RMSprop(FusedStep, torch.optim.RMSprop):
    """Same as `torch.optim.RMSprop`, in one fused pass; `centered` and `momentum` add a state each.

        v <- alpha v + (1 - alpha) g^2
        p <- p - lr g / (sqrt(v) + eps)

    One departure: where rounding makes the centered variance v - mean(g)^2 negative it is taken as 0, not as NaN.

    Args: those of `torch.optim.RMSprop`, and the keywords that `fusedopt.optim.Adam` adds.

    Source: Hinton, lecture 6e, 2012; Graves 2013 for `centered`; `torch.optim.RMSprop`.
    """

    rule, states = "rmsprop", ("square_avg",)
    hyper = ("lr", "alpha", "eps", "weight_decay", "momentum")
    options = {"centered": ("_centered", "grad_avg"), "momentum": ("_momentum", "momentum_buffer")}
    functional = staticmethod(rmsprop)
