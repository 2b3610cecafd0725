"""state_dtype, master_weights, stochastic_rounding, ema_decay: against a float32 run, by torch's operations, on every
engine; the codes and roundings themselves."""

import copy
import pickle
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from optim_table import DTYPES, ENGINES, WITH_LION, make_params, set_grads, use_engine
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt.optim
from fusedopt.backends import cpu
from fusedopt.optim import codes, precision

engines = pytest.mark.parametrize("engine", ENGINES)

MODES = {
    "8bit": {"state_dtype": "8bit"},
    "f32-states": {"state_dtype": torch.float32},
    "bf16-states": {"state_dtype": torch.bfloat16},
    "stochastic-states": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    "master": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "ema": {"ema_decay": 0.75},
    "8bit-master-ema-clip": {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.75, "max_norm": 0.5},
    "8bit-stochastic-ema": {"state_dtype": "8bit", "stochastic_rounding": True, "ema_decay": 0.75},
    "bf16-master-stochastic": {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "master_weights": True},
}
CANNOT = {
    "f32": {"master", "stochastic", "8bit-master-ema-clip", "bf16-master-stochastic"},
    "f64": MODES.keys() - {"ema"},
    "f16": {"stochastic"},
}
NO_SQUARES = {"SGD", "Lion"}


def takes(case, mode, dtypes):
    """Codes are rounded at random where they are of squares; without any, something else must be."""
    dtype = dtypes.split("-")[0]
    nothing = mode == "8bit-stochastic-ema" and case.name in NO_SQUARES and dtype != "bf16"
    return mode not in CANNOT.get(dtype, ()) and not nothing


ROWS = [(case, mode, dtypes) for case in WITH_LION for mode in MODES for dtypes in DTYPES if takes(case, mode, dtypes)]
rows = pytest.mark.parametrize("case, mode, dtypes", ROWS, ids=["-".join(map(str, row)) for row in ROWS])


def large_params(dtypes):
    """The table's, and one that 8-bit states take in blocks: three whole ones and a ragged."""
    dtype = DTYPES[dtypes][0]
    more = nn.Parameter(torch.sin(torch.arange(17.0 * 257)).view(257, 17).to(dtype).t())
    if DTYPES[dtypes][1] != dtype:
        more.grad_dtype = DTYPES[dtypes][1]
    return [*make_params(dtypes), more]


def set_all_grads(params, dtypes, step):
    set_grads(params[:-1], dtypes, step)
    params[-1].grad = torch.cos(torch.arange(17.0 * 257) * step).view(257, 17).t().to(DTYPES[dtypes][1])


def run(case, mode, dtypes, backend, steps=4):
    params = large_params(dtypes)
    optimizer = case.fused(params, backend=backend, **MODES[mode])
    for step in range(1, steps + 1):
        set_all_grads(params, dtypes, step)
        optimizer.step()
    return params, optimizer


def whole(param, state):
    return precision.weight(param, state).double()


@rows
def test_native_does_what_torchs_operations_do(case, mode, dtypes):
    """Every instruction set against the reference: both keep the same things, equal but for float32's rounding."""
    if case.name == "SGD" and mode in ("8bit", "bf16-states") and not case.options.get("momentum"):
        pytest.skip("has no states")
    torch.set_num_threads(1)
    theirs, reference = run(case, mode, dtypes, "reference")
    options, dtype = MODES[mode], DTYPES[dtypes][0]
    coarse = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0) if not options.get("master_weights") else 0
    for engine in ENGINES[1:]:
        ours, optimizer = run(case, mode, dtypes, use_engine(engine))
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            state, expected = optimizer.state.get(p, {}), reference.state.get(q, {})
            assert state.keys() == expected.keys()
            for key in state:
                assert state[key].dtype == expected[key].dtype and state[key].shape == expected[key].shape, key
                if key in ("step", "rounding_step"):
                    assert float(state[key]) == 4
            # rounding before a cast may fall on the other side: one unit there
            lr = float(case.options.get("lr", 1e-3))
            scale = q.detach().abs().max().item() if q.numel() else 0
            difference = (whole(p, state) - whole(q, expected)).abs()
            kept_narrow = optimizer._state_kind(p) not in (torch.float32, torch.float64)
            loose = 1e-5 + 4 * coarse * scale + (lr if kept_narrow else 0)  # a state off by a unit is an update off
            loose += 2.1 * 4 * lr if case.name == "Lion" else 0  # the sign of next to nothing
            assert not difference.numel() or difference.max() <= loose, (i, engine, float(difference.max()), loose)
            if difference.numel() and case.name != "Lion":
                assert difference.median() <= 5e-6 + coarse * scale
                assert difference.mean() <= 5e-6 + coarse * scale + (0.02 * lr if kept_narrow else 0)
            for key in optimizer._states(optimizer.param_groups[0]):
                a, b = (precision.View(t, s, (key,)).values[key].double() for t, s in ((p, state), (q, expected)))
                unit = {"8bit": 4 / 127, "bfloat16": 2**-7, "float16": 2**-9}.get(
                    str(optimizer._state_kind(p)).removeprefix("torch."), 1e-5
                )
                assert not a.numel() or (a - b).abs().max() <= unit * b.abs().max() + 1e-7, (key, i, engine)
            if "ema" in state and state["ema"].numel():
                close = (state["ema"] - expected["ema"]).abs().max()
                assert close <= loose + coarse * scale


@engines
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16", "f64"])
def test_average_is_averaged_models(engine, dtypes):
    torch.set_num_threads(1)
    dtype = DTYPES[dtypes][0]
    model = nn.ParameterList([*large_params(dtypes), nn.Parameter(torch.ones(5, dtype=dtype))])
    idle = model[-1]
    optimizer = fusedopt.optim.AdamW(model, lr=0.01, ema_decay=0.9, backend=use_engine(engine))
    wide = torch.promote_types(dtype, torch.float32)
    shadow = nn.ParameterList([nn.Parameter(p.detach().to(wide)) for p in model])
    average = AveragedModel(shadow, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(1, 6):
        set_all_grads(list(model)[:-1], dtypes, step)
        if step == 3:
            model[3].grad = None
        if step > 3:
            idle.data.mul_(0.5)
        if step == 5:
            idle.grad = torch.ones_like(idle)
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(shadow, model, strict=True):
                a.copy_(b)
        average.update_parameters(shadow)
    for p, q in zip(model, average.module, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], q.detach(), rtol=1e-6, atol=1e-7)
    assert float(optimizer.state[idle]["step"]) == 1
    kept = [p.detach().clone() for p in model]
    with pytest.raises(ZeroDivisionError), optimizer.ema_weights():
        for p, q in zip(model, average.module, strict=True):
            torch.testing.assert_close(
                p.detach(), q.detach().to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
            )
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(RuntimeError, match="inside `with ema_weights"):
                call()
        _ = 1 / 0
    assert all(map(torch.equal, model, kept))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_come_back(signed):
    """All codes, at scales from the smallest to the largest, in blocks whole and ragged."""
    all_codes = torch.arange(-127, 128).to(torch.int8) if signed else torch.arange(256).to(torch.uint8)
    for scale in (2.0**-90, 1e-26, 3e-9, 0.1, 1.0, 1.7e20, 3e38):
        scales = torch.full((1,), scale)
        values = codes.dequantize(all_codes, scales)
        again, scales_again = codes.quantize(values, signed)
        assert torch.equal(again, all_codes) and torch.equal(scales_again, scales)
    x = torch.randn(1000).exp() * (1 if not signed else torch.randn(1000).sign())
    coded, scales = codes.quantize(x, signed)
    assert scales.shape == (4,) and scales[3] == x[768:].abs().max()
    for _ in range(3):
        y = codes.dequantize(coded, scales)
        coded_again, scales = codes.quantize(y, signed)
        assert torch.equal(coded, coded_again)
    error = (y - x).abs() / x.abs().view(-1)[:1000]
    assert error.median() < 0.03
    assert signed or (y > 0).all()


@engines
@pytest.mark.parametrize("signed", [True, False])
def test_engines_agree_on_every_code(engine, signed):
    """A step that leaves the state as it is: SGD with momentum 1 and no gradient; Adagrad's sum."""
    backend = use_engine(engine)
    n = 256 * 40 + 77
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.zeros(n)
    key = "momentum_buffer" if signed else "sum"
    make = fusedopt.optim.SGD if signed else fusedopt.optim.Adagrad
    optimizer = make([p], lr=0.1, state_dtype="8bit", backend=backend, **({"momentum": 1.0} if signed else {}))
    optimizer.step()
    state = optimizer.state[p]
    coded = torch.randint(-127 if signed else 0, 128 if signed else 256, (n,)).to(torch.int8 if signed else torch.uint8)
    coded[::256] = 127 if signed else 255  # the scale's own
    state[key].copy_(coded)
    state[f"{key}_scale"].copy_(torch.logspace(-20, 20, 41))
    scales = state[f"{key}_scale"].clone()
    for _ in range(3):
        optimizer.step()
        assert torch.equal(state[key], coded) and torch.equal(state[f"{key}_scale"], scales)


@engines
def test_split_master_is_a_float32_run(engine):
    """A bfloat16 weight and its master are bit for bit the float32 weight that the same float32 gradients train."""
    backend = use_engine(engine)
    start = torch.linspace(-2, 2, 5000).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours.grad_dtype = torch.float32
    a = fusedopt.optim.AdamW([ours], lr=1e-3, master_weights=True, state_dtype=torch.float32, backend=backend)
    b = fusedopt.optim.AdamW([theirs], lr=1e-3, backend=backend)
    for step in range(20):
        ours.grad = theirs.grad = torch.sin(torch.arange(5000.0) + step)
        a.step()
        b.step()
    assert torch.equal(codes.join(ours.detach(), a.state[ours]["master"]), theirs.detach())
    assert a.state[ours]["master"].dtype == torch.int16
    assert (ours.detach().float() - theirs.detach()).abs().max() <= 2**-8


def test_every_float32_survives_the_split():
    every = torch.arange(0, 2**32, 4099).to(torch.int64)
    ties = torch.arange(0, 2**16) * 2**16 + 2**15
    for bits in (every, ties, ties - 1, ties + 1):
        x = bits.to(torch.int32).view(torch.float32)
        back = codes.join(*codes.split(x))
        assert torch.equal(back.isnan(), x.isnan())
        assert torch.equal(back[~x.isnan()].view(torch.int32), x[~x.isnan()].view(torch.int32))


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_that_was_set_is_the_weight(engine, dtype):
    p = nn.Parameter(torch.ones(300, dtype=dtype))
    optimizer = fusedopt.optim.SGD([p], lr=1e-4, master_weights=True, backend=use_engine(engine))
    for step in range(4):
        if step == 2:
            p.data.fill_(3.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
    expected = 3.0 - 2e-4
    got = precision.weight(p, optimizer.state[p])
    # of a bfloat16 the rest stays, less than half a unit in its last place
    torch.testing.assert_close(
        got, torch.full((300,), expected), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


@engines
def test_stochastic_rounding_is_unbiased(engine):
    """Steps of 1/50 unit in the last place: to the nearest nothing moves, at random the mean does."""
    backend = use_engine(engine)
    n, steps, lr = 20_000, 50, 2.0**-8 / 50
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.full((n,), 1.5, dtype=torch.bfloat16))
        optimizer = fusedopt.optim.SGD([p], lr=lr, stochastic_rounding=stochastic, backend=backend)
        for _ in range(steps):
            p.grad = torch.full_like(p, -1)
            optimizer.step()
        moved[stochastic] = p.detach().double() - 1.5
    assert moved[False].eq(0).all()
    # binomial: n * steps draws of probability 1/100 (a unit is 2^-7), each worth 2^-7
    unit, draws, chance = 2.0**-7, n * steps, lr / 2.0**-7
    deviation = unit * (draws * chance * (1 - chance)) ** 0.5 / n
    assert abs(moved[True].mean().item() - steps * lr) < 5 * deviation


@engines
@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_squares_codes_are_unbiased(engine, name):
    """Steps of a tenth of a code and less, in blocks whose scale stays: the mean follows, where the nearest stays."""
    backend = use_engine(engine)
    n, steps, share = 256 * 80, 40, 1e-3
    grad = torch.linspace(0.2, 0.9, n)
    grad[::256] = 1  # the scale's own
    key = {"Adam": "exp_avg_sq", "Adagrad": "sum"}[name]
    later = torch.zeros(n) if name == "Adam" else grad * share**0.5
    later[::256] = share**0.5 if name == "Adam" else 0
    follows = (1 - share) ** steps if name == "Adam" else 1 + steps * share
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.zeros(n))
        options = {"betas": (0.9, 1 - share)} if name == "Adam" else {}
        optimizer = getattr(fusedopt.optim, name)(
            [p], lr=1e-4, state_dtype="8bit", stochastic_rounding=stochastic, backend=backend, **options
        )
        for step in range(steps + 1):
            p.grad = later.clone() if step else grad.clone()
            optimizer.step()
        state = optimizer.state[p]
        values = codes.dequantize(state[key], state[f"{key}_scale"])
        assert (state[key][::256] == 255).all()
        moved[stochastic] = (values / (grad**2 * (share if name == "Adam" else 1))).double()
    largest = torch.arange(n) % 256 == 0
    assert all((values[largest] - 1).abs().max() < 1e-4 for values in moved.values())
    assert abs(moved[False][~largest].mean() - 1) < 0.005 < abs(follows - 1) / 5
    # binomial again: a share of a code's width a step, and a width once for the start
    width = 4 / (255 * grad[~largest].double() ** 0.5)
    deviation = (steps * share * width + width**2 / 4).sum() ** 0.5 / len(width)
    assert abs(moved[True][~largest].mean() - follows) < 5 * deviation


@pytest.mark.parametrize("random", [0, 1, 32767, 65535])
def test_random_codes_are_the_two_around(random):
    """Whatever the bits: the largest has the largest code, so that the scale comes back; nothing vanishes."""
    x = torch.rand(256 * 2000).double().pow(6).float() + 1e-38
    scales = codes.quantize(x, False)[1]
    coded, same = codes.quantize(x, False, torch.full((len(x),), random))
    assert torch.equal(same, scales) and (coded > 0).all()
    where = x.view(-1, 256).argmax(1, keepdim=True)
    assert (coded.view(-1, 256).gather(1, where) == 255).all()
    root = 255 * (x.view(-1, 256).double() / scales.double()[:, None]).pow(0.25).view(-1)
    assert ((root - 1e-3).floor() <= coded).all() and (coded <= (root + 1e-3).ceil()).all()
    again, scales_again = codes.quantize(codes.dequantize(coded, scales), False)
    assert torch.equal(again, coded) and torch.equal(scales_again, scales)


def test_random_bits_are_the_same_on_every_engine_and_of_philox():
    # Salmon et al.'s known answers for Philox4x32-10 of a zero counter and key
    words = codes.random16(0, 0, 0, 0, 8, torch.device("cpu"))
    assert [int(words[2 * i] | words[2 * i + 1] << 16) for i in range(4)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    found = []
    for engine in ENGINES:
        params = [nn.Parameter(torch.linspace(-1, 1, n).bfloat16()) for n in (3, 5000)]
        optimizer = fusedopt.optim.SGD(params, lr=2.0**-9, stochastic_rounding=True, backend=use_engine(engine))
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        found.append(torch.cat([p.detach() for p in params]))
    assert all(torch.equal(found[0], other) for other in found[1:])


@engines
def test_eight_bits_break_loudly_and_alone(engine):
    p = nn.Parameter(torch.ones(3 * 4096))
    optimizer = fusedopt.optim.AdamW([p], lr=0.1, state_dtype="8bit", backend=use_engine(engine))
    p.grad = torch.ones_like(p)
    p.grad[300] = torch.inf
    optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    broken = p.detach().isnan()
    assert broken[256:512].all() and not broken[:256].any() and not broken[512:].any()


def test_eight_bits_take_two_bytes():
    p = nn.Parameter(torch.randn(1000, 1000))
    small = nn.Parameter(torch.randn(4095))
    optimizer = fusedopt.optim.AdamW([p, small], state_dtype="8bit")
    p.grad, small.grad = torch.randn_like(p), torch.randn_like(small)
    optimizer.step()
    kept = sum(t.nbytes for t in optimizer.state[p].values())
    assert kept / p.numel() <= 2.1
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


def test_signs_are_the_rules():
    if cpu.available() is not True:
        pytest.skip("no native library")
    for name, (_, _, states, signed) in cpu.rules().items():
        for k, state in enumerate(states):
            assert bool(signed >> k & 1) == (state in precision.SIGNED), name


@engines
def test_skipped_steps_change_nothing(engine):
    params = [nn.Parameter(torch.ones(5000).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())]
    options = {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.5}
    optimizer = fusedopt.optim.Adam(params, backend=use_engine(engine), skip_non_finite=True, **options)

    def snapshot():
        return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]

    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad = None if step == 0 else params[1].grad
        if step == 2:
            params[0].grad[17] = torch.nan
            before = snapshot()
        optimizer.step()
    assert all(map(torch.equal, before, snapshot()))
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize(
    "options, dtype, message",
    [
        ({"master_weights": True}, torch.float64, "master_weights=True cannot serve a parameter of torch.float64"),
        ({"master_weights": True}, torch.float32, "float32 weights are whole"),
        ({"stochastic_rounding": True}, torch.float32, "stochastic_rounding=True needs bfloat16"),
        ({"stochastic_rounding": True}, torch.float16, "stochastic_rounding=True cannot serve"),
        ({"stochastic_rounding": True, "state_dtype": torch.float32}, torch.float32, "states that are squares"),
        ({"state_dtype": "8bit"}, torch.float64, "state_dtype='8bit' cannot serve"),
        ({"state_dtype": torch.bfloat16}, torch.complex64, "cannot serve a parameter of torch.complex64"),
        ({"state_dtype": torch.float16}, torch.float32, "state_dtype=torch.float16 is not"),
        ({"state_dtype": "4bit"}, torch.float32, "state_dtype='4bit' is not"),
        ({"ema_decay": 1.5}, torch.float32, "ema_decay=1.5 must be"),
        ({"ema_decay": 0.9, "differentiable": True}, torch.float32, "differentiable=True does not go with ema_decay"),
    ],
    ids=str,
)
def test_bad_options(options, dtype, message):
    with pytest.raises(ValueError, match=message):
        fusedopt.optim.AdamW([nn.Parameter(torch.ones(3, dtype=dtype))], **options)
    if options.get("stochastic_rounding"):  # codes are rounded at random if they are of squares
        with pytest.raises(ValueError, match="stochastic_rounding=True"):
            fusedopt.optim.SGD(
                [nn.Parameter(torch.ones(3, dtype=dtype))], momentum=0.9, **{**options, "state_dtype": "8bit"}
            )
    optimizer = fusedopt.optim.AdamW([nn.Parameter(torch.ones(3).bfloat16())], master_weights=True)
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3).double())]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["max_norm", "skip_non_finite", "ema_decay", "state_dtype", "master_weights"])
def test_options_do_not_change(name):
    optimizer = fusedopt.optim.AdamW([nn.Parameter(torch.ones(3))], max_norm=1.0)
    before = getattr(optimizer, name)
    with pytest.raises(AttributeError, match=f"{name} is chosen at construction"):
        setattr(optimizer, name, 0.5)
    assert getattr(optimizer, name) == before


def float64_run(case, dtypes, steps=4):
    """The oracle: the same gradients and the start as rounded, all kept in float64."""
    params = large_params(dtypes)
    exact = [nn.Parameter(p.detach().double().contiguous()) for p in params]
    make = case.stock if case.name != "Lion" else case.fused
    optimizer = make(exact, **({"foreach": False} if case.name != "Lion" else {"backend": "reference"}))
    for step in range(1, steps + 1):
        set_all_grads(params, dtypes, step)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.double().contiguous()
        optimizer.step()
    return exact


@rows
def test_near_the_float64_oracle(case, mode, dtypes):
    """As near as what is kept allows: a code is off by 1 in 127 at most, a bfloat16 by 1 in 256."""
    if case.name == "Lion":
        pytest.skip("the sign of next to nothing")
    if "clip" in mode:
        pytest.skip("the oracle does not clip; test_clip.py does")
    torch.set_num_threads(1)
    params, optimizer = run(case, mode, dtypes, "auto")
    lr = float(case.options.get("lr", 1e-3))
    for p, exact in zip(params, float64_run(case, dtypes), strict=True):
        if not p.numel():
            continue
        kind = optimizer._state_kind(p)
        narrow = 0.05 if kind == "8bit" else 0.01 if kind in (torch.bfloat16, torch.float16) else 1e-6
        error = (whole(p, optimizer.state.get(p, {})) - exact.detach()).abs()
        moved = 4 * lr * max(1.0, exact.detach().abs().max().item())
        unit = 0.0 if "master" in optimizer.state.get(p, {}) else torch.finfo(p.dtype).eps * exact.abs().max().item()
        rounds = 4 if "stochastic" in mode else 2.5
        centered = 10 if case.options.get("centered") else 1  # a small difference of two rounded states
        assert error.mean() <= centered * narrow * moved + rounds * unit + 1e-7 * exact.abs().max(), (p.shape, kind)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    numbers=st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 2.0**-60),
        min_size=1,
        max_size=600,
    ),
    signed=st.booleans(),
)
def test_any_values_as_codes(numbers, signed):
    """The largest is exact, zero is zero, nothing changes sign or vanishes, and a second time changes nothing."""
    x = torch.tensor(numbers)
    x = x if signed else x.abs()
    coded, scales = codes.quantize(x, signed)
    y = codes.dequantize(coded, scales)
    for begin in range(0, len(x), 256):
        block, back = x[begin : begin + 256], y[begin : begin + 256]
        where = block.abs().argmax()
        assert back[where] == block[where]
        step = 2 / 127 if signed else 4 / 255
        assert ((back - block).abs() <= step * block.abs().max()).all()
    assert (y[x == 0] == 0).all() and (y * x >= 0).all()
    assert signed or (y[x > 1e-9 * x.max()] > 0).all()
    again, scales_again = codes.quantize(y, signed)
    assert torch.equal(again, coded) and torch.equal(scales_again, scales)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_any_float32_survives_the_split(bits):
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    back = codes.join(*codes.split(x))
    assert torch.equal(back.view(torch.int32)[~x.isnan()], x.view(torch.int32)[~x.isnan()])
    assert back[x.isnan()].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_pickle_and_deepcopy_go_on_alike(mode):
    dtypes = "f32" if takes(WITH_LION[1], mode, "f32") else "bf16"
    found = []
    for copied in (lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        params, optimizer = copied(run(WITH_LION[1], mode, dtypes, "auto", steps=2))
        params = optimizer.param_groups[0]["params"]
        set_all_grads(params, dtypes, 3)
        optimizer.step()
        found.append((params, optimizer))
    for params, optimizer in found[1:]:
        for p, q in zip(params, found[0][0], strict=True):
            if q.stride() != p.stride():
                continue  # a copy of a view with gaps has none, and runs elsewhere
            assert torch.equal(p, q)
            state = found[0][1].state[q]
            assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)


@rows
def test_save_load_step_is_step(case, mode, dtypes, tmp_path):
    """Bit for bit, through a file, into an optimizer of the same options; deepcopy too."""
    torch.set_num_threads(1)
    params, optimizer = run(case, mode, dtypes, "auto", steps=2)
    if params[0].dtype == torch.float64 and case.name == "Lion":
        pytest.skip("the same as float32")
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    # as they lie: a clone of a view with gaps would have none
    others = [copy.deepcopy(p.detach()) for p in params]
    others = [nn.Parameter(p) for p in others]
    for p, q in zip(params, others, strict=True):
        q.grad_dtype = p.grad_dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = case.fused(others, **MODES[mode])
        loaded.load_state_dict(saved)
        set_all_grads(params, dtypes, 3)
        set_all_grads(others, dtypes, 3)
        optimizer.step()
        loaded.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        a, b = optimizer.state.get(p, {}), loaded.state.get(q, {})
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("case", [c for c in WITH_LION if c.name != "Lion"], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_swaps_with_stock_and_back(case, mode):
    """fusedopt, torch.optim, fusedopt: one run within tolerance; what stock left stale is dropped, and told."""
    dtypes = "f32" if takes(case, mode, "f32") else "bf16"
    params = large_params(dtypes)[3:]
    options = MODES[mode]
    first = case.fused(params, **options)
    stock = case.stock(params, foreach=False)
    second = case.fused(params, **options)
    reference = [nn.Parameter(p.detach().clone()) for p in params]
    plain = case.stock(reference, foreach=False)

    def steps(optimizer, tensors, numbers):
        for step in numbers:
            filler = large_params(dtypes)[:3]
            set_all_grads([*filler, *tensors], dtypes, step)
            if "max_norm" in options and optimizer in (stock, plain):
                nn.utils.clip_grad_norm_(tensors, options["max_norm"])
            optimizer.step()

    steps(first, params, (1, 2))
    stock.load_state_dict(first.state_dict())
    steps(stock, params, (3, 4))
    assert all(torch.isfinite(p).all() for p in params)
    stale = options.get("ema_decay") or options.get("master_weights")
    if stale:
        with pytest.warns(UserWarning, match="are left out and start anew"):
            second.load_state_dict(stock.state_dict())
            steps(second, params, (5, 6))
    else:
        second.load_state_dict(stock.state_dict())
        steps(second, params, (5, 6))
    steps(plain, reference, range(1, 7))
    lr = float(case.options.get("lr", 1e-3))
    for p, q in zip(params, reference, strict=True):
        coarse = torch.finfo(p.dtype).eps if p.dtype != torch.float32 else 0
        error = (p - q).abs().double()
        scale = q.abs().max().item()
        assert error.mean() <= 6 * (0.25 * lr + coarse * scale), (p.shape, error.mean())


def test_export_is_float32_under_stocks_keys_and_goes_to_the_cpu():
    p = nn.Parameter(torch.randn(200, 100))
    p.grad = torch.randn_like(p)
    optimizer = fusedopt.optim.AdamW([p], state_dtype="8bit", ema_decay=0.9)
    optimizer.step()
    exported = optimizer.state_dict(device="cpu")["state"][0]
    assert list(exported) == ["step", "exp_avg", "exp_avg_sq", "ema", "extras_step"]
    assert all(exported[key].dtype == torch.float32 for key in ("step", "exp_avg", "exp_avg_sq", "ema"))
    again = codes.quantize(exported["exp_avg"], True)
    assert torch.equal(again[0], optimizer.state[p]["exp_avg"])
    stock = torch.optim.AdamW([p])
    stock.load_state_dict(optimizer.state_dict())
    stock.step()


def test_a_parameter_that_only_averages_loads_into_stock():
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = fusedopt.optim.AdamW([used, idle], ema_decay=0.9)
    used.grad = torch.ones(3)
    optimizer.step()
    stock = torch.optim.AdamW([used, idle])
    stock.load_state_dict(optimizer.state_dict())
    idle.grad = torch.ones(4)
    stock.step()
    fresh = nn.Parameter(torch.ones(4))
    fresh.grad = torch.ones(4)
    torch.optim.AdamW([fresh]).step()
    assert torch.equal(fresh, idle)


def test_a_checkpoint_of_other_shapes_changes_nothing():
    p, q = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 3))
    a, b = (fusedopt.optim.AdamW([t], lr=lr, ema_decay=0.9) for t, lr in ((p, 0.1), (q, 0.2)))
    for t, optimizer in ((p, a), (q, b)):
        t.grad = torch.ones_like(t)
        optimizer.step()
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(ValueError, match="is it a checkpoint of another model"):
        b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == 0.2 and b.state_dict()["param_groups"] == before["param_groups"]
    assert all(torch.equal(b.state_dict()["state"][0][key], before["state"][0][key]) for key in ("step", "exp_avg"))
    assert not b._optimizer_load_state_dict_pre_hooks and not b._optimizer_state_dict_post_hooks


def test_sgd_knows_its_extras_by_the_weights():
    p = nn.Parameter(torch.ones(10))
    optimizer = fusedopt.optim.SGD([p], lr=0.1, ema_decay=0.9)
    p.grad = torch.ones(10)
    optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    again = fusedopt.optim.SGD([p], lr=0.1, ema_decay=0.9)
    p.data.zero_()
    again.load_state_dict(saved)  # before the model is loaded
    p.data.copy_(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.step()
        optimizer_ema = saved["state"][0]["ema"]
        torch.testing.assert_close(again.state[p]["ema"], torch.lerp(optimizer_ema, p.detach(), 0.1))
    stale = fusedopt.optim.SGD([p], lr=0.1, ema_decay=0.9)
    stale.load_state_dict(saved)
    with pytest.warns(UserWarning, match="written for other weights"):
        stale.step()
    assert torch.equal(stale.state[p]["ema"], p.detach())
