"""What Triton's compiler is told."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def options(device: torch.device, threads: int) -> dict[str, Any]:
    """For a kernel whose programs have so many threads."""
    # contraction as in C++; Triton 3.10 changes its default
    options = {"num_warps": threads // 32, "enable_fp_fusion": True}
    if device.type == "cuda" and torch.version.hip is None:
        # no kernel needs as many; but without a limit ptxas spills a register now and then to fit one more program
        options["maxnreg"] = min(128, 65536 // threads)
    elif device.type == "cuda":
        options["num_warps"] = threads // torch.cuda.get_device_properties(device).warp_size
    return options
