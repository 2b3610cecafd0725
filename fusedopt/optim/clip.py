"""Clipping by the total norm, in the step: the coefficient is folded into the update, gradients stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor


class Clip:
    """`max_norm` and `skip_non_finite` of one optimizer. A call measures the gradients and returns what GradScaler's
    found_inf and scale are to be taken for: that is how skipping and clipping reach every backend's step.

    Nothing here waits for a device.
    """

    def __init__(self, max_norm: float | None, skip_non_finite: bool) -> None:
        if max_norm is not None and (not isinstance(max_norm, (int, float)) or not max_norm > 0):
            raise ValueError(f"max_norm={max_norm!r} must be a number above 0, inf to measure only, or None")
        self.max_norm, self.skip_non_finite = max_norm, bool(skip_non_finite)
        self.on = max_norm is not None or self.skip_non_finite
        self._norm: Tensor | None = None
        self._skipped: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        if not self.on:
            raise AttributeError("the gradients' norm is measured with max_norm=... (inf: measured, never clipped)")
        return torch.zeros(()) if self._norm is None else self._norm.clone()  # the step writes over its own

    @property
    def skipped(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64) if self._skipped is None else self._skipped.clone()

    def __call__(self, total: Tensor, found_inf: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """(found_inf, scale) with the skipped step and the coefficient in them.

        `total`: () float64, the sum of all gradients' squares; a norm whose square is no float32 is a norm.
        """
        device, dtype = total.device, total.dtype
        scale = torch.ones((), dtype=dtype, device=device) if scale is None else scale.to(device, dtype)
        norm = total.sqrt() / scale
        if self.max_norm is not None:
            # as torch.nn.utils.clip_grad_norm_ has it
            scale = scale / (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.skip_non_finite:
            skips = (~norm.isfinite()).to(dtype)
            if self._skipped is None or self._skipped.device != device:
                self._skipped = self.skipped.to(device)
            already = 0.0 if found_inf is None else (found_inf.to(device, dtype) != 0).to(dtype)
            self._skipped += (skips * (1 - already)).to(torch.int64)
            found_inf = skips if found_inf is None else skips + already
        if self._norm is None or self._norm.device != device:
            self._norm = torch.empty_like(norm)
        self._norm.copy_(norm)  # in place, for graphs that replay this
        return found_inf, scale


def squares_by_torch(grads: list[Tensor]) -> list[Tensor]:
    """Sums of squares of gradients that PyTorch steps."""
    if not grads:
        return []
    grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    grads = [torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad for grad in grads]
    norms: list[Tensor] = []
    for wide in (torch.float32, torch.float64):
        of_dtype = [grad for grad in grads if _accumulator(grad) == wide]
        norms += torch._foreach_norm(of_dtype, 2.0, dtype=wide) if of_dtype else []
    return [norm.square() for norm in norms]


def _accumulator(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 or grad.device.type == "cpu" else torch.float32
