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
        ema_decay (float): keep `state[p]["ema"]`, the average of the weights, float32 (float64, complex for such
            parameters), as `AveragedModel` with `get_ema_multi_avg_fn` would of a float32 copy; it moves for parameters
            without a gradient too, and not in a step that is skipped. `with ema_weights():` puts it in their place.
        state_dtype (torch.dtype or str): of the states: torch.float32, torch.bfloat16 or "8bit", blockwise codes of
            which `state_dict()` makes float32; tensors of fewer than 4096 elements then have float32 states. None: the
            parameter's dtype, as stock.
        master_weights (bool): keep `state[p]["master"]`, of bfloat16 parameters the int16 that they lack of a float32,
            of float16 ones a float32; updates go there, and parameters are its rounding.
        stochastic_rounding (bool): of bfloat16 parameters without a master, of bfloat16 states and of 8-bit ones that
            are squares, whose decay is below half a code a step (those of either sign go to the nearest code), by
            Philox keyed by step, parameter and element as it lies.

    Options belong to the instance, not to groups, and cannot be changed: their setters raise AttributeError.

    Raises: what `torch.optim.Adam` raises; `BackendUnavailableError` for a backend that cannot run here; ValueError for
    a max_norm that is not above 0, for an option that a parameter's dtype cannot take (float32 ones beside narrower
    ones stay as they are) or that serves none, and for any of them with differentiable=True.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015; `torch.optim.Adam`.
    """

    rule, states = "adam", ("exp_avg", "exp_avg_sq")
    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay")
    options = {"decoupled_weight_decay": ("w", None), "amsgrad": ("_amsgrad", "max_exp_avg_sq")}
    functional = staticmethod(adam)


class AdamW(FusedStep, torch.optim.AdamW):
    """Same as `torch.optim.AdamW`, in one fused pass: Adam with p <- p (1 - lr * weight_decay) ahead of it.

    Args: those of `torch.optim.AdamW`, and the keywords that `fusedopt.optim.Adam` adds.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019; `torch.optim.AdamW`.
    """

    rule, states = "adamw", ("exp_avg", "exp_avg_sq")
    hyper = ("lr", "beta1", "beta2", "eps", "weight_decay")
    options = {"amsgrad": ("_amsgrad", "max_exp_avg_sq")}
    functional = staticmethod(adamw)
