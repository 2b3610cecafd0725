"""Triton's update at a chosen precision: by value in the interpreter, and compiled for GPUs that are not here."""

import functools

import pytest
import torch
from optim_table import DTYPES, WITH_LION, Case, values
from torch import nn

pytest.importorskip("triton")

from triton_elsewhere import TARGETS, Code, check_norms, compiled, forget, pretend
from triton_interpreter import INTERPRETED, interpreted, run_anew

import fusedopt.optim
from fusedopt.backends import cpu
from fusedopt.backends import triton as backend
from fusedopt.backends.triton import kernels, norms, precise, table
from fusedopt.optim import precision

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


@pytest.fixture
def engine(monkeypatch):
    """Optimizers of CPU tensors, asked for the Triton backend, get it; small tensors have codes too."""
    torch.set_num_threads(1)
    for name in ("TUNING", "PRECISE"):  # the interpreter takes as long for a small block
        large = {size: t._replace(block=kernels.CHUNK.value) for size, t in getattr(table, name).items()}
        monkeypatch.setattr(table, name, large)
    monkeypatch.setattr(backend, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(backend, "available", lambda: True)
    monkeypatch.setattr(precision, "SMALL", 0)


# --- against the CPU's kernels, one step at a time ---


MODES = {
    "8bit": ({"state_dtype": "8bit"}, ["f32", "bf16-f32-grads", "f16"]),
    "bf16-states": ({"state_dtype": torch.bfloat16}, ["f32"]),
    "f32-states": ({"state_dtype": torch.float32}, ["f32", "bf16"]),
    "stochastic": ({"stochastic_rounding": True}, ["bf16"]),
    "stochastic-states": ({"state_dtype": torch.bfloat16, "stochastic_rounding": True}, ["f32"]),
    "master": ({"master_weights": True}, ["bf16", "f16"]),
    "ema": ({"ema_decay": 0.75}, ["f32", "f64", "f16-f32-grads"]),
    "all": (
        {"state_dtype": torch.bfloat16, "master_weights": True, "stochastic_rounding": True, "ema_decay": 0.25},
        ["bf16"],
    ),
    "8bit-stochastic-ema": ({"state_dtype": "8bit", "stochastic_rounding": True, "ema_decay": 0.75}, ["bf16"]),
    "8bit-stochastic": ({"state_dtype": "8bit", "stochastic_rounding": True}, ["f32", "f16-f32-grads"]),
}
RULES = [*WITH_LION, Case("LAMB", {"lr": 0.01, "weight_decay": 0.1})]
ALL = [(mode, dtypes) for mode, (_, all_dtypes) in MODES.items() for dtypes in all_dtypes]
# A mode knows nothing of rules, nor they of it: each mode with one of them in turn, each rule with all there is.
EACH = [
    (rule, *kept)
    for i, rule in enumerate(RULES)
    for j, kept in enumerate(ALL)
    if j % len(RULES) == i or kept in (("all", "bf16"), ("8bit-stochastic-ema", "bf16"))
]
OTHERS = [(rule, *kept) for rule in RULES for kept in ALL if (rule, *kept) not in EACH]
# neither has squares, whose codes are all that is rounded
OTHERS = [row for row in OTHERS if row[1] != "8bit-stochastic" or row[0].name not in ("SGD", "Lion")]


def make_params(dtypes):
    """Over a chunk and ragged, over a block and not aligned, whole, transposed, tiny, empty; one that has no gradient
    now and then, one that never has."""
    dtype, grad_dtype = DTYPES[dtypes]
    tensors = [torch.empty(16384 + 300), torch.empty(1000)[3:968], torch.empty(512), torch.empty(17, 60).t()]
    params = []
    for seed, t in enumerate([*tensors, *map(torch.empty, (7, 0, 300, 40))]):
        data = torch.empty_like(t, dtype=dtype) if seed != 1 else torch.empty(1000, dtype=dtype)[3:968]
        param = nn.Parameter(data.copy_(values(t.shape, seed)))
        if grad_dtype != dtype:
            param.grad_dtype = grad_dtype
        params.append(param)
    return params


def set_grads(params, dtypes, step):
    for seed, p in enumerate(params[:-1]):
        p.grad = torch.empty_like(p, dtype=DTYPES[dtypes][1]).copy_(values(p.shape, 100 * step + seed))
    if step == 2:
        params[-2].grad = None


def assert_close(ours, theirs, unit):
    """The same but for arithmetic's rounding, which seldom makes a rounded value another by a unit."""
    small = 1e-12 if ours.dtype == torch.float64 else 5e-6  # a centered variance cancels
    torch.testing.assert_close(ours, theirs, rtol=unit, atol=small + unit * 1e-3)
    differ = ~torch.isclose(ours, theirs, rtol=2e-5, atol=small)  # steps from codes are good to 1e-5
    assert differ.sum() <= 1 + 0.01 * ours.numel()


def assert_codes_close(ours, theirs):
    """Or their neighbours: AVX-512 estimates roots to 2^-14, which is up to a fortieth of a code on either side."""
    differ = (ours.int() - theirs.int()).abs()
    assert not ours.numel() or (differ.max() <= 1 and differ.sum() <= 1 + 0.05 * ours.numel())


UNITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6, torch.float64: 1e-13}


@interpreted
@pytest.mark.parametrize("case, mode, dtypes", EACH, ids=str)
def test_steps_as_on_the_cpu(case, mode, dtypes, engine):
    check_steps(case, mode, dtypes)


@interpreted
@pytest.mark.thorough
@pytest.mark.parametrize("case, mode, dtypes", OTHERS, ids=str)
def test_so_do_all_the_others(case, mode, dtypes, engine):
    check_steps(case, mode, dtypes)


def check_steps(case, mode, dtypes):
    ours, theirs = make_params(dtypes), make_params(dtypes)
    options = MODES[mode][0]
    optimizer, on_cpu = case.fused(ours, backend="triton", **options), case.fused(theirs, backend="cpu", **options)
    for step in range(1, 4):
        for params, one in ((ours, optimizer), (theirs, on_cpu)):
            set_grads(params, dtypes, step)
            one.step()
        for p, q in zip(ours, theirs, strict=True):
            state, expected = optimizer.state.get(p, {}), on_cpu.state.get(q, {})
            assert state.keys() == expected.keys()
            dtype = torch.float32 if options.get("master_weights") else p.dtype
            a, b = (precision.weight(t, s) for t, s in ((p, state), (q, expected)))
            assert_close(a, b, UNITS[dtype])
            for key in state:
                if f"{key}_scale" in state:
                    assert_codes_close(state[key], expected[key])
                elif key in optimizer._states(optimizer.param_groups[0]):
                    assert_close(state[key], expected[key], UNITS[optimizer._state_kind(p)])
                elif key.endswith("_scale"):
                    torch.testing.assert_close(state[key], expected[key], rtol=2e-5, atol=0)
                elif key == "ema":
                    assert_close(state[key], expected[key], UNITS[dtype])
                elif key in ("step", "rounding_step"):
                    assert float(state[key]) == float(expected[key])
            with torch.no_grad():  # the next step starts alike
                p.copy_(q)
                for key in state:
                    state[key].copy_(expected[key])


@interpreted
@pytest.mark.parametrize("key", ["momentum_buffer", "sum", "sum at random"])
def test_codes_come_back(key, engine):
    """Steps that leave the states as they are, at scales from the smallest to the largest."""
    n = 256 * 40 + 77
    signed, random = key == "momentum_buffer", "random" in key
    key = key.split()[0]
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.zeros(n)
    make = functools.partial(fusedopt.optim.SGD, momentum=1.0) if signed else fusedopt.optim.Adagrad
    optimizer = make([p], lr=0.1, state_dtype="8bit", stochastic_rounding=random, backend="triton")
    optimizer.step()
    state = optimizer.state[p]
    low, high = (-127, 127) if signed else (0, 255)
    codes = torch.randint(low, high + 1, (n,)).to(state[key].dtype)
    codes[::256] = high  # the scale's own
    scales = torch.logspace(-27, 38, 41)
    state[key].copy_(codes)
    state[f"{key}_scale"].copy_(scales)
    for _ in range(2):
        optimizer.step()
        assert torch.equal(state[f"{key}_scale"], scales)
        if random:  # what came back is a rounding off, and a rounding more or less likely to be another code
            assert_codes_close(state[key], codes)
            assert (state[key][::256] == 255).all()
        else:
            assert torch.equal(state[key], codes)


@interpreted
def test_a_broken_block_shows_and_is_alone(engine):
    p = nn.Parameter(torch.ones(3 * 4096))
    optimizer = fusedopt.optim.AdamW([p], lr=0.1, state_dtype="8bit", backend="triton")
    for broken in (torch.inf, 1.0):
        p.grad = torch.ones_like(p)
        p.grad[300] = broken
        optimizer.step()
    nan = p.detach().isnan()
    assert nan[256:512].all() and not nan[:256].any() and not nan[512:].any()


@interpreted
def test_a_skipped_step_changes_nothing(engine):
    params = [nn.Parameter(torch.ones(5000).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())]
    options = {"state_dtype": "8bit", "master_weights": True, "ema_decay": 0.5, "skip_non_finite": True}
    optimizer = fusedopt.optim.Adam(params, backend="triton", **options)
    for step in range(3):
        params[0].grad = torch.ones_like(params[0])
        if step == 2:
            params[0].grad[17] = torch.nan
            before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        optimizer.step()
    after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(map(torch.equal, before, after))
    assert int(optimizer.skipped_steps) == 1


@interpreted
def test_nothing_is_sent_or_bound_where_nothing_moved(engine, monkeypatch):
    """Nor by the norm, which is told no precision."""
    params = [nn.Parameter(torch.ones(n).bfloat16()) for n in (3, 5000)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.optim.AdamW(params, state_dtype="8bit", ema_decay=0.5, max_norm=1.0, backend="triton")
    optimizer.step()
    optimizer.step()
    for what in ("_upload", "_lay_out", "_bind_update"):
        monkeypatch.setattr(table.DeviceTable, what, lambda *args, what=what: pytest.fail(what))
    optimizer.step()


@interpreted
def test_rows_with_and_without_a_master_share_a_launch(engine):
    """As two launches would; the plain kernel is not asked."""
    start, grad = torch.linspace(-1, 1, 600).bfloat16(), torch.linspace(1, -1, 600).bfloat16()
    made = []
    for together in (True, False):
        params, masters = start.clone().repeat(2, 1), torch.zeros(600, dtype=torch.int16)
        rows = torch.zeros(2, 14, dtype=torch.int64)
        rows[:, 0] = torch.tensor([p.data_ptr() for p in params])
        rows[:, 5], rows[0, 11], rows[1, 6] = 600, masters.data_ptr(), int(together)
        hyper = torch.tensor([0.01, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.float64).view(torch.int64)
        groups = torch.cat([hyper, torch.zeros(2, dtype=torch.int64)]).view(1, -1)
        dtype, grads = torch.bfloat16, torch.full((2,), grad.data_ptr())
        for part in [slice(0, 2)] if together else [slice(0, 1), slice(1, 2)]:
            chunks = torch.arange(2 if together else 1, dtype=torch.int32)
            launch = backend.Launch("sgd", dtype, dtype, dtype, rows[part], grads[part], chunks, True)
            launched = backend.new_table(torch.device("cpu")).step([launch], groups, precision=(0.0, False, 0))
            assert launched == (3 if together else 2)
        made.append((params, masters))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
    assert masters.any() and torch.equal(params[1], (start - 0.01 * grad.float()).bfloat16())


# --- compiled ---


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {  # rule, dtypes of parameter, gradient, state; master, average; stochastic
    "adamw-8bit-bf16": ("adamw", BF16, BF16, "8bit", 0, 0, False),
    "adamw-f32-ema": ("adamw", F32, F32, F32, 0, 1, False),
    "adamw-bf16-master": ("adamw", BF16, BF16, BF16, 1, 0, False),
    "adamw-bf16-stochastic": ("adamw", BF16, BF16, BF16, 0, 0, True),
    "amsgrad-8bit-f32-ema": ("adamw_amsgrad", F32, F32, "8bit", 0, 1, False),
    "amsgrad-8bit-all": ("adamw_amsgrad", BF16, F32, "8bit", 1, 1, False),
    "amsgrad-bf16-all": ("adamw_amsgrad", BF16, F32, BF16, 1, 1, True),
    "rmsprop-f32-bf16-states": ("rmsprop_centered_momentum", F32, BF16, BF16, 0, 1, True),
    "adamw-8bit-bf16-stochastic": ("adamw", BF16, BF16, "8bit", 0, 0, True),
    "amsgrad-8bit-f32-stochastic": ("adamw_amsgrad", F32, F32, "8bit", 0, 1, True),
    "rmsprop-8bit-stochastic": ("rmsprop", BF16, BF16, "8bit", 0, 1, True),
    "adam-f16-master": ("adam", F16, F16, F32, 1, 1, False),
    "amsgrad-f64-ema": ("adam_amsgrad", torch.float64, torch.float64, torch.float64, 0, 1, False),
    "lion-8bit-master": ("lion", BF16, F32, "8bit", 1, 1, False),
    "sgd-f16-master": ("sgd", F16, F32, F16, 1, 1, False),
    "momentum-8bit-f32-ema": ("sgd_momentum", F32, F32, "8bit", 0, 1, False),
    "lamb-8bit-bf16-ema": ("lamb", BF16, BF16, "8bit", 0, 1, False),
    "lamb-8bit-f16-master": ("lamb", F16, F32, "8bit", 1, 0, False),
}
VARIANTS = [(target, kind) for target in TARGETS for kind in KINDS]
SOME = [(target, kind) for target, kind in VARIANTS if target in ("sm_90", "gfx942") and kind in list(KINDS)[:4]]
SOME += [("sm_80", "adamw-8bit-bf16"), ("sm_100", "adamw-8bit-bf16"), ("sm_90", "amsgrad-bf16-all")]
SOME += [("sm_90", "adamw-8bit-bf16-stochastic"), ("gfx942", "adamw-8bit-bf16-stochastic")]
SOME += [("sm_90", "lamb-8bit-bf16-ema"), ("gfx942", "lamb-8bit-f16-master")]


def check(target, kind, monkeypatch, folder):
    rule, param, grad, state, master, average, stochastic = KINDS[kind]
    pretend(monkeypatch, target, table)
    rows = torch.zeros(3, 14, dtype=torch.int64)
    rows[:, 5], rows[:, 11], rows[:, 12] = 1000, master, average
    rest = torch.ones(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int32), True
    launch = backend.Launch(rule, param, grad, state, rows, *rest)
    groups = torch.zeros(1, 11, dtype=torch.int64)
    try:
        backend.new_table(torch.device("cpu")).step([launch], groups, precision=(0.1, stochastic, 0))
        (update,) = compiled(precise.update, target)
        code, states = Code.of(update, folder), len(table.RULES[rule].states)
        if table.RULES[rule].normed:
            check_norms(target, param, states, folder, wide=2)
    finally:
        for kernel in (kernels.prepare, norms.norms, norms.adapt, precise.update):
            forget(kernel)
    assert code.local == 0, code
    narrow = state == "8bit" or state.itemsize < param.itemsize  # 4 or 8 bytes a thread
    wide = (0 if narrow else states) + average
    assert code.loads >= 1 + wide and code.stores >= 1 + wide, code
    programs = table.STOCHASTIC if stochastic else table.PRECISE[param.itemsize].programs[states]
    assert code.resident(target, table.THREADS) >= programs, code


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("target, kind", SOME)
def test_moves_16_bytes_at_a_time_and_spills_nothing(target, kind, monkeypatch, tmp_path):
    check(target, kind, monkeypatch, tmp_path)


@pytest.mark.thorough
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("target, kind", [variant for variant in VARIANTS if variant not in SOME])
def test_so_does_every_other_kind(target, kind, monkeypatch, tmp_path):
    check(target, kind, monkeypatch, tmp_path)
