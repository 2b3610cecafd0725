"""Mean squared error against float64, for whoever computes it."""

import itertools

import torch
import torch.nn.functional as F

from fusedopt.nn.functional import mse_loss

OFFSETS = [(0, 0, 0), (1, 1, 1), (0, 3, 0), (4, 8, 5)]  # of input, target, gradient in memory, in elements


def run(function, x, y, upstream, dtype=None, **options):
    """Loss and both gradients, in float64, computed in `dtype`."""
    x, y = (t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in (x, y))
    loss = function(x, y, **options)
    loss.backward(upstream.to(loss.dtype))
    return [t.detach().double() for t in (loss, x.grad, y.grad)]


def assert_as_good_as_stock(x, y, reduction, **options):
    upstream = torch.tensor(1.375, device=x.device)
    exact = run(F.mse_loss, x, y, upstream, torch.float64, reduction=reduction)
    stock = run(F.mse_loss, x, y, upstream, reduction=reduction)
    ours = run(mse_loss, x, y, upstream, reduction=reduction, **options)
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).smallest_normal
    assert (ours[0] - exact[0]).abs() <= (stock[0] - exact[0]).abs() + (1e-6 if eps > 1e-10 else 1e-14) * exact[0]
    for a, b, c in zip(ours[1:], stock[1:], exact[1:], strict=True):
        # rounded in forward, and times the upstream gradient; in float32 the difference and the factor too
        assert ((a - c).abs() <= torch.maximum((b - c).abs(), 2 * eps * c.abs() + eps * tiny)).all()


def placed(values, offset):
    """A copy that begins so many elements into a buffer, which ends with it, and the buffer."""
    buffer = values.new_full((offset + values.numel(),), float("nan"))
    return buffer[offset:].copy_(values), buffer


def check_kernels(kernels, n, dtype, device="cpu"):
    """A backend's two functions, wherever the tensors begin. Returns the losses, which should be one."""
    generator = torch.Generator().manual_seed(n)
    values = [torch.randn(n, generator=generator).to(device, dtype) for _ in range(2)]
    difference = values[0].float() - values[1].float()
    factor, grad_factor, upstream = 1 / n, -2 / n, torch.tensor(1.7, device=device)
    # as the kernels round: the factor to float32, their product with the upstream gradient, then the product
    weighed = torch.tensor(grad_factor, device=device)
    exact, losses = difference.double().square().mean().cpu(), []
    for offsets in OFFSETS:
        x, y = (placed(v, offset)[0] for v, offset in zip(values, offsets[:2], strict=True))
        grad, buffer = placed(torch.zeros_like(x), offsets[2])
        for at_forward in (None, grad):
            loss = kernels.squared_error(x, y, factor, at_forward, grad_factor)
            torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=0)
            losses.append(loss.item())
        assert torch.equal(grad, (difference * weighed).to(dtype)), (n, dtype, offsets)
        kernels.squared_error_backward(x, y, grad, grad_factor, upstream)
        assert torch.equal(grad, (difference * (weighed * upstream)).to(dtype)), (n, dtype, offsets)
        assert buffer[: offsets[2]].isnan().all()
    return losses


def check_functional(backend, device="cpu"):
    """fusedopt.nn.functional.mse_loss on a backend: values, layouts, who needs a gradient, graphs that are kept."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, reduction, shape in itertools.product(dtypes, ("mean", "sum"), ((), (7, 13), (2, 3, 4, 5))):
        x, y = (torch.randn(shape).to(device, dtype) for _ in range(2))
        if len(shape) == 4:
            x, y = (t.to(memory_format=torch.channels_last) for t in (x, y))
        assert_as_good_as_stock(x, y, reduction, backend=backend)
    for dtype in dtypes:
        x, y = (torch.randn(50, device=device).to(dtype) for _ in range(2))
        for needs in ((True, False), (False, True)):
            a, b = (t.clone().requires_grad_(need) for t, need in zip((x, y), needs, strict=True))
            loss = mse_loss(a, b, backend=backend)
            loss.backward(retain_graph=True)
            (2 * loss).backward()
            expected = (x.double() - y.double()) * (6 / 50 if needs[0] else -6 / 50)
            got = a.grad if needs[0] else b.grad
            assert (a.grad is None) != needs[0] and (b.grad is None) != needs[1]
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=eps * expected.abs().max().item())
    # torch's: another dtype of the target, gaps, float64 on a GPU, no reduction
    for a, b, options in (
        (x, y.double(), {}),
        (torch.randn(9, 2, device=device)[:, 0], torch.randn(9, device=device), {}),
        (x.double(), y.double(), {}),
        (x, y, {"reduction": "none"}),
    ):
        ours = mse_loss(a, b, **options, backend=backend).double()
        torch.testing.assert_close(ours, F.mse_loss(a.double(), b.double(), **options), rtol=1e-2, atol=1e-3)
