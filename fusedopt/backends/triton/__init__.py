"""The Triton engine: GPUs without the CUDA library, and AMD's and Intel's. `table.DeviceTable` takes the steps.

Triton is imported when a table is first made, not before: it costs a good part of a second, and not every machine that
has it has a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from fusedopt.backends.triton.table import DeviceTable

name = "triton"
device_types = frozenset({"cuda", "xpu"})  # PyTorch calls AMD's GPUs "cuda" too

# parameter, gradient, state: as csrc/cpu/step.cpp has them
_DTYPES = frozenset(
    {
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float64, torch.float64, torch.float64),
    }
)


class Launch(NamedTuple):
    """All tensors of a step that share a rule and dtypes, laid out as csrc/step.h says.

    The arrays are NumPy's, or CPU tensors; they are read during the step only.
    """

    rule: str
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    rows: Any  # (n_rows, 8) int64
    grads: Any  # (n_rows,) int64
    chunk_rows: Any  # (n_chunks,) int32
    changed: bool  # any of the three, since the table's last step


def available() -> bool | str:
    if not _installed():
        return "Triton is not installed"
    if not _gpu_visible():
        return "no GPU is visible to PyTorch"
    return _import_error() or True


def remedy() -> str:
    """What turns this backend on, where `available()` gives a reason."""
    if not _installed():
        return "pip install triton"
    if not _gpu_visible():
        return "run where torch.cuda.is_available() or torch.xpu.is_available() is true"
    return "install the Triton that belongs to your PyTorch: pip install --force-reinstall torch"


def supports(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> bool:
    """Whether there is a kernel for a rule, by its name, with these dtypes."""
    return (param, grad, state) in _DTYPES and rule in rule_names()


@functools.cache
def rule_names() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """rule name -> (hyperparameters in order, states in order), as the Triton mirror has them."""
    mirror = importlib.import_module("fusedopt.backends.triton.rules")
    return {name: (rule.hyper, rule.states) for name, rule in mirror.RULES.items()}


def new_table(device: torch.device) -> DeviceTable:
    """An empty table of an optimizer's tensors: one per device and stream, and one for each graph capture."""
    return importlib.import_module("fusedopt.backends.triton.table").DeviceTable(device)


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gpu_visible() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available()


@functools.cache
def _import_error() -> str | None:
    try:
        rule_names()
    except Exception as error:  # a broken installation raises what it likes
        return f"Triton does not load ({type(error).__name__}: {error})"
    return None
