"""The Triton engine: GPUs without the CUDA library, and AMD's and Intel's. `table.DeviceTable` takes the steps.

It needs no nvcc and no CUDA toolkit, for Triton brings its compilers. It does need the native library's CPU core, built
with or without CUDA, which gathers a step's tensors whatever device they are on.

Triton is imported when a table is first made, not before: it costs a good part of a second, and not every machine that
has it has a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.backends import cpu
from fusedopt.backends.triton.losses import (
    LOSS_DTYPES,
    cross_entropy_backward,
    cross_entropy_forward,
    new_gradient,
    scale_,
    squared_error,
    squared_error_backward,
    takes_pixels,
    target_factor,
    total_loss,
)

if TYPE_CHECKING:
    from fusedopt.backends.triton.table import DeviceTable

__all__ = [
    "LOSS_DTYPES",
    "Stepper",
    "available",
    "capturing",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "new_gradient",
    "remedy",
    "scale_",
    "squared_error",
    "squared_error_backward",
    "supports",
    "takes_pixels",
    "target_factor",
    "total_loss",
]
name = "triton"
device_types = frozenset({"cuda", "xpu"})  # PyTorch calls AMD's GPUs "cuda" too

# parameter, gradient, state of the plain update, as csrc/cpu/step.cpp has them
PLAIN = frozenset(
    {
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float64, torch.float64, torch.float64),
    }
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Precision = tuple[float, bool, int]  # csrc/step.h's: ema_weight, stochastic, seed


class Launch(NamedTuple):
    """All tensors of a step that share a rule and dtypes, laid out as csrc/device_step.h says.

    The arrays are NumPy's, or CPU tensors; they are read during the step only.
    """

    rule: str
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype | str  # "8bit": codes
    rows: Any  # (n_rows, 14) int64
    grads: Any  # (n_rows,) int64
    chunk_rows: Any  # (n_chunks,) int32
    changed: bool  # any of the three, since the table's last step
    holders: int = 0  # see csrc/gather.h's Slot


def available() -> bool | str:
    if not _installed():
        return "Triton is not installed"
    if not _gpu_visible():
        return "no GPU is visible to PyTorch"
    if cpu.available() is not True:
        return f"it needs the native library: {cpu.available()}"
    return _import_error() or True


def remedy() -> str:
    """What turns this backend on, where `available()` gives a reason."""
    if not _installed():
        return "pip install triton"
    if not _gpu_visible():
        return "run where torch.cuda.is_available() or torch.xpu.is_available() is true"
    if cpu.available() is not True:
        return cpu.remedy()
    return "install the Triton that belongs to your PyTorch: pip install --force-reinstall torch"


def supports(rule: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype | str) -> bool:
    """Whether there is a kernel for a rule with these dtypes; "8bit" stands for codes."""
    precise = param in _FLOATS and grad in _FLOATS and (state in _FLOATS or state == "8bit")
    return (precise or (param, grad, state) in PLAIN) and _name_of(rule) in rule_names()


@functools.cache
def _name_of(rule: int) -> str:
    return list(cpu.rules())[rule]


@functools.cache
def rule_names() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """rule name -> (hyperparameters in order, states in order), as the Triton mirror has them."""
    mirror = importlib.import_module("fusedopt.backends.triton.rules")
    return {name: (rule.hyper, rule.states) for name, rule in mirror.RULES.items()}


def new_table(device: torch.device) -> DeviceTable:
    """An empty table of an optimizer's tensors: one per device and stream, and one for each graph capture."""
    return importlib.import_module("fusedopt.backends.triton.table").DeviceTable(device)


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the device's current stream."""
    return device.type != "cpu" and torch.get_device_module(device).is_current_stream_capturing()


class Stepper:
    """Steps the tensors of one optimizer on one device; as fusedopt.backends.cuda.Stepper."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._by_stream: dict[Any, tuple[Any, DeviceTable]] = {}
        self._captured: list[tuple[Any, DeviceTable]] = []
        self._measured: tuple[Any, DeviceTable] | None = None  # in this capture, by a step that has yet to update

    def step(
        self,
        table: Any,
        groups: list[tuple[list[float], float, int, bool]],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        precision: Precision | None = None,
    ) -> int:
        """Update the table's active tensors on this device; returns the number of kernels launched."""
        sent, launches = self._laid_out(table)
        self._measured = None
        if not launches:
            return 0
        scalars = [
            None if s is None else s.to(self.device, torch.float32, non_blocking=True) for s in (found_inf, grad_scale)
        ]
        return sent.step(launches, _group_words(groups), *scalars, precision)

    def sum_of_squares(self, table: Any, groups: list[tuple[list[float], float, int, bool]]) -> dict[int, Tensor]:
        """() float64 on the device, by who holds the tensors: of the gradients that the next step() takes, in one
        order whatever the hardware.
        """
        sent, launches = self._laid_out(table)
        if not launches:
            return {0: torch.zeros((), dtype=torch.float64, device=self.device)}
        return sent.sum_of_squares(launches, _group_words(groups))

    def _laid_out(self, table: Any) -> tuple[DeviceTable, list[Launch]]:
        """The tables of the current stream, or of the graph that is captured on it."""
        stream = None if self.device.type == "cpu" else torch.get_device_module(self.device).current_stream(self.device)
        if self._measured is not None:
            plan, sent = self._measured
        elif capturing(self.device):
            plan, sent = self._measured = cpu._native.DevicePlan(), new_table(self.device)
            self._captured.append((plan, sent))
        else:
            if stream not in self._by_stream:
                self._by_stream[stream] = cpu._native.DevicePlan(), new_table(self.device)
            plan, sent = self._by_stream[stream]
        launches = [
            Launch(
                _name_of(rule),
                *(getattr(torch, dtype, dtype) for dtype in dtypes),
                _words(rows, torch.int64).view(-1, 14),
                _words(grads, torch.int64),
                _words(chunk_rows, torch.int32),
                changed,
                holders,
            )
            for rule, dtypes, rows, grads, chunk_rows, changed, holders in plan.lay_out(table, self.device.index or 0)
        ]
        return sent, launches


def _words(memory: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype) if memory.nbytes else torch.empty(0, dtype=dtype)


def _group_words(groups: list[tuple[list[float], float, int, bool]]) -> Tensor:
    """Groups as csrc/device_step.h's DeviceGroup: hyper, grad_factor, the address of lr, whether it is float64."""
    floats = torch.tensor(
        [[*hyper, *[0.0] * (8 - len(hyper)), factor] for hyper, factor, _, _ in groups], dtype=torch.float64
    )
    rest = torch.tensor([[address, is_double] for _, _, address, is_double in groups], dtype=torch.int64)
    return torch.cat([floats.view(torch.int64), rest], dim=1)


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
