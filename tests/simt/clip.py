"""max_norm, skip_non_finite, GradScaler of tensors that the simulated GPU steps, without waiting: `clip.py LIBRARY`."""

import simulated  # noqa: F401, I001
import contextlib
import math

import torch
from memory_mode import NoWaiting
from optim_table import DTYPES, WITH_LION, make_params, set_grads

torch.set_num_threads(1)
checked = 0
for case in WITH_LION:
    for dtypes in DTYPES:
        ours, theirs = make_params(dtypes), make_params(dtypes)
        optimizer = case.fused(ours, backend="cuda", max_norm=0.5, skip_non_finite=True)
        on_cpu = case.fused(theirs, backend="cpu", max_norm=0.5, skip_non_finite=True)
        for step in range(4):
            for params, one in ((ours, optimizer), (theirs, on_cpu)):
                set_grads(params, dtypes, step)
                one.grad_scale, one.found_inf = torch.tensor(2.0), torch.tensor(float(step == 3))
                if step == 1:
                    params[4].grad.view(-1)[3] = math.inf
                # the first step asks what a checkpoint may have brought; and param-with-gaps is PyTorch's
                gaps, params[-1].grad = params[-1].grad, None
                with NoWaiting() if one is optimizer and step else contextlib.nullcontext():
                    one.step()
                params[-1].grad = gaps
            if step != 3:  # on the CPU a step that GradScaler skips measures nothing
                torch.testing.assert_close(optimizer.grad_norm.double(), on_cpu.grad_norm.double(), rtol=1e-6, atol=0)
        assert int(optimizer.skipped_steps) == 1
        for a, b in zip(ours, theirs, strict=True):
            error = 4 * torch.finfo(a.dtype).eps + 1e-7  # a device's coefficient is float32
            torch.testing.assert_close(a, b, rtol=error, atol=error, equal_nan=True)
            checked += 1
print(f"{checked} tensors agree")
