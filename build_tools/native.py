"""Compiles and links the native library with ninja: the CPU loops, the bindings and, where it can be, the CUDA part."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from build_tools import BuildFailed, cuda

ROOT = Path(__file__).parent.parent.resolve()

# One build of the CPU loops per instruction set, best first; -march=native would not survive a move to another machine.
ISAS = {
    "x86_64": {
        "avx512": ["-march=skylake-avx512", "-mprefer-vector-width=512"],
        "avx2": ["-march=haswell"],
        "baseline": ["-march=x86-64"],
    },
    "aarch64": {"neon": ["-march=armv8-a"]},
    "arm64": {"neon": []},
    "AMD64": {},
}
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# errno and traps keep gcc from vectorising sqrt and selects; neither is ever looked at. Nothing here changes a value.
LOOPS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
ISA_SOURCES = [
    "csrc/cpu/step.cpp",
    "csrc/cpu/step_codes.cpp",
    "csrc/cpu/step_precise.cpp",
    "csrc/cpu/cross_entropy.cpp",
    "csrc/cpu/cross_entropy_pixels.cpp",
    "csrc/cpu/mse.cpp",
    "csrc/cpu/norm.cpp",
    "csrc/cpu/random.cpp",
]
SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/gather.cpp", "csrc/launches.cpp", "csrc/tensor.cpp"]
BINDINGS = "csrc/bindings_cpu.cpp"
CUDA_HOST_SOURCES = ["csrc/bindings_cuda.cpp", "csrc/cuda/runtime.cpp"]


class CudaPart(NamedTuple):
    """A toolkit and what it builds for."""

    toolkit: cuda.Toolkit
    archs: cuda.Archs

    def info(self) -> dict[str, object]:
        return {"built": True, "nvcc": self.toolkit.version, "archs": self.archs.real, "ptx": self.archs.ptx}


def compiler() -> list[str]:
    remedy = "install a C++17 compiler (Debian/Ubuntu: apt install g++; macOS: xcode-select --install), then reinstall"
    if sys.platform == "win32":
        raise BuildFailed("the native core is not built on Windows", "use WSL 2, where it is")
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    raise BuildFailed("no C++ compiler was found (CXX, c++, g++, clang++)", remedy)


def accepts(cxx: list[str], flags: list[str], source: str = "int main() { return 0; }") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe.cpp").write_text(source)
        command = [*cxx, "probe.cpp", "-o", "probe", *flags]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def cuda_part() -> CudaPart:
    """The CUDA part that the environment asks for and allows.

    Raises:
        BuildFailed: there is to be none, or there can be none.
    """
    wanted = os.environ.get("FUSEDOPT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FUSEDOPT_CUDA={wanted!r} is not one of auto, 0, 1")
    if sys.platform != "linux":
        raise BuildFailed(f"there is no CUDA for {sys.platform}", "use Linux, with an NVIDIA GPU")
    if wanted == "0":
        raise BuildFailed("FUSEDOPT_CUDA=0 was set", "reinstall fusedopt without FUSEDOPT_CUDA=0")
    toolkit = cuda.find_toolkit()
    return CudaPart(toolkit, cuda.choose_archs(toolkit.known))


def write_ninja(path: Path, cxx: list[str], target: Path, openmp: list[str], with_cuda: CudaPart | None) -> None:
    """One edge per object, so that builds are parallel and incremental."""
    import pybind11

    isas = ISAS.get(platform.machine(), {}) or {"portable": []}
    listed = " ".join(f"X({isa})" for isa in isas)
    python = [f"-I{sysconfig.get_path('include')}"]
    bindings = [*python, f"-isystem{pybind11.get_include()}"]
    objects: dict[str, tuple[str, str, list[str]]] = {}  # name -> rule, source, flags
    for source in ISA_SOURCES:
        for isa, flags in isas.items():
            objects[f"{Path(source).stem}_{isa}.o"] = (
                "compile",
                source,
                [*LOOPS, *flags, f"-DFUSEDOPT_ISA={isa}", "-fopenmp-simd"],
            )
    for source in SOURCES:
        objects[f"{Path(source).stem}.o"] = ("compile", source, [*python, *openmp, f"-DFUSEDOPT_ISAS(X)={listed}"])
    define = ["-DFUSEDOPT_CUDA"] if with_cuda else []
    objects[f"{Path(BINDINGS).stem}.o"] = ("compile", BINDINGS, [*bindings, *define])

    link = ["-shared", "-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    libraries: list[str] = []
    nvcc: list[str] = []
    if with_cuda:
        include = with_cuda.toolkit.include
        for source in CUDA_HOST_SOURCES:
            objects[f"{Path(source).stem}.o"] = ("compile", source, [*bindings, f"-isystem{include}"])
        kernels = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cuda/*.cu"))
        for source in kernels:
            objects[f"{source.stem}.cu.o"] = ("nvcc", str(source), [])
        # ninja runs the sources side by side, nvcc the architectures of one
        threads = max(1, (os.cpu_count() or 1) // max(1, len(kernels)))
        nvcc = [str(with_cuda.toolkit.nvcc), f"-I{include}", *cuda.nvcc_flags(cxx, with_cuda.archs, threads)]
        libraries = [str(with_cuda.toolkit.cudart), "-ldl", "-lrt", "-lpthread"]

    def escaped(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {command(cxx)}",
        f"common = {command(COMMON)}",
        f"nvcc = {command(nvcc)}",
        "rule compile",
        "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        # the log tells what each kernel takes in registers, stack and spills; tests read it
        "rule nvcc",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {command([*link, *openmp])} $in {command(libraries)} -o $out",
    ]
    for name, (rule, source, flags) in objects.items():
        lines += [f"build {name}: {rule} {escaped(f'{ROOT}/{source}')}", f"  flags = {command(flags)}"]
    lines += [f"build {target.name}: link {' '.join(objects)}", f"default {target.name}", ""]
    path.write_text("\n".join(lines))


def run_ninja(folder: Path, *targets: str) -> None:
    ninja = shutil.which("ninja")
    if ninja is None:
        import ninja as package

        ninja = str(Path(package.BIN_DIR) / "ninja")
    run = subprocess.run(
        [ninja, "-C", str(folder), *targets], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(run.stdout, end="")
    if run.returncode == 0:
        return
    reason = next((line.strip() for line in run.stdout.splitlines() if re.search(r"\b(error|fatal)\b", line)), "")
    remedy = "reinstall with `pip install -v` to see the compiler's output"
    if "unsupported GNU version" in run.stdout or "unsupported clang version" in run.stdout:
        remedy = "set NVCC_CCBIN to an older compiler, such as NVCC_CCBIN=g++-13, then reinstall fusedopt"
    raise BuildFailed(f"compilation failed: {reason or 'ninja gave no reason'}", remedy)


def build_folder() -> Path:
    """A folder of the checkout's own, so that a second build compiles only what changed."""
    return ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def build(target: Path) -> dict[str, object]:
    """Make `target`; returns what there is to know of it.

    Raises:
        BuildFailed: not even the CPU part can be built, or FUSEDOPT_CUDA=1 and the CUDA part cannot.
    """
    cxx = compiler()
    if not accepts(cxx, ["-std=c++17"]):
        raise BuildFailed(
            f"{shlex.join(cxx)} does not compile C++17", "install gcc >= 9 or clang >= 10, then reinstall"
        )
    openmp = (
        ["-fopenmp"]
        if accepts(cxx, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }")
        else []
    )
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)

    def make(with_cuda: CudaPart | None) -> None:
        write_ninja(folder / "build.ninja", cxx, target, openmp, with_cuda)
        run_ninja(folder)

    try:
        part = cuda_part()
        make(part)
        cuda_info = part.info()
    except BuildFailed as failure:
        if os.environ.get("FUSEDOPT_CUDA") == "1":
            raise
        cuda_info = {"built": False, "reason": str(failure), "remedy": failure.remedy}
        make(None)  # where C++ was what failed, it fails again
        print(f"fusedopt: without CUDA: {failure}. To get it: {failure.remedy}", file=sys.stderr)
    shutil.copyfile(folder / target.name, target)
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.splitlines()
    return {"compiler": version[0] if version else shlex.join(cxx), "openmp": bool(openmp), "cuda": cuda_info}
