"""step_in_backward in one process: an ordinary step's numbers, hardly a gradient alive, and what it refuses."""

import copy

import pytest
import torch
from optim_table import Case
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt
from fusedopt.distributed import step_in_backward

CASES = [
    Case("Adam", {"lr": 0.01, "amsgrad": True}),
    Case("AdamW", {"lr": 0.01}),
    Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    Case("Adagrad", {"lr": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("Lion", {"lr": 0.01}),
    Case("LAMB", {"lr": 0.01, "weight_decay": 0.1}),
]
MODES = {
    "plain": (torch.float32, {}),
    "ema": (torch.float32, {"ema_decay": 0.9}),
    "8bit-ema": (torch.float32, {"state_dtype": "8bit", "ema_decay": 0.9}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "master": (torch.bfloat16, {"master_weights": True}),
}


class Model(nn.Module):
    """Linear layers, of which one is used every other time and one weight twice."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(80, 80) for _ in range(5)])
        self.layers[3].weight = self.layers[1].weight
        self.to(dtype)

    def forward(self, x, skip=False):
        for i, layer in enumerate(self.layers):
            x = x if skip and i == 2 else torch.tanh(layer(x))
        return x.float().square().mean()


def train(model, optimizer, steps=4, begin=0):
    scheduler = ExponentialLR(optimizer, 0.9)
    for step in range(begin, begin + steps):
        torch.manual_seed(step)
        model(torch.randn(4, 80).to(model.layers[0].weight.dtype), skip=step % 2 == 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def equal(a, b, ours, theirs):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        state, expected = ours.state[p], theirs.state[q]
        assert state.keys() == expected.keys()
        for key in state:
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected[key])), key


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numbers_of_an_ordinary_step(case, mode, backend):
    dtype, options = MODES[mode]
    a, b = Model(dtype), Model(dtype)
    ours, theirs = (case.fused(model.parameters(), backend=backend, **options) for model in (a, b))
    handle = step_in_backward(a, ours)
    for model, optimizer in ((a, ours), (b, theirs)):
        train(model, optimizer)
    equal(a, b, ours, theirs)
    # a checkpoint goes in and out, and an ordinary step goes on from there
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(a, ours, begin=4)
    train(b, theirs, begin=4)
    equal(a, b, ours, theirs)
    handle.remove()
    train(a, ours, begin=8)
    train(b, theirs, begin=8)
    equal(a, b, ours, theirs)


def test_hardly_a_gradient_is_alive():
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    size = 256 * 256 * 4

    def peak():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(torch.ones(1, 256)).sum().backward()
        events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns())  # fmt: skip
        alive = most = 0
        for event in events:
            alive += event.nbytes()
            most = max(most, alive)
        return most

    optimizer = fusedopt.optim.SGD(model.parameters(), lr=0.1)
    whole = peak()
    optimizer.zero_grad()
    handle = step_in_backward(model, optimizer)
    model(torch.ones(1, 256)).sum().backward()  # its tables are there now
    optimizer.step()
    in_backward = peak()
    optimizer.step()
    handle.remove()
    assert whole >= 8 * size
    assert in_backward <= 2.5 * size, in_backward / size
    assert all(p.grad is None for p in model.parameters())


def test_what_it_cannot_honour():
    model = Model()
    for options in ({"max_norm": 1.0}, {"skip_non_finite": True}):
        with pytest.raises(ValueError, match="max_norm and skip_non_finite look at all gradients"):
            step_in_backward(model, fusedopt.optim.AdamW(model.parameters(), **options))
    with pytest.raises(TypeError, match="an optimizer of fusedopt, not AdamW"):
        step_in_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"shape \(3,\) of the optimizer is not the model's"):
        step_in_backward(model, fusedopt.optim.AdamW([*model.parameters(), nn.Parameter(torch.ones(3))]))
    optimizer = fusedopt.optim.AdamW(model.parameters(), ema_decay=0.9)
    handle = step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="already steps in backward"):
        step_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="remove"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    model(torch.ones(1, 80)).backward()
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="gradients cannot be accumulated"):
        model(torch.ones(1, 80)).backward()
    optimizer.step()
    assert all(map(torch.equal, weights, model.parameters()))
    optimizer.zero_grad()
    with optimizer.ema_weights(), pytest.raises(RuntimeError, match="inside `with ema_weights"):
        model(torch.ones(1, 80)).backward()
    optimizer.zero_grad()
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="GradScaler does not go with step_in_backward"):
        optimizer.step()
    del optimizer.grad_scale
    handle.remove()
    model(torch.ones(1, 80)).backward()
    optimizer.step()
    assert not all(map(torch.equal, weights, model.parameters()))
