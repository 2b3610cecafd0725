"""The CUDA engine: kernels of the native library. It is on where the build, the driver and a device go together.

A step is a constant number of launches and never waits for the device.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.backends import bad_target, cpu, sums

name = "cuda"
device_types = frozenset({"cuda"})

# A Tegra runs code built for just itself; otherwise code runs on every later device of the same major version.
_TEGRA = frozenset({72, 87, 110})
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir fusedopt"


class Device(NamedTuple):
    name: str
    major: int  # compute capability
    minor: int
    multiprocessors: int

    @property
    def arch(self) -> int:
        return 10 * self.major + self.minor


class Probe(NamedTuple):
    """What the driver answers, as csrc/cuda/runtime.h has it."""

    driver: int  # the newest CUDA version that it takes, as 1000 * major + 10 * minor; 0: there is none
    runtime: int  # the CUDA version of the build
    error: str
    message: str
    devices: tuple[Device, ...]


@functools.cache
def _build() -> dict[str, Any]:
    """What the build wrote down of its CUDA part."""
    return cpu.build_info().get("cuda", {})


@functools.cache
def probe() -> Probe:
    """Ask the driver, once; only where the native library has its CUDA part."""
    *facts, devices = cpu._native.cuda_probe()
    return Probe(*facts, tuple(Device(*device) for device in devices))


def _has_code(device: Device) -> bool:
    """Whether the build's machine code, or its PTX, runs on a device."""
    for arch in _build()["archs"]:
        if arch == device.arch:
            return True
        same_family = arch // 10 == device.major and arch <= device.arch
        if same_family and not _TEGRA & {arch, device.arch}:
            return True
    # a driver refuses PTX that is newer than itself
    return probe().driver >= probe().runtime and any(arch <= device.arch for arch in _build()["ptx"])


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _obstacle() -> tuple[str, str] | None:
    """Why this backend is off, and what would mend that; None where it is on."""
    if cpu._native is None:
        return str(cpu.available()), cpu.remedy()
    if not hasattr(cpu._native, "cuda_probe"):
        build = _build()
        reason = "the native library was built without CUDA"
        if "reason" in build:
            return f"{reason}: {build['reason']}", build["remedy"]
        return reason, f"FUSEDOPT_CUDA=1 {_REINSTALL}"
    if torch.version.hip:
        return (
            "this PyTorch is built for ROCm, and the CUDA kernels run on NVIDIA GPUs",
            "none needed: Triton serves AMD",
        )
    driver, runtime, error, message, devices = probe()
    if driver == 0:
        return "no NVIDIA driver was found", "run on a machine with an NVIDIA GPU, and install its driver there"
    if error == "cudaErrorInsufficientDriver":
        return (
            f"the NVIDIA driver is too old: it takes CUDA {_version(driver)} and older, "
            f"and fusedopt was built with CUDA {_version(runtime)}",
            f"update the driver, or rebuild with an older toolkit: CUDA_HOME=/path/to/cuda {_REINSTALL}",
        )
    if error == "cudaErrorNoDevice" or not (error or devices):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return f"no CUDA device is visible (CUDA_VISIBLE_DEVICES={visible!r})", "unset CUDA_VISIBLE_DEVICES"
        return "no CUDA device is visible", "see whether `nvidia-smi -L` lists one; a container must be given its GPUs"
    if error:
        return f"the CUDA runtime does not start: {error}: {message}", "see what `nvidia-smi` says on this machine"
    if not any(map(_has_code, devices)):
        archs = sorted({device.arch for device in devices})
        names = ", ".join(dict.fromkeys(f"{device.name} (sm_{device.arch})" for device in devices))
        built = ", ".join(f"sm_{arch}" for arch in _build()["archs"])
        wanted = ";".join(map(str, archs))
        return f"this build has no code for {names}, only for {built}", f"FUSEDOPT_CUDA_ARCHS='{wanted}' {_REINSTALL}"
    if not torch.version.cuda:
        return f"this PyTorch, {torch.__version__}, is built without CUDA", "install a PyTorch that is built for CUDA"
    return None


def available() -> bool | str:
    obstacle = _obstacle()
    return True if obstacle is None else obstacle[0]


def remedy() -> str:
    """What turns this backend on, where `available()` gives a reason."""
    obstacle = _obstacle()
    return "" if obstacle is None else obstacle[1]


def covers(device: torch.device) -> bool:
    """Whether the build has code for this very device, where the backend is on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _has_code(probe().devices[index])


@functools.cache
def supports(rule: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype | str) -> bool:
    """Whether there are kernels for a rule with these dtypes; `state` may be "8bit"."""
    return cpu._native.cuda_can_step(rule, *(str(dtype).removeprefix("torch.") for dtype in (param, grad, state)))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Tables:
    """A plan and the device memory that it fills."""

    def __init__(self) -> None:
        self.plan = cpu._native.CudaPlan()
        self.memory: Tensor | None = None
        self.partial: Tensor | None = None  # sums of squares, one of each chunk


class Stepper:
    """Steps the tensors of one optimizer on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._by_stream: dict[int, _Tables] = {}
        # A graph replays with the addresses it was captured with, whatever eager steps do in between.
        self._captured: list[_Tables] = []
        self._measured: _Tables | None = None  # in this capture, by a step that has yet to update

    def step(
        self,
        table: Any,
        groups: list[tuple[list[float], float, int, bool]],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        precision: tuple[float, bool, int] | None = None,
    ) -> int:
        """Update the table's active tensors on this device; returns the number of kernels launched.

        `groups` gives each group's hyperparameters, gradient factor, and the address of a learning rate on the device
        (or 0) and whether it is float64. `precision`: as csrc/step.h has it; None: a plain step.
        """
        tables = self._laid_out(table, len(groups))
        self._measured = None
        if tables is None:
            return 0
        scalars = [
            0 if scalar is None else scalar.to(self.device, torch.float32, non_blocking=True)
            for scalar in (found_inf, grad_scale)
        ]
        addresses = [scalar.data_ptr() if isinstance(scalar, Tensor) else 0 for scalar in scalars]
        return tables.plan.step(groups, tables.memory.data_ptr(), *addresses, _stream(self.device), precision)

    def sum_of_squares(self, table: Any, groups: list[tuple[list[float], float, int, bool]]) -> dict[int, Tensor]:
        """() float64 on the device, by who holds the tensors: of the gradients that the next step() takes, in one
        order whatever the hardware.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tables = self._laid_out(table, len(groups))
        by_holders = {0: total}
        if tables is not None:
            chunks = tables.plan.chunks()
            n = sum(count for _, count in chunks)
            if tables.partial is None or tables.partial.numel() < n:
                tables.partial = torch.empty(n, dtype=torch.float64, device=self.device)
            addresses = (t.data_ptr() for t in (tables.memory, tables.partial, total))
            tables.plan.sum_squares(groups, *addresses, _stream(self.device))
            by_holders = sums.by_holders(chunks, tables.partial[:n], total)
        if capturing(self.device):
            self._measured = tables
        return by_holders

    def _laid_out(self, table: Any, n_groups: int) -> _Tables | None:
        """The tables of the current stream, or of the graph that is captured on it; None where there is nothing."""
        if self._measured is not None:
            tables = self._measured
        elif capturing(self.device):
            tables = _Tables()
            self._captured.append(tables)
        else:
            tables = self._by_stream.setdefault(_stream(self.device), _Tables())
        nbytes = tables.plan.lay_out(table, self.device.index or 0, n_groups)
        if nbytes == 0:
            return None
        if tables.memory is None or tables.memory.numel() < nbytes:
            tables.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return tables


# --- losses: nothing here waits for the device ---


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LOSS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
takes_pixels = False


def new_gradient(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the logits' shape and dtype."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def target_factor(target: Tensor, rule: Any, classes: int, mean: bool) -> Tensor:
    """What the sum of row losses is multiplied by, () float32: 1, or the reciprocal of the mean's denominator."""
    bad_target.raise_reported()
    device = target.device
    factor = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(cpu._native.CUDA_PARTIALS, dtype=torch.float64, device=device)
    indices = None if target.dim() > 1 else target
    cpu._native.cuda_target_factor(
        *(indices, target.shape[0], rule.weight, classes, rule.ignore_index, mean, partial, factor),
        *(bad_target.report(), device.index or 0, _stream(device)),
    )
    return factor


def total_loss(rows: Tensor, factor: Tensor) -> Tensor:
    """() float32: `factor` times the sum of `rows` (N,) float32, in an order that depends on N alone."""
    device = rows.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(cpu._native.CUDA_PARTIALS, dtype=torch.float64, device=device)
    cpu._native.cuda_total_loss(rows, rows.shape[0], factor, partial, loss, device.index or 0, _stream(device))
    return loss


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply a dense tensor by a () float32 on its device, in place; where that is 1, nothing moves."""
    device = tensor.device
    cpu._native.cuda_scale(tensor, _name(tensor.dtype), tensor.numel(), factor, device.index or 0, _stream(device))
    return tensor


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


def _cross_entropy_args(logits: Tensor, target: Tensor, rule: Any, grad: Tensor | None, factor: Tensor) -> Any:
    """They hold addresses: the tensors must outlive the launch."""
    args = cpu._native.CudaCrossEntropyArgs()
    args.dtype = _name(logits.dtype)
    args.logits, args.logits_stride = logits, logits.stride(0)
    args.rows, args.classes = logits.shape
    if target.dim() == 1:
        args.target = target
    else:
        args.probabilities, args.probabilities_stride = target, target.stride(0)
    args.weight, args.ignore_index, args.label_smoothing = rule.weight, rule.ignore_index, rule.label_smoothing
    args.z_loss, args.logit_scale, args.softcap = rule.z_loss, rule.logit_scale, rule.softcap or 0.0
    if grad is not None:
        args.grad, args.grad_stride = grad, grad.stride(0)
    args.grad_factor = factor
    return args


def cross_entropy_forward(
    logits: Tensor,  # (N, V) float32, bfloat16 or float16, class stride 1
    target: Tensor,  # (N,) int64, or (N, V) probabilities of the logits' dtype, class stride 1
    rule: Any,  # fusedopt.nn.cross_entropy.Rule; its weight (V,) float32
    grad: Tensor | None,  # (N, V), written if given; may be the logits themselves
    factor: float | Tensor,  # () float32, multiplies the gradient
    rows: Tensor,  # (N,) float32, written: the losses
    lse: Tensor,  # (N,) float32, written
    stats: Any = None,  # fusedopt.nn.cross_entropy.Stats of N elements each, written if given; its lse is `lse`
) -> None:
    """Row losses and log-sum-exps, with `grad` the gradient and with `stats` the statistics; one launch."""
    factor = _scalar(factor, logits.device)
    args = _cross_entropy_args(logits, target, rule, grad, factor)
    args.loss, args.lse = rows, lse
    if stats is not None:
        args.argmax, args.correct, args.entropy = stats.argmax, stats.correct, stats.entropy
    cpu._native.cuda_cross_entropy(args, True, logits.device.index or 0, _stream(logits.device))


def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    rule: Any,
    grad: Tensor,
    factor: float | Tensor,
    upstream: Tensor | None,  # (N,) float32
    lse: Tensor,
) -> None:
    """The gradient from the saved log-sum-exps, times `factor` and each row's `upstream`, rounded once; one launch."""
    factor = _scalar(factor, logits.device)
    args = _cross_entropy_args(logits, target, rule, grad, factor)
    args.upstream, args.lse = upstream, lse
    cpu._native.cuda_cross_entropy(args, False, logits.device.index or 0, _stream(logits.device))


def squared_error(
    input: Tensor, target: Tensor, factor: float, grad: Tensor | None = None, grad_factor: float = 0.0
) -> Tensor:
    """() float32: `factor` times the sum of squares, in an order that depends on its size alone; two launches.

    With `grad`, the difference times `grad_factor`, in the same pass. All three are dense, of one dtype, shape and
    strides.
    """
    device = input.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(cpu._native.CUDA_MSE_PARTIALS, dtype=torch.float64, device=device)
    cpu._native.cuda_mse(
        *(input, target, grad, grad_factor, _name(input.dtype), input.numel(), factor, partial, loss),
        *(device.index or 0, _stream(device)),
    )
    return loss


def squared_error_backward(input: Tensor, target: Tensor, grad: Tensor, grad_factor: float, upstream: Tensor) -> None:
    """`grad`: the difference times `grad_factor` and the () float32 `upstream`, rounded once; one launch."""
    device = input.device
    cpu._native.cuda_mse_backward(
        *(input, target, grad, grad_factor, _name(input.dtype), input.numel(), upstream),
        *(device.index or 0, _stream(device)),
    )
