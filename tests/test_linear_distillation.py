"""Distillation against float64: divergences, teachers, dtypes; chunks, memory, products left out, graphs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_mode import Watch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import fusedopt
from fusedopt.nn.functional import linear_distillation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def make(n=23, h=8, ht=5, v=37, dtype=torch.float32, seed=0):
    """Student's hidden states, head and bias; teacher's states and head; labels, every fourth ignored."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, h), (v, h), (v,), (n, ht), (v, ht))
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    target = torch.randint(v, (n,), generator=g)
    target[1::4] = -100
    return *tensors, target


def by_torch(
    x, w, b, teacher, target, *, divergence="forward_kl", beta=0.5, temperature=1.0, hard_weight=0.0,
    reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None, logit_scale=1.0, teacher_softcap=None,
    teacher_logit_scale=1.0,
):  # fmt: skip
    """Whole logits, in the inputs' dtype; the teacher's are given."""

    def seen(logits, scale, cap):
        return logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)

    s = seen(x @ w.t() if b is None else x @ w.t() + b, logit_scale, softcap)
    teacher = seen(teacher, teacher_logit_scale, teacher_softcap)
    q, p = (s / temperature).softmax(-1), (teacher / temperature).softmax(-1)

    def kl(a, b):
        return (a * torch.where(a > 0, a / b, 1).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    soft = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[divergence]()
    rows = (1 - hard_weight) * temperature**2 * soft
    counts = torch.ones_like(rows, dtype=torch.bool) if target is None else target != -100
    if hard_weight:
        hard = F.cross_entropy(s, target, reduction="none", label_smoothing=label_smoothing)
        rows = rows + hard_weight * (hard + z_loss * s.logsumexp(-1).square())
    rows = rows.where(counts, 0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}[reduction]


def check(dtype, *, whole_teacher=False, biased=True, labelled=True, chunk_bytes=1500, shapes=None, **options):
    x, w, b, tx, tw, target = make(dtype=dtype, **(shapes or {}))
    target = target if labelled else None
    leaves = [t.clone().requires_grad_() for t in (x, w, b)[: 2 + biased]]
    teacher = tx @ tw.t()
    given = {"teacher_logits": teacher} if whole_teacher else {"teacher_input": tx, "teacher_weight": tw}
    bias = leaves[2] if biased else None
    loss = linear_distillation(
        *leaves[:2], target=target, linear_bias=bias, **given, chunk_bytes=chunk_bytes, **options
    )  # fmt: skip
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    loss.backward(upstream.to(loss.dtype))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    teacher = teacher.double() if whole_teacher else tx.double() @ tw.double().t()
    expected = by_torch(*exact[:2], exact[2] if biased else None, teacher, target, **options)
    expected.backward(upstream.double())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # logits are rounded before, gradients of logits once in between, and each chunk's part of the weight's
    error = 8 * torch.finfo(dtype).eps + (3e-6 if dtype != torch.float64 else 1e-13)
    # logits are off by half an epsilon of themselves: so are log-probabilities, over the temperature, and the terms of
    # a gradient, which in some shapes cancel
    largest = max(F.linear(*exact).abs().max().item(), teacher.abs().max().item()) if shapes else 0.0
    off = torch.finfo(dtype).eps * largest
    rows = 1 if options.get("reduction") == "mean" else x.shape[0]
    reach = 3 * rows * max(1.0, x.abs().max().item(), w.abs().max().item())
    pairs = [(loss.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    for ours, right in pairs:
        size = right.abs().max().item()
        torch.testing.assert_close(ours.double(), right, rtol=error, atol=error * max(size, 0.1) + off * reach)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_in_float64(dtype, divergence, reduction):
    for whole_teacher, temperature, hard_weight in itertools.product((False, True), (1.0, 2.5), (0.0, 0.3, 1.0)):
        options = {"temperature": temperature, "hard_weight": hard_weight, "beta": 0.3, "label_smoothing": 0.1}
        check(dtype, whole_teacher=whole_teacher, divergence=divergence, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_capped_and_scaled_logits(dtype, divergence, reduction):
    """Gradients are compared with float64's by size: a cap's slope at rounded logits is off by their rounding."""
    options = {"softcap": 3.0, "logit_scale": 0.7, "teacher_softcap": 4.0, "teacher_logit_scale": 1.3}
    for whole_teacher, hard_weight in itertools.product((False, True), (0.0, 0.3)):
        options |= {"z_loss": 0.01, "temperature": 2.5, "hard_weight": hard_weight}
        check(dtype, whole_teacher=whole_teacher, divergence=divergence, reduction=reduction, **options)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.fixed_dictionaries(
        {
            "n": st.integers(2, 30),
            "h": st.sampled_from([1, 7, 16]),
            "ht": st.sampled_from([1, 5, 33]),
            "v": st.sampled_from([1, 2, 17, 300, 1031]),
            "seed": st.integers(0, 1000),
        }
    ),
    dtype=st.sampled_from(DTYPES),
    divergence=st.sampled_from(DIVERGENCES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    beta=st.floats(0.01, 0.99),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    hard_weight=st.sampled_from([0.0, 0.5]),
    biased=st.booleans(),
    chunk_bytes=st.sampled_from([1, 3000, None]),
)
def test_any_shape_and_chunk(shapes, dtype, **options):
    check(dtype, shapes=shapes, labelled=options["hard_weight"] > 0 or shapes["seed"] % 2 == 0, **options)


def test_a_perfect_student():
    x, w, b, _, _, _ = make()
    for divergence in DIVERGENCES:
        a = x.clone().requires_grad_()
        loss = linear_distillation(a, w, teacher_logits=x @ w.t() + b, linear_bias=b, divergence=divergence)
        loss.backward()
        assert loss.abs() < 1e-6 and a.grad.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_that_all_lie_together(divergence, offset):
    """float32 holds such logits to 1e-3; as they are held, nothing more may be lost."""
    x, w, b, tx, tw, _ = make()
    teacher = tx @ tw.t() + offset
    a, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    options = {"divergence": divergence, "temperature": 3.0}
    loss = linear_distillation(a, w, teacher_logits=teacher, linear_bias=b, **options)
    expected = by_torch(exact, w.double(), b.double(), teacher.double(), None, **options)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=0, atol=2e-6 * exact.grad.abs().max().item())


@pytest.mark.parametrize("beta", [1e-30, 0.3, 0.999])
def test_jsd_of_nearly_equal_rows(beta):
    """What is summed is small where the two sides agree, so that what is lost is small beside the logarithms' 5."""
    x, w, b, _, _, _ = make()
    s = x @ w.t() + b
    teacher = s + 1e-2 * torch.randn(s.shape)
    ours = linear_distillation(x, w, teacher_logits=teacher, linear_bias=b, divergence="jsd", beta=beta)
    double = [t.double() for t in (x, w, b, teacher)]
    exact = linear_distillation(
        *double[:2], teacher_logits=double[3], linear_bias=double[2], divergence="jsd", beta=beta
    )
    torch.testing.assert_close(exact, by_torch(*double, None, divergence="jsd", beta=beta), rtol=1e-6, atol=1e-18)
    assert (ours - exact).abs() <= 1e-8


def test_classes_that_both_sides_rule_out():
    x, w, b, tx, tw, _ = make()
    teacher = tx @ tw.t()
    b[3::7] = teacher[:, 3::7] = -torch.inf
    allowed = b.isfinite()
    for divergence in DIVERGENCES:
        a, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        loss = linear_distillation(a, w, teacher_logits=teacher, linear_bias=b, divergence=divergence)
        narrow = (w[allowed].double(), b[allowed].double(), teacher[:, allowed].double())
        expected = by_torch(exact, *narrow, None, divergence=divergence)
        (right,) = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for create_graph in (False, True):
            (grad,) = torch.autograd.grad(loss, a, retain_graph=True, create_graph=create_graph)
            torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-6)


def test_classes_that_the_teacher_rules_out():
    x, w, _, _, _, _ = make()
    teacher = torch.randn(23, 37)
    teacher[:, ::3] = -torch.inf
    for divergence in ("forward_kl", "jsd"):
        a = x.clone().requires_grad_()
        loss = linear_distillation(a, w, teacher_logits=teacher, divergence=divergence)
        loss.backward()
        exact = x.double().requires_grad_()
        expected = by_torch(exact, w.double(), None, teacher.double(), None, divergence=divergence)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert linear_distillation(x, w, teacher_logits=teacher, divergence="reverse_kl") == torch.inf


def test_rows_that_do_not_count_cost_nothing_and_may_hold_anything():
    x, w, _, tx, tw, target = make()
    x[1] = tx[1] = torch.nan
    a = x.clone().requires_grad_()
    linear_distillation(a, w, tx, tw, target, hard_weight=0.5).backward()
    assert torch.equal(a.grad[1::4], torch.zeros(6, 8)) and a.grad.isfinite().all()
    ignored = torch.full((23,), -100)
    assert linear_distillation(a, w, tx, tw, ignored, reduction="sum") == 0
    assert linear_distillation(a, w, tx, tw, ignored).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory(dtype, reduction):
    n, v, budget = 2048, 4000, 4 << 20
    x, w, _, tx, tw, target = make(n, 32, 16, v, dtype)
    x.requires_grad_(), w.requires_grad_()
    with Watch(x, w, tx, tw, target) as watch:
        linear_distillation(
            x, w, tx, tw, target, hard_weight=0.5, chunk_bytes=budget, reduction=reduction
        ).sum().backward()
    gradients, wide = (x.numel() + w.numel()) * dtype.itemsize, w.numel() * 4
    blocks = 8 << 20
    assert watch.peak <= gradients + wide + budget + blocks < 2 * n * v * dtype.itemsize


def test_what_needs_no_gradient_costs_no_product():
    x, w, _, tx, tw, _ = make()
    for needs, products in (((False, False), 2), ((True, False), 3), ((False, True), 3), ((True, True), 4)):
        a, b = (t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True))
        with Watch() as watch:
            loss = linear_distillation(a, b, tx, tw)
            if any(needs):
                loss.backward()
        assert watch.products == products
        assert [t.grad is not None for t in (a, b)] == list(needs)


def test_the_teacher_gets_no_gradient():
    x, w, _, tx, tw, _ = make()
    x, tx, tw = (t.requires_grad_() for t in (x, tx, tw))
    linear_distillation(x, w, tx, tw).backward()
    assert x.grad is not None and tx.grad is None and tw.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(dtype, reduction):
    x, w, _, tx, tw, target = make(dtype=dtype)
    x.requires_grad_(), w.requires_grad_()
    loss = linear_distillation(x, w, tx, tw, target, hard_weight=0.2, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for a, b in zip(torch.autograd.grad(2 * loss, (x, w)), kept, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_double_backward_and_transforms(divergence):
    x, w, b, tx, tw, target = make(4, 3, 2, 5, torch.float64)
    leaves = tuple(t.requires_grad_() for t in (x, w, b))

    def loss(x, w, b):
        options = {"divergence": divergence, "hard_weight": 0.3, "linear_bias": b, "temperature": 2.0}
        options |= {"z_loss": 0.01, "softcap": 3.0, "logit_scale": 0.7, "teacher_softcap": 4.0}
        return linear_distillation(x, w, tx, tw, target, **options)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    by_function = torch.func.grad(loss)(x.detach(), w.detach(), b.detach())
    torch.testing.assert_close(by_function, torch.autograd.grad(loss(*leaves), x)[0])


def test_float16_gradients_survive_a_large_batch():
    """1 / N times a small probability is nothing in float16; GradScaler's scale is there to prevent that."""
    x, w, _, tx, tw, _ = make(4096, 8, 5, 512, torch.float16)
    a, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    scale = 2.0**14
    (linear_distillation(a, w, tx, tw) * scale).backward()
    (by_torch(exact, w.double(), None, tx.double() @ tw.double().t(), None) * scale).backward()
    assert (a.grad - exact.grad).abs().max() <= 8 * torch.finfo(torch.float16).eps * exact.grad.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_compile_fullgraph(reduction, dtype):
    torch._dynamo.reset()
    x, w, b, tx, tw, target = make(24, dtype=dtype)

    def loss(x, w, b):
        options = {"linear_bias": b, "hard_weight": 0.3, "reduction": reduction, "divergence": "jsd", "softcap": 5.0}
        x, tx_, y = (x * 2).view(4, 6, 8), tx.view(4, 6, 5), target.view(4, 6)
        return (linear_distillation(x, w, tx_, tw, y, **options) * 3).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        value = function(*leaves)
        value.backward()
        results.append((value, *(t.grad for t in leaves)))
    eps = torch.finfo(dtype).eps
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_operator(reduction):
    x, w, b, tx, tw, target = make(6, 4, 3, 7)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    options = ("jsd", 0.5, 2.0, 0.3, -100, 0.1, 0.01, 5.0, 0.9, None, 1.0)
    options = (*options, reduction, torch.float32, torch.float32, 1000, "auto", True, True, True)
    operator = torch.ops.fusedopt.linear_distillation.default
    torch.library.opcheck(operator, (*leaves, target, tx, tw, None, None, None, *options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, w, b, tx, tw, target = make()
    x.requires_grad_(), w.requires_grad_()
    exact = by_torch(x, w, b, tx @ tw.t(), target, hard_weight=0.3)
    expected = torch.autograd.grad(exact, (x, w))
    with torch.autocast("cpu", dtype):
        loss = linear_distillation(x, w, tx, tw, target, linear_bias=b, hard_weight=0.3)
    assert loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, exact, rtol=8 * eps, atol=8 * eps)
    for ours, right in zip(torch.autograd.grad(loss, (x, w)), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).abs().max() <= 8 * eps * right.abs().max()


def test_double_backward_of_what_autocast_converted():
    x, w, _, tx, tw, target = make()
    a, b = x.bfloat16().requires_grad_(), w.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation(a, b, tx.bfloat16(), tw, target, hard_weight=0.3)
    once = torch.autograd.grad(loss, (a, b), retain_graph=True)
    again = torch.autograd.grad(loss, (a, b), create_graph=True)
    for one, other in zip(once, again, strict=True):
        assert one.dtype == other.dtype and other.requires_grad
        torch.testing.assert_close(one, other, rtol=0, atol=0.03 * other.abs().max().item())


def test_distributed_tensors():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        x, w, _, tx, tw, _ = make()
        a, b, t = (distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (x, w, tx @ tw.t()))
        loss = linear_distillation(a.requires_grad_(), b.requires_grad_(), teacher_logits=t)
        loss.backward()
        torch.testing.assert_close(loss.full_tensor(), linear_distillation(x, w, tx, tw))
        assert a.grad.full_tensor().abs().sum() > 0 and type(b.grad) is DTensor
    finally:
        torch.distributed.destroy_process_group()


BAD = [
    ({"divergence": "kl"}, ValueError, "divergence='kl' is not one of 'forward_kl'"),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta=1.0 must be in"),
    ({"temperature": 0.0}, ValueError, "temperature=0.0"),
    ({"hard_weight": 1.5}, ValueError, "hard_weight=1.5"),
    ({"softcap": 0.0}, ValueError, "softcap=0.0 must be finite and above 0"),
    ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap=-1.0"),
    ({"teacher_logit_scale": "1"}, TypeError, "teacher_logit_scale must be a number, not str"),
    ({"z_loss": -1.0}, ValueError, "z_loss=-1.0"),
    ({"hard_weight": 0.5, "target": None}, ValueError, "needs a target"),
    ({"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
    ({"teacher_logits": torch.zeros(23, 37)}, ValueError, "either as teacher_input"),
    ({"teacher_input": None, "teacher_weight": None}, ValueError, "either as teacher_input"),
    ({"teacher_weight": None}, ValueError, "go together"),
    ({"input": torch.zeros(23, 9)}, RuntimeError, r"expected input \(..., H\)"),
    ({"teacher_input": torch.zeros(22, 5)}, RuntimeError, r"teacher_input of shape \(23, 5\), got \(22, 5\)"),
    ({"teacher_weight": torch.zeros(36, 5)}, RuntimeError, r"teacher_weight of shape \(37, 5\), got \(36, 5\)"),
    ({"target": torch.zeros(22, dtype=torch.int64)}, RuntimeError, r"target of shape \(23,\)"),
    ({"target": torch.zeros(23)}, RuntimeError, "torch.int64, got torch.float32"),
    ({"linear_weight": torch.zeros(37, 8).double()}, RuntimeError, "expected one floating dtype"),
    ({"target": torch.full((23,), 37)}, IndexError, "Target 37 is out of bounds"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(change, error, message):
    x, w, _, tx, tw, target = make()
    arguments = {"input": x, "linear_weight": w, "teacher_input": tx, "teacher_weight": tw, "target": target, **change}
    with pytest.raises(error, match=message):
        linear_distillation(**arguments)


def test_module():
    x, w, b, tx, tw, target = make()
    options = {"divergence": "jsd", "beta": 0.2, "temperature": 3.0, "hard_weight": 0.4, "reduction": "none"}
    module = fusedopt.nn.LinearDistillationLoss(**options)
    expected = linear_distillation(x, w, tx, tw, target, linear_bias=b, **options)
    assert torch.equal(module(x, w, tx, tw, target, linear_bias=b), expected)
    assert "divergence='jsd', beta=0.2" in repr(module)
    assert fusedopt.LinearDistillationLoss is fusedopt.nn.LinearDistillationLoss
    with pytest.raises(ValueError, match="temperature"):
        fusedopt.nn.LinearDistillationLoss(temperature=-1.0)


def test_the_backend_that_was_asked_for(monkeypatch):
    x, w, _, tx, tw, target = make()
    whole = linear_distillation(x, w, tx, tw, target, hard_weight=0.5, backend="reference")
    torch.testing.assert_close(linear_distillation(x, w, tx, tw, target, hard_weight=0.5, backend="cpu"), whole)
    with monkeypatch.context() as without_kernels:
        without_kernels.setattr(fusedopt.backends, "for_losses", lambda *_: "")
        torch.testing.assert_close(linear_distillation(x, w, tx, tw, target, hard_weight=0.5), whole)
    monkeypatch.setattr(fusedopt.nn.distillation_passes, "walk", None)
    linear_distillation(x, w, tx, tw, target, backend="reference")
    with pytest.raises(ValueError, match="backend='gpu' is not one of"):
        linear_distillation(x, w, tx, tw, backend="gpu")
