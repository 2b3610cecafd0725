"""`python -m fusedopt` on machines with and without GPUs, and what an installation without a compiler does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedopt
import fusedopt.__main__ as report
from fusedopt import _native, backends
from fusedopt.backends import cpu, cuda

ROOT = Path(__file__).parent.parent


def test_text_report(capsys):
    assert report.main([]) == 0
    text = capsys.readouterr().out
    assert fusedopt.__version__ in text and cpu.isa() in text
    assert re.search(r"^  cpu +on$", text, re.M)
    for name, state in backends.available().items():
        line = r"on$" if state is True else rf"off: {re.escape(state)}\n +remedy: .+$"
        assert re.search(rf"^  {name} +{line}", text, re.M), name
    assert re.search(r"self-test (\d+) of \1 agree", text)


def test_json_report(capsys):
    started = time.perf_counter()
    assert report.main(["--json"]) == 0
    assert time.perf_counter() - started < 20  # "a second or two", on a machine that does other things as well
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and data["cpu"]["instruction_set"] == cpu.isa()
    assert {name: entry["on"] for name, entry in data["backends"].items()} == {
        name: state is True for name, state in backends.available().items()
    }
    assert {row["test"] for row in data["self_test"]} == {
        "Adam",
        "AdamW",
        "RMSprop",
        "Adagrad",
        "SGD",
        "Lion",
        "cross_entropy",
    }


def test_a_wrong_kernel_fails_the_self_test(monkeypatch, capsys):
    step = cpu.step

    def off_by_a_percent(table, groups, precision):
        return step(table, [([hyper[0] * 1.01, *hyper[1:]], factor) for hyper, factor in groups], precision)

    monkeypatch.setattr(cpu, "step", off_by_a_percent)
    assert report.main([]) == 1
    assert "FAILED  AdamW float32" in capsys.readouterr().out


@pytest.mark.parametrize("isa", [*_native.cpu_isas(), "sse9"])
def test_fusedopt_cpu_forces_an_instruction_set(isa):
    run = subprocess.run(
        [sys.executable, "-m", "fusedopt", "--json"],
        env={**os.environ, "FUSEDOPT_CPU": isa},
        capture_output=True,
        text=True,
    )
    data = json.loads(run.stdout)
    if isa == "sse9":
        assert "FUSEDOPT_CPU='sse9' is not one of" in data["backends"]["cpu"]["reason"]
        assert "unset" in data["backends"]["cpu"]["remedy"]
    else:
        assert data["cpu"]["instruction_set"] == isa
    assert data["ok"] and run.returncode == 0, run.stdout  # without kernels, torch's own run


def test_build_without_a_compiler_says_so_and_succeeds(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "build_tools"):
        shutil.copytree(ROOT / name, source / name)
    shutil.copytree(ROOT / "fusedopt", source / "fusedopt", ignore=shutil.ignore_patterns("*.so", "_build_info.json"))
    environment = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "FUSEDOPT_CUDA", "FUSEDOPT_REQUIRE_NATIVE")
    } | {"PATH": "/nowhere"}
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no C++ compiler was found" in run.stderr and "apt install g++" in run.stderr
    strict = subprocess.run(
        build, cwd=source, env=environment | {"FUSEDOPT_REQUIRE_NATIVE": "1"}, capture_output=True, text=True
    )
    assert strict.returncode != 0 and "apt install g++" in strict.stderr

    # an editable installation's finder would lend its native library to this copy
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import fusedopt.__main__ as m; sys.exit(m.main(['--json']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    data = json.loads(run.stdout)
    assert "no C++ compiler was found" in data["backends"]["cpu"]["reason"]
    assert "apt install g++" in data["backends"]["cpu"]["remedy"]
    assert "no C++ compiler was found" in data["backends"]["cuda"]["reason"]
    assert "apt install g++" in data["backends"]["cuda"]["remedy"]
    assert data["ok"], data["self_test"]


def test_setup_never_imports_torch():
    for path in (ROOT / "setup.py", *(ROOT / "build_tools").glob("*.py")):
        assert not re.search(r"^\s*(import|from) torch", path.read_text(), re.M), path
    project = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in re.search(r"\[build-system\].*?\n\n", project, re.S).group()
    included = {
        line for path in (ROOT / "csrc").rglob("*.*") for line in re.findall(r"#include\s+(\S+)", path.read_text())
    }
    assert not [name for name in included if re.search(r"torch|ATen|c10", name)]


# --- machines with GPUs, by what their drivers would answer ---

H100 = ("NVIDIA H100 80GB HBM3", 9, 0, 132)
T4 = ("Tesla T4", 7, 5, 40)
BUILT = {"built": True, "nvcc": "13.0.88", "archs": [80, 90], "ptx": []}
NO_DRIVER = (0, 13000, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient", [])


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be another machine: what the build wrote down, the driver answers, PyTorch is and sees."""

    def forget():
        for cached in (cuda.probe, cuda._build, cuda._obstacle):
            cached.cache_clear()

    def pretend(build=BUILT, probe=NO_DRIVER, cuda_version="13.0", hip=None, triton="no GPU is visible to PyTorch"):
        info = {"native": True, "compiler": "c++"} | ({"cuda": build} if build else {})
        monkeypatch.setattr(cpu, "build_info", lambda: info)
        if probe is None:
            monkeypatch.delattr(cpu._native, "cuda_probe", raising=False)
        else:
            monkeypatch.setattr(cpu._native, "cuda_probe", lambda: probe, raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        monkeypatch.setattr(torch.version, "hip", hip)
        devices = [SimpleNamespace(name=d[0], major=d[1], minor=d[2]) for d in (probe or NO_DRIVER)[-1]]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
        monkeypatch.setattr(backends.module("triton"), "available", lambda: triton)
        measure = report._step_error
        monkeypatch.setattr(report, "_step_error", lambda *test: measure(*test) if test[-1] == "cpu" else (0.0, 1e-6))
        forget()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield pretend
    forget()


@pytest.mark.parametrize(
    ("differs", "reason", "remedy"),
    [
        (
            {"build": {"built": False, "reason": "nvcc was not found", "remedy": "install it"}, "probe": None},
            "the native library was built without CUDA: nvcc was not found",
            "install it",
        ),
        ({"build": None, "probe": None}, "the native library was built without CUDA", "FUSEDOPT_CUDA=1 pip install"),
        ({}, "no NVIDIA driver was found", "install its driver"),
        ({"hip": "7.1", "cuda_version": None}, "this PyTorch is built for ROCm", "Triton serves AMD"),
        (
            {"probe": (12040, *NO_DRIVER[1:])},
            "it takes CUDA 12.4 and older, and fusedopt was built with CUDA 13.0",
            "update the driver, or rebuild with an older toolkit",
        ),
        ({"probe": (13000, 13000, "cudaErrorNoDevice", "no device", [])}, "no CUDA device is visible", "nvidia-smi -L"),
        (
            {"probe": (13000, 13000, "cudaErrorSystemNotReady", "system not yet initialized", [])},
            "does not start: cudaErrorSystemNotReady: system not yet initialized",
            "nvidia-smi",
        ),
        (
            {"probe": (13000, 13000, "", "", [T4, T4])},
            "this build has no code for Tesla T4 (sm_75), only for sm_80, sm_90",
            "FUSEDOPT_CUDA_ARCHS='75' pip install",
        ),
        (
            {"probe": (13000, 13000, "", "", [H100]), "cuda_version": None},
            f"this PyTorch, {torch.__version__}, is built without CUDA",
            "install a PyTorch that is built for CUDA",
        ),
    ],
)
def test_why_cuda_is_off(machine, differs, reason, remedy):
    machine(**differs)
    assert reason in cuda.available()
    assert remedy in cuda.remedy()
    with pytest.raises(backends.BackendUnavailableError) as error:
        backends.check("cuda")
    assert cuda.available() in str(error.value) and cuda.remedy() in str(error.value)


def test_hidden_devices(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine(probe=(13000, 13000, "cudaErrorNoDevice", "no CUDA-capable device is detected", []))
    assert cuda.available() == "no CUDA device is visible (CUDA_VISIBLE_DEVICES='')"
    assert cuda.remedy() == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("archs", "ptx", "driver", "capability", "runs"),
    [
        ([80, 90], [], 13000, (9, 0), True),
        ([80], [], 13000, (8, 9), True),  # a later minor version of the same major one
        ([86], [], 13000, (8, 0), False),
        ([80], [], 13000, (9, 0), False),
        ([80], [80], 13000, (9, 0), True),  # the driver compiles PTX,
        ([80], [80], 12080, (9, 0), False),  # unless it is newer than the driver
        ([90], [90], 13000, (8, 0), False),
        ([86], [], 13000, (8, 7), False),  # a Tegra runs nobody else's code,
        ([87], [], 13000, (8, 7), True),
        ([87], [], 13000, (8, 9), False),  # and nobody else a Tegra's
        ([100], [], 13000, (10, 3), True),
        ([100], [], 13000, (12, 0), False),
    ],
)
def test_which_devices_a_build_runs_on(machine, archs, ptx, driver, capability, runs):
    machine(build=BUILT | {"archs": archs, "ptx": ptx}, probe=(driver, 13000, "", "", [("a GPU", *capability, 1)]))
    assert (cuda.available() is True) == runs


def shown(capsys):
    """The report as text, and as data."""
    assert report.main([]) == 0
    text = capsys.readouterr().out
    assert report.main(["--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


def test_report_with_neither_cuda_nor_triton(machine, capsys):
    machine()
    text, data = shown(capsys)
    assert "CUDA      built by nvcc 13.0.88 for sm_80, sm_90\n" in text
    assert "  cuda       off: no NVIDIA driver was found\n             remedy: run on a machine with" in text
    assert "  triton     off: no GPU is visible to PyTorch\n             remedy: " in text
    assert "devices" not in text and data["devices"] == []
    assert data["cuda"] == {"nvcc": "13.0.88", "archs": [80, 90], "ptx": []}
    assert backends.select("auto", torch.device("cuda")).name == "reference"


def test_report_with_triton_alone(machine, capsys):
    machine(probe=(13000, 13000, "", "", [T4]), triton=True)
    text, data = shown(capsys)
    assert "  cuda       off: this build has no code for Tesla T4 (sm_75), only for sm_80, sm_90\n" in text
    assert "  triton     on\n" in text
    assert "devices\n  cuda:0     Tesla T4, compute capability 7.5; kernels: triton\n" in text
    assert [(r["backend"], r["device"]) for r in data["self_test"] if r["test"] == "Lion"] == [
        ("auto", "cpu"),
        ("triton", "cuda:0"),
    ] * 2
    assert backends.select("auto", torch.device("cuda")).name == "triton"


def test_report_with_cuda_and_triton(machine, capsys):
    machine(build=BUILT | {"ptx": [90]}, probe=(13000, 13000, "", "", [H100, T4]), triton=True)
    text, data = shown(capsys)
    assert "for sm_80, sm_90, PTX of 90\n" in text
    assert "  cuda       on\n  triton     on\n" in text
    assert data["backends"]["cuda"] == {"on": True}
    assert data["devices"] == [
        {"device": "cuda:0", "name": H100[0], "compute_capability": "9.0", "backends": ["cuda", "triton"]},
        {"device": "cuda:1", "name": "Tesla T4", "compute_capability": "7.5", "backends": ["triton"]},
    ]
    assert {(r["backend"], r["device"]) for r in data["self_test"]} == {
        ("auto", "cpu"),
        ("cuda", "cuda:0"),
        ("triton", "cuda:0"),
    }
    for device, name in (("cuda", "cuda"), ("cuda:0", "cuda"), ("cuda:1", "triton"), ("cpu", "cpu")):
        assert backends.select("auto", torch.device(device)).name == name
    assert backends.check("cuda") == "cuda"
