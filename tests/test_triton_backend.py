"""When the Triton backend is on, what it says where it is not, and that "auto" falls back to it."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedopt import backends
from fusedopt.backends import cpu, cuda
from fusedopt.backends import triton as backend

NO_TRITON = """
import sys
sys.modules["triton"] = None
from fusedopt.backends import triton
assert triton.available() == "Triton is not installed", triton.available()
assert triton.remedy() == "pip install triton"
"""
NOT_YET = """
import sys
import fusedopt
from fusedopt.backends import triton
triton.available()
import torch
assert torch.cuda.is_available() or torch.xpu.is_available() or "triton" not in sys.modules
"""


@pytest.mark.parametrize("script", [NO_TRITON, NOT_YET], ids=["without Triton", "imports late"])
def test_import(script):
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def machine(monkeypatch):
    """One with a GPU and a Triton that loads; the CUDA library is off for the reason given, or on."""

    def pretend(cuda_state=True, *, installed=True, visible=True, error=None):
        monkeypatch.setattr(cuda, "available", lambda: cuda_state)
        monkeypatch.setattr(cuda, "covers", lambda device: cuda_state is True)
        monkeypatch.setattr(backend, "_installed", lambda: installed)
        monkeypatch.setattr(backend, "_gpu_visible", lambda: visible)
        monkeypatch.setattr(backend, "_import_error", lambda: error)

    return pretend


selected = functools.partial(backends.select, "auto")


@pytest.mark.parametrize("reason", ["it was built without CUDA", "no NVIDIA driver was found", "PyTorch is for ROCm"])
def test_auto_falls_back_to_triton_where_cuda_is_off(machine, reason):
    machine(reason)
    assert selected(torch.device("cuda")) is backend
    assert selected(torch.device("cuda:3")) is backend
    assert selected(torch.device("xpu")) is backend
    assert selected(torch.device("cpu")) is cpu
    assert backends.check("triton") == "triton"


def test_auto_prefers_cuda_and_ends_at_reference(machine):
    machine()
    assert selected(torch.device("cuda")) is cuda
    assert selected(torch.device("xpu")) is backend
    machine("no NVIDIA driver was found", installed=False)
    assert selected(torch.device("cuda")).name == "reference"


@pytest.mark.parametrize(
    ("differs", "reason", "remedy"),
    [
        ({"installed": False}, "Triton is not installed", "pip install triton"),
        ({"visible": False}, "no GPU is visible to PyTorch", "torch.cuda.is_available()"),
        ({"error": "Triton does not load (no libz)"}, "Triton does not load (no libz)", "--force-reinstall torch"),
    ],
)
def test_why_it_is_off(machine, differs, reason, remedy):
    machine(**differs)
    assert backend.available() == reason and remedy in backend.remedy()
    with pytest.raises(backends.BackendUnavailableError) as error:
        backends.check("triton")
    assert reason in str(error.value) and remedy in str(error.value)


def test_it_is_off_without_the_native_core(machine, monkeypatch):
    machine("the native library was not built: no C++ compiler was found")
    monkeypatch.setattr(cpu, "available", lambda: "no C++ compiler was found")
    monkeypatch.setattr(cpu, "remedy", lambda: "apt install g++")
    assert backend.available() == "it needs the native library: no C++ compiler was found"
    assert backend.remedy() == "apt install g++"
    assert selected(torch.device("cuda")).name == "reference"
