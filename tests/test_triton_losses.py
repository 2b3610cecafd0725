"""fusedopt.nn's losses on the Triton backend, in Triton's interpreter: from the functional down to the kernels."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from triton_elsewhere import TARGETS, Code, compiled, pretend
from triton_interpreter import INTERPRETED, interpreted, run_anew

from fusedopt.backends import bad_target, triton
from fusedopt.backends.triton import totals
from fusedopt.nn.cross_entropy import Rule
from fusedopt.nn.functional import cross_entropy


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setattr(triton, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(triton, "available", lambda: True)


@interpreted
@pytest.mark.parametrize("shape", [(6, 50), (2, 7, 3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(on, dtype, reduction, shape):
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    target.view(-1)[1] = -100
    options = {"label_smoothing": 0.1, "reduction": reduction}
    loss, stats = cross_entropy(logits, target, **options, return_stats=True, backend="triton")
    assert loss.dtype == torch.float32
    upstream = torch.randn(loss.shape)
    loss.backward(upstream)
    leaf = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(leaf, target, **options)
    expected.backward(upstream.double())
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(stats.argmax, logits.argmax(1))
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), leaf.grad, rtol=2 * ulp, atol=ulp * leaf.grad.abs().max().item())


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
def test_what_the_mean_divides_by(weighted):
    target = torch.randint(7, (2500,))
    target[::5] = 3
    weight = torch.rand(7) if weighted else None
    factor = triton.target_factor(target, Rule(weight, ignore_index=3), 7, mean=True)
    counts = target != 3
    total = weight[target[counts]].double().sum() if weighted else counts.sum()
    torch.testing.assert_close(factor.double(), 1.0 / total.double(), rtol=1e-6, atol=0)
    assert triton.target_factor(target, Rule(weight, ignore_index=3), 7, mean=False) == 1
    assert triton.target_factor(torch.rand(4, 7), Rule(), 7, mean=True) == 0.25


@interpreted
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_a_target_out_of_range_is_nan_now_and_an_error_later(on, bad, monkeypatch):
    monkeypatch.setattr(totals, "THREADS", 2)  # blocks of 8 rows
    target = torch.randint(7, (15,))
    target[12] = bad
    assert cross_entropy(torch.randn(15, 7), target, backend="triton").isnan()
    with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds. \(row 12 of an earlier loss"):
        cross_entropy(torch.randn(3, 7), torch.tensor([0, 1, 2]), backend="triton")
    assert bad_target.report().tolist() == [0, 0, 0]
    assert cross_entropy(torch.randn(3, 7), torch.tensor([0, 1, 2]), backend="triton").isfinite()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 2047, 2049, 70000])
def test_scaling(dtype, n):
    tensor = torch.randn(n).to(dtype)
    expected = (tensor.float() * 0.3).to(dtype)
    assert torch.equal(triton.scale_(tensor.clone(), torch.tensor(1.0)), tensor)
    assert torch.equal(triton.scale_(tensor, torch.tensor(0.3)), expected)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels_compile_and_spill_nothing(monkeypatch, tmp_path, target):
    pretend(monkeypatch, target, totals)
    labels, weight = torch.zeros(5, dtype=torch.int64), torch.zeros(3)
    totals.check_targets(labels, Rule(weight), 3, torch.zeros(()), torch.zeros(3, dtype=torch.int64))
    totals.check_targets(labels, Rule(), 3, None, torch.zeros(3, dtype=torch.int64))
    totals.scale_(torch.zeros(5000, dtype=torch.bfloat16), torch.ones(()))
    for kernel in (totals._check_targets, totals._scale):
        for made in compiled(kernel, target):
            assert Code.of(made, tmp_path).local == 0
