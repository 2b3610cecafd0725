"""The CUDA part's build: what it is asked for, where nvcc is found, and what lies in the kernels that it compiled."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from build_tools import BuildFailed, cuda, native
from fusedopt import backends
from fusedopt.backends import cpu

ROOT = Path(__file__).parent.parent
KNOWN = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)  # nvcc 13.0 --list-gpu-arch


def toolkit_or_reason():
    try:
        return cuda.find_toolkit(), ""
    except BuildFailed as failure:
        return None, str(failure)


TOOLKIT, REASON = toolkit_or_reason()
needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason=f"left out, no kernel is compiled here: {REASON}")


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    for name in (
        "FUSEDOPT_CUDA",
        "FUSEDOPT_CUDA_ARCHS",
        "TORCH_CUDA_ARCH_LIST",
        "NVCC_CCBIN",
        "CUDA_HOME",
        "CUDA_PATH",
    ):
        monkeypatch.delenv(name, raising=False)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- architectures ---


@pytest.mark.parametrize(
    ("text", "real", "ptx"),
    [
        ("80;90", (80, 90), ()),
        ("9.0", (90,), ()),
        ("120", (120,), ()),
        ("8.0 9.0a+PTX", (80, 90), (90,)),
        ("10.0f,9.0,9.0", (90, 100), ()),
        (" 12.0+PTX; 8.6 ", (86, 120), (120,)),
        ("Hopper", (90,), (90,)),
        ("ampere;Ada", (80, 86, 89), (86, 89)),
        ("Ampere+Tegra", (87,), ()),
    ],
)
def test_arch_lists_are_read(text, real, ptx):
    assert cuda.parse_archs(text) == (real, ptx)


@pytest.mark.parametrize("text", ["Hoper", "9", "9.0b", "sm_90", "80+ptxx"])
def test_what_is_no_architecture_is_named(text):
    with pytest.raises(BuildFailed, match="is not a CUDA architecture") as failure:
        cuda.parse_archs(text)
    assert "FUSEDOPT_CUDA_ARCHS" in failure.value.remedy


def test_what_is_asked_for_comes_before_what_is_visible(monkeypatch):
    monkeypatch.setattr(cuda, "visible_archs", lambda: "")
    assert cuda.choose_archs(KNOWN) == ((80, 86, 89, 90, 100, 120), (120,))
    monkeypatch.setattr(cuda, "visible_archs", lambda: "9.0 9.0")
    assert cuda.choose_archs(KNOWN) == ((90,), ())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    assert cuda.choose_archs(KNOWN) == ((80, 90), (90,))
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "86")
    assert cuda.choose_archs(KNOWN) == ((86,), ())
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", " ")  # as good as unset
    assert cuda.choose_archs(KNOWN) == ((80, 90), (90,))


def test_architectures_that_nvcc_does_not_know_are_dropped_aloud(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "visible_archs", lambda: "")
    assert cuda.choose_archs((70, 75, 80, 86, 87, 89, 90)) == ((80, 86, 89, 90), (90,))
    assert "does not know sm_100, 120: building for 80, 86, 89, 90" in capsys.readouterr().err
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "130;200+PTX")
    with pytest.raises(BuildFailed, match="does not know sm_130, 200") as failure:
        cuda.choose_archs(KNOWN)
    assert "FUSEDOPT_CUDA_ARCHS=121+PTX" in failure.value.remedy


@pytest.mark.parametrize(
    ("nvidia_smi", "expected"),
    [
        ("printf '9.0\\n9.0\\n12.0\\n'", "9.0 9.0 12.0"),
        ("echo 'No devices were found'", ""),
        ("echo '9.0'; echo 'NVIDIA-SMI has failed'; exit 9", ""),
    ],
)
def test_visible_gpus(tmp_path, monkeypatch, nvidia_smi, expected):
    script(tmp_path / "nvidia-smi", nvidia_smi)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda.visible_archs() == expected


def test_flags(monkeypatch):
    flags = cuda.nvcc_flags(["ccache", "g++", "-m64"], cuda.Archs((80, 90), (90,)), threads=3)
    assert flags[:2] == ["-ccbin", "g++"]
    assert {"-O3", "-std=c++17", "-Xptxas=-v", "-DFUSEDOPT_ISA=cuda", "--threads=3"} < set(flags)
    assert flags[-3:] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    # division, square root and subnormals are IEEE's, as on the CPU
    assert not [f for f in flags if re.search(r"fast|ftz|prec|fmad", f)]
    monkeypatch.setenv("NVCC_CCBIN", "g++-12")
    assert cuda.nvcc_flags(["c++"], cuda.Archs((90,), ()), threads=1)[:2] == ["-ccbin", "g++-12"]


# --- nvcc ---


def fake_toolkit(root, version="13.0.88", lib="lib64", nvcc="bin/nvcc"):
    """A folder that looks like a CUDA toolkit; its nvcc answers what the build asks."""
    for path in (root / "include" / "cuda_runtime.h", root / lib / "libcudart_static.a"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    answers = f"""case "$1" in
--version) echo 'Cuda compilation tools, release {version[:4]}, V{version}' ;;
--list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
--dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;
esac"""
    return script(root / nvcc, answers)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without nvcc."""
    monkeypatch.setattr(cuda, "SYSTEM", tmp_path / "usr-local-cuda")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path / "user-site"))
    return tmp_path


def test_no_nvcc(nowhere):
    with pytest.raises(BuildFailed, match="nvcc was not found") as failure:
        cuda.find_toolkit()
    assert "pip install nvidia-cuda-nvcc" in failure.value.remedy


def test_where_nvcc_is_looked_for(nowhere, monkeypatch):
    wheel = nowhere / "site-packages" / "nvidia" / "cu13"
    places = [  # last to first
        (fake_toolkit(wheel, "13.0.1", lib="lib"), None),
        (fake_toolkit(cuda.SYSTEM, "13.0.2"), None),
        (fake_toolkit(nowhere / "on-path", "13.0.3"), ("PATH", nowhere / "on-path" / "bin")),
        (fake_toolkit(nowhere / "a-path", "13.0.4"), ("CUDA_PATH", nowhere / "a-path")),
        (fake_toolkit(nowhere / "a-home", "13.0.5"), ("CUDA_HOME", nowhere / "a-home")),
    ]
    for nvcc, _ in places:
        nvcc.rename(nvcc.with_name("hidden"))
    for i, (nvcc, variable) in enumerate(places, 1):
        nvcc.with_name("hidden").rename(nvcc)
        if variable:
            monkeypatch.setenv(variable[0], str(variable[1]))
        toolkit = cuda.find_toolkit()
        assert (toolkit.nvcc, toolkit.version) == (nvcc, f"13.0.{i}")
        assert toolkit.known == {80, 90}
        assert toolkit.include == nvcc.parent.parent / "include"
        assert toolkit.cudart.parent.parent == nvcc.parent.parent


def test_a_wrapper_script_is_not_where_the_toolkit_is(nowhere, monkeypatch):
    real = fake_toolkit(nowhere / "opt" / "cuda")
    wrapper = script(nowhere / "bin" / "nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", str(wrapper.parent))
    toolkit = cuda.find_toolkit()
    assert toolkit.nvcc == wrapper
    assert toolkit.cudart == nowhere / "opt" / "cuda" / "lib64" / "libcudart_static.a"


@pytest.mark.parametrize("missing", ["include/cuda_runtime.h", "lib64/libcudart_static.a"])
def test_an_incomplete_toolkit_is_passed_over_or_named(nowhere, monkeypatch, missing):
    nvcc = fake_toolkit(nowhere / "half")
    (nowhere / "half" / missing).unlink()
    if any((Path("/usr") / part / Path(missing).name).exists() for part in ("include", "lib", "lib64")):
        pytest.skip("the system's own CUDA completes it")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "half"))
    with pytest.raises(BuildFailed, match=f"no {Path(missing).name} beside {nvcc}"):
        cuda.find_toolkit()
    fake_toolkit(cuda.SYSTEM, "13.0.9")
    assert cuda.find_toolkit().version == "13.0.9"


def test_nvcc_that_does_not_run(nowhere, monkeypatch):
    nvcc = script(nowhere / "broken" / "bin" / "nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "broken"))
    with pytest.raises(BuildFailed, match=f"{nvcc} does not run"):
        cuda.find_toolkit()


def test_fusedopt_cuda(monkeypatch, nowhere):
    monkeypatch.setenv("FUSEDOPT_CUDA", "0")
    with pytest.raises(BuildFailed, match="FUSEDOPT_CUDA=0 was set"):
        native.cuda_part()
    for value in ("auto", "1"):
        monkeypatch.setenv("FUSEDOPT_CUDA", value)
        with pytest.raises(BuildFailed, match="nvcc was not found"):
            native.cuda_part()
    monkeypatch.setenv("FUSEDOPT_CUDA", "yes")
    with pytest.raises(SystemExit, match="FUSEDOPT_CUDA='yes' is not one of auto, 0, 1"):
        native.cuda_part()


# --- a build, of a library as small as can be ---

KERNEL = """
#include "scale.h"
#include "../../csrc/cuda/launch.h"
__global__ void update(float4* x) { x[threadIdx.x] = scale(x[threadIdx.x]); }
template <class T, int kStep>
__global__ void rotate(T* x) {
  FUSEDOPT_SHARED(T, near, [32]);
  FUSEDOPT_DYN_SHARED(T, far);
  near[threadIdx.x] = x[threadIdx.x];
  far[threadIdx.x] = x[threadIdx.x + 32];
  __syncthreads();
  x[threadIdx.x] = near[(threadIdx.x + kStep) % 32] + far[(threadIdx.x + kStep) % 32];
}
void run(float4* x, double* y, cudaStream_t stream) {
  fusedopt::check(FUSEDOPT_LAUNCH((update), 1, 32, 0, stream, x), "update");
  const cudaError_t error = FUSEDOPT_LAUNCH((rotate<double, 1>), 1, 32, 256, stream, y);
  fusedopt::check(error, "rotate");
  fusedopt::check(FUSEDOPT_LAUNCH_CLUSTER((rotate<float, 2>), dim3(4), dim3(32), 2, 128, stream, &x->x), "rotate");
}
"""
SCALE = "inline __device__ float4 scale(float4 v) { return {v.x * 2, v.y * 2, v.z * 2, v.w * 2}; }\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A source tree with one C++ file and one kernel; the function builds it and returns what is known of it."""
    source = tmp_path / "a source"  # a space in its name, as users have
    (source / "csrc" / "cuda").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "cuda" / "launch.h", source / "csrc" / "cuda")
    (source / "csrc" / "bindings_cpu.cpp").write_text("int answer() { return 42; }\n")
    (source / "csrc" / "cuda" / "kernel.cu").write_text(KERNEL)
    (source / "csrc" / "cuda" / "scale.h").write_text(SCALE)
    monkeypatch.setattr(native, "ROOT", source)
    for name in ("ISA_SOURCES", "SOURCES", "CUDA_HOST_SOURCES"):
        monkeypatch.setattr(native, name, [])
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "80;90")
    return source


def built(source):
    return native.build(source / "library.so")["cuda"], native.build_folder()


def test_without_nvcc_the_rest_is_built(project, monkeypatch):
    def nothing():
        raise BuildFailed("nvcc was not found", "install it")

    monkeypatch.setattr(cuda, "find_toolkit", nothing)
    info, folder = built(project)
    assert info == {"built": False, "reason": "nvcc was not found", "remedy": "install it"}
    assert (project / "library.so").exists() and not list(folder.glob("*.cu.o"))
    monkeypatch.setenv("FUSEDOPT_CUDA", "1")
    with pytest.raises(BuildFailed, match="nvcc was not found"):
        built(project)


@needs_nvcc
def test_with_nvcc(project, capfd):
    info, folder = built(project)
    assert info == {"built": True, "nvcc": TOOLKIT.version, "archs": (80, 90), "ptx": ()}
    kernels = resources((folder / "kernel.cu.o.log").read_text())
    names = "_Z6rotateIdLi1EEvPT_", "_Z6rotateIfLi2EEvPT_", "_Z6updateP6float4"
    assert [(kernel.name, kernel.arch) for kernel in kernels] == [(name, arch) for name in names for arch in (80, 90)]
    assert all(0 < kernel.registers < 64 and kernel.in_memory == (0, 0, 0) for kernel in kernels)

    # a second build compiles nothing, a changed header what includes it
    before = (folder / "kernel.cu.o").stat().st_mtime_ns, (folder / "bindings_cpu.o").stat().st_mtime_ns
    built(project)
    assert "no work to do" in capfd.readouterr().out
    (project / "csrc" / "cuda" / "scale.h").write_text(SCALE.replace("2", "3"))
    built(project)
    assert (folder / "kernel.cu.o").stat().st_mtime_ns > before[0]
    assert (folder / "bindings_cpu.o").stat().st_mtime_ns == before[1]


@needs_nvcc
def test_a_kernel_that_does_not_compile(project, monkeypatch, capfd):
    (project / "csrc" / "cuda" / "scale.h").write_text("")
    info, folder = built(project)
    assert info["built"] is False
    assert re.fullmatch(
        r'compilation failed: .*kernel\.cu\(4\): error: identifier "scale" is undefined', info["reason"]
    )
    assert "pip install -v" in info["remedy"]
    assert "without CUDA: compilation failed" in capfd.readouterr().err
    assert (project / "library.so").exists() and not (folder / "kernel.cu.o").exists()
    monkeypatch.setenv("FUSEDOPT_CUDA", "1")
    with pytest.raises(BuildFailed, match='"scale" is undefined'):
        built(project)


@needs_nvcc
def test_a_compiler_too_new_for_nvcc(project, monkeypatch, tmp_path):
    # nvcc asks for the version by preprocessing __GNUC__
    compiler = script(tmp_path / "g++-99", f'exec {" ".join(native.compiler())} -w -U__GNUC__ -D__GNUC__=99 "$@"')
    monkeypatch.setenv("NVCC_CCBIN", str(compiler))
    info, _ = built(project)
    assert "unsupported GNU version" in info["reason"] or "unsupported clang version" in info["reason"]
    assert "NVCC_CCBIN" in info["remedy"]


# --- the library that was built from this tree ---


class Kernel:
    """What ptxas says of one kernel on one architecture."""

    def __init__(self, name, arch, stack, stores, loads, registers):
        self.name, self.arch, self.registers = name, int(arch), int(registers)
        self.in_memory = int(stack), int(stores), int(loads)


def resources(log):
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'\n.*Function properties for \1\n"
        r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        log,
    )
    assert len(kernels) == log.count("Compiling entry function"), "ptxas -v says it in other words now"
    return sorted((Kernel(*kernel) for kernel in kernels), key=lambda kernel: (kernel.name, kernel.arch))


def logs():
    paths = [native.build_folder() / f"{source.name}.o.log" for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    found = [path for path in paths if path.exists()]
    if TOOLKIT is None:
        pytest.skip(f"left out, no kernel is compiled here: {REASON}")
    if not found:
        pytest.skip("no kernel was compiled in build/")
    return found


def test_no_kernel_spills_or_uses_local_memory():
    kernels = [kernel for log in logs() for kernel in resources(log.read_text())]
    assert kernels
    wrong = [f"{k.name} sm_{k.arch}: stack, spill stores, loads {k.in_memory}" for k in kernels if any(k.in_memory)]
    assert not wrong, "\n".join(wrong)


def cuobjdump(*arguments):
    """The disassembler of the toolkit or of Triton, which ships one."""
    candidates = [shutil.which("cuobjdump"), TOOLKIT and TOOLKIT.include.parent / "bin" / "cuobjdump"]
    if spec := importlib.util.find_spec("triton"):
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    program = next((str(path) for path in candidates if path and Path(path).exists()), None)
    if program is None:
        pytest.skip("left out, no machine code is read here: neither a cuobjdump nor Triton, which ships one")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def cuda_info():
    info = cpu.build_info().get("cuda", {})
    if not info.get("built"):
        pytest.skip(
            f"left out, the library has no CUDA part: {info.get('reason', 'it was built before there was one')}"
        )
    return info


def test_the_library_holds_what_it_says():
    info = cuda_info()
    logs()
    listed = cuobjdump("--list-elf", "--list-ptx", cpu._native.__file__)
    assert {int(arch) for arch in re.findall(r"sm_(\d+)\S*\.cubin", listed)} == set(info["archs"])
    assert {int(arch) for arch in re.findall(r"sm_(\d+)\S*\.ptx", listed)} == set(info["ptx"])


@functools.cache
def machine_code(arch):
    """Of each kernel in the library."""
    text = cuobjdump("-sass", "-arch", f"sm_{arch}", cpu._native.__file__)
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL))


@pytest.mark.parametrize(
    ("kernels", "moves"),
    [
        ("update", ("LDG", "STG")),
        ("step_floats", ("LDG", "STG")),
        ("norms_of_floats", ("LDG",)),
        (r"squared_error.*Lb0", ("LDG",)),
        (r"squared_error.*Lb1", ("LDG", "STG")),
    ],
)
def test_kernels_move_16_bytes_at_a_time(kernels, moves):
    arch = cuda_info()["archs"][0]
    logs()
    wanted = {name: code for name, code in machine_code(arch).items() if re.search(kernels, name)}
    assert wanted
    for name, code in wanted.items():
        for instruction in moves:
            assert re.search(rf"\b{instruction}\.\S*(128|256)", code), f"{name}: no 16-byte {instruction}"


def test_the_library_needs_no_cuda_to_load():
    cuda_info()
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on this machine")
    dynamic = subprocess.run(["readelf", "-dW", cpu._native.__file__], capture_output=True, text=True, check=True)
    assert "NEEDED" in dynamic.stdout and not re.search(r"cud|nv", " ".join(re.findall(r"\[(.*)\]", dynamic.stdout)))
    symbols = subprocess.run(["readelf", "-W", "--dyn-syms", cpu._native.__file__], capture_output=True, text=True)
    assert "PyInit__native" in symbols.stdout
    assert not re.findall(r" cuda\w+|cudart\w+", symbols.stdout)  # PyTorch brings a runtime of its own


def test_without_a_driver_the_library_loads_and_says_so():
    cuda_info()
    driver, runtime, error, message, devices = cpu._native.cuda_probe()
    assert runtime >= 11080
    if driver != 0:
        pytest.skip("this machine has an NVIDIA driver")
    assert error == "cudaErrorInsufficientDriver" and message and devices == []
    assert backends.available()["cuda"] == "no NVIDIA driver was found"


def test_probing_is_left_until_it_is_asked_for():
    """Training on the CPU, or forking workers, must not start the driver."""
    code = """
import json, torch, fusedopt
from fusedopt.backends import cpu
def asked():
    raise AssertionError("the driver was asked")
if hasattr(cpu._native, "cuda_probe"):
    cpu._native.cuda_probe = asked
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = fusedopt.optim.AdamW([p])
optimizer.step()
print(json.dumps([row.backend for row in optimizer.backend_report()]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == ["cpu"]
