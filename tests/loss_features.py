"""What each loss does on each backend, found by doing it: `loss_features.py BACKEND [SIMULATED LIBRARY]`.

Every feature of every loss is computed in a process whose only backend is this one, its tensors in host memory: CUDA's
kernels on the simulated GPU, Triton's in the interpreter. What disagrees with float64 ends the process. What agrees is
"kernels" where the backend's kernels took the logits, "torch" where PyTorch's operations did; told as JSON.
"""

import json
import sys

BACKEND = sys.argv[1]
if BACKEND == "cuda":
    sys.argv[1:2] = []
    sys.path.insert(0, __file__.rsplit("/", 1)[0] + "/simt")
    import simulated  # noqa: F401
else:
    sys.path.insert(0, __file__.rsplit("/", 2)[0])
if BACKEND == "triton":
    import triton_interpreter  # noqa: F401

import torch  # noqa: E402
from loss_oracle import composition  # noqa: E402

from fusedopt import backends  # noqa: E402
from fusedopt.backends import cpu  # noqa: E402
from fusedopt.nn.functional import cross_entropy, linear_cross_entropy, linear_distillation, mse_loss  # noqa: E402

torch.set_num_threads(1)
kernels = backends.module(BACKEND)
if BACKEND != "cpu":
    cpu.device_types = frozenset()
    kernels.device_types, kernels.available = frozenset({"cpu"}), lambda: True

calls = 0


def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        return function(*arguments, **options)

    return call


for name in ("cross_entropy_forward", "squared_error"):
    setattr(kernels, name, counted(getattr(kernels, name)))

N, H, V = 12, 8, 37
FEATURES = {
    "class indices, ignore_index": {},
    "class probabilities": {"probabilities": True},
    "weight per class": {"weighted": True},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "soft cap": {"softcap": 5.0},
    "logit scale": {"logit_scale": 0.7},
    "reductions mean, sum, none": {"reductions": True},
    "statistics": {"return_stats": True},
    "gradient over the logits": {"inplace": True},
    "images, (N, C, d1, ...)": {"images": True},
    "rows with gaps between them": {"gaps": True},
    "bias": {"bias": True},
    "frozen weight": {"frozen": True},
    "forward KL, reverse KL, JSD": {"divergences": True},
    "temperature": {"temperature": 2.0},
    "mixed with the labels' loss": {"hard_weight": 0.4},
    "teacher's logits, or hidden states and head": {"whole_teacher": True},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
}
# Which loss knows what. What is not here has no meaning there: a linear loss has no logits to write over, ...
BOTH = {"class indices, ignore_index", "label smoothing", "reductions mean, sum, none"}
DTYPES = {"float32", "bfloat16", "float16", "float64"}
HEAD = {"bias", "frozen weight"}
SCORES = {"z-loss", "soft cap", "logit scale"}
CLASSIFICATION = BOTH | SCORES | {"class probabilities", "weight per class", "statistics"}
KNOWN = {
    "cross entropy": CLASSIFICATION | DTYPES | set(list(FEATURES)[9:12]),
    "linear cross entropy": CLASSIFICATION | HEAD | DTYPES,
    "distillation": BOTH | SCORES | HEAD | DTYPES | set(list(FEATURES)[14:18]),
    "mean squared error": {"reductions mean, sum, none"} | DTYPES,
}


def judge(loss, leaves, exact_loss, exact_leaves, dtype):
    """Loss and gradients against float64, within a few roundings of the dtype."""
    eps = torch.finfo(dtype).eps
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    loss.backward(upstream.to(loss.dtype))
    exact_loss.backward(upstream.double())
    floor = 3e-6 if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(loss.detach().double(), exact_loss.detach(), rtol=floor + 8 * eps, atol=floor + 8 * eps)
    for ours, right in zip(leaves, exact_leaves, strict=True):
        if ours.requires_grad:
            size = max(0.1, right.grad.abs().max().item())
            torch.testing.assert_close(
                ours.grad.double(), right.grad, rtol=8 * eps + floor, atol=(8 * eps + floor) * size
            )


def data(dtype, probabilities=False, images=False):
    g = torch.Generator().manual_seed(0)
    shape = (2, V, 4, 5) if images else (N, V)
    target = torch.randint(V, shape[:1] + shape[2:], generator=g)
    target.view(-1)[1::4] = -100
    if probabilities:
        target = torch.randn(shape, generator=g).softmax(1).to(dtype)
    return g, shape, target


def try_cross_entropy(
    reduction, dtype=torch.float32, probabilities=False, weighted=False, images=False, gaps=False, inplace=False,
    return_stats=False, **options,
):  # fmt: skip
    g, shape, target = data(dtype, probabilities, images)
    logits = torch.randn(shape, generator=g).to(dtype)
    weight = torch.rand(V, generator=g).to(dtype) if weighted else None
    leaf = logits.clone().requires_grad_()
    given = torch.cat([leaf, leaf], 1)[:, :V] if gaps else leaf * 1
    loss = cross_entropy(
        given,
        target,
        weight,
        reduction=reduction,
        inplace=inplace,
        return_stats=return_stats,
        backend=BACKEND,
        **options,
    )
    exact = logits.double().requires_grad_()
    hard = target if not probabilities else target.double()
    expected = composition(exact, hard, None if weight is None else weight.double(), reduction=reduction, **options)
    if return_stats:
        loss, stats = loss
        assert torch.equal(stats.argmax, logits.argmax(1)) and torch.equal(stats.correct, stats.argmax == target)
        torch.testing.assert_close(stats.lse.double(), exact.logsumexp(1), rtol=1e-5, atol=1e-5)
        entropy = torch.special.entr(exact.softmax(1)).sum(1)
        torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    judge(loss, [leaf], expected, [exact], dtype)


def head(g, dtype, bias, frozen):
    x, w = torch.randn(N, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    b = torch.randn(V, generator=g).to(dtype) if bias else None
    ours = [None if t is None else t.clone().requires_grad_(not (frozen and t is w)) for t in (x, w, b)]
    exact = [None if t is None else t.double().requires_grad_() for t in (x, w, b)]
    return ours, exact


def try_linear_cross_entropy(
    reduction, dtype=torch.float32, probabilities=False, weighted=False, bias=False, frozen=False, return_stats=False,
    **options,
):  # fmt: skip
    g, _, target = data(dtype, probabilities)
    (x, w, b), exact = head(g, dtype, bias, frozen)
    weight = torch.rand(V, generator=g).to(dtype) if weighted else None
    loss = linear_cross_entropy(
        x, w, target, linear_bias=b, weight=weight, reduction=reduction, return_stats=return_stats, chunk_bytes=700,
        backend=BACKEND, **options,
    )  # fmt: skip
    logits = torch.nn.functional.linear(*exact)
    hard = target if not probabilities else target.double()
    expected = composition(logits, hard, None if weight is None else weight.double(), reduction=reduction, **options)
    if return_stats:
        loss, stats = loss
        assert torch.equal(stats.argmax, logits.argmax(1))
        torch.testing.assert_close(stats.lse.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    judge(loss, [t for t in (x, w, b) if t is not None], expected, [t for t in exact if t is not None], dtype)


def try_distillation(
    reduction, dtype=torch.float32, bias=False, frozen=False, divergence="forward_kl", whole_teacher=False,
    temperature=1.0, hard_weight=0.0, label_smoothing=0.0, z_loss=0.0, softcap=None, logit_scale=1.0,
):  # fmt: skip
    g, _, target = data(dtype)
    (x, w, b), exact = head(g, dtype, bias, frozen)
    tx, tw = torch.randn(N, 5, generator=g).to(dtype), torch.randn(V, 5, generator=g).to(dtype)
    teacher = {"teacher_logits": tx @ tw.t()} if whole_teacher else {"teacher_input": tx, "teacher_weight": tw}
    hard_weight = hard_weight or (0.5 if label_smoothing or z_loss else 0.0)
    loss = linear_distillation(
        x, w, target=target, linear_bias=b, **teacher, divergence=divergence, temperature=temperature,
        hard_weight=hard_weight, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, teacher_softcap=softcap, teacher_logit_scale=logit_scale, reduction=reduction,
        chunk_bytes=1400,
    )  # fmt: skip
    t = (tx @ tw.t()).double() if whole_teacher else tx.double() @ tw.double().t()
    s = torch.nn.functional.linear(*exact)
    s, t = s * logit_scale, t * logit_scale
    if softcap is not None:
        s, t = (softcap * torch.tanh(logits / softcap) for logits in (s, t))
    q, p = (s / temperature).softmax(1), (t / temperature).softmax(1)
    kl = lambda a, b: (a * (a / b).log()).sum(1)  # noqa: E731
    soft = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2}
    rows = (1 - hard_weight) * temperature**2 * soft[divergence]
    hard = torch.nn.functional.cross_entropy(s, target, reduction="none", label_smoothing=label_smoothing)
    hard = hard + z_loss * s.logsumexp(1).square()
    rows = (rows + hard_weight * hard).where(target != -100, 0)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (target != -100).sum()}[reduction]
    judge(loss, [t for t in (x, w, b) if t is not None], expected, [t for t in exact if t is not None], dtype)


def try_mse(reduction, dtype=torch.float32):
    a, b = (torch.randn(40, 7, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_() for i in (0, 1))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    loss = mse_loss(a, b, reduction=reduction)
    judge(loss, [a, b], torch.nn.functional.mse_loss(*exact, reduction=reduction), exact, dtype)


TRY = dict(zip(KNOWN, (try_cross_entropy, try_linear_cross_entropy, try_distillation, try_mse), strict=True))


def outcome(loss, feature):
    """ "kernels" or "torch"; "partly" where only some of a feature's variants reach the kernels."""
    options = dict(FEATURES[feature])
    reductions = ("mean", "sum", "none") if options.pop("reductions", False) else ("mean",)
    variants = (
        [{"divergence": d} for d in ("forward_kl", "reverse_kl", "jsd")] if options.pop("divergences", 0) else [{}]
    )
    found = set()
    for reduction in reductions:
        for variant in variants:
            before = calls
            TRY[loss](reduction, **options, **variant)
            found.add("kernels" if calls > before else "torch")
    return found.pop() if len(found) == 1 else "partly"


print(json.dumps({loss: {f: outcome(loss, f) for f in FEATURES if f in known} for loss, known in KNOWN.items()}))
