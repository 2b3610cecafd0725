"""What a figure depends on: processor, threads, versions, commit, date. Nothing else that would name a machine."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from fusedopt import __version__, backends

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ("csrc", "fusedopt", "setup.py", "pyproject.toml")


def cpu_model() -> str:
    """The processor's name as Linux tells it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def last_cache_bytes() -> int:
    """Of the largest cache that the first core sees; 32 MiB where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=32 << 20)


def free_memory(device: str = "cpu") -> int:
    """Bytes that can be allocated: the GPU's, or what Linux tells; elsewhere there is no telling."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), sys.maxsize)


def allocator() -> str:
    """How torch gets its memory on this CPU: the setting counts when torch is imported."""
    return "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "as installed"


def slug(device: str = "cpu") -> str:
    """The folder of a machine's results: `cpu-intel-xeon-2c`, `gpu-nvidia-h100-80gb-hbm3`."""
    if device == "cuda":
        return "-".join(["gpu", *re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())])
    model = re.sub(r"\((r|tm|c)\)|\b(cpu|processor)\b|@.*", " ", cpu_model().lower())
    words = re.findall(r"[a-z0-9]+", model)
    return "-".join(["cpu", *words, f"{os.cpu_count()}c"])


def instruction_set() -> str:
    """That of fusedopt's loops and of torch's."""
    ours = backends.cpu.isa() if backends.available()["cpu"] is True else "none"
    return f"fusedopt {ours}, torch {torch.backends.cpu.get_cpu_capability().lower()}"


def commit() -> str:
    """The commit that is measured, `-dirty` if what is built from differs from it; "unknown" outside a checkout."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *BUILT_FROM)
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Part of every row, so that rows of several runs may lie in one file."""
    return {
        "machine": cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        **({"allocator": allocator()} if device == "cpu" else {}),
        "torch": torch.__version__,
        "fusedopt": __version__,
        "python": platform.python_version(),
        "commit": commit(),
        **(gpu() if device == "cuda" else {}),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
