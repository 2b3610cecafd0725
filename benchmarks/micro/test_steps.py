"""step() of the CPU kernels: many small tensors, which are host time, and large ones, which are the loops."""

import pytest
import torch
from torch import nn

from fusedopt import optim
from fusedopt.backends import cpu

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
MILLION = 1 << 20


def stepping(count, numel, dtype, **options):
    """An optimizer whose states are there and whose tensors are known."""
    params = [nn.Parameter(torch.randn(numel).to(dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(numel).to(dtype)
    optimizer = optim.AdamW(params, backend="cpu", **options)
    for _ in range(2):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=["plain", "max_norm"])
def test_small_tensors(benchmark, count, options):
    benchmark(stepping(count, 64, torch.float32, **options).step)


def test_small_tensors_with_new_gradients(benchmark):
    """As after zero_grad(set_to_none=True): every gradient lies elsewhere."""
    optimizer = stepping(1000, 64, torch.float32)
    (group,) = optimizer.param_groups

    def renew():
        kept = [p.grad for p in group["params"]]  # so that no new gradient lies where an old one lay
        for p in group["params"]:
            p.grad = p.grad.clone()
        return (kept,), {}

    benchmark.pedantic(lambda kept: optimizer.step(), setup=renew, rounds=50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 1.0},
        {"ema_decay": 0.999},
        {"state_dtype": "8bit"},
        {"stochastic_rounding": True},
        {"master_weights": True},
    ],
    ids=["plain", "max_norm", "ema", "8bit", "stochastic", "master"],
)
def test_a_million(benchmark, options, dtype):
    if dtype == "f32" and options.keys() & {"stochastic_rounding", "master_weights"}:
        pytest.skip("of 16-bit weights")
    benchmark(stepping(1, MILLION, DTYPES[dtype], **options).step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_pass(benchmark, dtype):
    optimizer = stepping(1, MILLION, DTYPES[dtype])
    benchmark(cpu.sum_of_squares, optimizer._table)


def test_gather(benchmark):
    """What finds a thousand tensors and sees that nothing has changed."""
    optimizer = stepping(1000, 64, torch.float32)
    benchmark(optimizer._gather)
