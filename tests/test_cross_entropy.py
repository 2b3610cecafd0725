"""Cross entropy against float64 and against stock's own error; memory, graphs, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt import _native
from fusedopt.backends import BackendUnavailableError
from fusedopt.nn.functional import cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((7, 13), (5,), (3, 11, 2, 3), (4, 1000), (1, 1), (3, 1), (2, 5003), (129, 64))
# Rounding of one float32 exp, sum and log; the tests' logits keep losses below 20.
LOSS_TOLERANCE = {torch.float64: 1e-13}
# What stock's error may be exceeded by: two roundings to the gradient's dtype.
GRAD_ULPS = 2


@pytest.fixture(params=_native.cpu_isas())
def isa(request):
    before = _native.cpu_isa()
    assert _native.use_cpu_isa(request.param)
    yield request.param
    _native.use_cpu_isa(before)


def make(shape, dtype, *, probabilities, weighted, seed=0):
    g = torch.Generator().manual_seed(seed)
    class_dim = 0 if len(shape) == 1 else 1
    classes = shape[class_dim]
    logits = (torch.randn(shape, generator=g) * 3).to(dtype)
    if probabilities:
        target = torch.randn(shape, generator=g).softmax(class_dim).to(dtype)
    else:
        target = torch.randint(0, classes, shape[:class_dim] + shape[class_dim + 1 :], generator=g)
        if target.numel() > 2:
            target.view(-1)[1] = -100
    weight = (torch.rand(classes, generator=g) + 0.1).to(dtype) if weighted else None
    return logits, target, weight


def run(function, logits, target, weight, upstream, dtype=None, **options):
    """(loss, gradient of logits) in float64, computed in `dtype`."""
    x = logits.detach().clone() if dtype is None else logits.detach().to(dtype, copy=True)
    x.requires_grad_()
    if target.is_floating_point():
        target = target.to(x.dtype)
    loss = function(x, target, None if weight is None else weight.to(x.dtype), **options)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach().double(), x.grad.double()


def assert_as_good_as_stock(logits, target, weight, **options):
    dtype = logits.dtype
    probe = F.cross_entropy(
        logits.float(), target.float() if target.is_floating_point() else target, reduction=options["reduction"]
    )
    upstream = torch.rand(probe.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    exact_loss, exact_grad = run(F.cross_entropy, logits, target, weight, upstream, torch.float64, **options)
    loss, grad = run(cross_entropy, logits, target, weight, upstream, **options)
    stock_loss, stock_grad = run(F.cross_entropy, logits, target, weight, upstream, **options)

    scale = exact_loss.abs().max().clamp(min=1)
    allowed = LOSS_TOLERANCE.get(dtype, 2e-6) * scale
    assert (loss - exact_loss).abs().max() <= torch.minimum(
        (stock_loss - exact_loss).abs().max() + allowed, scale * 1e-2
    )
    # relative to the largest entry: tiny probabilities sit beside it in the same sum
    ulp = torch.finfo(dtype).eps * exact_grad.abs().max() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # p carries exp's relative error (softmax.h: 2e-7 and 2e-8 |x|), which stays where p - 1 cancels; for float64 the
    # oracle itself rounds
    floor = 5e-7 if dtype != torch.float64 else 2e-14
    assert (grad - exact_grad).abs().max() <= (stock_grad - exact_grad).abs().max() + GRAD_ULPS * ulp + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_float64_as_well_as_stock(dtype, shape, reduction):
    for probabilities in (False, True):
        for weighted in (False, True):
            for smoothing in (0.0, 0.1, 1.0):
                logits, target, weight = make(shape, dtype, probabilities=probabilities, weighted=weighted)
                assert_as_good_as_stock(logits, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_every_instruction_set(isa, dtype, probabilities):
    logits, target, weight = make((33, 1031), dtype, probabilities=probabilities, weighted=True)
    for reduction in ("mean", "none"):
        assert_as_good_as_stock(logits, target, weight, reduction=reduction, label_smoothing=0.1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 257, 4095, 4096, 4097]),
    offset=st.integers(0, 3),
    gap=st.integers(0, 5),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_any_alignment_and_stride(rows, classes, offset, gap, transposed, dtype, reduction, seed):
    g = torch.Generator().manual_seed(seed)
    memory = (torch.randn(offset + rows * (classes + gap), generator=g) * 3).to(dtype)
    strides = (1, rows) if transposed else (classes + gap, 1)
    logits = memory.as_strided((rows, classes), strides, offset)
    target = torch.randint(0, classes, (rows,), generator=g)
    assert_as_good_as_stock(logits, target, None, reduction=reduction)


@pytest.mark.parametrize(
    "row",
    [
        [float("inf"), 0.0, 1.0],
        [float("-inf"), 0.0, 1.0],
        [float("-inf")] * 3,
        [float("nan"), 0.0, 1.0],
        [2.0, 2.0, 2.0],
        [1e4, -1e4, 0.0],
        [3e38, -3e38, 0.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_adversarial_rows_as_stock(row, target, smoothing):
    rows = torch.tensor([row, [0.5, 1.0, -1.0]])
    y = torch.tensor([target, 1])
    for reduction in ("mean", "none"):
        upstream = torch.ones(() if reduction == "mean" else (2,))
        ours = run(cross_entropy, rows, y, None, upstream, reduction=reduction, label_smoothing=smoothing)
        stock = run(F.cross_entropy, rows, y, None, upstream, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(ours[0], stock[0], equal_nan=True, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(ours[1], stock[1], equal_nan=True, rtol=2e-6, atol=2e-7)


def test_all_ignored_is_nan_as_in_stock():
    x = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(x, torch.full((3,), -100))
    loss.backward()
    assert loss.isnan()
    assert torch.equal(x.grad, torch.zeros(3, 5))
    assert cross_entropy(x, torch.full((3,), -100), reduction="sum") == 0


def test_empty_batch_as_stock():
    x = torch.randn(0, 5, requires_grad=True)
    y = torch.empty(0, dtype=torch.int64)
    assert cross_entropy(x, y).isnan() and F.cross_entropy(x, y).isnan()
    assert cross_entropy(x, y, reduction="sum") == 0


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
@pytest.mark.parametrize("inplace", [False, True])
def test_target_out_of_range_raises_before_anything_is_written(bad, inplace):
    x = torch.randn(4, 5, requires_grad=True)
    before = x.detach().clone()
    y = torch.tensor([0, 1, bad, 2])
    with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds.*position 2.*0 <= target < 5"):
        cross_entropy(x, y, inplace=inplace)
    assert torch.equal(x, before)
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        F.cross_entropy(x, y)


@pytest.mark.parametrize(
    "arguments",
    [
        ((2, 3), torch.tensor([0, 1, 2]), {}),
        ((2, 3), torch.tensor([0, 1], dtype=torch.int32), {}),
        ((2, 3), torch.tensor([0.0, 1.0]), {}),
        ((2, 3), torch.tensor([0, 1]), {"weight": torch.ones(4)}),
        ((2, 3), torch.tensor([0, 1]), {"weight": torch.ones(3, dtype=torch.float64)}),
        ((2, 3), torch.tensor([0, 1]), {"reduction": "average"}),
        ((2, 3), torch.tensor([0, 1]), {"label_smoothing": 1.1}),
    ],
    ids=lambda a: str(a[1:]),
)
def test_bad_input_raises_torchs_own_error(arguments):
    shape, target, options = arguments
    x = torch.randn(shape)
    with pytest.raises(Exception) as stock:
        F.cross_entropy(x, target, **options)
    with pytest.raises(stock.type) as ours:
        cross_entropy(x, target, **options)
    assert str(ours.value) == str(stock.value)


def test_backend_by_name():
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert cross_entropy(x, y, backend="reference") == F.cross_entropy(x, y)
    torch.testing.assert_close(cross_entropy(x, y, backend="cpu"), F.cross_entropy(x, y))
    with pytest.raises(BackendUnavailableError, match="cuda"):
        fusedopt.nn.CrossEntropyLoss(backend="cuda")
    with pytest.raises(ValueError, match="'metal' is not one of"):
        cross_entropy(x, y, backend="metal")


def test_loss_of_half_logits_is_float32():
    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.randn(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 3])
        assert cross_entropy(x, y).dtype == torch.float32
        assert cross_entropy(x, y, backend="reference").dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_backward_and_accumulation(reduction, dtype):
    logits, target, _ = make((6, 50), dtype, probabilities=False, weighted=False)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for x, function in ((a, cross_entropy), (b, lambda *args, **kw: F.cross_entropy(args[0].float(), args[1], **kw))):
        loss = function(x, target, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        (loss * 2).backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_gradient_returned_under_retain_graph_is_not_shared():
    x = torch.randn(5, 7, requires_grad=True)
    loss = cross_entropy(x, torch.arange(5))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(second, kept)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_double_backward(reduction):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 1])
    assert torch.autograd.gradgradcheck(lambda t: cross_entropy(t, y, label_smoothing=0.1, reduction=reduction), (x,))
    assert torch.autograd.gradcheck(lambda t: cross_entropy(t, y, label_smoothing=0.1, reduction=reduction), (x,))


def test_logits_may_change_between_forward_and_backward():
    x = torch.randn(3, 4, requires_grad=True)
    y = torch.tensor([0, 3, 1])
    expected = torch.autograd.grad(F.cross_entropy(x, y), x)[0]
    logits = x * 1
    loss = cross_entropy(logits, y)
    with torch.no_grad():
        logits.mul_(7)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
    # where backward needs them, autograd says so instead of computing nonsense
    logits = x * 1
    loss = cross_entropy(logits, y, reduction="none").sum()
    with torch.no_grad():
        logits.mul_(7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_overwrites_the_logits_and_says_so():
    x = torch.randn(6, 9)
    y = torch.randint(0, 9, (6,))
    expected = run(F.cross_entropy, x, y, None, torch.tensor(1.0))
    w = torch.eye(9, requires_grad=True)
    logits = x @ w
    version = logits._version
    loss = cross_entropy(logits, y, inplace=True)
    torch.testing.assert_close(logits.detach().double(), expected[1], rtol=1e-5, atol=1e-7)
    assert logits._version > version
    loss.backward()
    torch.testing.assert_close(w.grad, x.T @ expected[1].float(), rtol=1e-5, atol=1e-6)
    # exp saves its output, which the loss then overwrites: autograd must notice
    z = x.clone().requires_grad_()
    saved = z.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(saved, y, inplace=True).backward()
    # nothing to write without a gradient
    x2 = x.clone()
    cross_entropy(x2, y, inplace=True)
    assert torch.equal(x, x2)


def test_scratch_buffer_is_reused_only_when_free():
    rows, classes = 70, 131072  # above the size from which buffers are kept
    x = torch.randn(rows, classes)
    y = torch.randint(0, classes, (rows,))
    a, b = x.clone().requires_grad_(), (x * 2).requires_grad_()
    cross_entropy(a, y).backward()
    kept, address = a.grad.clone(), a.grad.data_ptr()
    cross_entropy(b, y).backward()
    assert b.grad.data_ptr() != address
    assert torch.equal(a.grad, kept)
    view = b.grad[3:5]
    address = b.grad.data_ptr()
    expected = view.clone()
    b.grad = None
    cross_entropy(a, y).backward()
    assert torch.equal(view, expected)
    del view
    a.grad = None
    c = x.clone().requires_grad_()
    cross_entropy(c, y).backward()
    torch.testing.assert_close(c.grad, kept, rtol=0, atol=0)


def test_targets_and_weights_that_need_gradients():
    x = torch.randn(4, 6, requires_grad=True)
    t = torch.randn(4, 6).softmax(1).requires_grad_()
    for function in (cross_entropy, F.cross_entropy):
        grads = torch.autograd.grad(function(x, t), (x, t))
        if function is cross_entropy:
            ours = grads
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_transforms_and_forward_mode():
    x, y = torch.randn(5, 4, 6), torch.randint(0, 6, (5, 4))
    torch.testing.assert_close(torch.vmap(cross_entropy)(x, y), torch.vmap(F.cross_entropy)(x, y))
    torch.testing.assert_close(torch.func.grad(cross_entropy)(x[0], y[0]), torch.func.grad(F.cross_entropy)(x[0], y[0]))
    tangent = torch.randn(4, 6)
    ours = torch.func.jvp(lambda t: cross_entropy(t, y[0]), (x[0],), (tangent,))
    stock = torch.func.jvp(lambda t: F.cross_entropy(t, y[0]), (x[0],), (tangent,))
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize(
    "shape, dtype, reduction",
    [
        ((340, 50257), torch.bfloat16, "sum"),
        ((340, 50257), torch.float16, "sum"),
        ((170, 50257), torch.float32, "none"),
        ((3, 3, 1001, 953), torch.float32, "sum"),
        ((6, 3, 1001, 953), torch.bfloat16, "sum"),
    ],
    ids=str,
)
def test_gradient_that_goes_past_the_cache(isa, shape, dtype, reduction):
    """32 MiB and more, apart from the logits, rows that start anywhere in a line: the same bits as a part at a time."""
    logits, target, _ = make(shape, dtype, probabilities=False, weighted=False)
    logits.requires_grad_()
    assert logits.numel() * dtype.itemsize >= 32 << 20
    cross_entropy(logits, target, reduction=reduction).sum().backward()
    for first in range(0, shape[0], shape[0] // 3):
        part = slice(first, first + shape[0] // 3)
        x = logits.detach()[part].clone().requires_grad_()
        assert x.numel() * dtype.itemsize < 32 << 20
        cross_entropy(x, target[part], reduction=reduction).sum().backward()
        assert torch.equal(logits.grad[part], x.grad)


def test_deterministic_whatever_the_threads():
    logits, target, _ = make((257, 3001), torch.float32, probabilities=False, weighted=False)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(cross_entropy, logits, target, None, torch.tensor(1.0)))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_compile_fullgraph(backend, reduction, dtype):
    torch._dynamo.reset()
    logits, target, weight = make((8, 33), dtype, probabilities=False, weighted=True)
    criterion = fusedopt.nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.1)

    def loss(x):
        return (criterion(x * 2, target) * 3).sum()

    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    eager, compiled = loss(a), torch.compile(loss, backend=backend, fullgraph=True)(b)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(b.grad, a.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_operators(with_grad, reduction):
    if with_grad and reduction == "none":
        pytest.skip("the gradient of 'none' is always made in backward")
    x = torch.randn(5, 7, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4])
    rule = (torch.rand(7), -100, 0.1, 1e-3, 20.0, 0.5)
    arguments = (x, y, *rule, reduction, with_grad, True, "cpu")
    torch.library.opcheck(torch.ops.fusedopt.cross_entropy.default, arguments)
    lse = torch.ops.fusedopt.cross_entropy(*arguments)[2]
    upstream = torch.ones(5 if reduction == "none" else ())
    torch.library.opcheck(
        torch.ops.fusedopt.cross_entropy_backward.default,
        (upstream, x.detach(), y, *rule, reduction, lse.detach(), "cpu"),
    )


def test_module_is_torchs_module():
    module = fusedopt.nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert "weight" in module.state_dict()
    assert fusedopt.nn.Linear is torch.nn.Linear
    assert fusedopt.nn.functional.relu is F.relu
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(module(x, y), torch.nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1)(x, y))
    assert fusedopt.nn.CrossEntropyLoss(size_average=False).reduction == "sum"
