"""LAMB: the paper's formula in float64, every dtype, precision and instruction set."""

import papers
import pytest
import torch
from optim_table import DTYPES, ENGINES, SHAPES, make_params, set_grads, use_engine
from torch import nn

import fusedopt.optim
from fusedopt.optim import precision

OPTIONS = [
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": torch.tensor(2.0**-7), "always_adapt": True, "maximize": True},
    {"lr": 0.01, "betas": (0.3, 0.8), "eps": 1e-3},  # no decay: Adam's step
]
STEPS = 4


def oracle(options, dtypes):
    params = make_params(dtypes, double=True)
    optimizer = papers.LAMB(params, **{**options, "lr": float(options["lr"])})
    for t in range(1, STEPS + 1):
        set_grads(params, dtypes, t)
        optimizer.step()
    return [p.detach() for p in params]


def run(options, dtypes, backend, **precise):
    params = make_params(dtypes)
    optimizer = fusedopt.optim.LAMB(params, backend=backend, **options, **precise)
    for t in range(1, STEPS + 1):
        set_grads(params, dtypes, t)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_papers(options, dtypes, engine):
    torch.set_num_threads(1)
    params, optimizer = run(options, dtypes, use_engine(engine))
    eps = torch.finfo(DTYPES[dtypes][0]).eps
    for p, exact, name in zip(params, oracle(options, dtypes), SHAPES, strict=True):
        if p.numel():
            # each step rounds the weight and both moments, and a moment off by an ulp is an update off by one
            tolerance = STEPS * (eps * exact.abs().max() + 4 * eps * float(options["lr"]) * exact.abs().max()) + 1e-12
            assert (p.detach().double() - exact).abs().max() <= (2 if engine == "reference" else 1) * tolerance, name
    backends = {row.backend for row in optimizer.backend_report()}
    assert backends == ({"reference"} if engine == "reference" else {"cpu", "reference"})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "precise, dtypes",
    [
        ({"state_dtype": torch.float32, "master_weights": True, "ema_decay": 0.5}, "bf16-f32-grads"),
        ({"state_dtype": "8bit"}, "f32"),
        ({"state_dtype": "8bit", "master_weights": True, "max_norm": 1.0}, "f16"),
        ({"stochastic_rounding": True}, "bf16"),
    ],
    ids=str,
)
def test_at_every_precision(precise, dtypes, engine):
    torch.set_num_threads(1)
    params, optimizer = run(OPTIONS[0], dtypes, use_engine(engine), **precise)
    lr = OPTIONS[0]["lr"]
    whole = "master_weights" in precise or dtypes == "f32"
    for p, exact in zip(params, oracle(OPTIONS[0], dtypes), strict=True):
        got = precision.weight(p, optimizer.state[p]).double()
        scale = exact.abs().max() if p.numel() else 0
        tolerance = (0.15 * STEPS * lr if "state_dtype" in precise else 0.1 * lr) * scale + 1e-6
        tolerance += 0 if whole else STEPS * 2**-7 * scale
        assert not p.numel() or (got - exact).abs().max() <= tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_norms_and_threads(engine):
    backend = use_engine(engine)
    zero, still = nn.Parameter(torch.zeros(300)), nn.Parameter(torch.ones(300))
    optimizer = fusedopt.optim.LAMB([zero, still], lr=0.5, always_adapt=True, backend=backend)
    zero.grad, still.grad = torch.ones(300), torch.zeros(300)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((300,), -0.5))  # the ratio of 0 to something is taken for 1
    assert still.eq(1).all()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = nn.Parameter(torch.linspace(-1, 1, 300_001))
        p.grad = torch.sin(torch.arange(300_001.0))
        fusedopt.optim.LAMB([p], lr=0.1, weight_decay=0.1, backend=backend).step()
        found.append(p.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_saves_and_loads():
    p = nn.Parameter(torch.ones(5000))
    p.grad = torch.linspace(-1, 1, 5000)
    a = fusedopt.optim.LAMB([p], weight_decay=0.1, state_dtype="8bit")
    a.step()
    q = nn.Parameter(p.detach().clone())
    q.grad = p.grad
    b = fusedopt.optim.LAMB([q], weight_decay=0.1, state_dtype="8bit")
    b.load_state_dict(a.state_dict())
    a.step()
    b.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        fusedopt.optim.LAMB([nn.Parameter(torch.ones(3))], **options)
