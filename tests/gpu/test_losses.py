"""Losses on a GPU: values, statistics, what waits for the device, graphs, sizes."""

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import assert_as_good_as_composition, make
from mse_oracle import check_functional, check_kernels

from fusedopt import backends
from fusedopt.nn.functional import cross_entropy, linear_cross_entropy, mse_loss

EXTRAS = [
    {},
    {"z_loss": 1e-2},
    {"logit_scale": -1.7},
    {"softcap": 5.0},
    {"softcap": 30.0, "z_loss": 1e-3, "logit_scale": 2.0},
]


def on_gpu(backend):
    """The loss of CPU tensors, computed on the GPU."""

    def loss(*tensors, **options):
        return cross_entropy(*(None if t is None else t.cuda() for t in tensors), **options, backend=backend).cpu()

    return loss


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_float64_than_torchs_operators(dtype, reduction, extras, backend):
    for shape in [(7, 13), (3, 1), (5, 2053), (3, 50257), (2, 128256), (2, 300001), (2, 5, 3, 4)]:
        for probabilities, weighted, smoothing in [(False, False, 0.0), (False, True, 0.1), (True, True, 0.1)]:
            data = make(shape, dtype, probabilities=probabilities, weighted=weighted)
            assert_as_good_as_composition(
                on_gpu(backend), *data, reduction=reduction, label_smoothing=smoothing, **extras
            )


def test_statistics(backend):
    x = torch.randn(64, 50257).bfloat16().cuda()
    x[0, [3, 500]] = 9.0
    target = x.argmax(1)
    target[::2] = 5
    _, stats = cross_entropy(x, target, return_stats=True, backend=backend)
    torch.testing.assert_close(stats.lse.double(), x.double().logsumexp(1), rtol=2e-6, atol=2e-6)
    assert torch.equal(stats.argmax, x.float().argmax(1))
    assert torch.equal(stats.correct, stats.argmax == target)
    entropy = torch.special.entr(x.double().softmax(1)).sum(1)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_nothing_waits(backend):
    x = torch.randn(100, 1003, device="cuda", requires_grad=True)
    target = torch.randint(1003, (100,), device="cuda")
    cross_entropy(x, target, backend=backend).backward()  # compiles, for Triton
    for dtype in (torch.float32, torch.float16):
        mse_loss(x.to(dtype), x.detach().to(dtype), backend=backend).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "none"):
            loss, _ = cross_entropy(x, target, reduction=reduction, return_stats=True, backend=backend)
            loss.backward(torch.ones_like(loss))
        hidden = torch.randn(100, 64, device="cuda", requires_grad=True)
        weight = torch.randn(1003, 64, device="cuda", requires_grad=True)
        linear_cross_entropy(hidden, weight, target).backward()
        for dtype in (torch.float32, torch.float16):
            a, b = (t.detach().to(dtype).requires_grad_() for t in (x, x + 1))
            mse_loss(a, b, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_target_out_of_range_is_nan_now_and_an_error_later(backend):
    x = torch.randn(10, 7, device="cuda")
    target = torch.zeros(10, dtype=torch.int64, device="cuda")
    target[4] = 7
    assert cross_entropy(x, target, backend=backend).isnan()
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds. \(row 4 of an earlier loss"):
        cross_entropy(x, target.clamp(max=6), backend=backend)
    assert cross_entropy(x, target.clamp(max=6), backend=backend).isfinite()


def test_captured_in_a_graph(backend):
    x = torch.randn(64, 1003, device="cuda", requires_grad=True)
    target = torch.randint(1003, (64,), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cross_entropy(x, target, backend=backend).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(x, target, backend=backend)
        loss.backward()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    leaf = x.detach().clone().requires_grad_()
    expected = F.cross_entropy(leaf, target)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, leaf.grad)


def test_more_than_2_to_the_31_logits(backend):
    rows, classes = 20000, 128256
    if torch.cuda.mem_get_info()[0] < 5 * rows * classes:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(classes, device="cuda")
    target = torch.full((rows,), classes - 1, device="cuda")
    last = x[-1:].float().clone().requires_grad_()
    F.cross_entropy(last, target[-1:], reduction="sum").backward()
    loss = cross_entropy(x.requires_grad_(), target, reduction="sum", inplace=False, backend=backend)
    loss.backward()
    torch.testing.assert_close(x.grad[-1:].float(), last.grad, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(x.grad[0, :10].float(), torch.full((10,), 1 / classes, device="cuda"), rtol=1e-2, atol=0)


# --- mean squared error ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squared_error_kernels(dtype, backend):
    for n in (1, 3, 8, 1000, 4096, 8195, 20003, 20_000_003):
        losses = check_kernels(backends.module(backend), n, dtype, "cuda")
        if backend == "cuda":
            assert len(set(losses)) == 1, losses  # wherever the tensors begin
        assert losses == check_kernels(backends.module(backend), n, dtype, "cuda")


def test_squared_error_from_python(backend):
    check_functional(backend, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_squared_error_in_a_graph(dtype, backend):
    x, y = (torch.randn(5003, device="cuda", dtype=dtype) for _ in range(2))
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mse_loss(x, y, backend=backend).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = mse_loss(x, y, backend=backend)
        loss.backward()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    leaf = x.detach().double().requires_grad_()
    expected = F.mse_loss(leaf, y.double())
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_squared_error_of_more_than_2_to_the_31_elements(backend):
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip(f"needs {7 * n >> 30} GiB of free GPU memory")
    x, y = torch.zeros(n, dtype=torch.bfloat16, device="cuda"), torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-5:], x[0] = 3.0, -2.0
    loss = mse_loss(x.requires_grad_(), y, reduction="sum", backend=backend)
    assert loss == 5 * 9 + 4
    loss.backward()
    assert x.grad[-5:].tolist() == [6.0] * 5 and x.grad[0] == -4
    for block in x.grad[1:-5].split(2**28):
        assert not block.any()
