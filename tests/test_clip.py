"""max_norm and skip_non_finite: as clip_grad_norm_ on float32 copies, then stock's step; nothing else moves."""

import math

import pytest
import torch
from optim_table import DTYPES, ENGINES, WITH_LION, Case, make_params, set_grads, use_engine
from torch import nn

import fusedopt.optim

each = pytest.mark.parametrize("case", WITH_LION, ids=str)
engines = pytest.mark.parametrize("engine", ENGINES)


def clipped_by_hand(case, dtypes, max_norm, steps, engine):
    """Gradients clipped in float64 before an optimizer that clips nothing."""
    params = make_params(dtypes)
    optimizer, norms = case.fused(params, backend=engine), []
    for step in range(steps):
        set_grads(params, dtypes, step)
        exact = [p.grad.double() for p in params]
        norms.append(math.sqrt(sum(float((g * g).sum()) for g in exact)))
        coefficient = min(1.0, max_norm / (norms[-1] + 1e-6))
        scaler_state = torch.tensor(1.0 / coefficient, dtype=torch.float64)
        optimizer.grad_scale, optimizer.found_inf = scaler_state, torch.zeros(())
        optimizer.step()
    return params, norms


@each
@engines
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_the_coefficient_is_folded_in(case, engine, dtypes, max_norm):
    if engine == "reference" and "f32-grads" in dtypes:
        pytest.skip("torch's functions take gradients of the parameter's dtype only")
    backend = use_engine(engine)
    expected, norms = clipped_by_hand(case, dtypes, max_norm, 3, backend)
    params = make_params(dtypes)
    optimizer = case.fused(params, backend=backend, max_norm=max_norm)
    for step in range(3):
        set_grads(params, dtypes, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
        assert float(optimizer.grad_norm) == pytest.approx(norms[step], rel=1e-6)
    for a, b in zip(params, expected, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=2 * eps, equal_nan=True)


@each
@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_as_torchs_clip_and_step(case, max_norm):
    if case.name == "Lion":
        pytest.skip("torch.optim has none")
    ours, theirs = ([nn.Parameter(torch.randn(31, 7)), nn.Parameter(torch.randn(500))] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    optimizer, stock = case.fused(ours, max_norm=max_norm), case.stock(theirs)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step(), stock.step()
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@engines
@pytest.mark.parametrize("clips", [{}, {"max_norm": 1.0}])
def test_a_non_finite_step_is_left_out_and_counted(engine, clips):
    backend = use_engine(engine)
    for case in WITH_LION:
        params = make_params("f32")
        optimizer = case.fused(params, backend=backend, skip_non_finite=True, **clips)
        set_grads(params, "f32", 0)
        optimizer.step()
        kept = [p.detach().clone() for p in params]
        state = [{k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params]
        for bad in (math.inf, math.nan):
            set_grads(params, "f32", 1)
            params[4].grad.view(-1)[7] = bad
            optimizer.step()
            assert not optimizer.grad_norm.isfinite()
        assert int(optimizer.skipped_steps) == 2
        torch.testing.assert_close([p.detach() for p in params], kept, rtol=0, atol=0)
        for p, before in zip(params, state, strict=True):
            assert all(torch.equal(optimizer.state[p][key], value) for key, value in before.items())
        set_grads(params, "f32", 1)
        optimizer.step()
        assert int(optimizer.skipped_steps) == 2 and not torch.equal(params[4], kept[4])


def test_a_non_finite_norm_otherwise_does_as_stock():
    for bad in (math.inf, math.nan):
        ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
        ours.grad, theirs.grad = (torch.tensor([1.0, bad, 2.0, 3.0, 4.0]) for _ in range(2))
        nn.utils.clip_grad_norm_([theirs], 1.0)
        fusedopt.optim.SGD([ours], lr=0.1, max_norm=1.0).step()
        torch.optim.SGD([theirs], lr=0.1).step()
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@engines
def test_with_grad_scaler(engine):
    backend = use_engine(engine)
    found = []
    for scale in (1.0, 1024.0):
        p = nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = fusedopt.optim.AdamW([p], max_norm=0.3, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for step in range(3):
            p.grad = torch.sin(torch.arange(50.0) + step) * scale
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            assert float(optimizer.grad_norm) == pytest.approx(float(p.grad.norm()) / scale, rel=1e-6)
        p.grad = torch.full((50,), torch.inf)
        before = p.detach().clone()
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) and int(optimizer.skipped_steps) == 0
        found.append(before)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_what_goes_to_torch_counts_too():
    sparse, strided, dense, unused = (nn.Parameter(torch.ones(6, 4)) for _ in range(4))
    strided.data = torch.ones(6, 8)[:, ::2]
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1, 4]]), torch.ones(3, 4), (6, 4))
    strided.grad, dense.grad = torch.full((6, 4), 2.0), torch.full((6, 4), -3.0)
    optimizer = fusedopt.optim.SGD([sparse, strided, dense, unused], lr=1.0, max_norm=1.0)
    optimizer.step()
    norm = math.sqrt(4 * (4 + 1) + 24 * 4 + 24 * 9)
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(dense.detach(), torch.full((6, 4), 1 + 3 / norm))
    torch.testing.assert_close(strided.detach(), torch.full((6, 4), 1 - 2 / norm))
    assert sparse[1, 0].item() == pytest.approx(1 - 2 / norm) and unused.eq(1).all()


def test_complex_half_and_huge_gradients():
    z, h, b = (nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.complex64, torch.float16, torch.float32))
    z.grad, h.grad = torch.full((3,), 3 + 4j), torch.full((3,), 60000.0, dtype=torch.float16)
    b.grad = torch.full((3,), 1e30)
    optimizer = fusedopt.optim.SGD([z, h, b], lr=1.0, max_norm=1.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(3) * 1e30, rel=1e-6)  # its square is no float32
    torch.testing.assert_close(b.detach(), torch.full((3,), 1 - 3**-0.5))


def test_same_bits_on_every_number_of_threads():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = nn.Parameter(torch.linspace(-1, 1, 300_001))
        p.grad = torch.sin(torch.arange(300_001.0))
        optimizer = fusedopt.optim.SGD([p], lr=1.0, max_norm=1.0)
        optimizer.step()
        found.append((p.detach().clone(), optimizer.grad_norm))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_nothing_to_step():
    optimizer = fusedopt.optim.Adam([nn.Parameter(torch.ones(3))], max_norm=1.0, skip_non_finite=True)
    optimizer.step()
    assert float(optimizer.grad_norm) == 0 and int(optimizer.skipped_steps) == 0


def test_what_is_told_outlives_the_next_step():
    p = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.optim.SGD([p], lr=0.0, max_norm=math.inf)
    told = []
    for size in (1.0, 2.0):
        p.grad = torch.tensor([size, 0.0, 0.0])
        optimizer.step()
        told.append(optimizer.grad_norm)
    assert [float(norm) for norm in told] == [1.0, 2.0]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, "1", torch.ones(())], ids=repr)
def test_bad_input(bad):
    with pytest.raises(ValueError, match=r"max_norm=.* must be a number above 0"):
        fusedopt.optim.Adam([nn.Parameter(torch.ones(3))], max_norm=bad)
    with pytest.raises(ValueError, match="differentiable=True does not go with max_norm"):
        fusedopt.optim.Adam([nn.Parameter(torch.ones(3))], max_norm=1.0, differentiable=True)
    with pytest.raises(AttributeError, match="max_norm"):
        _ = fusedopt.optim.Adam([nn.Parameter(torch.ones(3))]).grad_norm


def test_options_do_not_travel_in_checkpoints():
    optimizer = Case("AdamW").fused([nn.Parameter(torch.ones(3))], max_norm=1.0)
    assert "max_norm" not in optimizer.param_groups[0]
    torch.optim.AdamW([nn.Parameter(torch.ones(3))]).load_state_dict(optimizer.state_dict())
