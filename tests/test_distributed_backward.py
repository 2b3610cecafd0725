"""step_in_backward under DistributedDataParallel and FSDP2: the numbers of an ordinary step of the same wrapping."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt.distributed import step_in_backward

pytestmark = pytest.mark.processes(4)

OPTIONS = {
    "plain": {},
    "8bit-ema": {"state_dtype": "8bit", "ema_decay": 0.9},
    "stochastic-states": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
}


def ddp(model):
    return DistributedDataParallel(model, bucket_cap_mb=0.01)  # several buckets


def ddp_views(model):
    return DistributedDataParallel(model, bucket_cap_mb=0.01, gradient_as_bucket_view=True)


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def trained(wrap, in_backward, options, micro):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(*[nn.Linear(66, 66) for _ in range(3)]))
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, **options)
    if in_backward:
        handle = step_in_backward(model, optimizer)
    for step in range(4):
        for i in range(micro):
            last = i == micro - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last  # as no_sync() does
            else:
                model.set_requires_gradient_sync(last)
            torch.manual_seed(100 * step + 10 * i + dist.get_rank())
            model(torch.randn(5, 66)).square().mean().backward()
            if in_backward and last and wrap is fsdp2:
                assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        if in_backward:
            assert all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
    if in_backward:
        handle.remove()
    return model, optimizer


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrap", [ddp, ddp_views, fsdp2])
def test_numbers_of_an_ordinary_step(wrap, options):
    for micro in (1, 2):
        (a, by_a), (b, by_b) = (trained(wrap, when, OPTIONS[options], micro) for when in (True, False))
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            for x, y in ((p, q), *((by_a.state[p][key], by_b.state[q][key]) for key in by_b.state[q])):
                x, y = (t._local_tensor if isinstance(t, DTensor) else t.detach() for t in (x, y))
                assert torch.equal(x, y)


def test_lamb_of_shared_tensors_is_refused():
    torch.manual_seed(0)
    model = fsdp2(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="LAMB sums norms over the processes"):
        step_in_backward(model, fusedopt.LAMB(model.parameters()))
