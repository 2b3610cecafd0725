"""Finds nvcc and chooses what it builds for. `python -m build_tools.cuda` tells both.

FUSEDOPT_CUDA         auto (build the CUDA part if nvcc is found), 1 (fail without it), 0 (never)
CUDA_HOME, CUDA_PATH  where a toolkit is; then PATH, /usr/local/cuda and PyPI's nvidia-cuda-nvcc are looked through
FUSEDOPT_CUDA_ARCHS   compute capabilities, "80;90" or "8.0 9.0+PTX"; else TORCH_CUDA_ARCH_LIST; else the visible GPUs'
NVCC_CCBIN            the C++ compiler that nvcc uses; else the one that compiles the rest
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from build_tools import BuildFailed

SYSTEM = Path("/usr/local/cuda")
DEFAULT_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
# As in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHS = {
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "blackwell+tegra": "11.0",
}
WHEELS = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"
INSTALL = f"install the CUDA toolkit, or `pip install {WHEELS}`, then reinstall fusedopt"


class Archs(NamedTuple):
    """Compute capabilities without the dot: machine code for `real`, and PTX of `ptx`, which newer devices compile."""

    real: tuple[int, ...]
    ptx: tuple[int, ...]

    def flags(self) -> list[str]:
        return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.real] + [
            f"-gencode=arch=compute_{a},code=compute_{a}" for a in self.ptx
        ]


class Toolkit(NamedTuple):
    nvcc: Path
    version: str
    include: Path
    cudart: Path  # libcudart_static.a: the built library needs no CUDA at run time but the driver
    known: frozenset[int]  # the compute capabilities that this nvcc compiles for


def parse_archs(text: str) -> Archs:
    """Read a list such as "80;90", "8.0 9.0a+PTX" or "Hopper".

    A suffix (9.0a, 10.0f) is read over: the kernels use nothing that only one architecture has, and code for 9.0 also
    runs where code for 9.0a does.
    """
    real, ptx = set(), set()
    for entry in re.split(r"[;,\s]+", text.strip()):
        if named := NAMED_ARCHS.get(entry.lower()):
            archs = parse_archs(named)
            real.update(archs.real)
            ptx.update(archs.ptx)
            continue
        match = re.fullmatch(r"(?:(\d+)\.(\d)|(\d{2,3}))[af]?(\+PTX)?", entry, re.IGNORECASE)
        if match is None:
            raise BuildFailed(
                f"{entry!r} is not a CUDA architecture",
                "name compute capabilities in FUSEDOPT_CUDA_ARCHS, such as '80;90' or '8.0 9.0+PTX'",
            )
        major, minor, number, with_ptx = match.groups()
        arch = int(number or major + minor)
        real.add(arch)
        if with_ptx:
            ptx.add(arch)
    return Archs(tuple(sorted(real)), tuple(sorted(ptx)))


def visible_archs() -> str:
    """The compute capabilities of this machine's GPUs, "" where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(re.findall(r"^\d+\.\d$", run.stdout, re.MULTILINE)) if run.returncode == 0 else ""


def choose_archs(known: Collection[int]) -> Archs:
    """What was asked for, else the visible GPUs', else DEFAULT_ARCHS; less what this nvcc does not know."""
    asked = os.environ.get("FUSEDOPT_CUDA_ARCHS", "").strip() or os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    wanted = parse_archs(asked or visible_archs() or DEFAULT_ARCHS)
    real = tuple(a for a in wanted.real if a in known)
    dropped = ", ".join(str(a) for a in wanted.real if a not in known)
    if not real:
        newest = max(known)
        raise BuildFailed(
            f"nvcc does not know sm_{dropped}",
            f"install a newer CUDA toolkit, or set FUSEDOPT_CUDA_ARCHS={newest}+PTX, "
            "which the driver of a newer GPU compiles at first use; then reinstall fusedopt",
        )
    if dropped:
        print(f"fusedopt: nvcc does not know sm_{dropped}: building for {', '.join(map(str, real))}", file=sys.stderr)
    # PTX of a dropped architecture was to serve newer devices: the newest that is left does
    return Archs(real, tuple(sorted({a if a in known else real[-1] for a in wanted.ptx})))


def nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            yield Path(folder) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield SYSTEM / "bin" / "nvcc"
    # an isolated build does not see the environment it builds for in sys.path
    folders = [*sys.path, *(sysconfig.get_path(name) for name in ("purelib", "platlib")), site.getusersitepackages()]
    for folder in dict.fromkeys(folders):
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)


def _first(paths: Iterator[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def inspect_toolkit(nvcc: Path) -> Toolkit:
    """The toolkit around an nvcc, which may be a wrapper script somewhere else."""

    def output(*arguments: str) -> str:
        run = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return run.stdout

    version = re.search(r"\bV(\d+(?:\.\d+)+)", output("--version"))
    known = re.findall(r"compute_(\d+)\b", output("--list-gpu-arch"))
    if version is None or not known:
        raise BuildFailed(f"{nvcc} does not run", INSTALL)
    top = re.search(r"^#\$ TOP=(.+)$", output("--dryrun", "-c", "x.cu"), re.MULTILINE)
    root = Path(top[1]).resolve() if top else nvcc.resolve().parent.parent
    machine = platform.machine()
    targets = [root / "targets" / f"{name}-linux" for name in (machine, "sbsa" if machine == "aarch64" else machine)]
    roots = [root, *targets, Path("/usr")]
    include = _first(r / "include" / "cuda_runtime.h" for r in roots)
    libraries = ("lib64", "lib", f"lib/{machine}-linux-gnu")
    cudart = _first(r / library / "libcudart_static.a" for r in roots for library in libraries)
    if include is None or cudart is None:
        missing = "cuda_runtime.h" if include is None else "libcudart_static.a"
        raise BuildFailed(f"there is no {missing} beside {nvcc}", INSTALL)
    return Toolkit(nvcc, version[1], include.parent, cudart, frozenset(map(int, known)))


def find_toolkit() -> Toolkit:
    """The first complete toolkit.

    Raises:
        BuildFailed: there is none; the reason is the first incomplete one's, if any.
    """
    first_failure = None
    for nvcc in nvcc_candidates():
        if nvcc.is_file():
            try:
                return inspect_toolkit(nvcc)
            except BuildFailed as failure:
                first_failure = first_failure or failure
    raise first_failure or BuildFailed("nvcc was not found", INSTALL)


def nvcc_flags(cxx: list[str], archs: Archs, threads: int) -> list[str]:
    host = os.environ.get("NVCC_CCBIN") or [word for word in cxx if not word.startswith("-")][-1]
    return [
        *("-ccbin", host, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *("-Xptxas=-v", "-DFUSEDOPT_ISA=cuda", f"--threads={threads}"),
        *archs.flags(),
    ]


def main() -> int:
    try:
        toolkit = find_toolkit()
        archs = choose_archs(toolkit.known)
    except BuildFailed as failure:
        print(f"no CUDA part can be built: {failure}. To get it: {failure.remedy}")
        return 1
    ptx = f", PTX of {', '.join(map(str, archs.ptx))}" if archs.ptx else ""
    print(f"nvcc {toolkit.version} ({toolkit.nvcc}) builds for {', '.join(map(str, archs.real))}{ptx}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
