"""Adam and AdamW."""

from __future__ import annotations

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from fusedopt.optim.engine import FusedStep


class Adam(FusedStep, torch.optim.Adam):
    """Same as `torch.optim.Adam`, in one fused pass over parameter, gradient and both moments.

        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Args: those of `torch.optim.Adam`, and

        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (PyTorch's own kernels).
        max_norm (float): clip by the total norm of all gradients, as `torch.nn.utils.clip_grad_norm_` would on float32
            copies of them, but with the coefficient (float32 on GPUs) folded into the update: the gradients stay as
            they are, and GradScaler needs no `unscale_`. `grad_norm` tells the norm, unscaled and before clipping. inf:
            measure only.
        skip_non_finite (bool): leave out a step whose gradients' norm is inf or NaN, step counters included;
            `skipped_steps` counts them. Otherwise such a step does what stock's does.

    Raises: what `torch.optim.Adam` raises; `BackendUnavailableError` for a backend that cannot run here; ValueError for
    a max_norm that is not above 0, and for either option with differentiable=True.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015; `torch.optim.Adam`.
    """

    rule, states = "adam", ("exp_avg", "exp_avg_sq")
    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay")
    options = {"decoupled_weight_decay": ("w", None), "amsgrad": ("_amsgrad", "max_exp_avg_sq")}
    functional = staticmethod(adam)


class AdamW(FusedStep, torch.optim.AdamW):
    """Same as `torch.optim.AdamW`, in one fused pass: Adam with p <- p (1 - lr * weight_decay) ahead of it.

    Args: those of `torch.optim.AdamW`, and `backend`, `max_norm`, `skip_non_finite` as for `fusedopt.optim.Adam`.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019; `torch.optim.AdamW`.
    """

    rule, states = "adamw", ("exp_avg", "exp_avg_sq")
    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay")
    options = {"amsgrad": ("_amsgrad", "max_exp_avg_sq")}
    functional = staticmethod(adamw)
