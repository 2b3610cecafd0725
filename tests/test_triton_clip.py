"""The norm of gradients on Triton's kernels: by value in the interpreter, and compiled for GPUs that are not here."""

import math

import pytest
import torch
from optim_table import DTYPES, WITH_LION, make_params, set_grads

pytest.importorskip("triton")

from triton_elsewhere import TARGETS, Code, compiled, forget, pretend
from triton_interpreter import INTERPRETED, interpreted, run_anew

from fusedopt.backends import cpu
from fusedopt.backends import triton as backend
from fusedopt.backends.triton import kernels, table

pytestmark = pytest.mark.skipif(cpu.available() is not True, reason=str(cpu.available()))


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


@interpreted
@pytest.mark.parametrize("case", WITH_LION[:2], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_clipping_as_on_the_cpu(case, dtypes, monkeypatch):
    torch.set_num_threads(1)
    large = {size: t._replace(block=kernels.CHUNK.value) for size, t in table.TUNING.items()}
    monkeypatch.setattr(table, "TUNING", large)
    monkeypatch.setattr(backend, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(backend, "available", lambda: True)
    ours, theirs = make_params(dtypes), make_params(dtypes)
    options = {"max_norm": 0.5, "skip_non_finite": True}
    optimizer, on_cpu = case.fused(ours, backend="triton", **options), case.fused(theirs, backend="cpu", **options)
    for step in range(3):
        for params, one in ((ours, optimizer), (theirs, on_cpu)):
            set_grads(params, dtypes, step)
            if step == 1:
                params[4].grad.view(-1)[3] = math.inf
            one.step()
        torch.testing.assert_close(optimizer.grad_norm, on_cpu.grad_norm, rtol=1e-12, atol=0)
    assert int(optimizer.skipped_steps) == 1
    for a, b in zip(ours, theirs, strict=True):
        error = 4 * torch.finfo(a.dtype).eps + 1e-7  # a device's coefficient is float32
        torch.testing.assert_close(a, b, rtol=error, atol=error, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_compiles_to_wide_loads(monkeypatch, tmp_path, target, dtypes):
    pretend(monkeypatch, target, table)
    dtype, grad = DTYPES[dtypes]
    words = torch.zeros(3, 14, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    launch = backend.Launch("sgd", dtype, grad, dtype, *words, torch.zeros(5, dtype=torch.int32), True)
    backend.new_table(torch.device("cpu")).sum_of_squares([launch], torch.zeros(1, 11, dtype=torch.int64))
    (made,) = compiled(kernels.sum_squares, target)
    code = Code.of(made, tmp_path)
    assert code.local == 0 and code.loads >= 1
    for kernel in (kernels.sum_squares, kernels.update):
        forget(kernel)
