"""The CUDA engine: kernels of the native library. It is on where the build, the driver and a device go together."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch

from fusedopt.backends import cpu

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


def supports(rule: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> bool:
    """Whether there is a kernel for a rule with these dtypes."""
    return False
