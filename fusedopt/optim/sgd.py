"""SGD."""

from __future__ import annotations

import torch
from torch.optim.sgd import sgd

from fusedopt.optim.engine import FusedStep


class SGD(FusedStep, torch.optim.SGD):
    """Same as `torch.optim.SGD`, in one fused pass. Sparse gradients go to PyTorch's own kernels.

        b <- g at a tensor's first step, then momentum * b + (1 - dampening) g
        p <- p - lr b        (nesterov: p - lr (g + momentum * b))

    Args: those of `torch.optim.SGD`, and the keywords that `fusedopt.optim.Adam` adds.

    Source: Sutskever et al., "On the importance of initialization and momentum", 2013; `torch.optim.SGD`.
    """

    rule, states = "sgd", ()
    hyper = ("lr", "weight_decay", "momentum", "dampening", "nesterov")
    options = {"momentum": ("_momentum", "momentum_buffer")}
    functional = staticmethod(sgd)
