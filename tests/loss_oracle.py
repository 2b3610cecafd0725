"""Cross entropy written out, in whatever dtype its logits have: the oracle in float64, the yardstick in float32."""

import torch


def composition(
    logits,
    target,
    weight=None,
    *,
    reduction="mean",
    label_smoothing=0.0,
    ignore_index=-100,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
):
    s = logit_scale * logits
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.movedim(1, -1)
    classes = s.shape[-1]
    w = torch.ones(classes, dtype=s.dtype) if weight is None else weight.to(s.dtype)
    lse = s.logsumexp(-1)
    if target.is_floating_point():
        hot, counts = target.to(s.dtype).movedim(1, -1), torch.ones_like(lse, dtype=torch.bool)
        total = counts.sum()
    else:
        counts = target != ignore_index
        safe = target.where(counts, 0)
        hot = torch.nn.functional.one_hot(safe, classes).to(s.dtype)
        total = w[safe].where(counts, 0.0).sum()
    y = w * ((1 - label_smoothing) * hot + label_smoothing / classes)
    rows = -(y * (s - lse.unsqueeze(-1))).sum(-1) + z_loss * lse.square()
    rows = rows.where(counts, 0.0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / total}[reduction]


def make(shape, dtype, *, probabilities=False, weighted=False, ignored=True, seed=0, spread=3.0):
    """Logits (N, C, ...), targets with every fifth ignored, and class weights."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * spread).to(dtype)
    if probabilities:
        target = torch.randn(shape, generator=g).softmax(1).to(dtype)
    else:
        target = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=g)
        if ignored:
            target.view(-1)[1::5] = -100
    weight = (torch.rand(shape[1], generator=g) + 0.1).to(dtype) if weighted else None
    return logits, target, weight


def run(function, logits, target, weight, dtype, **options):
    """Loss and gradient of the logits in float64, computed on logits of `dtype`, under a random upstream gradient."""
    x = logits.detach().to(dtype, copy=True).requires_grad_()
    t = target.to(dtype) if target.is_floating_point() else target
    loss = function(x, t, None if weight is None else weight.to(dtype), **options)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    loss.backward(upstream.to(loss.dtype))
    return loss.detach().double(), x.grad.double()


def assert_as_good_as_composition(function, logits, target, weight, **options):
    """No further from float64 than torch's operators in the compute dtype, but for what is stated here."""
    dtype = logits.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact_loss, exact_grad = run(composition, logits, target, weight, torch.float64, **options)
    loss, grad = run(function, logits, target, weight, dtype, **options)
    their_loss, their_grad = run(composition, logits, target, weight, compute, **options)
    # softmax.h: exp's relative error is 2e-7 + 2e-8 |x|, tanh's 4e-7, which the cap multiplies, once in the target's
    # logit and once in the log-sum-exp; z_loss * lse^2 has twice the log-sum-exp's relative error
    tanh = 0.0 if options.get("softcap") is None else 4e-7 * options["softcap"]
    relative = 2e-6 + 2 * tanh if dtype != torch.float64 else 1e-12
    finite = exact_loss.isfinite()
    scale = exact_loss[finite].abs().max().clamp(min=1) if finite.any() else torch.tensor(1.0)
    assert torch.equal(loss.isnan(), exact_loss.isnan())
    their_error = (their_loss - exact_loss)[finite].abs().max() if finite.any() else 0.0
    assert (loss - exact_loss)[finite].abs().max() <= their_error + relative * scale if finite.any() else True
    # rounded to the gradient's dtype twice: at forward, and times upstream
    ulp = torch.finfo(dtype).eps * exact_grad.abs().max() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # p carries its error where p - y cancels
    allowed = 2 * ulp + relative * exact_grad.abs().max().clamp(min=0.5)
    assert (grad - exact_grad).abs().max() <= (their_grad - exact_grad).abs().max() + allowed
