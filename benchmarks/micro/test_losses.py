"""Losses of the CPU kernels, forward and backward."""

import pytest
import torch

from fusedopt.nn.functional import cross_entropy, mse_loss

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ROWS, CLASSES = 64, 32000


def forward_and_backward(loss, leaf, target, **options):
    def run():
        leaf.grad = None
        loss(leaf, target, backend="cpu", **options).backward()

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(benchmark, dtype):
    logits = torch.randn(ROWS, CLASSES).to(DTYPES[dtype]).requires_grad_()
    benchmark(forward_and_backward(cross_entropy, logits, torch.randint(CLASSES, (ROWS,))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_alone(benchmark, dtype):
    """Without a gradient."""
    logits = torch.randn(ROWS, CLASSES).to(DTYPES[dtype])
    benchmark(cross_entropy, logits, torch.randint(CLASSES, (ROWS,)), backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_mse(benchmark, dtype):
    x = torch.randn(1 << 20).to(DTYPES[dtype]).requires_grad_()
    benchmark(forward_and_backward(mse_loss, x, torch.randn(1 << 20).to(DTYPES[dtype])))
