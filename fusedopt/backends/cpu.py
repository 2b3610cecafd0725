"""The native CPU engine: vector loops built once per instruction set, `torch.get_num_threads()` OpenMP threads."""

from __future__ import annotations

import functools
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch  # before the native library, so that both bind the same OpenMP runtime
from torch import Tensor

try:
    from fusedopt import _native

    _IMPORT_ERROR = None
except ImportError as error:
    _native = None
    _IMPORT_ERROR = str(error)

name = "cpu"
device_types = frozenset({"cpu"})
HUGE = 4 << 20  # bytes from which a buffer is asked onto huge pages


def _forced_isa() -> str | None:
    """Obey FUSEDOPT_CPU; returns what is wrong with it, if anything."""
    wanted = os.environ.get("FUSEDOPT_CPU")
    if not wanted or _native is None or _native.use_cpu_isa(wanted):
        return None
    return f"FUSEDOPT_CPU={wanted!r} is not one of {', '.join(_native.cpu_isas())}, which this machine and build offer"


_ISA_ERROR = _forced_isa()
READY = _native is not None and _ISA_ERROR is None  # a constant, which torch.compile can trace


def build_info() -> dict[str, Any]:
    """What the build wrote down: compiler, OpenMP; or the reason and the remedy where there is no native library."""
    path = Path(__file__).parent.parent / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def available() -> bool | str:
    if _ISA_ERROR is not None:
        return _ISA_ERROR
    if _native is not None:
        return True
    info = build_info()
    if info.get("native") is False:
        return f"the native library was not built: {info['reason']}"
    return f"the native library does not load ({_IMPORT_ERROR})"


def remedy() -> str:
    """What turns this backend on, where `available()` gives a reason."""
    if _ISA_ERROR is not None:
        return "unset FUSEDOPT_CPU, or name one of those"
    return build_info().get(
        "remedy", "reinstall fusedopt with this Python: pip install --force-reinstall --no-deps fusedopt"
    )


def isa() -> str:
    """The instruction set in use: avx512, avx2, baseline, neon or portable."""
    return _native.cpu_isa()


def new_table() -> Any:
    """An empty table of an optimizer's tensors."""
    return _native.Table()


@functools.cache
def rules() -> dict[str, tuple[int, tuple[str, ...], tuple[str, ...], int]]:
    """rule name -> (index, hyperparameters, states, bit mask of the signed states), as the native library has them."""

    def split(names: str) -> tuple[str, ...]:
        return tuple(n.strip() for n in names.split(",") if n.strip())

    return {
        name: (i, split(hyper), split(states), signed)
        for i, (name, hyper, states, _, signed) in enumerate(_native.rules())
    }


@functools.cache
def supports(rule: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype | str) -> bool:
    """Whether there is a loop for a rule with these dtypes; "8bit" stands for codes."""
    return _native.cpu_can_step(rule, *(str(dtype).removeprefix("torch.") for dtype in (param, grad, state)))


def obstacle(tensor: Tensor) -> str:
    """What keeps a native loop from walking a tensor's memory as it lies; "" where nothing does."""
    return _native.obstacle(tensor)


def step(table: Any, groups: list[tuple[list[float], float]], precision: tuple[float, bool, int] | None = None) -> int:
    """Update the table's active tensors; `groups` gives each group's hyperparameters and gradient factor.

    `precision`: the new weights' share in their averages, whether bfloat16 and squares' codes are rounded at random,
    and the seed; None where nothing is kept beside parameters and states of one dtype. Returns the number of launches.
    """
    return table.cpu_step(groups, torch.get_num_threads(), precision)


def sum_of_squares(table: Any) -> dict[int, float]:
    """Of the gradients of the table's active tensors on the CPU, by the number of who holds them: in double, in one
    order whatever the threads."""
    return table.cpu_sum_squares(torch.get_num_threads())


def advised(tensor: Tensor) -> Tensor:
    """`tensor`, fresh and dense, asked onto huge pages when large: first touch is most of a large write's cost."""
    if tensor.numel() * tensor.element_size() >= HUGE:
        _native.advise_huge_pages(tensor)
    return tensor


class _Scratch:
    """The last large buffer handed out, handed out again once nobody holds it.

    The C library returns blocks of 32 MB and more to the system at once, so each step's gradient would be faulted in
    page by page again, at several times the cost of computing it. What is kept is what the step's peak held anyway.
    """

    KEEP = 32 << 20  # bytes: below, malloc keeps its blocks itself

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.storage: torch.UntypedStorage | None = None

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        nbytes = shape.numel() * dtype.itemsize
        if nbytes < self.KEEP:
            return advised(torch.empty(shape, dtype=dtype))
        with self.lock:
            kept = self.storage
            # a count of 1 is this object's own: no tensor, view or array shares the memory any more
            if kept is not None and kept.nbytes() == nbytes and torch._C._storage_Use_Count(kept._cdata) == 1:
                return torch.empty(0, dtype=dtype).set_(kept, 0, shape)
            self.storage = None
            out = advised(torch.empty(shape, dtype=dtype))
            self.storage = out.untyped_storage()
            return out


scratch = _Scratch()


LOSS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
takes_pixels = True


def new_gradient(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the logits' shape and dtype."""
    return scratch.empty(logits.shape, logits.dtype)


def target_factor(target: Tensor, rule: Any, classes: int, mean: bool) -> float:
    """What the sum of row losses is multiplied by: 1, or the mean's reciprocal denominator.

    Raises:
        IndexError: a class index outside [0, classes) that is not ignore_index.
    """
    total = target_total(target, rule.weight, rule.ignore_index, classes)  # checks the range before all else
    if not mean:
        return 1.0
    return 1.0 / total if total != 0.0 else float("inf")  # all ignored: the mean is 0 * inf = NaN, as in stock


def total_loss(rows: Tensor, factor: float) -> Tensor:
    """() of `rows`' dtype: `factor` times their sum."""
    return (rows.sum(dtype=torch.float64) * factor).to(rows.dtype)


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a scalar, in place; where that is 1, nothing moves."""
    return tensor if float(factor) == 1.0 else tensor.mul_(factor)


def squared_error(
    input: Tensor, target: Tensor, factor: float, grad: Tensor | None = None, grad_factor: float = 0.0
) -> Tensor:
    """() in the compute dtype: `factor` times the sum of (input - target)^2.

    With `grad`, that difference times `grad_factor`, in the same pass. All three are dense, of one dtype, shape and
    strides.
    """
    total = _native.cpu_mse(input, target, grad, grad_factor, torch.get_num_threads())
    return torch.tensor(factor * total, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def squared_error_backward(input: Tensor, target: Tensor, grad: Tensor, grad_factor: float, upstream: Tensor) -> None:
    """`grad`: the difference times `grad_factor` and the scalar `upstream`, rounded once."""
    _native.cpu_mse(input, target, grad, grad_factor * float(upstream), torch.get_num_threads())


def target_total(target: Tensor, weight: Tensor | None, ignore_index: int, classes: int) -> float:
    """The mean's denominator: the number, or summed weight, of the rows that count.

    Raises:
        IndexError: a class index outside [0, classes) that is not ignore_index.
    """
    if target.dim() > 1:
        return target.numel() / classes
    return _native.target_total(target, weight, ignore_index, classes)


def _weight_sum(logits: Tensor, rule: Any) -> float:
    return float(logits.shape[1]) if rule.weight is None else float(rule.weight.sum(dtype=torch.float64))


def cross_entropy_forward(
    logits: Tensor,  # (N, V) with class stride 1
    target: Tensor,  # (N,) int64, or probabilities as the logits are
    rule: Any,  # fusedopt.nn.cross_entropy.Rule; its weight (V,) contiguous in the compute dtype
    grad: Tensor | None,  # as the logits are, written if given; may be the logits themselves
    factor: float,  # multiplies the gradient
    rows: Tensor,  # (N,) compute dtype, written: the losses
    lse: Tensor,  # (N,) compute dtype, written
    stats: Any = None,  # fusedopt.nn.cross_entropy.Stats of N elements each, written if given; its lse is `lse`
) -> None:
    """Row losses and log-sum-exps, with `grad` the gradient and with `stats` the statistics, in one pass.

    Raises:
        IndexError: a class index out of range; nothing has been written.
    """
    argmax, correct, entropy = (None, None, None) if stats is None else (stats.argmax, stats.correct, stats.entropy)
    _native.cpu_cross_entropy_forward(
        logits,
        target,
        rule,
        _weight_sum(logits, rule),
        grad,
        float(factor),
        rows,
        lse,
        argmax,
        correct,
        entropy,
        torch.get_num_threads(),
    )


def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    rule: Any,
    grad: Tensor,
    factor: float,
    upstream: Tensor | None,  # (N,) compute dtype
    lse: Tensor,
) -> None:
    """The gradient from the saved log-sum-exps, times `factor` and each row's `upstream`, rounded once."""
    _native.cpu_cross_entropy_backward(
        logits, target, rule, _weight_sum(logits, rule), grad, float(factor), upstream, lse, torch.get_num_threads()
    )
