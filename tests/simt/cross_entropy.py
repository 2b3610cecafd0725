"""csrc/cuda/cross_entropy.cu against float64, on host memory: `cross_entropy.py LIBRARY full|few`."""

import simulated  # noqa: F401, I001
import itertools
import sys
from types import SimpleNamespace

import torch
from fusedopt.backends import bad_target, cuda
from fusedopt.nn.functional import cross_entropy

torch.set_num_threads(1)
PLAIN = {
    "weight": None,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
}
FEATURES = [
    {},
    {"label_smoothing": 0.2},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.3, "z_loss": 1e-2},
    {"softcap": 5.0, "logit_scale": 1.5},
    {"softcap": 3.0, "weight": True, "label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": -0.5},
]


def oracle(logits, target, rule, upstream):
    """Losses, gradient of (losses * upstream).sum(), log-sum-exps, argmax, correct, entropy; in float64."""
    x = logits.double().requires_grad_()
    s = rule.logit_scale * x
    if rule.softcap:
        s = rule.softcap * torch.tanh(s / rule.softcap)
    n, classes = x.shape
    w = torch.ones(classes, dtype=torch.float64) if rule.weight is None else rule.weight.double()
    if target.dim() == 2:
        kept = torch.ones(n, dtype=torch.bool)
        y, truth = target.double(), target.argmax(1)
    else:
        kept = target != rule.ignore_index
        y, truth = torch.zeros_like(s), target
        y[kept] = torch.nn.functional.one_hot(target[kept], classes).double()
    y = w * ((1 - rule.label_smoothing) * y + rule.label_smoothing / classes)
    lse = s.logsumexp(1)
    # 0 * -inf is 0
    dot = torch.where(y == 0, 0.0, y * torch.where(y == 0, 0.0, s - lse[:, None])).sum(1)
    losses = torch.where(kept, -dot + rule.z_loss * lse**2, 0.0)
    (grad,) = torch.autograd.grad((losses * upstream.double()).sum(), x)
    p = torch.softmax(s.detach(), 1)
    entropy = -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, p.log())).sum(1)
    return losses.detach(), grad, lse.detach(), s.argmax(1), kept & (s.argmax(1) == truth), entropy


def laid_out(values, dtype, stride, offset):
    n, classes = values.shape
    storage = torch.full((offset + n * stride + 8,), float("nan"), dtype=dtype)
    return storage[offset:].as_strided((n, classes), (stride, 1)).copy_(values)


def check(n, classes, dtype, features, kind, layout, seed):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.rand(classes, generator=g) + 0.5) if features.get("weight") else None
    rule = SimpleNamespace(**{**PLAIN, **features, "weight": weight})
    stride, offset = classes + layout[0], layout[1]
    logits = laid_out(3 * torch.randn(n, classes, generator=g), dtype, stride, offset)
    if kind == "probabilities":
        target = torch.softmax(torch.randn(n, classes, generator=g), 1).to(dtype)
        target[0] = torch.nn.functional.one_hot(torch.tensor(classes - 1), classes)
    else:
        target = torch.randint(classes, (n,), generator=g)
        target[0], target[-1] = classes - 1, 0
        if n > 2:
            target[1] = rule.ignore_index
    name = (n, classes, dtype, features, kind, layout)

    factor = cuda.target_factor(target, rule, classes, mean=True)
    counted = target != rule.ignore_index if target.dim() == 1 else None
    total = n
    if counted is not None:
        total = counted.sum() if weight is None else weight[target[counted]].double().sum()
    torch.testing.assert_close(factor, (1 / torch.as_tensor(total).double()).float(), rtol=1e-6, atol=0)

    ones = torch.ones(n) * factor
    exact = oracle(logits, target, rule, ones)
    eps = torch.finfo(dtype).eps

    def judge(grad, expected=exact[1], per_row=ones):
        # rounded once; before that, softmax and target, each up to 1.5 times the factor, are known to float32's 2e-6
        tolerance = eps * expected.abs().max() + 3e-6 * per_row.abs().max()
        assert (grad.double() - expected).abs().max() <= tolerance, name

    stats = SimpleNamespace(
        lse=torch.empty(n),
        argmax=torch.empty(n, dtype=torch.int64),
        correct=torch.empty(n, dtype=torch.bool),
        entropy=torch.empty(n),
    )
    rows = torch.empty(n)
    grad = laid_out(torch.zeros(n, classes), dtype, classes + 3, 1)
    cuda.cross_entropy_forward(logits, target, rule, grad, factor, rows, stats.lse, stats)
    torch.testing.assert_close(
        rows.double(), exact[0], rtol=2e-6, atol=2e-6, msg=lambda m: f"{name}\n{rows}\n{exact[0]}\n{m}"
    )
    torch.testing.assert_close(stats.lse.double(), exact[2], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.entropy.double(), exact[5], rtol=1e-5, atol=1e-5)
    top = logits.double() * rule.logit_scale
    assert (top.gather(1, stats.argmax[:, None])[:, 0] == top.max(1).values).all(), name
    assert torch.equal(stats.argmax, top.argmax(1)), name
    if target.dim() == 1:
        assert torch.equal(stats.correct, counted & (top.argmax(1) == target)), name
    else:
        assert torch.equal(stats.correct, top.argmax(1) == target.argmax(1)), name
    judge(grad)

    plain_rows, lse = torch.empty(n), torch.empty(n)
    cuda.cross_entropy_forward(logits, target, rule, None, factor, plain_rows, lse)
    assert torch.equal(plain_rows, rows), name
    upstream = torch.randn(n, generator=g)
    cuda.cross_entropy_backward(logits, target, rule, grad, factor, upstream, lse)
    judge(grad, oracle(logits, target, rule, ones * upstream)[1], ones * upstream)

    loss = cuda.total_loss(rows, factor)
    torch.testing.assert_close(loss.double(), (rows.double().sum() * factor.double()), rtol=1e-6, atol=1e-6)

    inplace = logits.clone() if layout == (0, 0) else logits
    cuda.cross_entropy_forward(inplace, target, rule, inplace, factor, rows, lse)
    judge(inplace)


def adversarial():
    inf = float("inf")
    rule = SimpleNamespace(**PLAIN)
    for classes in (3, 1000, 20000):
        rows = torch.zeros(9, classes)
        rows[0] = 7.0
        rows[1, 0] = 1e4
        rows[2] = torch.linspace(-5e3, 5e3, classes)
        rows[3, 1:] = -inf
        rows[4, 1] = inf
        rows[5] = -inf
        rows[6, 2] = float("nan")
        rows[7, -1] = -inf
        rows[8] = 1e4
        target = torch.tensor([0, 1, classes - 1, 0, 1, 0, 0, classes - 1, 2])
        losses, lse, factor = torch.empty(9), torch.empty(9), torch.ones(())
        grad = torch.empty_like(rows)
        cuda.cross_entropy_forward(rows, target, rule, grad, factor, losses, lse)
        leaf = rows.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
        expected.sum().backward()
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-6, equal_nan=True)

    target = torch.tensor([0, 5, -1])
    losses, lse, logits = torch.empty(3), torch.empty(3), torch.randn(3, 4)
    cuda.cross_entropy_forward(logits, target, rule, logits, torch.ones(()), losses, lse)
    assert losses.isnan().tolist() == [False, True, True]
    cuda.target_factor(target, rule, 4, mean=True)
    try:
        bad_target.raise_reported()
    except IndexError as error:
        assert "Target 5 is out of bounds" in str(error) or "Target -1 is out of bounds" in str(error)
    else:
        raise AssertionError("nobody told")
    bad_target.raise_reported()


def scaling():
    for dtype, n, offset in itertools.product((torch.float32, torch.bfloat16), (1, 7, 8, 1000, 5003), (0, 1, 3)):
        tensor = torch.randn(offset + n + 4).to(dtype)
        before = tensor.clone()
        cuda.scale_(tensor[offset : offset + n], torch.tensor(1.0))
        assert torch.equal(tensor, before)
        cuda.scale_(tensor[offset : offset + n], torch.tensor(-0.3))
        before[offset : offset + n] = (before[offset : offset + n].float() * torch.tensor(-0.3)).to(dtype)
        assert torch.equal(tensor, before), (dtype, n, offset)
    rows = torch.randn(300_000)
    torch.testing.assert_close(
        cuda.total_loss(rows, torch.tensor(0.5)).double(), rows.double().sum() / 2, rtol=1e-6, atol=1e-4
    )


def from_python():
    """fusedopt.nn.functional.cross_entropy on this backend: autograd, upstream gradients, images, statistics."""
    for dtype, reduction, shape in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ("mean", "sum", "none"), ((6, 50), (2, 7, 3, 5))
    ):
        logits = torch.randn(shape).to(dtype).requires_grad_()
        target = torch.randint(shape[1], shape[:1] + shape[2:])
        target.view(-1)[1] = -100
        options = {"label_smoothing": 0.1, "reduction": reduction}
        loss, stats = cross_entropy(logits, target, **options, return_stats=True, backend="cuda")
        assert loss.dtype == torch.float32
        upstream = torch.randn(loss.shape)
        loss.backward(upstream)
        leaf = logits.detach().double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf, target, **options)
        expected.backward(upstream.double())
        torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(stats.argmax, logits.argmax(1))
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(
            logits.grad.double(), leaf.grad, rtol=2 * ulp, atol=ulp * leaf.grad.abs().max().item()
        )
    logits = torch.randn(4, 9, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 2, 3, -100]), backend="cuda")
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(second, 3 * first)
    assert cross_entropy(logits, torch.full((4,), -100), backend="cuda").isnan()
    inplace = logits.detach().clone().requires_grad_()
    cross_entropy(inplace * 1, torch.tensor([1, 2, 3, -100]), inplace=True, backend="cuda").backward()
    torch.testing.assert_close(inplace.grad, first)


LAYOUTS = [(0, 0), (0, 1), (3, 0), (8, 8), (1, 5)]
SIZES = [(1, 1), (5, 2), (3, 7), (9, 33), (4, 1000), (3, 2053), (2, 8200)]
if sys.argv[2] == "full":
    SIZES += [(3, 9001), (2, 20011), (2, 70001)]
seed = checked = 0
for (n, classes), dtype, kind in itertools.product(
    SIZES, (torch.float32, torch.bfloat16, torch.float16), ("indices", "probabilities")
):
    for features in FEATURES if classes < 8000 else FEATURES[seed % 2 :: 3]:
        seed += 1
        check(n, classes, dtype, features, kind, LAYOUTS[seed % len(LAYOUTS)], seed)
        checked += 1
adversarial()
scaling()
from_python()
print(f"{checked} losses agree")
