"""max_norm and skip_non_finite of tensors that the simulated GPU steps: `clip.py LIBRARY`."""

import simulated  # noqa: F401, I001
import math

import torch
from optim_table import DTYPES, WITH_LION, make_params, set_grads

torch.set_num_threads(1)
checked = 0
for case in WITH_LION:
    for dtypes in DTYPES:
        ours, theirs = make_params(dtypes), make_params(dtypes)
        optimizer = case.fused(ours, backend="cuda", max_norm=0.5, skip_non_finite=True)
        on_cpu = case.fused(theirs, backend="cpu", max_norm=0.5, skip_non_finite=True)
        for step in range(3):
            for params, one in ((ours, optimizer), (theirs, on_cpu)):
                set_grads(params, dtypes, step)
                if step == 1:
                    params[4].grad.view(-1)[3] = math.inf
                one.step()
            torch.testing.assert_close(optimizer.grad_norm.double(), on_cpu.grad_norm.double(), rtol=1e-6, atol=0)
        assert int(optimizer.skipped_steps) == 1
        for a, b in zip(ours, theirs, strict=True):
            error = 4 * torch.finfo(a.dtype).eps + 1e-7  # a device's coefficient is float32
            torch.testing.assert_close(a, b, rtol=error, atol=error, equal_nan=True)
            checked += 1
print(f"{checked} tensors agree")
