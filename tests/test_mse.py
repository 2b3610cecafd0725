"""Mean squared error against float64 and against stock's own error; layouts, graphs, what is left to stock."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_mode import Watch
from mse_oracle import assert_as_good_as_stock, run

import fusedopt
from fusedopt import _native
from fusedopt.backends import cpu
from fusedopt.nn.functional import mse_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=_native.cpu_isas())
def isa(request):
    before = _native.cpu_isa()
    assert _native.use_cpu_isa(request.param)
    yield
    _native.use_cpu_isa(before)


@pytest.fixture
def passes(monkeypatch):
    """Counts the native passes."""
    calls = []
    native = cpu._native.cpu_mse
    monkeypatch.setattr(cpu._native, "cpu_mse", lambda *args: calls.append(args) or native(*args))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 13), (513,), (3, 5, 1, 7), (200_003,)], ids=str)
def test_matches_float64_as_well_as_stock(isa, passes, dtype, reduction, shape):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    assert_as_good_as_stock(x, y, reduction)
    assert len(passes) == (2 if dtype == torch.float16 else 1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    layout=st.sampled_from(["contiguous", "transposed", "offset", "gaps"]),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_layout(shape, layout, dtype, reduction, seed):
    g = torch.Generator().manual_seed(seed)

    def make():
        if layout == "gaps":
            return torch.randn(*shape, 2, generator=g).to(dtype)[..., 0]
        if layout == "offset":
            numel = torch.Size(shape).numel()
            return torch.randn(numel + 1, generator=g).to(dtype)[1:].view(shape)
        t = torch.randn(shape, generator=g).to(dtype)
        return t.mT if layout == "transposed" and len(shape) > 1 else t

    assert_as_good_as_stock(make(), make(), reduction)


def test_gradient_keeps_the_layout(passes):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    mse_loss(x, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)).backward()
    assert x.grad.stride() == x.stride() and len(passes) == 1


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_needs_a_gradient(needs):
    x, y = torch.randn(100), torch.randn(100)
    a, b = (t.clone().requires_grad_(need) for t, need in zip((x, y), needs, strict=True))
    with Watch(a, b) as watch:
        loss = mse_loss(a, b)
    assert (watch.peak >= 400) == any(needs)
    if any(needs):
        loss.backward()
    expected = (x - y) / 50
    for t, need, sign in ((a, needs[0], 1), (b, needs[1], -1)):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, sign * expected)


def test_same_bits_whatever_the_threads():
    x, y = torch.randn(300_007), torch.randn(300_007)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(mse_loss, x, y, torch.tensor(1.0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, 3e38])
def test_adversarial_values_as_stock(isa, value):
    x, y = torch.tensor([1.0, value, -2.0]), torch.tensor([0.5, 1.0, value])
    ours, stock = run(mse_loss, x, y, torch.tensor(1.0)), run(F.mse_loss, x, y, torch.tensor(1.0))
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_loss_of_half_inputs_is_float32():
    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.randn(4, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        assert mse_loss(x, y).dtype == mse_loss(x, y, backend="reference").dtype == torch.float32
        assert mse_loss(x, y, reduction="none").dtype == dtype


def test_float16_gradients_survive_a_large_batch():
    x, y, scale = torch.randn(1 << 20).half(), torch.randn(1 << 20).half(), torch.tensor(2.0**16)
    exact = run(F.mse_loss, x, y, scale, torch.float64)
    ours = run(mse_loss, x, y, scale)
    assert ((ours[1] - exact[1]).abs() <= 2**-10 * exact[1].abs() + 2**-25).all()


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((4, 5), (4, 5)), {"reduction": "none"}),
        (((4, 5), (4, 5)), {"weight": torch.rand(4, 5)}),
        (((4, 5), (5,)), {}),
        (((0, 5), (0, 5)), {}),
        (((4, 5), (4, 5)), {"size_average": False}),
    ],
    ids=["none", "weight", "broadcast", "empty", "size_average"],
)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce")
def test_the_rest_as_stock(shapes, options):
    x, y = (torch.randn(shape) for shape in shapes)
    torch.testing.assert_close(mse_loss(x, y, **options), F.mse_loss(x, y, **options), equal_nan=True)
    mixed = mse_loss(x, y.double(), **options)
    torch.testing.assert_close(mixed, F.mse_loss(x, y.double(), **options), equal_nan=True)


@pytest.mark.parametrize("arguments", [((3,), (4,), {}), ((3,), (3,), {"reduction": "average"})], ids=str)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_bad_input_raises_torchs_own_error(arguments):
    a, b, options = arguments
    x, y = torch.randn(a), torch.randn(b)
    with pytest.raises(Exception) as stock:
        F.mse_loss(x, y, **options)
    with pytest.raises(stock.type) as ours:
        mse_loss(x, y, **options)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_backward_and_accumulation(dtype):
    x, y = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    grads = []
    for function in (mse_loss, F.mse_loss):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = function(a, b)
        loss.backward(retain_graph=True)
        (loss * 2).backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        grads.append((a.grad, b.grad))
    eps = torch.finfo(dtype).eps
    for ours, stock in zip(*grads, strict=True):
        torch.testing.assert_close(ours, stock, rtol=4 * eps, atol=eps * float(stock.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_double_backward(reduction):
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: mse_loss(a, b, reduction=reduction), (x, y))
    assert torch.autograd.gradgradcheck(lambda a, b: mse_loss(a, b, reduction=reduction), (x, y))


def test_inputs_may_change_between_forward_and_backward():
    x, y = torch.randn(9, requires_grad=True), torch.randn(9)
    expected = torch.autograd.grad(F.mse_loss(x, y), x)[0]
    z = x * 1
    loss = mse_loss(z, y)
    with torch.no_grad():
        z.mul_(7)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_transforms_autocast_and_compile():
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    torch.testing.assert_close(torch.vmap(mse_loss)(x, y), torch.vmap(F.mse_loss)(x, y))
    torch.testing.assert_close(torch.func.grad(mse_loss)(x, y), torch.func.grad(F.mse_loss)(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mse_loss(x.bfloat16(), y.bfloat16()), F.mse_loss(x.bfloat16(), y.bfloat16()))
    torch._dynamo.reset()
    a = x.clone().requires_grad_()
    loss = torch.compile(lambda t: mse_loss(t * 2, y), backend="aot_eager", fullgraph=True)(a)
    loss.backward()
    b = x.clone().requires_grad_()
    F.mse_loss(b * 2, y).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_module_is_torchs_module():
    module = fusedopt.nn.MSELoss(reduction="sum")
    assert isinstance(module, torch.nn.MSELoss) and fusedopt.MSELoss is fusedopt.nn.MSELoss
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(module(x, y), torch.nn.MSELoss(reduction="sum")(x, y))
