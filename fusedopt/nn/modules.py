"""Loss modules: torch.nn's, computed by fusedopt.nn.functional."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt import backends
from fusedopt.nn import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Same as `torch.nn.CrossEntropyLoss`, with loss and gradient computed in one pass over the logits.

    Two departures: the loss of float16 and bfloat16 logits is float32, and the gradient of "mean" and "sum" is made
    during forward (see `fusedopt.nn.functional.cross_entropy`).

    Args: those of `torch.nn.CrossEntropyLoss`, and

        inplace (bool): let the gradient overwrite the logits, which then hold no logits any more (default: False).
        backend (str): "auto", "cpu", "cuda", "triton" or "reference".

    Shape: input (C), (N, C) or (N, C, d1, ...); target () / (N) / (N, d1, ...) int64 class indices, or probabilities
    of the input's shape; output a scalar, or the target's index shape for reduction "none".

    Source: `torch.nn.CrossEntropyLoss`.
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
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace = inplace
        self.backend = backends.check(backend)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace=self.inplace,
            backend=self.backend,
        )
