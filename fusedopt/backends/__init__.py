"""Where kernels run. One interface, one module per backend; `available()` says which can run here, and why not.

A backend offers, each optional:

- `device_types`: the `torch.device.type`s whose tensors it takes;
- `supports(rule, param, grad, state)` and `step(table, groups)` for optimizers;
- `cross_entropy_forward(...)` and `cross_entropy_backward(...)` for losses.
"""

from __future__ import annotations

from types import ModuleType

import torch

from fusedopt.backends import cpu, reference

# Fastest first: what "auto" tries. reference takes everything.
_MODULES: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}
_UNBUILT = {
    "cuda": "this version of fusedopt has no CUDA kernels; CUDA tensors run on PyTorch's own",
    "triton": "this version of fusedopt has no Triton kernels; GPU tensors run on PyTorch's own",
}
NAMES = ("cpu", "cuda", "triton", "reference")


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run here; the message says why and what would mend it."""


def available() -> dict[str, bool | str]:
    """Every backend: True where it can run on this machine, otherwise the reason why not."""
    return {name: _MODULES[name].available() if name in _MODULES else _UNBUILT[name] for name in NAMES}


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
    reason = available()[name]
    if reason is not True:
        remedy = f"; to mend it: {cpu.remedy()}" if name == "cpu" else ""
        raise BackendUnavailableError(f"backend={name!r} cannot run here: {reason}{remedy}")
    return name


def select(name: str, device: torch.device) -> ModuleType:
    """The backend that serves tensors on `device`, when the user asked for `name` ("auto": the fastest there is)."""
    if name != "auto":
        return _MODULES[name]
    return next(m for m in _MODULES.values() if m.available() is True and takes(m, device))


def takes(backend: ModuleType, device: torch.device) -> bool:
    """Whether `backend` runs tensors that live on `device`."""
    return backend.device_types is None or device.type in backend.device_types
