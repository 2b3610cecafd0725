"""Cross entropy's extras: z-loss, soft cap, scale, statistics, gradients of targets; against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import assert_as_good_as_composition, composition, make

import fusedopt
from fusedopt import _native
from fusedopt.nn.functional import Stats, cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXTRAS = (
    {"z_loss": 1e-2},
    {"logit_scale": 0.3},
    {"logit_scale": -1.7},
    {"softcap": 5.0},
    {"softcap": 30.0, "z_loss": 1e-3, "logit_scale": 2.0},
)


@pytest.fixture(params=_native.cpu_isas())
def isa(request):
    assert _native.use_cpu_isa(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_further_from_float64_than_torchs_operators(dtype, extras, reduction):
    for shape, probabilities, weighted, smoothing in itertools.product(
        [(7, 13), (3, 1), (3, 2053)], [False, True], [False, True], [0.0, 0.1]
    ):
        data = make(shape, dtype, probabilities=probabilities, weighted=weighted)
        assert_as_good_as_composition(cross_entropy, *data, reduction=reduction, label_smoothing=smoothing, **extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 1031), (2, 37, 5, 9)], ids=str)
def test_every_instruction_set(isa, dtype, shape):
    for probabilities, reduction in itertools.product([False, True], ["mean", "none"]):
        data = make(shape, dtype, probabilities=probabilities, weighted=True)
        options = {"reduction": reduction, "label_smoothing": 0.1, **EXTRAS[-1]}
        assert_as_good_as_composition(cross_entropy, *data, **options)


@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 17, 127, 128, 129, 641]))
    | st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 21, 129, 700]), st.sampled_from([1, 2, 15, 16, 17, 131, 300]))
    | st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 19), st.integers(1, 19)),
    dtype=st.sampled_from(DTYPES),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    ignored=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([None, 3.0, 50.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -2.0]),
    inplace=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_features_crossed(
    shape, dtype, probabilities, weighted, ignored, smoothing, reduction, z_loss, softcap, logit_scale, inplace, seed
):
    data = make(shape, dtype, probabilities=probabilities, weighted=weighted, ignored=ignored, seed=seed)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options |= {"z_loss": z_loss, "softcap": softcap, "logit_scale": logit_scale}

    def ours(x, *rest, **options):
        return cross_entropy(x * 1, *rest, inplace=inplace, **options)  # a leaf cannot be overwritten

    assert_as_good_as_composition(ours, *data, **options)


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(shape, reduction):
    x = torch.randn(shape, requires_grad=True)
    y = torch.empty(shape[:1] + shape[2:], dtype=torch.int64)
    loss, stats = cross_entropy(x, y, reduction=reduction, z_loss=0.1, softcap=2.0, return_stats=True)
    torch.testing.assert_close(loss, F.cross_entropy(x, y, reduction=reduction), equal_nan=True)
    assert all(s.shape == y.shape for s in stats)


def test_all_ignored():
    for shape in ((3, 5), (2, 5, 4, 4)):
        x = torch.randn(shape, requires_grad=True)
        y = torch.full(shape[:1] + shape[2:], -100)
        loss = cross_entropy(x, y, z_loss=0.1)
        loss.backward()
        assert loss.isnan()
        assert torch.equal(x.grad, torch.zeros(shape))
        assert cross_entropy(x, y, z_loss=0.1, reduction="sum") == 0


def test_ignored_rows_may_hold_anything():
    for shape in ((4, 5), (2, 5, 4, 4)):
        x, y, _ = make(shape, torch.float32)
        y.view(-1)[0] = -100
        x.movedim(1, -1)[(0,) * (len(shape) - 1)] = torch.tensor([torch.nan, torch.inf, 0.0, 0.0, 0.0])
        for reduction in ("mean", "none"):
            a = x.clone().requires_grad_()
            loss = cross_entropy(a, y, reduction=reduction, z_loss=1e-3)
            loss.sum().backward()
            assert loss.isfinite().all() and a.grad.isfinite().all()


# --- tanh ---


@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_softcap_is_tanh_to_4e7_however_small_or_large(isa, layout):
    magnitude = torch.cat([torch.logspace(-37, 38, 4001), torch.linspace(0, 22, 4001), torch.tensor([0.0, 3.4e38])])
    x = torch.cat([magnitude, -magnitude])
    logits = x[:, None] if layout == "rows" else x[None, None, :]
    target = torch.zeros_like(logits, dtype=torch.int64).squeeze(1)
    lse = cross_entropy(logits, target, softcap=1.0, return_stats=True)[1].lse.flatten()  # of one class: its logit
    exact = torch.tanh(x.double())
    assert ((lse.double() - exact).abs() <= 4e-7 * exact.abs() + 1e-45).all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    lse = cross_entropy(special[:, None], torch.zeros(3, dtype=torch.int64), softcap=1.0, return_stats=True)[1].lse
    torch.testing.assert_close(lse, torch.tensor([1.0, -1.0, torch.nan]), equal_nan=True)


# --- adversarial rows ---

ROWS = {
    "+inf": [torch.inf, 0.0, 1.0],
    "-inf": [-torch.inf, 0.0, 1.0],
    "only -inf": [-torch.inf] * 3,
    "nan": [torch.nan, 0.0, 1.0],
    "equal": [2.0, 2.0, 2.0],
    "wide": [1e4, -1e4, 0.0],
    "huge": [1e36, -1e36, 0.0],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("extras", EXTRAS[1:], ids=str)
@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_adversarial_rows_as_torchs_operators(row, extras, layout):
    rows = torch.tensor([row, [0.5, 1.0, -1.0]])
    indices = [torch.tensor([t, 1]) for t in range(3)]
    for target in [*indices, *(F.one_hot(t, 3).float() for t in indices)]:
        if layout == "pixels":
            x = rows.repeat(16, 1).T[None].contiguous()
            t = target.repeat(16, *[1] * (target.dim() - 1)).movedim(0, -1)[None].contiguous()
        else:
            x, t = rows, target
        for reduction in ("mean", "none"):
            results = []
            for backend in ("cpu", "reference"):
                a = x.clone().requires_grad_()
                loss = cross_entropy(a, t, reduction=reduction, backend=backend, **extras)
                loss.sum().backward()
                results.append((loss.detach(), a.grad))
            (loss, grad), (expected, expected_grad) = results
            torch.testing.assert_close(loss, expected, equal_nan=True, rtol=4e-6, atol=4e-6)
            torch.testing.assert_close(grad, expected_grad, equal_nan=True, rtol=2e-5, atol=1e-5)


# --- statistics ---


def check_stats(x, target, stats, **extras):
    scale, cap = extras.get("logit_scale", 1.0), extras.get("softcap")
    s = x.double() * scale
    s = s if cap is None else cap * torch.tanh(s / cap)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    if compute == torch.float32:  # the cap multiplies tanh's error, and p log p that of p
        tolerance = {"rtol": 2e-6, "atol": 4e-6 + 2e-6 * (cap or 0.0)}
    lse = s.logsumexp(1)
    argmax = (x.to(compute) * scale).argmax(1)
    hit = target.argmax(1) if target.is_floating_point() else target
    assert isinstance(stats, Stats)
    assert all(not t.requires_grad and t.shape == argmax.shape for t in stats)
    torch.testing.assert_close(stats.lse, lse.where(lse.isfinite(), torch.nan).to(compute), equal_nan=True, **tolerance)
    assert torch.equal(stats.argmax, argmax)
    assert torch.equal(stats.correct, argmax == hit)  # an ignored target is no class
    exact = torch.special.entr(s.softmax(1)).sum(1)
    torch.testing.assert_close(stats.entropy, exact.to(compute), equal_nan=True, **tolerance)


@pytest.mark.parametrize("shape", [(9, 1), (5, 513), (3, 2053), (2, 21, 7, 19), (3, 1, 33), (2, 700, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(isa, shape, dtype):
    for probabilities, extras in itertools.product([False, True], [{}, *EXTRAS]):
        x, target, _ = make(shape, dtype, probabilities=probabilities)
        for inplace, reduction in ((False, "none"), (True, "mean")):
            logits = x.clone().requires_grad_() * 1
            loss, stats = cross_entropy(
                logits, target, return_stats=True, reduction=reduction, inplace=inplace, **extras
            )
            torch.testing.assert_close(loss, cross_entropy(x, target, reduction=reduction, **extras))
            check_stats(x, target, stats, **extras)
        check_stats(x, target, cross_entropy(x, target, return_stats=True, backend="reference", **extras)[1], **extras)


@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_statistics_of_odd_rows(isa, layout):
    nan, inf = torch.nan, torch.inf
    x = torch.randn(16, 600)
    x[0, [3, 500, 599]] = 9.0  # ties: the first
    x[1, [7, 550]] = nan  # the first NaN
    x[2, 2], x[2, 520] = 50.0, nan
    x[3, 4] = inf
    x[4, 5], x[4, 1] = nan, inf
    x[5] = -inf
    x[6] = 0.0
    x[7, 10] = -inf
    target = x.nan_to_num(0).argmax(1)
    target[6] = -100
    if layout == "pixels":
        logits, target = x.T[None].contiguous(), target[None]
    else:
        logits = x
    check_stats(logits, target, cross_entropy(logits, target, return_stats=True)[1])


def test_one_dimensional_logits():
    x = torch.randn(7, requires_grad=True)
    loss, stats = cross_entropy(x, torch.tensor(3), return_stats=True, z_loss=0.5)
    torch.testing.assert_close(loss, F.cross_entropy(x, torch.tensor(3)) + 0.5 * x.logsumexp(0) ** 2)
    torch.testing.assert_close(stats.lse, x.logsumexp(0).detach())
    assert all(s.shape == () for s in stats)
    criterion = fusedopt.nn.CrossEntropyLoss(return_stats=True, z_loss=0.5)
    torch.testing.assert_close(criterion(x, torch.tensor(3)), (loss, stats))


# --- gradients of gradients, of targets and of weights ---


@pytest.mark.parametrize("extras", [{}, *EXTRAS], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 16)], ids=str)
def test_gradcheck(extras, reduction, shape):
    x, y, weight = make(shape, torch.float64, weighted=True, spread=1.0)
    x.requires_grad_()
    options = {"label_smoothing": 0.1, "reduction": reduction, **extras}
    assert torch.autograd.gradcheck(lambda t: cross_entropy(t, y, weight, **options), (x,))
    assert torch.autograd.gradgradcheck(lambda t: cross_entropy(t, y, weight, **options), (x,))
    p = make(shape, torch.float64, probabilities=True)[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, weight, **options), (x, p))
    assert torch.autograd.gradgradcheck(lambda a, b: cross_entropy(a, b, weight, **options), (x, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 16)], ids=str)
def test_probability_targets_that_need_gradients(dtype, reduction, shape):
    x, t, weight = make(shape, dtype, probabilities=True, weighted=True)
    for logits_too, inplace in itertools.product([True, False], [True, False]):
        grads = []
        for function, d in ((cross_entropy, dtype), (F.cross_entropy, torch.float64)):
            a, b = x.to(d).requires_grad_(logits_too), t.to(d).requires_grad_()
            options = {"inplace": inplace} if function is cross_entropy else {}
            loss = function(a * 1, b, weight.to(d), reduction=reduction, label_smoothing=0.1, **options)
            if function is cross_entropy:
                node = loss.grad_fn.next_functions[0][0] if "View" in loss.grad_fn.name() else loss.grad_fn
                assert "CrossEntropyBackward" in node.name()
            upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(2)).to(loss.dtype)
            grads.append(torch.autograd.grad(loss, (a, b) if logits_too else (b,), upstream))
        eps = torch.finfo(dtype).eps
        for ours, exact in zip(*grads, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), exact.double(), rtol=4 * eps, atol=4 * eps + 1e-12)


def test_weights_that_need_gradients_as_in_stock():
    x, t, weight = make((4, 6), torch.float32, probabilities=True, weighted=True)
    weight.requires_grad_()
    ours = torch.autograd.grad(cross_entropy(x, t, weight), weight)
    torch.testing.assert_close(ours, torch.autograd.grad(F.cross_entropy(x, t, weight), weight))
    (capped,) = torch.autograd.grad(cross_entropy(x, t, weight, softcap=2.0, z_loss=0.1), weight)
    expected = torch.autograd.grad(composition(x, t, weight, softcap=2.0, z_loss=0.1), weight)[0]
    torch.testing.assert_close(capped, expected)
    for function in (cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
            function(x, torch.tensor([0, 1, 2, 3]), weight)


# --- torch.compile, other paths, bad input ---


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 33), (2, 5, 4, 6)], ids=str)
def test_torch_compile_fullgraph(backend, reduction, dtype, shape):
    for probabilities in (False, True):
        torch._dynamo.reset()
        logits, target, weight = make(shape, dtype, probabilities=probabilities, weighted=True)
        criterion = fusedopt.nn.CrossEntropyLoss(
            weight, reduction=reduction, z_loss=1e-2, softcap=5.0, logit_scale=0.5, return_stats=True
        )

        def call(x, t, criterion=criterion):
            loss, stats = criterion(x * 2, t)
            return (loss * 3).sum(), stats

        results = []
        for function in (call, torch.compile(call, backend=backend, fullgraph=True)):
            x, t = logits.clone().requires_grad_(), target.clone().requires_grad_(probabilities)
            loss, stats = function(x, t)
            loss.backward()
            results.append((loss, *stats, x.grad, *([t.grad] if probabilities else [])))
        eps = torch.finfo(dtype).eps
        for compiled, eager in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(compiled, eager, rtol=4 * eps, atol=1e-6)


def test_transforms_and_forward_mode_with_extras():
    x, y = torch.randn(5, 4, 6), torch.randint(0, 6, (5, 4))
    for extras in EXTRAS:

        def ours(a, b, extras=extras):
            return cross_entropy(a, b, **extras)

        def written_out(a, b, extras=extras):
            return composition(a, b, **extras)

        expected = torch.stack([written_out(a, b) for a, b in zip(x, y, strict=True)])
        torch.testing.assert_close(torch.vmap(ours)(x, y), expected)
        torch.testing.assert_close(torch.func.grad(ours)(x[0], y[0]), torch.func.grad(written_out)(x[0], y[0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 0.0}, ValueError, r"softcap=0\.0 must be finite and above 0"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf"),
        ({"z_loss": -1e-4}, ValueError, r"z_loss=-0\.0001 must be finite and at least 0"),
        ({"z_loss": float("nan")}, ValueError, "z_loss=nan"),
        ({"z_loss": None}, TypeError, "z_loss must be a number, not NoneType"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale=inf must be finite"),
        ({"logit_scale": torch.ones(())}, TypeError, "logit_scale must be a number, not Tensor"),
    ],
    ids=str,
)
def test_bad_extras(options, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), **options)
    with pytest.raises(error, match=message):
        fusedopt.nn.CrossEntropyLoss(**options)


def test_images_are_not_copied():
    x = torch.randn(2, 5, 8, 8, requires_grad=True)
    y = torch.randint(0, 5, (2, 8, 8))
    before = x.detach().clone()
    z = x * 1
    cross_entropy(z, y, inplace=True).backward()
    torch.testing.assert_close(z.detach(), x.grad)
    expected = torch.autograd.grad(F.cross_entropy(x, y), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert x.grad.stride() == x.stride()
    assert torch.equal(x, before)
    # every second image, and classes that share memory: strides are walked, overlaps are not written to
    wide = torch.randn(4, 5, 8, 8)
    for view in (wide[::2], wide[:, :1].expand(4, 5, 8, 8)[:2], wide[:2].to(memory_format=torch.channels_last)):
        leaf = view.detach().requires_grad_()
        kept = view.clone()
        torch.testing.assert_close(
            torch.autograd.grad(cross_entropy(leaf, y, inplace=view.stride(1) == 0), leaf)[0],
            torch.autograd.grad(F.cross_entropy(leaf, y), leaf)[0],
        )
        assert torch.equal(view, kept)
