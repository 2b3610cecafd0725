"""Where kernels run. One interface, one module per backend; `available()` says which can run here, and why not.

A backend has a `name` and `available()`: True, or the reason why it cannot run here, and then `remedy()` tells what
would mend that. It offers, each optional:

- `device_types`: the `torch.device.type`s whose tensors it takes; `covers(device)`: whether this very device is among
  them, where not all of a type need be;
- `supports(rule, param, grad, state)` and `step(table, groups)` for optimizers;
- `cross_entropy_forward(...)` and `cross_entropy_backward(...)` for losses, of logits of `LOSS_DTYPES` as matrices, or
  with pixels too where `takes_pixels`; with them `target_factor`, `total_loss`, `new_gradient` and `scale_`; and
  `squared_error(...)` and `squared_error_backward(...)`, of the same dtypes.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

# Fastest first: what "auto" tries. reference takes everything.
NAMES = ("cpu", "cuda", "triton", "reference")


@functools.cache
def module(name: str) -> ModuleType:
    """The backend of that name, imported when it is first asked for."""
    return importlib.import_module(f"fusedopt.backends.{name}")


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run here; the message says why and what would mend it."""


def available() -> dict[str, bool | str]:
    """Every backend: True where it can run on this machine, otherwise the reason why not."""
    return {name: module(name).available() for name in NAMES}


def check(name: str) -> str:
    """Return `name` if it is "auto" or a backend that can run here; raise otherwise.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: there is, but not on this machine.
    """
    if name == "auto":
        return name
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is not one of {', '.join(map(repr, ('auto', *NAMES)))}")
    reason = module(name).available()
    if reason is not True:
        raise BackendUnavailableError(
            f"backend={name!r} cannot run here: {reason}; to mend it: {module(name).remedy()}"
        )
    return name


def select(name: str, device: torch.device) -> ModuleType:
    """The backend that serves tensors on `device`, when the user asked for `name` ("auto": the fastest there is)."""
    if name != "auto":
        return module(name)
    # drivers are asked only for tensors of their own: a process that trains on the CPU leaves its GPUs alone
    return next(m for m in map(module, NAMES) if _of_type(m, device) and m.available() is True and takes(m, device))


def _constant(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, which would import all of torch._dynamo, two seconds of it."""
    function._dynamo_marked_constant = True
    return function


@_constant
def for_losses(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend whose loss kernels take logits so, when the user asked for `name`; "" for torch's own."""
    if module("cpu").available() is not True:  # its library holds CUDA's kernels too
        return ""
    backend = select(name, device)
    return backend.name if dtype in getattr(backend, "LOSS_DTYPES", ()) and takes(backend, device) else ""


@_constant
def takes_pixels(name: str) -> bool:
    """Whether a backend's loss kernels take (N, C, d1, ...) as it lies."""
    return module(name).takes_pixels


def _of_type(backend: ModuleType, device: torch.device) -> bool:
    return backend.device_types is None or device.type in backend.device_types


def takes(backend: ModuleType, device: torch.device) -> bool:
    """Whether `backend`, which can run here, runs tensors that live on `device`."""
    return _of_type(backend, device) and (not hasattr(backend, "covers") or backend.covers(device))
