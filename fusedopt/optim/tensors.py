"""What is asked of tensors before their memory is handed on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


def check_memory(param: Tensor, grad: Tensor) -> None:
    """Raise where torch's kernels would write to address 0, or do half of an update before they notice."""
    for tensor, what in ((param, "a parameter"), (grad, "the gradient of a parameter")):
        plain = type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided
        if plain and tensor.numel() and not tensor.untyped_storage().nbytes():
            raise RuntimeError(
                f"{what} of shape {tuple(param.shape)} has no memory: its storage was resized to 0 bytes (FSDP does so "
                "outside of forward and backward); give it back before step()"
            )
    if grad.device != param.device:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} is on device {param.device}, its gradient on {grad.device}: "
            "was .data moved after backward()?"
        )


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Same memory order, where the shapes are the same: strides of dimensions of extent 1 do not matter."""
    return a.stride() == b.stride() or all(
        s == t or n == 1 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True)
    )
