"""Small steps of every rule and small losses, for compute-sanitizer: `make gpu-sanitize` runs each of its tools."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from loss_oracle import make  # noqa: E402
from optim_table import DTYPES, WITH_LION, Case, make_params, train  # noqa: E402

from fusedopt.nn.functional import cross_entropy, mse_loss  # noqa: E402

for case in [*WITH_LION, Case("LAMB", {"weight_decay": 0.1})]:
    for dtypes in DTYPES:
        train(case.fused(make_params(dtypes, device="cuda"), backend="cuda"), dtypes, steps=2)
for shape in [(5, 3), (3, 2053), (2, 70001)]:
    for dtype in (torch.float32, torch.bfloat16):
        for probabilities in (False, True):
            x, target, weight = make(shape, dtype, probabilities=probabilities, weighted=True)
            x, target, weight = x.cuda().requires_grad_(), target.cuda(), weight.cuda()
            for reduction in ("mean", "none"):
                options = {"label_smoothing": 0.1, "softcap": 9.0, "reduction": reduction, "return_stats": True}
                loss, _ = cross_entropy(x, target, weight, **options, backend="cuda")
                loss.sum().backward()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n in (1, 5003, 70001):
        x, y = (torch.randn(n + 1, device="cuda").to(dtype)[1:].requires_grad_() for _ in range(2))
        mse_loss(x, y, backend="cuda").backward()
        mse_loss(x.detach().clone().requires_grad_(), y.detach().clone(), backend="cuda").backward()
print("all rules stepped, all losses computed")
