"""Loss modules: torch.nn's, computed by fusedopt.nn.functional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt import backends
from fusedopt.nn import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Same as `torch.nn.CrossEntropyLoss`, with loss and gradient computed in one pass over the logits.

    Two departures: the loss of float16 and bfloat16 logits is float32, and the gradient of "mean" and "sum" is made
    during forward (see `fusedopt.nn.functional.cross_entropy`).

    Args: those of `torch.nn.CrossEntropyLoss`, and

        z_loss (float): weight of the squared log-sum-exp that is added to each row's loss (default: 0).
        softcap (float): logits become softcap tanh(logits / softcap), after the scale (default: None).
        logit_scale (float): multiplies the logits (default: 1).
        inplace (bool): let the gradient overwrite the logits, which then hold no logits any more (default: False).
        return_stats (bool): return `(loss, fusedopt.nn.functional.Stats)` (default: False).
        tp_group (ProcessGroup), vocab_range ((int, int)): the ranks that hold the classes, and which of them are here,
            where the logits are plain tensors; DTensors need neither. See the function.
        backend (str): "auto", "cpu", "cuda", "triton" or "reference".

    Shape: input (C), (N, C) or (N, C, d1, ...); target () / (N) / (N, d1, ...) int64 class indices, or probabilities
    of the input's shape; output a scalar, or the target's index shape for reduction "none".

    Raises:
        TypeError, ValueError: z_loss, softcap or logit_scale is no number, or out of its range.

    Source: `torch.nn.CrossEntropyLoss`; Chowdhery et al. 2022 (PaLM) for the z-loss; Gemma Team 2024 (Gemma 2) for the
    soft cap.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace: bool = False,
        return_stats: bool = False,
        tp_group: Any = None,
        vocab_range: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        functional.check_extras(z_loss, softcap, logit_scale)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.inplace, self.return_stats = inplace, return_stats
        self.tp_group, self.vocab_range = tp_group, vocab_range
        self.backend = backends.check(backend)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, functional.Stats]:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            inplace=self.inplace,
            return_stats=self.return_stats,
            tp_group=self.tp_group,
            vocab_range=self.vocab_range,
            backend=self.backend,
        )
