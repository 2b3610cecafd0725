"""The CUDA sources themselves, run on the CPU: g++ compiles step.cu against tests/simt, the engine steps through it."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from build_tools import BuildFailed, cuda

ROOT = Path(__file__).parent.parent
SOURCES = ["csrc/gather.cpp", "csrc/bindings_cpu.cpp", "csrc/bindings_cuda.cpp", "csrc/cuda/runtime.cpp"]
CPU = ["csrc/cpu/step.cpp", "csrc/cpu/cross_entropy.cpp", "csrc/cpu/cross_entropy_pixels.cpp"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        include = cuda.find_toolkit().include
    except BuildFailed as reason:
        pytest.skip(f"needs CUDA's headers: {reason}")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("simt")
    common = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
    ]
    common += [
        "-Wno-unknown-pragmas",
        "-DFUSEDOPT_SIMT",
        "-DFUSEDOPT_CUDA",
        f"-I{ROOT / 'tests/simt/include'}",
        "-isystem",
        str(include),
    ]
    common += ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    # a vector access to an odd address then stops the process, as it would stop a GPU
    checked = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
    jobs = [(source, []) for source in [*SOURCES, "tests/simt/harness/sequential.cpp"]]
    jobs += [(source, ["-DFUSEDOPT_ISA=baseline"]) for source in CPU]
    jobs += [("csrc/cpu/dispatch.cpp", ["-DFUSEDOPT_ISAS(X)=X(baseline)"])]
    jobs += [("csrc/cuda/step.cu", ["-DFUSEDOPT_ISA=cuda", *checked, "-x", "c++"])]
    objects = []
    for i, (source, flags) in enumerate(jobs):
        objects.append(str(folder / f"{i}.o"))
        subprocess.run([*common, *flags, "-c", str(ROOT / source), "-o", objects[-1]], check=True)
    path = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-lubsan", "-o", str(path)], check=True)
    return path


@pytest.mark.timeout(900)
def test_no_further_from_float64_than_stock(library):
    script = ROOT / "tests/simt/optimizers.py"
    run = subprocess.run([sys.executable, script, library], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) tensors agree", run.stdout)[1]) > 6000
