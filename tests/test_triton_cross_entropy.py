"""Triton's cross entropy by value, in Triton's interpreter (triton_interpreter.py); no GPU needed."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from triton_interpreter import INTERPRETED, interpreted, run_anew

from fusedopt.backends.triton import cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Rule(NamedTuple):
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Stats(NamedTuple):
    lse: Tensor
    argmax: Tensor
    correct: Tensor
    entropy: Tensor


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of several blocks, though they are short."""
    monkeypatch.setattr(cross_entropy, "_plan", lambda *_: (16, 128))


# --- the kernels, and what they should compute ---


def forward(x, target, rule, *, grad=True, inplace=False, factor=1.0, stats=False):
    """(rows, lse, gradient, stats)"""
    n = len(x)
    rows, lse = torch.full((2, n), 7.0).unbind()
    wanted = None
    if stats:
        wanted = Stats(lse, torch.full((n,), -7), torch.zeros(n, dtype=torch.bool), torch.full((n,), 7.0))
    out = x if inplace else torch.full_like(x, 7.0) if grad else None
    cross_entropy.cross_entropy_forward(x, target, rule, out, factor, rows, lse, wanted)
    return rows, lse, out, wanted


def backward(x, target, rule, lse, *, upstream=None, factor=1.0, inplace=False):
    out = x if inplace else torch.full_like(x, 7.0)
    cross_entropy.cross_entropy_backward(x, target, rule, out, factor, upstream, lse)
    return out


def scaled(x, rule):
    s = x * rule.logit_scale
    return s if rule.softcap is None else rule.softcap * torch.tanh(s / rule.softcap)


def by_torch(x, target, rule, upstream, dtype):
    """(rows, gradient under `upstream`), both in float64, computed in `dtype` by torch's operators."""
    x = x.detach().to(dtype, copy=True).requires_grad_()
    target = target.to(dtype) if target.is_floating_point() else target
    options = {"ignore_index": rule.ignore_index, "label_smoothing": rule.label_smoothing, "reduction": "none"}
    s = scaled(x, rule)
    rows = F.cross_entropy(s, target, None if rule.weight is None else rule.weight.to(dtype), **options)
    if rule.z_loss:
        lse = s.logsumexp(1)
        rows = rows + rule.z_loss * torch.where(torch.as_tensor(counted(target, rule)), lse * lse, 0)
    rows.backward(upstream.to(rows.dtype))
    return rows.detach().double(), x.grad.double()


def counted(target, rule):
    return target != rule.ignore_index if target.dim() == 1 else torch.ones(len(target), dtype=torch.bool)


def check_stats(x, target, rule, stats):
    s = scaled(x.double(), rule)
    torch.testing.assert_close(stats.lse.double(), s.logsumexp(1), rtol=2e-6, atol=2e-6)
    entropy = torch.distributions.Categorical(logits=s).entropy()
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    if rule.softcap is None:
        assert torch.equal(stats.argmax, s.argmax(1))
    else:  # what the cap has made equal to float32
        assert torch.all(s.max(1).values - s.gather(1, stats.argmax[:, None])[:, 0] <= 1e-6 * rule.softcap)
    right = target if target.dim() == 1 else target.argmax(1)
    assert torch.equal(stats.correct, (stats.argmax == right) & counted(target, rule))


def check(x, target, rule, *, stats=False, inplace=False):
    """Forward and backward, no further from float64 than torch is in the same dtype."""
    n, upstream = len(x), torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.5
    stock_rows, stock_grad = by_torch(x, target, rule, upstream, x.dtype)
    exact_rows, exact_grad = by_torch(x, target, rule, upstream, torch.float64)
    given = x.clone()
    rows, lse, at_forward, wanted = forward(given, target, rule, inplace=inplace, factor=0.25, stats=stats)

    # as tests/test_cross_entropy.py: one exp, sum and log in float32; a quotient and two roundings of the gradient
    scale = exact_rows.abs().max().clamp(min=1)
    assert (rows - exact_rows).abs().max() <= (stock_rows - exact_rows).abs().max() + 3e-6 * scale
    _, exact_plain = by_torch(x, target, rule, torch.full((n,), 0.25), torch.float64)
    _, stock_plain = by_torch(x, target, rule, torch.full((n,), 0.25), x.dtype)
    late = backward(x.clone(), target, rule, lse, upstream=upstream, inplace=inplace)
    for ours, exact, theirs in ((at_forward, exact_plain, stock_plain), (late, exact_grad, stock_grad)):
        finfo = torch.finfo(x.dtype)
        ulp = finfo.eps * exact.abs().max() + finfo.smallest_normal * finfo.eps
        floor = 1e-6 * exact.abs().max().clamp(min=1)
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + 2 * ulp + floor
    if stats:
        check_stats(x, target, rule, wanted)


def make(n, classes, dtype, probabilities=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, classes, generator=g) * 3).to(dtype)
    if probabilities:
        return x, torch.randn(n, classes, generator=g).softmax(1).to(dtype)
    target = torch.randint(0, classes, (n,), generator=g)
    target[0], target[-1] = 0, classes - 1
    if n > 2:
        target[1] = -100
    return x, target


def weights(classes):
    return torch.rand(classes, generator=torch.Generator().manual_seed(5)) + 0.1


RULES = {
    "plain": lambda v: Rule(),
    "weight": lambda v: Rule(weights(v)),
    "smoothing": lambda v: Rule(label_smoothing=0.1),
    "weight, smoothing": lambda v: Rule(weights(v), label_smoothing=0.3),
    "only smoothing": lambda v: Rule(label_smoothing=1.0),
    "z-loss": lambda v: Rule(z_loss=1e-2),
    "softcap": lambda v: Rule(softcap=2.0),
    "scale": lambda v: Rule(logit_scale=-0.5),
    "all": lambda v: Rule(weights(v), label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=1.5),
}


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_no_further_from_float64_than_torch(rule, probabilities, dtype):
    for i, (n, classes) in enumerate([(5, 1), (3, 13), (4, 1000), (2, 5003)]):
        x, target = make(n, classes, dtype, probabilities)
        check(x, target, RULES[rule](classes), stats=i % 2 == 0, inplace=i % 3 == 0)


@interpreted
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("rule", ["plain", "all"])
def test_rows_of_several_blocks(rule, stats):
    for probabilities in (False, True):
        x, target = make(3, 33013, torch.bfloat16, probabilities)
        check(x, target, RULES[rule](33013), stats=stats)
        check(x, target, RULES[rule](33013), stats=stats, inplace=True)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_any_alignment_and_stride(dtype, probabilities, small_blocks):
    """Rows anywhere in memory; what lies between them stays."""
    for seed, classes in enumerate([1, 2, 3, 7, 8, 9, 15, 16, 17, 18, 31, 33, 100]):
        offset, gap = seed % 9, (0, 5, 8)[seed % 3]
        values, target = make(3, classes, dtype, probabilities, seed)
        memory = torch.full((offset + 3 * (classes + gap) + 16,), 9.0, dtype=dtype)
        x = memory[offset:].as_strided((3, classes), (classes + gap, 1))
        x.copy_(values)
        if probabilities and seed % 2:  # of another alignment than the logits
            target = torch.cat([torch.zeros(3, 1, dtype=dtype), target], 1)[:, 1:]
        rule = Rule(weights(classes), label_smoothing=0.1)
        expected = forward(values.clone(), target.contiguous(), rule, stats=True)
        outside = memory.clone()
        outside.as_strided((3, classes), (classes + gap, 1), offset).fill_(0)
        for inplace in (False, True):
            ours = forward(x, target, rule, stats=True, inplace=inplace)
            for a, b in zip((*ours[:3], *ours[3]), (*expected[:3], *expected[3]), strict=True):
                torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        x.zero_()
        assert torch.equal(memory, outside)


INF, NAN = float("inf"), float("nan")
ADVERSARIAL = [
    [INF, 0.0, 1.0],
    [-INF, 0.0, 1.0],
    [-INF, -INF, -INF],
    [NAN, 0.0, 1.0],
    [2.0, 2.0, 2.0],
    [1e4, -1e4, 0.0],
    [3e38, -3e38, 0.0],
]


@interpreted
@pytest.mark.parametrize("row", ADVERSARIAL, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_adversarial_rows_as_stock(row, smoothing, probabilities, small_blocks):
    """Three numbers, as they are and as three stretches of a row of several blocks; every target."""
    rule = Rule(label_smoothing=smoothing)
    for stretch in (1, 21):
        x = torch.tensor(row).repeat_interleave(stretch).repeat(3, 1)
        target = torch.arange(3) * stretch
        target[2] += stretch - 1
        if probabilities:
            target = F.one_hot(target, 3 * stretch).float()
        upstream = torch.tensor([1.0, 0.5, 2.0])
        exact_rows, exact_grad = by_torch(x, target, rule, upstream, torch.float32)
        rows, lse, grad, stats = forward(x, target, rule, stats=True)
        torch.testing.assert_close(rows.double(), exact_rows, equal_nan=True, rtol=2e-6, atol=2e-6)
        late = backward(x, target, rule, lse, upstream=upstream)
        close = functools.partial(torch.testing.assert_close, equal_nan=True, rtol=4e-6)
        close((grad * upstream[:, None]).double(), exact_grad, atol=4e-7)
        if stretch == 1 or row[0] < 1e30:  # of what is saved for backward, lse, an ulp changes softmax by as much
            off = torch.finfo(torch.float32).eps * lse.nan_to_num(0, 0, 0).abs().max().item()
            close(late.double(), exact_grad, atol=4e-7 + 2 * off)
        assert torch.equal(stats.argmax, x.argmax(1))


@interpreted
def test_one_huge_logit_among_many():
    x = torch.randn(2, 3001)
    x[:, 1700] = 1e4
    for target in (torch.tensor([1700, 3]), torch.eye(3001)[[1700, 3]]):
        check(x, target, Rule(), stats=True)


@interpreted
def test_ignored_rows_are_not_read_and_have_no_gradient():
    x, target = torch.full((3, 40), NAN), torch.full((3,), 5)
    for grad_of in (
        lambda: forward(x, target, Rule(ignore_index=5), factor=2.0)[2],
        lambda: backward(x, target, Rule(ignore_index=5), torch.full((3,), NAN), upstream=torch.full((3,), NAN)),
        lambda: forward(x.clone(), target, Rule(ignore_index=5), inplace=True)[2],
    ):
        assert torch.equal(grad_of(), torch.zeros(3, 40))
    rows, *_ = forward(x, target, Rule(ignore_index=5, z_loss=1.0))
    assert torch.equal(rows, torch.zeros(3))
    y, target = make(3, 40, torch.float32)
    target[:] = 5
    rows, _, grad, stats = forward(y, target, Rule(ignore_index=5), stats=True)
    assert not rows.any() and not grad.any()
    check_stats(y, target, Rule(ignore_index=5), stats)


@interpreted
@pytest.mark.parametrize("bad", [-1, 40, 2**40, -(2**62)])
def test_a_class_that_is_not_there_makes_its_row_nan(bad):
    x, target = make(4, 40, torch.float32)
    good = forward(x, target, Rule())
    target[2] = bad
    for rule in (Rule(), Rule(weights(40), label_smoothing=0.1)):
        rows, lse, grad, _ = forward(x, target, rule)
        late = backward(x, target, rule, lse)
        assert rows.isnan().tolist() == [False, False, True, False]
        for g in (grad, late):
            assert g[2].isnan().all() and not g[[0, 1, 3]].isnan().any()
    torch.testing.assert_close(forward(x, target, Rule())[2][[0, 1, 3]], good[2][[0, 1, 3]], rtol=0, atol=0)


@interpreted
def test_the_factor_may_lie_on_the_device_and_the_gradient_may_be_left_out():
    x, target = make(3, 50, torch.float16)
    rows, lse, grad, _ = forward(x, target, Rule(), factor=0.125)
    for dtype in (torch.float32, torch.float64):
        on_device = forward(x, target, Rule(), factor=torch.tensor(0.125, dtype=dtype))
        assert torch.equal(on_device[2], grad)
        late = backward(x, target, Rule(), lse, factor=torch.tensor(0.125, dtype=dtype))
        torch.testing.assert_close(late, grad, rtol=0, atol=1e-4)
    without = forward(x, target, Rule(), grad=False)
    assert torch.equal(without[0], rows) and torch.equal(without[1], lse)
    assert [len(t) for t in forward(x[:0], target[:0], Rule())[:3]] == [0, 0, 0]
