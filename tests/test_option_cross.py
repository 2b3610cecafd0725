"""Every option of a step with every other, on every optimizer, engine and dtype, against the same run in float64."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from optim_table import use_engine
from option_table import (
    CASES,
    FACTORS,
    FOUND_INF,
    NON_FINITE,
    OPTIONS,
    SCALE,
    SHAPES,
    STEPS,
    Oracle,
    allowed,
    kept,
    left_out,
    make_params,
    possible,
    reason_against,
    set_grads,
    step_of,
)
from pairwise import all_pairs, possible_rows
from torch import nn

import fusedopt.optim

PAIRS = all_pairs(FACTORS, possible)
DECOUPLED = (fusedopt.optim.AdamW, fusedopt.optim.Lion, fusedopt.optim.LAMB)


def label(row):
    words = [f"{key}={value}" for key, value in row.items() if key in OPTIONS and value not in (None, False)]
    return "-".join([str(row["case"]), row["engine"], row["dtypes"], *words, row["scaler"]])


def everything(optimizer, params):
    return [t.clone() for p in params for t in (p.detach(), *optimizer.state.get(p, {}).values())]


def take_one(optimizer, params, row, step):
    """One step; returns whether it counts."""
    set_grads(params, step, 1.0 if row["scaler"] == "none" else SCALE)
    found_inf = "inf" in row["scaler"] and step == FOUND_INF
    if found_inf or (row["skip_non_finite"] and step == NON_FINITE):
        params[3].grad[7, 5] = torch.inf if found_inf else torch.nan
    step_of(optimizer, row["scaler"], found_inf)


def agrees_with_float64(row):
    case, backend = row["case"], use_engine(row["engine"])
    params = make_params(row["dtypes"])
    oracle = Oracle(case, params, row["max_norm"], row["ema_decay"])
    optimizer = case.fused(params, backend=backend, **{name: row[name] for name in OPTIONS})
    for step in range(1, STEPS + 1):
        for p in (params[-1], oracle.params[-1]):
            p.data.mul_(0.5)  # the user's, where no gradient is
        before = everything(optimizer, params)
        take_one(optimizer, params, row, step)
        if step in left_out(row):
            assert all(map(torch.equal, before, everything(optimizer, params)))
            continue
        for p in params[:-1]:
            p.grad = p.grad / SCALE if row["scaler"] != "none" else p.grad
        oracle.step(params)
        if row["max_norm"] or row["skip_non_finite"]:
            torch.testing.assert_close(optimizer.grad_norm.double(), oracle.norm, rtol=1e-9, atol=0)
    if row["skip_non_finite"]:
        assert int(optimizer.skipped_steps) == 1
    compare(optimizer, params, oracle.rows(), row["engine"], STEPS - len(left_out(row)))
    goes_on_from_its_checkpoint(optimizer, params, row)


def compare(optimizer, params, exact, engine, steps):
    group = optimizer.param_groups[0]
    # what Lion, LAMB and AdamW add to the gradient is no part of the states
    coupled = 0.0 if isinstance(optimizer, DECOUPLED) else group.get("weight_decay", 0.0)
    for (name, shape), p, row in zip(SHAPES.items(), params, exact, strict=True):
        if not p.numel():
            continue
        bound, part = allowed(optimizer, p, row, steps, engine == "reference" or not shape.fuses)
        weight, states = kept(optimizer, p)
        error = (weight - row.param).abs().max().item()
        assert error <= bound, (name, error, bound)
        half_a_unit = torch.finfo(p.dtype).eps / 2 * row.param.abs().max().item()
        assert (p.detach().double() - row.param).abs().max() <= bound + half_a_unit, name
        for key, value in states.items() if name != "idle" else ():
            expected = row.state[key]
            error, limit = (value - expected).abs().max(), 2 * (part * expected.abs().max() + coupled * bound)
            assert error <= limit, (name, key, error.item(), limit.item())
        if row.average is not None:
            average = optimizer.state[p]["ema"]
            assert average.dtype == torch.promote_types(p.dtype, torch.float32)
            assert (average.double() - row.average).abs().max() <= bound + 1e-7 * row.average.abs().max(), name


def goes_on_from_its_checkpoint(optimizer, params, row):
    """Bit for bit."""
    others = [nn.Parameter(copy.deepcopy(p.detach())) for p in params]  # as they lie
    for p, q in zip(params, others, strict=True):
        q.grad_dtype = p.grad_dtype
    backend = optimizer._options["backend"]
    loaded = row["case"].fused(others, backend=backend, **{name: row[name] for name in OPTIONS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, tensors in ((optimizer, params), (loaded, others)):
            take_one(one, tensors, row, STEPS + 1)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        a, b = optimizer.state.get(p, {}), dict(loaded.state.get(q, {}))
        if q is others[-1]:  # stock needs all of a state or none: what only averages comes back with new moments
            b = {key: value for key, value in b.items() if key in a or value.any()}
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("row", PAIRS, ids=label)
def test_every_pair_of_options(row):
    agrees_with_float64(row)


def test_the_design_holds_every_pair():
    """Of those in any row that can be."""
    rows = possible_rows(FACTORS, possible)
    chosen = torch.tensor([[values.index(row[name]) for name, values in FACTORS.items()] for row in PAIRS])
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        some, all_rows = ((r[:, i] * 100 + r[:, j]).unique() for r in (chosen, rows))
        assert torch.equal(some, all_rows), (i, j)
    assert len(PAIRS) < 100 < len(rows) / 100


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(row=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()}))
def test_any_options(row):
    assume(possible(*(row[name] for name in list(FACTORS)[:6])))
    agrees_with_float64(row)


# --- what cannot be ---

NAMES = sorted({case.name for case in CASES})
DTYPES_OF_PARAMS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_raises_with_option_dtype_and_reason(name):
    make = getattr(fusedopt.optim, name)
    raised = 0
    for dtype, state_dtype, master, stochastic in itertools.product(
        DTYPES_OF_PARAMS, FACTORS["state_dtype"], (False, True), (False, True)
    ):
        options = {"state_dtype": state_dtype, "master_weights": master, "stochastic_rounding": stochastic}
        params = [nn.Parameter(torch.ones(3, dtype=dtype))]
        against = reason_against(name, dtype, state_dtype, master, stochastic)
        if against is None:
            make(params, lr=0.1, **options)
            continue
        raised += 1
        with pytest.raises(ValueError) as error:
            make(params, lr=0.1, **options)
        for word in (against[0], against[1], str(dtype).removeprefix("torch.")):
            assert word in str(error.value), (options, dtype, str(error.value))
    assert raised >= 25
