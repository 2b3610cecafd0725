"""csrc/cuda/mse.cu against float64, on host memory: `mse.py LIBRARY`."""

import simulated  # noqa: F401, I001
import itertools

import torch
from fusedopt.backends import cpu
from fusedopt.nn.functional import mse_loss

torch.set_num_threads(1)
cpu.device_types = frozenset()
checked = 0
SIZES = [(1,), (7,), (8, 3), (1000,), (257, 129), (300_001,)]
for shape, dtype, reduction, offset, needs in itertools.product(
    SIZES, (torch.float32, torch.bfloat16, torch.float16), ("mean", "sum"), (0, 1), ((True, False), (True, True))
):
    numel = torch.Size(shape).numel()
    storage = torch.randn(2, numel + offset, generator=torch.Generator().manual_seed(checked)).to(dtype)
    a, b = (row[offset:].reshape(shape).requires_grad_(need) for row, need in zip(storage, needs, strict=True))
    loss = mse_loss(a, b, reduction=reduction, backend="cuda")
    assert loss.dtype == torch.float32 and "_MSE" in type(loss.grad_fn).__name__
    upstream = torch.tensor(0.7)
    found = torch.autograd.grad(loss, [t for t in (a, b) if t.requires_grad], upstream)
    x, y = (t.detach().double().requires_grad_(t.requires_grad) for t in (a, b))
    expected = torch.nn.functional.mse_loss(x, y, reduction=reduction)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    right = torch.autograd.grad(expected, [t for t in (x, y) if t.requires_grad], upstream.double())
    eps = torch.finfo(dtype).eps
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2 * eps, atol=torch.finfo(dtype).smallest_normal * eps)
    checked += 1
a, b = torch.randn(2, 40).requires_grad_()
loss = mse_loss(a, b, backend="cuda")
first = torch.autograd.grad(loss, a, retain_graph=True)[0]
torch.testing.assert_close(torch.autograd.grad(3 * loss, a)[0], 3 * first)
print(f"{checked} losses agree")
