"""Checkpoints at every option: fusedopt, torch.optim, fusedopt is one run; what is refused changes nothing; how much
memory an export takes."""

import copy
import inspect
import warnings

import pytest
import torch
from memory_mode import Watch
from option_table import CASES, Oracle, allowed, kept, make_params, set_grads
from torch import nn

import fusedopt.optim
from fusedopt.optim import lamb, lion, precision

each = pytest.mark.parametrize("case", CASES, ids=str)

MODES = {
    "f32-states": {"state_dtype": torch.float32},
    "bf16-states": {"state_dtype": torch.bfloat16},
    "8bit": {"state_dtype": "8bit"},
    "master": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "ema": {"ema_decay": 0.75},
    "clip": {"max_norm": 30.0},
    "8bit-master-ema-clip": {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.75, "max_norm": 30.0},
    "bf16-all": {
        "state_dtype": torch.bfloat16,
        "master_weights": True,
        "stochastic_rounding": True,
        "ema_decay": 0.75,
    },
}


def dtype_for(mode):
    return "bf16" if {"master_weights", "stochastic_rounding"} & MODES[mode].keys() else "f32"


class _Plain:
    """What torch.optim would have: no fused step, no options of ours, stock's own loading."""

    @torch.no_grad()
    def step(self):
        names = list(inspect.signature(self._init_group).parameters)[1:]
        for group in self.param_groups:
            lists = {name: [] for name in names}
            self._init_group(group, *lists.values())
            known = {**group, "beta1": group["betas"][0], "beta2": group["betas"][1]}
            keywords = {key: known[key] for key in inspect.signature(self.functional).parameters if key in known}
            self.functional(*lists.values(), **{k: v for k, v in keywords.items() if k not in ("params", "grads")})


class Lion(_Plain, lion._Lion):
    functional = staticmethod(lion.lion)


class LAMB(_Plain, lamb._LAMB):
    functional = staticmethod(lamb.lamb)


def plain(case, params):
    own = {"Lion": Lion, "LAMB": LAMB}.get(case.name)
    return own(params, **case.options) if own else case.stock(params, foreach=False)


def steps(optimizer, params, numbers, max_norm=None):
    for step in numbers:
        set_grads(params, step)
        if max_norm:
            nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()


def everything(optimizer):
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((groups, [p.detach() for p in params], [optimizer.state.get(p, {}) for p in params]))


def without_stamps(state):
    return {key: value for key, value in state.items() if key not in precision.STAMPS}


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@each
@pytest.mark.parametrize("mode", MODES)
def test_one_run_through_stock_and_back(case, mode):
    """As near float64 as both precisions allow; extras that stock let go stale are dropped, told and rebuilt."""
    options, dtypes = MODES[mode], dtype_for(mode)
    params = make_params(dtypes)
    oracle = Oracle(case, params, options.get("max_norm"), None)
    for step in range(1, 7):
        set_grads(params, step)
        oracle.step(params)

    first, stock, second = case.fused(params, **options), plain(case, params), case.fused(params, **options)
    steps(first, params, (1, 2))
    stock.load_state_dict(first.state_dict())
    steps(stock, params, (3, 4), options.get("max_norm"))
    extras = [name for option, name in (("master_weights", "master"), ("ema_decay", "ema")) if options.get(option)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        second.load_state_dict(stock.state_dict())
        steps(second, params, (5,))
        averages = [kept(second, p)[0] for p in params]
        steps(second, params, (6,))
    messages = [str(warning.message) for warning in told]
    assert all("start anew" in message for message in messages), messages
    assert [name for name in extras if any(repr(name) in message for message in messages)] == extras
    assert extras or not messages

    as_stock = case.fused(make_params(dtypes), backend="reference")
    for p, row, average in zip(params, oracle.rows(), averages, strict=True):
        if not p.numel():
            continue
        weight, _ = kept(second, p)
        error, bound = (weight - row.param).abs().max(), sum(allowed(o, p, row, 6, True)[0] for o in (second, as_stock))
        assert error <= bound, (p.shape, error, bound)
        if "ema" in extras:  # of the steps since it began anew
            expected = torch.lerp(average, weight, 0.25)
            torch.testing.assert_close(second.state[p]["ema"].double(), expected, rtol=1e-6, atol=1e-7)


@each
def test_stocks_checkpoint_into_every_mode_is_that_modes_own(case):
    """A state of torch.optim's, taken on by a mode, is what the mode would have kept of it."""
    for mode, options in MODES.items():
        params = make_params(dtype_for(mode))
        stock = plain(case, params)
        steps(stock, params, (1, 2))
        taken, again = case.fused(params, **options), case.fused(params, **options)
        taken.load_state_dict(stock.state_dict())
        again.load_state_dict(taken.state_dict())
        for p in params[:-1]:
            given = stock.state.get(p, {})
            assert_same(*(without_stamps(optimizer.state.get(p, {})) for optimizer in (taken, again)))
            for key in taken._states(taken.param_groups[0]) if p.numel() else ():
                value, kind = given[key].double(), taken._state_kind(p)
                unit = 0.02 if kind == "8bit" else torch.finfo(kind).eps
                assert (kept(taken, p)[1][key] - value).abs().max() <= unit * value.abs().max()


# --- what is refused changes nothing ---


def wrong(state, key):
    state[key] = torch.zeros(2, 2)


@each
def test_a_checkpoint_with_a_wrong_shape_changes_nothing(case):
    """Whichever tensor of whichever parameter is wrong, masters and averages too."""
    options = {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.75}
    params = make_params("bf16")
    optimizer = case.fused(params, **options)
    steps(optimizer, params, (1, 2))
    given, before = copy.deepcopy(optimizer.state_dict()), everything(optimizer)
    given["param_groups"][0]["lr"] = 0.5
    last = 3
    for key in [key for key, value in given["state"][last].items() if torch.is_tensor(value) and value.dim()]:
        bad = copy.deepcopy(given)
        wrong(bad["state"][last], key)
        with pytest.raises(ValueError, match=rf"state '{key}' of parameter {last} has shape \(2, 2\), the parameter"):
            optimizer.load_state_dict(bad)
        assert_same(everything(optimizer), before)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict({**given, "param_groups": [{**given["param_groups"][0], "params": [0, 1]}]})
    assert_same(everything(optimizer), before)
    twin = case.fused(make_params("bf16"), **options)
    steps(twin, twin.param_groups[0]["params"], (1, 2, 3))
    steps(optimizer, params, (3,))
    assert_same(everything(optimizer), everything(twin))


REFUSED = {  # option: a dtype that it takes, one that it does not
    "state_dtype": ("8bit", torch.float32, torch.float64),
    "master_weights": (True, torch.bfloat16, torch.float64),
    "stochastic_rounding": (True, torch.bfloat16, torch.float16),
}


@pytest.mark.parametrize("option", REFUSED)
@each
def test_a_group_that_an_option_cannot_take_changes_nothing(case, option):
    value, takes, refuses = REFUSED[option]
    found = []
    for refused in (False, True):
        param = nn.Parameter(torch.linspace(-1, 1, 5000).to(takes))
        optimizer = case.fused([param], **{option: value})
        for step in range(3):
            param.grad = torch.sin(torch.arange(5000.0) + step).to(takes)
            optimizer.step()
            if refused and step == 1:
                news = [nn.Parameter(torch.ones(3, dtype=takes)), nn.Parameter(torch.ones(3, dtype=refuses))]
                with pytest.raises(ValueError, match=rf"^{option}=.*{refuses}, shape \(3,\)"):
                    optimizer.add_param_group({"params": news, "lr": 0.5})
                assert len(optimizer.param_groups) == 1 and list(optimizer.state) in ([], [param])
        found.append(everything(optimizer))
    assert_same(*found)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "SGD"])
def test_differentiable_takes_no_option(name):
    for option, value in {
        "max_norm": 1.0,
        "skip_non_finite": True,
        "ema_decay": 0.9,
        "state_dtype": torch.float32,
        "master_weights": True,
        "stochastic_rounding": True,
    }.items():
        param = nn.Parameter(torch.ones(3).bfloat16())
        with pytest.raises(ValueError, match=f"differentiable=True does not go with .*{option}"):
            getattr(fusedopt.optim, name)([param], lr=0.1, differentiable=True, **{option: value})


@each
def test_no_option_changes_after_construction(case):
    params = make_params("bf16")
    optimizer = case.fused(params, max_norm=1.0, master_weights=True)
    steps(optimizer, params, (1,))
    for name, value in {
        "max_norm": 2.0,
        "skip_non_finite": True,
        "ema_decay": 0.9,
        "state_dtype": "8bit",
        "master_weights": False,
        "stochastic_rounding": True,
    }.items():
        before = getattr(optimizer, name)
        with pytest.raises(
            AttributeError, match=f"{name} is chosen at construction: make a new optimizer with {name}="
        ):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before


# --- the memory of an export ---


@pytest.mark.parametrize("device", ["meta", None])
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Adagrad"])
def test_an_export_holds_one_tensor_more_at_most(name, device):
    """8-bit states become float32 one by one. The CPU plays the device, and "meta" the CPU that they go to."""
    sizes = (20_000, 50_003, 70_000, 30_000)
    params = [nn.Parameter(torch.ones(n).bfloat16()) for n in sizes]
    options = {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.9}
    optimizer = getattr(fusedopt.optim, name)(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = {id(t.untyped_storage()): t for p in params for t in (p, *optimizer.state[p].values()) if torch.is_tensor(t)}
    with Watch(*held.values()) as watch:
        exported = optimizer.state_dict(device=device)
        fresh = [
            t.untyped_storage()
            for state in exported["state"].values()
            for t in state.values()
            if torch.is_tensor(t) and t.device.type == "cpu"
        ]
    states = len(optimizer.states)
    new = sum(s.nbytes() for s in fresh if s._cdata not in watch.known)
    assert new == (0 if device == "meta" else states * 4 * sum(sizes))
    assert watch.peak - new <= 4 * max(sizes) + 4096
    moved = [t for state in exported["state"].values() for t in state.values() if torch.is_tensor(t)]
    assert {t.device.type for t in moved} == {device or "cpu"}


def test_an_export_to_the_cpu_has_the_same_values():
    params = make_params("bf16")
    optimizer = fusedopt.optim.AdamW(params, state_dtype="8bit", master_weights=True, ema_decay=0.9)
    steps(optimizer, params, (1, 2))
    here, there = (optimizer.state_dict(**given)["state"] for given in ({}, {"device": "cpu"}))
    assert_same(here, there)
    assert here[3]["exp_avg"].stride() == there[3]["exp_avg"].stride() == params[3].stride()
    assert there[3]["exp_avg"].dtype == torch.float32


# --- the norm ---


@each
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16", "f64"])
def test_the_norm_is_torchs_and_the_same_bits_again(case, dtypes):
    """clip_grad_norm_'s of float64 copies, and of float32 ones as near as float32 sums."""
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        params = [*make_params(dtypes), nn.Parameter(torch.ones(70_001))]
        optimizer = case.fused(params, max_norm=1.0)
        set_grads(params[:-1], 1)
        params[-1].grad = torch.sin(torch.arange(70_001.0))
        copies = {}
        for wide in (torch.float32, torch.float64):
            copies[wide] = [nn.Parameter(p.detach().to(wide)) for p in params if p.grad is not None]
            for c, p in zip(copies[wide], [p for p in params if p.grad is not None], strict=True):
                c.grad = p.grad.to(wide, copy=True)
        optimizer.step()
        exact, narrow = (nn.utils.clip_grad_norm_(copies[wide], 1.0) for wide in (torch.float64, torch.float32))
        torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=1e-12, atol=0)
        torch.testing.assert_close(optimizer.grad_norm.float(), narrow, rtol=1e-5, atol=0)
        found.append((optimizer.grad_norm, *(p.detach().clone() for p in params)))
    for other in found[1:]:
        assert_same(found[0], other)
