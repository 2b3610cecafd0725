"""Linear cross entropy against float64 and against stock's own error; chunks, memory, products left out, graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_mode import Watch

import fusedopt
from fusedopt import _native
from fusedopt.backends import cpu
from fusedopt.nn import rows
from fusedopt.nn.functional import linear_cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEATURES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7},
}
# a gradient is rounded once a chunk and once at the end, its logits' gradient once before
GRAD_ULPS = 4


@pytest.fixture(params=[*_native.cpu_isas(), "torch"])
def kernel(request, monkeypatch):
    """The row kernel of each instruction set, and the one of torch operations."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "READY", False)
        yield
        return
    before = _native.cpu_isa()
    assert _native.use_cpu_isa(request.param)
    yield
    _native.use_cpu_isa(before)


def make(n, h, v, dtype=torch.float32, *, bias=True, probabilities=False, weighted=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, h, generator=g).to(dtype), (torch.randn(v, h, generator=g) * h**-0.5 * 2).to(dtype)
    b = torch.randn(v, generator=g).to(dtype) if bias else None
    if probabilities:
        target = torch.randn(n, v, generator=g).softmax(1).to(dtype)
    else:
        target = torch.randint(0, v, (n,), generator=g)
        target[1::5] = -100
    weight = (torch.rand(v, generator=g) + 0.1).to(dtype) if weighted else None
    return x, w, b, target, weight


def reduced(
    x, w, target, *, reduction, linear_bias=None, weight=None, z_loss=0.0, softcap=None, logit_scale=1.0, **options
):
    """In the inputs' dtype, by torch's operations."""
    s = F.linear(x, w, linear_bias) * logit_scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    z = z_loss * s.logsumexp(1).square() if z_loss else s.new_zeros(len(s))
    ignored = target == -100 if target.dim() == 1 else torch.zeros(len(target), dtype=torch.bool)
    loss = F.cross_entropy(s, target, weight, reduction="none", **options) + z.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counts = torch.ones_like(loss) if weight is None or target.dim() == 2 else weight[target.clamp(0)]
    return loss.sum() / counts.masked_fill(ignored, 0).sum()


def run(function, x, w, b, target, weight, upstream, dtype=None, **options):
    """(loss, gradients of x, w and b) in float64, computed in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in (x, w, b)]
    dtype = leaves[0].dtype
    target = target.to(dtype) if target.is_floating_point() else target
    weight = None if weight is None else weight.to(dtype)
    loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], weight=weight, **options)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach().double(), [t.grad.double() for t in leaves if t is not None]


def assert_as_good_as_stock(x, w, b, target, weight, *, reduction, chunk_bytes=None, **options):
    dtype = x.dtype
    g = torch.Generator().manual_seed(1)
    upstream = torch.rand(x.shape[0] if reduction == "none" else (), generator=g) + 0.5
    arguments = (x, w, b, target, weight, upstream)
    exact_loss, exact = run(reduced, *arguments, torch.float64, reduction=reduction, **options)
    stock_loss, stocks = run(reduced, *arguments, reduction=reduction, **options)
    loss, grads = run(linear_cross_entropy, *arguments, reduction=reduction, chunk_bytes=chunk_bytes, **options)
    eps = torch.finfo(dtype).eps
    # rounding the logits moves the target's and the log-sum-exp by half an epsilon of the largest; stock's may cancel
    logits = F.linear(x.double(), w.double(), None if b is None else b.double())
    rounding = eps * logits.abs().max() * (x.shape[0] if reduction == "sum" else 1)
    scale = exact_loss.abs().max().clamp(min=1)
    floor = scale * (2e-6 if dtype != torch.float64 else 1e-13)
    assert (loss - exact_loss).abs().max() <= (stock_loss - exact_loss).abs().max() + rounding + floor
    # exp's relative error (softmax.h), of every p of a row alike, multiplied by x and w and by upstreams up to 1.5
    span = (x.double() @ w.double().t()).aminmax(dim=1)
    error = 3 * (2e-7 + 2e-8 * (span.max - span.min).max().item()) if dtype != torch.float64 else 2e-14
    floor = max(1.0, x.abs().max().item(), w.abs().max().item()) * error
    for ours, theirs, right in zip(grads, stocks, exact, strict=True):
        allowed = GRAD_ULPS * eps * right.abs().max() + torch.finfo(dtype).tiny * eps + floor
        assert (ours - right).abs().max() <= (theirs - right).abs().max() + allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("features", FEATURES)
def test_matches_float64_as_well_as_stock(dtype, reduction, features):
    for probabilities in (False, True):
        for weighted in (False, True):
            for chunk_bytes in (None, 20_000):
                inputs = make(45, 24, 203, dtype, probabilities=probabilities, weighted=weighted)
                assert_as_good_as_stock(*inputs, reduction=reduction, chunk_bytes=chunk_bytes, **FEATURES[features])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_kernel(kernel, dtype):
    for probabilities in (False, True):
        inputs = make(33, 16, 517, dtype, probabilities=probabilities, weighted=True)
        for reduction in ("mean", "none"):
            for features in FEATURES.values():
                assert_as_good_as_stock(*inputs, reduction=reduction, chunk_bytes=40_000, **features)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    h=st.sampled_from([1, 2, 7, 16, 33]),
    v=st.sampled_from([1, 2, 3, 16, 17, 255, 1031]),
    rows_a_chunk=st.integers(1, 41),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    transposed=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_chunk(n, h, v, rows_a_chunk, dtype, reduction, transposed, bias, seed):
    x, w, b, target, weight = make(n, h, v, dtype, bias=bias, seed=seed)
    if transposed:
        x, w = x.t().contiguous().t(), w.t().contiguous().t()
    if (target == -100).all():
        target[0] = 0
    chunk_bytes = rows_a_chunk * (v + 2 * h) * x.element_size()
    assert_as_good_as_stock(x, w, b, target, weight, reduction=reduction, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_change_nothing_but_rounding(dtype):
    inputs = make(64, 32, 301, dtype)
    upstream = torch.tensor(1.0)
    whole = run(linear_cross_entropy, *inputs, upstream, chunk_bytes=1 << 30)
    for count in (1, 3, 64):
        options = {"chunk_bytes": -(-64 // count) * (301 + 64) * dtype.itemsize}
        loss, grads = run(linear_cross_entropy, *inputs, upstream, **options)
        torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=0)
        for a, b in zip(grads, whole[1], strict=True):
            # products of other shapes sum in another order, and logits of 5 carry that into exp; in half precision each
            # chunk's product is rounded
            assert (a - b).abs().max() <= (32 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * b.abs().max()


def test_batch_chunk_size_is_obeyed():
    class Options:
        batch_chunk_size = 5

    x, w, _, y, _ = make(20, 8, 11)
    y = y.clamp(0)
    with Watch() as watch:
        linear_cross_entropy(x, w, y, options=Options())
    assert watch.products == 4


# --- memory and work ---


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize("ignored", [False, True])
def test_peak_memory(reduction, dtype, features, ignored):
    n, h, v, budget = 1024, 96, 4000, 1 << 20
    x, w, _, target, _ = make(n, h, v, dtype)
    target = target if ignored else target.clamp(0)
    x.requires_grad_(), w.requires_grad_()
    with Watch(x, w, target) as watch:
        loss = linear_cross_entropy(x, w, target, reduction=reduction, chunk_bytes=budget, **FEATURES[features])
        loss.sum().backward()
    gradients = (x.numel() + w.numel()) * dtype.itemsize
    wide = w.numel() * 4 if dtype != torch.float32 else 0
    columns = 8 * 8 * n  # losses, log-sum-exps, the rows that count
    logits = n * v * dtype.itemsize
    assert watch.peak <= gradients + wide + budget + columns
    assert watch.peak > gradients and budget < logits / 7


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_needs_no_gradient_costs_no_product(reduction):
    x, w, b, target, _ = make(20, 8, 11)
    rebuilt = reduction == "none"
    for needs, products in (
        ((False, False, False), 1),
        ((True, False, False), 2 + rebuilt),
        ((False, True, False), 2 + rebuilt),
        ((True, True, False), 3 + rebuilt),
        ((False, False, True), 2 + rebuilt),  # the bias' is a product with a row of ones
        ((True, True, True), 4 + rebuilt),
    ):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
        with Watch() as watch:
            loss = linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction).sum()
            if any(needs):
                loss.backward()
        assert watch.products == products
        assert [t.grad is not None for t in leaves] == list(needs)


def test_ignored_rows_are_dropped_before_the_product():
    x, w, _, target, _ = make(40, 8, 11)
    seen = []
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        linear_cross_entropy(x, w, target)
    seen = [event.input_shapes[0] for event in profile.function_events if event.name == "aten::mm"]
    assert seen == [[int((target != -100).sum()), 8]]


# --- what the inputs may be ---


def test_three_dimensions_and_one():
    x, w, b, target, _ = make(24, 8, 11)
    flat = linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    deep = linear_cross_entropy(x.view(2, 3, 4, 8), w, target.view(2, 3, 4), linear_bias=b, reduction="none")
    assert deep.shape == (2, 3, 4) and torch.equal(deep.flatten(), flat)
    single = linear_cross_entropy(x[0], w, target[0], linear_bias=b)
    torch.testing.assert_close(single, flat[0])
    p = torch.rand(24, 11).softmax(1)
    torch.testing.assert_close(
        linear_cross_entropy(x.view(4, 6, 8), w, p.view(4, 6, 11)), linear_cross_entropy(x, w, p)
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
@pytest.mark.parametrize("probabilities", [False, True])
def test_k_dimensional_loss_as_stock(probabilities):
    x, w, b = torch.randn(5, 8, requires_grad=True), torch.randn(7, 2, 3, 8, requires_grad=True), torch.randn(7, 2, 3)
    target = torch.rand(5, 7, 2, 3).softmax(1) if probabilities else torch.randint(0, 7, (5, 2, 3))
    for reduction in ("mean", "none"):
        ours = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(ours, F.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction))
        assert all(g is not None for g in torch.autograd.grad(ours.sum(), (x, w)))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
@pytest.mark.parametrize(
    "change",
    [
        {"linear_weight": torch.randn(11)},
        {"linear_weight": torch.randn(11, 9)},
        {"linear_bias": torch.randn(10)},
        {"target": torch.rand(6, 11), "ignore_index": 3},
        {"linear_weight": torch.randn(11, 8, dtype=torch.float64)},
        {"reduction": "average"},
        {"label_smoothing": 1.5},
    ],
    ids=lambda change: " ".join(change),
)
def test_bad_input_raises_torchs_own_error(change):
    arguments = {
        "input": torch.randn(6, 8), "linear_weight": torch.randn(11, 8), "target": torch.arange(6), **change
    }  # fmt: skip
    with pytest.raises(Exception) as theirs:
        F.linear_cross_entropy(**arguments)
    with pytest.raises(theirs.type) as ours:
        linear_cross_entropy(**arguments)
    assert str(ours.value) == str(theirs.value)


def test_wrong_target_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"expected target of shape \(6,\).*got \(5,\)"):
        linear_cross_entropy(torch.randn(6, 8), torch.randn(11, 8), torch.arange(5))


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_target_out_of_range_raises(kernel, bad):
    x, w, _, target, _ = make(6, 8, 11)
    target[2] = bad
    with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds.*position 2.*0 <= target < 11"):
        linear_cross_entropy(x, w, target)


def test_all_ignored_and_empty_as_stock(kernel):
    for n in (3, 0):
        x, w = torch.randn(n, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
        y = torch.full((n,), -100)
        loss = linear_cross_entropy(x, w, y)
        loss.backward()
        assert loss.isnan()
        assert torch.equal(x.grad, torch.zeros(n, 5)) and torch.equal(w.grad, torch.zeros(7, 5))
        assert linear_cross_entropy(x, w, y, reduction="sum") == 0
        none = linear_cross_entropy(x, w, y, reduction="none")
        none.backward(torch.ones(n))
        assert torch.equal(none, torch.zeros(n)) and torch.equal(w.grad, torch.zeros(7, 5))


@pytest.mark.parametrize("size", [1e4, 1e30, float("inf"), float("nan")])
def test_huge_logits_as_stock(kernel, size):
    x, w, _, target, _ = make(6, 4, 9)
    x[2] *= size
    for reduction in ("mean", "none"):
        upstream = torch.ones(() if reduction == "mean" else 6)
        ours = run(linear_cross_entropy, x, w, None, target, None, upstream, reduction=reduction)
        theirs = run(reduced, x, w, None, target, None, upstream, reduction=reduction)
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], theirs[1], equal_nan=True, rtol=1e-5, atol=1e-5)


# --- statistics ---


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_statistics(probabilities, fused):
    x, w, b, target, _ = make(24, 8, 31, probabilities=probabilities)
    options = {"linear_bias": b, "logit_scale": 1.5, "softcap": 4.0}
    x.requires_grad_()
    loss, stats = linear_cross_entropy(
        x.view(4, 6, 8), w, target.view(4, 6, *target.shape[1:]), return_stats=True, chunk_bytes=3000,
        backend="auto" if fused else "reference", **options,
    )  # fmt: skip
    assert torch.equal(loss, linear_cross_entropy(x, w, target, **options)) or not fused
    assert all(s.shape == (4, 6) and not s.requires_grad for s in stats)
    s = 4 * torch.tanh(F.linear(x, w, b).double() * 1.5 / 4)
    p = s.softmax(1)
    torch.testing.assert_close(stats.lse.flatten().double(), s.logsumexp(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.argmax.flatten(), s.argmax(1))
    best = target.argmax(1) if probabilities else target
    assert torch.equal(stats.correct.flatten(), s.argmax(1) == best)
    torch.testing.assert_close(stats.entropy.flatten().double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-5)


def test_entropy_of_impossible_classes():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    stats = rows.reference_stats(logits, torch.tensor([1]), rows.Rule())
    torch.testing.assert_close(stats.entropy, torch.tensor([2.0]).log())


# --- graphs ---


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_backward_and_accumulation(reduction, dtype):
    inputs = make(12, 8, 30, dtype)
    grads = []
    for function in (linear_cross_entropy, reduced):
        x, w, b = (t.clone().requires_grad_() for t in inputs[:3])
        loss = function(x, w, inputs[3], linear_bias=b, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        (loss * 2).backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        grads.append((x.grad, w.grad, b.grad))
    for ours, theirs in zip(*grads, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps * float(theirs.abs().max()))


def test_gradient_returned_under_retain_graph_is_not_shared():
    x, w, _, target, _ = make(12, 8, 30)
    w.requires_grad_()
    loss = linear_cross_entropy(x, w, target)
    (first,) = torch.autograd.grad(loss, w, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, w)
    assert torch.equal(second, kept)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("features", FEATURES)
def test_double_backward(reduction, features):
    x, w, b, target, weight = make(4, 3, 5, torch.float64, weighted=True)
    leaves = tuple(t.requires_grad_() for t in (x, w, b))

    def loss(x, w, b):
        options = FEATURES[features]
        return linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_weights_may_change_between_forward_and_backward():
    x, w, _, target, _ = make(12, 8, 30)
    expected = run(reduced, x, w, None, target, None, torch.tensor(1.0), reduction="mean")[1]
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_cross_entropy(a, b, target)
    with torch.no_grad():
        b.mul_(7)
    loss.backward()
    torch.testing.assert_close(b.grad.double(), expected[1], rtol=1e-5, atol=1e-7)
    loss = linear_cross_entropy(a, b, target, reduction="none").sum()
    with torch.no_grad():
        b.mul_(7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_targets_and_weights_that_need_gradients():
    x, w, _, _, _ = make(6, 8, 5)
    target, weight = torch.rand(6, 5).softmax(1).requires_grad_(), torch.rand(5).requires_grad_()
    ours = torch.autograd.grad(linear_cross_entropy(x, w, target, weight=weight), (target, weight))
    theirs = torch.autograd.grad(F.cross_entropy(x @ w.t(), target, weight), (target, weight))
    torch.testing.assert_close(ours, theirs)


def test_functional_transforms():
    x, w, _, target, _ = make(6, 8, 5)
    ours = torch.func.grad(lambda t: linear_cross_entropy(x, t, target))(w)
    theirs = torch.func.grad(lambda t: F.cross_entropy(x @ t.t(), target))(w)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_autocast(dtype, features):
    x, w, b, target, _ = make(40, 16, 203)
    upstream = torch.tensor(3.0)
    options = {"reduction": "mean", **FEATURES[features]}
    exact = run(reduced, x, w, b, target, None, upstream, torch.float64, **options)
    with torch.autocast("cpu", dtype):
        loss, grads = run(linear_cross_entropy, x, w, b, target, None, upstream, chunk_bytes=10_000, **options)
        theirs_loss, theirs = run(reduced, x, w, b, target, None, upstream, **options)
        assert linear_cross_entropy(x, w, target).dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (loss - exact[0]).abs() <= (theirs_loss - exact[0]).abs() + eps
    for a, b, c in zip(grads, theirs, exact[1], strict=True):
        assert (a - c).abs().max() <= (b - c).abs().max() + 2 * eps * c.abs().max()


def test_float16_gradients_survive_a_large_batch():
    """1 / N times a small probability is nothing in float16; GradScaler's scale is there to prevent that."""
    g = torch.Generator().manual_seed(0)
    n, h, v = 4096, 16, 512
    x, w = torch.randn(n, h, generator=g).half(), torch.randn(v, h, generator=g).half() * 0.02
    target = torch.randint(0, v, (n,), generator=g)
    scale = torch.tensor(2.0**16)
    exact = run(reduced, x, w, None, target, None, scale, torch.float64, reduction="mean")[1]
    ours = run(linear_cross_entropy, x, w, None, target, None, scale, chunk_bytes=1 << 19)[1]
    for a, b in zip(ours, exact, strict=True):
        assert ((a - b).abs() <= 4 * torch.finfo(torch.float16).eps * b.abs().max()).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_compile_fullgraph(backend, reduction, dtype):
    torch._dynamo.reset()
    x, w, b, target, weight = make(12, 8, 30, dtype, weighted=True)

    def loss(x, w, b):
        options = {"linear_bias": b, "weight": weight, "reduction": reduction, "label_smoothing": 0.1}
        return (linear_cross_entropy((x * 2).view(3, 4, 8), w, target.view(3, 4), **options) * 3).sum()

    results = []
    for function in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        value = function(*leaves)
        value.backward()
        results.append((value, *(t.grad for t in leaves)))
    eps = torch.finfo(dtype).eps
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=4 * eps, atol=4 * eps)


def test_torch_compile_statistics_and_autocast():
    torch._dynamo.reset()
    x, w, _, target, _ = make(12, 8, 30)
    w.requires_grad_()

    def loss(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(x, w, target, softcap=9.0, return_stats=True)

    eager, compiled = loss(x, w), torch.compile(loss, backend="aot_eager", fullgraph=True)(x, w)
    torch.testing.assert_close(compiled[0], eager[0])
    for a, b in zip(compiled[1], eager[1], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(compiled[0], w), torch.autograd.grad(eager[0], w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stats", [False, True])
def test_registered_operators(dtype, reduction, stats):
    x, w, b, target, weight = make(6, 4, 7, dtype, weighted=True)
    options = (-100, 0.1, 1e-3, None, 1.0, reduction, dtype, 1000, None, stats, "auto", True, True, True)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    torch.library.opcheck(torch.ops.fusedopt.linear_cross_entropy.default, (*leaves, target, weight.float(), *options))
    if reduction == "none":
        lse = (x @ w.t() + b).float().logsumexp(1).detach()
        leaves = [t.detach() for t in leaves]
        torch.library.opcheck(
            torch.ops.fusedopt.linear_cross_entropy_backward.default,
            (torch.ones(6), *leaves, target, lse, weight.float(), *options),
        )


def test_module_is_torchs_module():
    module = fusedopt.nn.LinearCrossEntropyLoss(8, 5, bias=True, weight=torch.ones(5), z_loss=1e-3, ignore_index=2)
    assert set(module.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    x, y = torch.randn(6, 8), torch.arange(6) % 5
    expected = linear_cross_entropy(
        x, module.linear.weight, y, linear_bias=module.linear.bias, z_loss=1e-3, ignore_index=2
    )
    assert torch.equal(module(x, y), expected)
    assert fusedopt.LinearCrossEntropyLoss is fusedopt.nn.LinearCrossEntropyLoss
    with pytest.raises(RuntimeError, match=r"expected weight shape to be \(5,\)"):
        fusedopt.nn.LinearCrossEntropyLoss(8, 5, weight=torch.ones(4))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        stock = torch.nn.LinearCrossEntropyLoss(8, 5, out_features=(3,), label_smoothing=0.1)
        ours = fusedopt.nn.LinearCrossEntropyLoss(8, 5, out_features=(3,), label_smoothing=0.1)
        assert isinstance(ours, type(stock)) and repr(ours).startswith("LinearCrossEntropyLoss(")
        ours.load_state_dict(stock.state_dict())
        y = torch.randint(0, 5, (6, 3))
        torch.testing.assert_close(ours(x, y), stock(x, y))
