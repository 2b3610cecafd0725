"""Triton kernels compiled for GPUs that are not here, and what lies in their machine code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedopt.backends.triton import norms, options, table

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}


class _Elsewhere:
    """In place of Triton's driver: kernels are compiled as they would be there, and launches do nothing."""

    def __init__(self, target: GPUTarget):
        self.target, self.utils = target, self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target  # Triton keeps what it compiles by device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 64 << 10}

    def load_binary(self, name, binary, shared, device):
        return None, None, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None


def pretend(monkeypatch, target: str, module: Any) -> None:
    """Launches of the module from now on are compiled for the target; nothing runs."""
    monkeypatch.setattr(driver, "_active", _Elsewhere(TARGETS[target]))
    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=64))
    monkeypatch.setattr(
        module, "options", lambda device, threads: options.options.__wrapped__(torch.device("cuda"), threads)
    )


def compiled(kernel: Any, target: str) -> list[Any]:
    """All that a kernel was compiled to for the target, and not forgotten since."""
    return list(kernel.device_caches[TARGETS[target]][0].values())


def forget(kernel: Any) -> None:
    kernel.device_caches.clear()  # what Triton has on disk stays there, by content


class Code(NamedTuple):
    """One kernel's machine code."""

    registers: int  # of a thread
    local: int  # bytes of stack, scratch and spilled registers of a thread
    loads: int  # instructions that read 16 bytes or more of global memory
    stores: int

    @classmethod
    def of(cls, kernel: Any, folder: Path) -> Code:
        return cls._of_amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else cls._of_nvidia(kernel, folder)

    @classmethod
    def _of_nvidia(cls, kernel: Any, folder: Path) -> Code:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [program, "--dump-sass", "--dump-resource-usage", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
        wide = {name: len(re.findall(rf"\b{name}\.E\S*\.(?:128|256)\b", text)) for name in ("LDG", "STG")}
        assert "EXIT" in text and not re.search(r"\b(LDL|STL)\b", text)
        return cls(int(registers), int(stack) + int(local), *wide.values())

    @classmethod
    def _of_amd(cls, text: str) -> Code:
        said = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
        # scalar registers spill to lanes of a vector register, not to memory
        local = said["private_segment_fixed_size"] + said["vgpr_spill_count"]
        wide = (len(re.findall(rf"\b(?:global|buffer)_{name}_dwordx4\b", text)) for name in ("load", "store"))
        return cls(said["vgpr_count"], local, *wide)

    def resident(self, target: str, threads: int) -> int:
        """Programs of so many threads that a multiprocessor has registers for."""
        allocated = -(-self.registers // 8) * 8
        if TARGETS[target].backend == "cuda":
            return min(65536 // (allocated * threads), 2048 // threads)
        return min(512 // allocated, 8) * 4 * 64 // threads  # registers of one lane; waves of 64 on each of 4 SIMDs


def check_norms(target: str, dtype: torch.dtype, states: int, folder: Path, wide: int | None = None) -> None:
    """Nothing spilled, and registers for the programs. `wide`: arrays read 16 bytes at a time; unless told, all."""
    (measure,), (adapt,) = compiled(norms.norms, target), compiled(norms.adapt, target)
    assert Code.of(adapt, folder).local == 0
    code = Code.of(measure, folder)
    assert code.local == 0 and code.loads >= (2 + states if wide is None else wide), code
    assert code.resident(target, table.THREADS) >= table.PRECISE[dtype.itemsize].programs[states], code
