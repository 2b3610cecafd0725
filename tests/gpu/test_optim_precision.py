"""Weights, states and averages of other precision on a GPU: the CPU's values, codes and random bits; nobody waits."""

import pytest
import torch
from optim_table import DTYPES, Case, make_params, set_grads
from test_optim import nothing_waits
from test_precision import MODES, ROWS

from fusedopt.optim import precision

LARGE = 50001  # over a chunk, and ragged


def run(case, dtypes, backend, device="cuda", **options):
    dtype, grad_dtype = DTYPES[dtypes]
    params = make_params(dtypes, device=device)
    large = torch.nn.Parameter(torch.linspace(-1, 1, LARGE).sin().to(device, dtype))
    if grad_dtype != dtype:
        large.grad_dtype = grad_dtype
    optimizer = case.fused([*params, large], backend=backend, **options)
    for step in range(1, 5):
        set_grads(params, dtypes, step)
        large.grad = torch.linspace(-step, 2, LARGE).cos().to(device, grad_dtype)
        optimizer.step()
    return [
        (p.detach().cpu(), {k: torch.as_tensor(v).cpu() for k, v in optimizer.state[p].items()})
        for p in [*params, large]
    ]


@pytest.mark.parametrize(("case", "mode", "dtypes"), [row for row in ROWS if row[0].name != "Lion"], ids=str)
def test_as_on_the_cpu(case, mode, dtypes, backend):
    ours, theirs = (
        run(case, dtypes, name, device, **MODES[mode]) for name, device in ((backend, "cuda"), ("cpu", "cpu"))
    )
    eps = torch.finfo(DTYPES[dtypes][0]).eps
    for (p, state), (q, expected) in zip(ours, theirs, strict=True):
        assert state.keys() == expected.keys()
        both = {"param": (precision.weight(p, state), precision.weight(q, expected))}
        if "ema" in state:
            both["ema"] = state["ema"], expected["ema"]
        for key, (a, b) in both.items():
            error = (a.double() - b.double()).abs()
            # a rounding may fall on the other side; where a state is a code, or bfloat16, one update is then off
            assert not error.numel() or error.max() <= 0.005 + 4 * eps, key
            assert not error.numel() or error.mean() <= 1e-4 + eps, key


@pytest.mark.parametrize("case", [Case("SGD", {"lr": 2.0**-4}), Case("SGD", {"lr": 2.0**-4, "momentum": 0.5})], ids=str)
def test_random_bits_are_the_cpus(case, backend):
    """Every product is exact, so that the values before rounding are the CPU's."""
    options = {"stochastic_rounding": True, "state_dtype": torch.bfloat16, "ema_decay": 0.5}
    ours, theirs = (run(case, "bf16", name, device, **options) for name, device in ((backend, "cuda"), ("cpu", "cpu")))
    for (p, state), (q, expected) in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_codes_are_the_cpus(backend):
    case = Case("SGD", {"lr": 2.0**-4, "momentum": 0.5})
    options = {"state_dtype": "8bit", "master_weights": True}
    ours, theirs = (run(case, "bf16", name, device, **options) for name, device in ((backend, "cuda"), ("cpu", "cpu")))
    (_, state), (_, expected) = ours[-1], theirs[-1]
    assert torch.equal(state["momentum_buffer_scale"], expected["momentum_buffer_scale"])
    # the roots of the two agree to 1e-5 of a code's width
    assert (state["momentum_buffer"] != expected["momentum_buffer"]).double().mean() < 1e-3


@pytest.mark.parametrize("mode", ["8bit-master-ema-clip", "8bit-stochastic-ema", "bf16-master-stochastic"])
def test_waits_for_nothing_and_replays(mode, backend):
    def fresh():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n, device="cuda").bfloat16()) for n in (LARGE, 7)]
        for p in params:
            p.grad = p.detach().cos()
        return Case("AdamW", {"lr": 0.01}).fused(params, backend=backend, **MODES[mode])

    captured, eager = fresh(), fresh()
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    eager.step()
    for _ in range(3):
        graph.replay()
        with nothing_waits():
            eager.step()
    for p, q in zip(captured.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(captured.state[p][key], value) for key, value in eager.state[q].items())
