"""Four processes that share their parameters take the steps that one process takes: every optimizer, every mode."""

import functools

import pytest
import sharded
import torch
from sharded import CASES, here, make_params, pairs, placed, set_gradients, states
from torch.nn.utils import clip_grad_norm_

from fusedopt.distributed import parts
from fusedopt.optim import precision

pytestmark = pytest.mark.processes(4)

STEPS = 50
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MODES = {
    "plain": (F32, {}),
    "max_norm": (F32, {"max_norm": 20.0}),
    "ema": (F32, {"ema_decay": 0.75}),
    "bf16-states": (F32, {"state_dtype": BF16}),
    "8bit": (F32, {"state_dtype": "8bit"}),
    "bf16": (BF16, {}),
    "bf16-master": (BF16, {"master_weights": True, "state_dtype": F32}),
    "f16-master": (F16, {"master_weights": True}),
    "stochastic": (BF16, {"stochastic_rounding": True}),
    "8bit-master-ema-clip": (
        BF16,
        {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.75, "max_norm": 20.0},
    ),
}
ORACLE = ("plain", "max_norm", "ema")  # compared with float64 too
WITHOUT_STATES = ("bf16-states", "8bit", "8bit-master-ema-clip")  # cannot go with an optimizer that has none
NARROW_STATES = {"bf16-states": 0.2, "f16-master": 0.05}  # learning rates that a state off by a unit is worth


def train(case, mode, backend, shared, steps=STEPS):
    dtype, options = MODES[mode]
    params = make_params(dtype, shared)
    optimizer = case.fused(params, backend=backend, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


def whole_weights(params, optimizer):
    """As they are computed with."""
    found = []
    for param in params:
        state = {key: parts.part(v) if isinstance(v, torch.Tensor) else v for key, v in optimizer.state[param].items()}
        found.append(precision.weight(here(param), state))
    return found


@functools.cache
def exact(key, mode):
    """(parameters, averages, total norm of the last gradients): float64, clipped and averaged by torch's own."""
    case, options = CASES[key], MODES[mode][1]
    params = [torch.nn.Parameter(p.detach().double()) for p in make_params(F32, shared=False)]
    optimizer = getattr(torch.optim, case.name, None)
    optimizer = case.stock(params, foreach=False) if optimizer is not None else case.fused(params, backend="reference")
    averages, norm = None, None
    for step in range(STEPS):
        set_gradients(params, step)
        if "max_norm" in options:
            for p in params:
                p.grad = p.grad.clone()
            norm = clip_grad_norm_(params, options["max_norm"])
        optimizer.step()
        if "ema_decay" in options:
            if averages is None:
                averages = [p.detach().clone() for p in params]
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - options["ema_decay"])
    return params, averages, norm


@functools.cache
def stock_error(key):
    """How far stock's float32 is from float64: each parameter's largest, in a plain run."""
    params = make_params(F32, shared=False)
    optimizer = CASES[key].stock(params, foreach=False)
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
    return [(p.detach().double() - q).abs().max().item() for p, q in zip(params, exact(key, "plain")[0], strict=True)]


def check(case, mode, backend):
    key, lr = CASES.index(case), float(case.options["lr"])
    ours, optimizer = train(case, mode, backend, shared=True)
    alone, by_one = train(case, mode, backend, shared=False)
    assert [set(optimizer.state[p]) for p in ours] == [set(by_one.state[p]) for p in alone]
    for index, (a, b) in enumerate(pairs(ours, alone)):
        if "8bit" in mode and alone[index].numel() >= precision.SMALL:
            continue
        if backend == "auto" and case.name != "LAMB":  # whose norms are added up in another order
            assert torch.equal(a, b), (index, (a - b).abs().max())
        else:
            units = 2 * torch.finfo(a.dtype).eps * max(1.0, alone[index].abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=units + NARROW_STATES.get(mode, 1e-3) * lr)
    if backend == "auto" and case.name != "LAMB" and "8bit" not in mode:
        for name in {name for p in alone for name in by_one.state[p]}:
            for index, (a, b) in enumerate(
                zip(states(optimizer, ours, name), states(by_one, alone, name), strict=True)
            ):
                b = here(placed(b, index)) if b.shape == sharded.PLACED[index][0] else b
                assert torch.equal(here(a), b), (name, index)
    if "8bit" in mode:
        check_codes(case, mode, backend, (ours, optimizer), (alone, by_one))

    if mode in ORACLE and case.name not in ("Lion",):
        params, averages, norm = exact(key, mode)
        allowed = stock_error(key) if case.name != "LAMB" else [0.0] * len(params)
        for index, (a, b) in enumerate(pairs(ours, params)):
            peak = max(1.0, params[index].abs().max().item())
            error = (a.double() - b).abs().max().item() if a.numel() else 0.0
            assert error <= allowed[index] + STEPS * torch.finfo(F32).eps * peak, (index, error, allowed[index])
        if norm is not None:
            assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        for index, average in enumerate(averages or ()):
            a, b = here(optimizer.state[ours[index]]["ema"]), here(placed(average, index))
            error = (a.double() - b).abs().max().item() if a.numel() else 0.0
            assert error <= allowed[index] + STEPS * torch.finfo(F32).eps * max(1.0, average.abs().max().item())


def check_codes(case, mode, backend, shared, whole):
    """Blocks are of a process's own part: other codes than one process's, but on the whole no worse ones."""
    dtype, options = MODES[mode]
    params = make_params(dtype, shared=False)
    exact = case.fused(params, backend=backend, **{**options, "state_dtype": F32})
    for step in range(STEPS):
        set_gradients(params, step)
        exact.step()
    uncoded = whole_weights(params, exact)
    for index, (a, b, c) in enumerate(zip(whole_weights(*shared), whole_weights(*whole), uncoded, strict=True)):
        if c.numel() >= precision.SMALL:
            ours, theirs = ((t - here(placed(c, index))).square().mean().sqrt() for t in (a, here(placed(b, index))))
            assert ours <= 1.25 * theirs, (index, ours, theirs)


def by_default(case, mode):
    """One of the optimizers in every mode, all of them in some."""
    return case.name == "AdamW" or mode in ("max_norm", "stochastic", "8bit-master-ema-clip")


ALL = [
    pytest.param(case, mode, id=f"{case}-{mode}", marks=() if by_default(case, mode) else pytest.mark.thorough)
    for case in CASES
    for mode in MODES
    if not (mode in WITHOUT_STATES and case.name == "SGD" and not case.options.get("momentum"))
]


@pytest.mark.parametrize("case, mode", ALL)
def test_four_are_one(case, mode):
    check(case, mode, "auto")


@pytest.mark.thorough
@pytest.mark.parametrize("case, mode", ALL)
def test_four_are_one_by_torchs_operations(case, mode):
    check(case, mode, "reference")
