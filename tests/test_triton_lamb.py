"""LAMB on Triton's kernels, by value in Triton's interpreter: the norms of whole tensors between two of them.

Precision by precision it is a row of test_triton_precision.py, compiled one of test_triton_compile.py.
"""

import math

import pytest
import torch
from optim_table import DTYPES, SHAPES
from test_lamb import OPTIONS, STEPS, oracle, run
from torch import nn

pytest.importorskip("triton")

from triton_interpreter import INTERPRETED, interpreted, run_anew

import fusedopt.optim
from fusedopt.backends import cpu
from fusedopt.backends import triton as backend
from fusedopt.backends.triton import kernels, table

pytestmark = pytest.mark.skipif(cpu.available() is not True, reason=str(cpu.available()))


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_all_of_it_in_the_interpreter():
    run_anew(__file__, "thorough")


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """Optimizers of CPU tensors, asked for the Triton backend, get it."""
    torch.set_num_threads(1)
    for name in ("TUNING", "PRECISE"):  # the interpreter takes as long for a small block
        large = {size: t._replace(block=kernels.CHUNK.value) for size, t in getattr(table, name).items()}
        monkeypatch.setattr(table, name, large)
    monkeypatch.setattr(backend, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(backend, "available", lambda: True)


ALL = [(i, dtypes) for i in range(len(OPTIONS)) for dtypes in DTYPES]
SOME = [(0, "f32"), (1, "bf16-f32-grads"), (2, "f64")]


def check(options, dtypes):
    params, optimizer = run(options, dtypes, "triton")
    assert {row.backend for row in optimizer.backend_report()} == {"triton", "reference"}
    eps = torch.finfo(DTYPES[dtypes][0]).eps
    for p, exact, name in zip(params, oracle(options, dtypes), SHAPES, strict=True):
        if p.numel():
            # as tests/test_lamb.py has it
            tolerance = STEPS * (eps * exact.abs().max() + 4 * eps * float(options["lr"]) * exact.abs().max()) + 1e-12
            assert (p.detach().double() - exact).abs().max() <= tolerance, name


@interpreted
@pytest.mark.parametrize("i, dtypes", SOME)
def test_is_the_papers(i, dtypes):
    check(OPTIONS[i], dtypes)


@interpreted
@pytest.mark.thorough
@pytest.mark.parametrize("i, dtypes", [row for row in ALL if row not in SOME])
def test_so_is_every_other(i, dtypes):
    check(OPTIONS[i], dtypes)


def on_both(steps, make, **options):
    """The parameters after steps by this backend, and by the CPU's."""
    found = []
    for name in ("triton", "cpu"):
        params, grads = make()
        optimizer = fusedopt.optim.LAMB(params, backend=name, **options)
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(steps):
            for p, grad in zip(tensors, grads[step], strict=True):
                p.grad = grad
            optimizer.step()
        found.append([p.detach() for p in tensors])
    return found


@interpreted
def test_zeros_many_chunks_and_groups(monkeypatch):
    """A norm of 0 makes a ratio of 1; more chunks than are summed at a time; beyond a tensor's end 0 / 0 lies."""
    monkeypatch.setattr(table, "SUMS", 2)

    def make():
        large = torch.linspace(-1, 1, 4 * 16384 + 777)
        params = [nn.Parameter(t) for t in (torch.zeros(300), torch.ones(300), torch.empty(0), large)]
        grads = [torch.ones(300), torch.zeros(300), torch.empty(0), torch.cos(9 * large)]
        return [{"params": params[:3]}, {"params": params[3:], "eps": 0.0, "lr": 0.125}], [grads]

    (zero, still, _, large), theirs = on_both(1, make, lr=0.5, always_adapt=True)
    torch.testing.assert_close(zero, torch.full((300,), -0.5))
    assert still.eq(1).all()
    torch.testing.assert_close(large, theirs[3], rtol=2e-6, atol=1e-7)
    assert not torch.equal(large, make()[0][1]["params"][0])
    monkeypatch.setattr(table, "_multiprocessors", lambda device: 3)  # sums do not depend on who takes them
    assert torch.equal(on_both(1, make, lr=0.5, always_adapt=True)[0][3], large)


@interpreted
def test_what_is_broken_shows_as_on_the_cpu():
    """An infinite gradient, an infinite weight, a NaN: each in a tensor of its own, and no other."""

    def make():
        start, grads = (torch.linspace(a, 1.5, 300).repeat(4, 1) for a in (0.5, -1.0))
        start[1, 7], grads[0, 3], grads[2, 5] = math.inf, math.inf, math.nan
        return [nn.Parameter(row.clone()) for row in start], [list(grads), list(grads)]

    ours, theirs = on_both(2, make, lr=0.01, weight_decay=0.1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0, equal_nan=True)
    assert [int(a.isnan().sum()) for a in ours] == [1, 300, 1, 0]


@interpreted
def test_squares_do_not_overflow():
    p = nn.Parameter(torch.full((300,), 3e38))
    p.grad = torch.ones(300)
    fusedopt.optim.LAMB([p], lr=0.01, weight_decay=0.1, backend="triton").step()  # along 0.1 p
    torch.testing.assert_close(p.detach(), torch.full((300,), 0.99 * 3e38), rtol=1e-6, atol=0)


@interpreted
def test_scaled_clipped_and_skipped_steps():
    """GradScaler's factor and the clip's are in the direction, and so in its norm; a step left out adapts nothing."""
    n, kept = 5000, []
    for backend_, scale in (("triton", 4.0), ("triton", 1.0), ("cpu", 1.0)):
        params = [nn.Parameter(torch.linspace(-1, 1, n)), nn.Parameter(torch.ones(3))]
        optimizer = fusedopt.optim.LAMB(params, lr=0.1, weight_decay=0.1, max_norm=0.5, eps=0.1, backend=backend_)
        for step in range(3):
            params[0].grad, params[1].grad = scale * torch.cos(torch.arange(n) + step), scale * torch.ones(3)
            if scale != 1:  # an overflow before each step that counts, the very first too
                optimizer.grad_scale = torch.tensor(scale)
                before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
                optimizer.found_inf = torch.tensor(1.0)
                optimizer.step()
                after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
                assert step == 0 or all(map(torch.equal, before, after))
                optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
        assert float(optimizer.state[params[0]]["step"]) == 3
        kept.append([p.detach() for p in params])
    assert all(map(torch.equal, kept[0], kept[1]))  # 4 is a power of two
    for a, b in zip(kept[1], kept[2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@interpreted
@pytest.mark.parametrize("masters", [False, True])
def test_launches(masters):
    """Prepare, norms, adapt, update, whatever the number of tensors; norms and update once more where only some rows
    have masters, with the same bits as in launches of their own."""
    start, grad = torch.linspace(-1, 1, 600).bfloat16(), torch.linspace(1, -1, 600).bfloat16()
    made = []
    for together in (True, False):
        weights, rest = start.clone().repeat(2, 1), torch.zeros(600, dtype=torch.int16)
        moments = torch.zeros(2, 2, 600, dtype=torch.bfloat16)
        counters = torch.zeros(2)
        rows = torch.zeros(2, 14, dtype=torch.int64)
        for r in range(2):
            rows[r, :3] = torch.tensor([t.data_ptr() for t in (weights[r], *moments[r])])
            rows[r, 4], rows[r, 5], rows[r, 6] = counters[r].data_ptr(), 600, r * together
        rows[0, 11] = rest.data_ptr() if masters else 0
        hyper = torch.tensor([0.1, 0.9, 0.99, 1e-6, 0.5, 0, 0, 0, 1], dtype=torch.float64).view(torch.int64)
        groups = torch.cat([hyper, torch.zeros(2, dtype=torch.int64)]).view(1, -1)
        dtype, grads = torch.bfloat16, torch.full((2,), grad.data_ptr())
        for part in [slice(0, 2)] if together else [slice(0, 1), slice(1, 2)]:
            chunks = torch.arange(2 if together else 1, dtype=torch.int32)
            launch = backend.Launch("lamb", dtype, dtype, dtype, rows[part], grads[part], chunks, True)
            launched = backend.new_table(torch.device("cpu")).step([launch], groups, precision=(0.0, False, 0))
            assert launched == (6 if together and masters else 4)
        made.append((weights, rest, moments))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
    assert bool(rest.any()) == masters and not torch.equal(weights[1], start)
