"""Mean squared error on the Triton backend: by value in Triton's interpreter, and what it is compiled to elsewhere."""

import pytest
import torch

pytest.importorskip("triton")

from mse_oracle import check_functional, check_kernels
from triton_elsewhere import TARGETS, Code, compiled, forget, pretend
from triton_interpreter import INTERPRETED, interpreted, run_anew

from fusedopt.backends import triton
from fusedopt.backends.triton import mse

compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setattr(triton, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(triton, "available", lambda: True)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 8, 1000, 4096, 8195, 20003])
def test_kernels(dtype, n):
    check_kernels(triton, n, dtype)


@interpreted
def test_programs_walk_several_blocks(monkeypatch):
    monkeypatch.setattr(mse, "PROGRAMS", 2)
    check_kernels(triton, 40003, torch.bfloat16)


@interpreted
def test_functional(on):
    check_functional("triton")


@pytest.fixture
def elsewhere(monkeypatch):
    yield lambda target: pretend(monkeypatch, target, mse)
    forget(mse.squares)
    forget(mse.finish)


@compiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_move_16_bytes_at_a_time_and_spill_nothing(target, dtype, elsewhere, tmp_path):
    elsewhere(target)
    x = torch.zeros(1000, dtype=dtype)
    if dtype == torch.float16:  # its gradient is written in backward
        mse.squared_error(x, x, 1.0)
        mse.squared_error_backward(x, x, x, 1.0, torch.ones(()))
    else:
        mse.squared_error(x, x, 1.0, x, 1.0)
    vectors = mse.BLOCK * dtype.itemsize // 16 // mse.THREADS
    for kernel in compiled(mse.squares, target):
        code = Code.of(kernel, tmp_path)
        writes = kernel.src.constants.get((mse.squares.arg_names.index("grad"),), x) is not None
        assert code.local == 0, code
        assert code.loads >= 2 * vectors and code.stores >= vectors * writes, code
    assert Code.of(*compiled(mse.finish, target), tmp_path).local == 0


@compiles
def test_one_compilation_serves_all_sizes_factors_and_aligned_addresses(elsewhere):
    elsewhere("sm_90")
    memory = torch.zeros(100_000)
    for n, offset in ((1, 0), (16, 4), (4097, 8), (100_000 - 64, 64)):
        x = memory[offset : offset + n]
        mse.squared_error(x, x, 1.0 / n, x, 2.0 / n)
    assert len(compiled(mse.squares, "sm_90")) == len(compiled(mse.finish, "sm_90")) == 1
    mse.squared_error(memory[1:], memory[:-1], 1.0, memory[:-1], 2.0)
    assert len(compiled(mse.squares, "sm_90")) == 2
