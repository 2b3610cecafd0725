"""Builds what runs the CUDA sources on the CPU: g++ in nvcc's place, tests/simt in CUDA's, with and without sanitizers.

`python -m tests.simt.build` says what of it this machine cannot have.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from build_tools import BuildFailed, cuda, native

ROOT = native.ROOT
FOLDER = ROOT / "build" / f"simt-{sysconfig.get_platform()}-{sysconfig.get_python_version()}"


class Kind(NamedTuple):
    """How the kernels are compiled. The harness and the host code never are instrumented, but the harness is told."""

    flags: tuple[str, ...]
    runtime: str  # of the sanitizer; a process that loads a library of this kind must have it from the start
    define: str = ""


KINDS = {
    # A vector access to an odd address stops the process, as it would stop a GPU. Not -O2: gcc 12 then merges
    # neighbouring scalars into a vector access of its own, at an address that only promises to fit the scalars.
    "plain": Kind(("-O1", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"), "libubsan.so"),
    "asan": Kind(
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "libasan.so",
        "-DFUSEDOPT_SIMT_ASAN",
    ),
    "tsan": Kind(("-O1", "-g1", "-fsanitize=thread"), "libtsan.so", "-DFUSEDOPT_SIMT_TSAN"),
}
# Counts what kernels read and write (harness/traffic.cpp stands where TSAN would); for benchmarks/counting.
COUNTED = {"counted": Kind(("-O1", "-fsanitize=thread", "-fno-tree-sra"), "")}
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
HOST = {
    source: define
    for define, sources in (
        ("-DFUSEDOPT_ISAS(X)=X(baseline)", [*native.SOURCES, native.BINDINGS, *native.CUDA_HOST_SOURCES]),
        ("-DFUSEDOPT_ISA=baseline", native.ISA_SOURCES),
    )
    for source in sources
}
HARNESS = ["collectives.cpp", "errors.cpp", "fiber.cpp", "memory.cpp", "runtime.cpp", "scheduler.cpp"]


def _file(name: str) -> str:
    """Where g++ has a library; its bare name where it has none."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def missing(kind: str) -> str:
    """Why nothing of this kind can be built or run here; "" where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the fibers are written for Linux on x86-64"
    if not shutil.which("g++"):
        return "needs g++"
    try:
        cuda.find_toolkit()
    except BuildFailed as reason:
        return f"needs CUDA's headers: {reason}"
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None and not shutil.which(package):
            return f"needs {package}"
    if kind in KINDS and not os.path.isabs(_file(KINDS[kind].runtime)):
        return f"needs {KINDS[kind].runtime}, the runtime of g++'s sanitizer"
    return ""


def _write_ninja() -> None:
    import pybind11

    common = [*COMMON, "-DFUSEDOPT_SIMT", "-DFUSEDOPT_CUDA", f"-I{ROOT}/tests/simt/include"]
    for folder in (cuda.find_toolkit().include, sysconfig.get_path("include"), pybind11.get_include()):
        common += ["-isystem", str(folder)]
    lines = [
        f"common = {shlex.join(common)}",
        "rule compile",
        "  command = g++ $common $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ $flags $in -o $out",
    ]

    def compiled(name: str, source: str, flags: list[str]) -> str:
        lines.extend([f"build {name}: compile {ROOT}/{source}", f"  flags = {shlex.join(flags)}"])
        return name

    def linked(name: str, objects: list[str], flags: list[str]) -> None:
        lines.extend([f"build {name}: link {' '.join(objects)}", f"  flags = {shlex.join(flags)}"])

    host = [compiled(f"{source}.o", source, ["-O3", define]) for source, define in HOST.items()]
    for kind, (flags, runtime, define) in {**KINDS, **COUNTED}.items():
        kernel = [*flags, "-x", "c++"]
        told = ["-O2", "-Wall", "-Wextra", *([define] if define else [])]
        sources = HARNESS if runtime else [*HARNESS, "traffic.cpp"]
        harness = [compiled(f"{kind}/{name}.o", f"tests/simt/harness/{name}", told) for name in sources]
        kernels = [
            compiled(f"{kind}/{path.name}.o", str(path.relative_to(ROOT)), [*kernel, "-DFUSEDOPT_ISA=cuda"])
            for path in sorted(ROOT.glob("csrc/cuda/*.cu"))
        ]
        linked(f"{kind}/_native.so", [*host, *kernels, *harness], ["-shared", *(flags if runtime else [])])
        if runtime:
            tests = compiled(f"{kind}/selftest.o", "tests/simt/selftest.cu", ["-Wall", *kernel])
            linked(f"{kind}/selftest", [tests, *harness], list(flags))
    lines.append("")
    (FOLDER / "build.ninja").write_text("\n".join(lines))


def build(kind: str, what: str) -> Path:
    """Make "_native.so", the simulated fusedopt._native, or "selftest"; returns its path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes, and ninja suffers one to a folder
        _write_ninja()
        native.run_ninja(FOLDER, f"{kind}/{what}")
    return FOLDER / kind / what


@functools.cache
def _fixed_addresses() -> list[str]:
    """TSAN of gcc 12 and older does not start where the kernel randomises more address bits than it knows."""
    works = shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
    return ["setarch", "-R"] if works else []


def run(kind: str, command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program, or a Python process that loads a library, of this kind; its stderr goes where its stdout goes."""
    env = {
        **os.environ,
        **environment,
        "ASAN_OPTIONS": "detect_leaks=0",  # an error leaves its fibers' strings behind
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    if kind != "plain" and Path(command[0]).name.startswith("python"):
        # ASAN looks for __cxa_throw when it starts, and Python itself links no libstdc++
        env["LD_PRELOAD"] = f"{_file(KINDS[kind].runtime)} {_file('libstdc++.so.6')}"
    prefix = _fixed_addresses() if kind == "tsan" else []
    return subprocess.run(
        [*prefix, *map(str, command)], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


if __name__ == "__main__":
    for reason in {reason: None for kind in KINDS if (reason := missing(kind))}:
        print(reason)
