"""Builds the native core: plain C++17, no torch. Needs pybind11 and ninja, which pip's isolated build fetches.

FUSEDOPT_REQUIRE_NATIVE=1 makes a failed native build fail the installation; otherwise fusedopt installs without it,
runs on PyTorch's own kernels, and `python -m fusedopt` says why.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

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
ISA_SOURCES = ["csrc/cpu/step.cpp", "csrc/cpu/cross_entropy.cpp"]
SOURCES = ["csrc/cpu/dispatch.cpp", "csrc/gather.cpp"]
BINDINGS = "csrc/bindings_cpu.cpp"


class BuildFailed(Exception):
    """The native core cannot be built here; the message says why, `remedy` what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


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


def write_ninja(path: Path, cxx: list[str], target: Path, openmp: list[str]) -> None:
    """One edge per object, so that builds are parallel and incremental."""
    import pybind11

    isas = ISAS.get(platform.machine(), {}) or {"portable": []}
    listed = " ".join(f"X({isa})" for isa in isas)
    python = [f"-I{sysconfig.get_path('include')}"]
    objects: dict[str, tuple[str, list[str]]] = {}
    for source in ISA_SOURCES:
        for isa, flags in isas.items():
            objects[f"{Path(source).stem}_{isa}.o"] = (
                source,
                [*LOOPS, *flags, f"-DFUSEDOPT_ISA={isa}", "-fopenmp-simd"],
            )
    for source in SOURCES:
        objects[f"{Path(source).stem}.o"] = (source, [*python, *openmp, f"'-DFUSEDOPT_ISAS(X)={listed}'"])
    objects[f"{Path(BINDINGS).stem}.o"] = (BINDINGS, [*python, f"-isystem{pybind11.get_include()}"])

    link = ["-shared", "-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    escape = str(ROOT).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(cxx)}",
        f"common = {' '.join(COMMON)}",
        "rule compile",
        "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {' '.join([*link, *openmp])} $in -o $out",
    ]
    for name, (source, flags) in objects.items():
        lines += [f"build {name}: compile {escape}/{source}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {target.name}: link {' '.join(objects)}", f"default {target.name}", ""]
    path.write_text("\n".join(lines))


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"native": True}
        try:
            info |= self.build_native(target)
        except BuildFailed as failure:
            if os.environ.get("FUSEDOPT_REQUIRE_NATIVE") == "1":
                raise
            info = {"native": False, "reason": str(failure), "remedy": failure.remedy}
            target.unlink(missing_ok=True)
            print(
                f"fusedopt: installing without the native core: {failure}. To get it: {failure.remedy}", file=sys.stderr
            )
        folders = [target.parent] + ([ROOT / "fusedopt"] if getattr(self, "editable_mode", False) else [])
        for folder in folders:
            (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build_native(self, target: Path) -> dict[str, object]:
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
        # a folder of the checkout's own, so that a second build compiles only what changed
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder / "build.ninja", cxx, target, openmp)
        ninja = shutil.which("ninja")
        if ninja is None:
            import ninja as package

            ninja = str(Path(package.BIN_DIR) / "ninja")
        run = subprocess.run([ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(run.stdout, end="")
        if run.returncode != 0:
            errors = [line for line in run.stdout.splitlines() if "error" in line]
            raise BuildFailed(
                f"compilation failed: {(errors or ['ninja gave no reason'])[0]}",
                "reinstall with `pip install -v` to see the compiler's output",
            )
        shutil.copyfile(folder / target.name, target)
        version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.splitlines()
        return {"compiler": version[0] if version else shlex.join(cxx), "openmp": bool(openmp)}


setup(
    ext_modules=[Extension("fusedopt._native", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
