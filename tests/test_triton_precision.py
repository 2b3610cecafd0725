"""Triton's update at a chosen precision: by value in the interpreter, and compiled for GPUs that are not here."""

import pytest
import torch
from optim_table import DTYPES, WITH_LION, values
from torch import nn

pytest.importorskip("triton")

from triton_interpreter import INTERPRETED, interpreted, run_anew

from fusedopt.backends import cpu
from fusedopt.backends import triton as backend
from fusedopt.backends.triton import kernels, table
from fusedopt.optim import precision

pytestmark = pytest.mark.skipif(cpu.available() is not True, reason=str(cpu.available()))


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


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
}
ALL = [(mode, dtypes) for mode, (_, all_dtypes) in MODES.items() for dtypes in all_dtypes]


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
    """The same but for arithmetic's rounding, which seldom makes a rounded value another. A centered variance cancels."""
    small = 1e-12 if ours.dtype == torch.float64 else 5e-6
    torch.testing.assert_close(ours, theirs, rtol=unit, atol=small + unit * 1e-3)
    differ = ~torch.isclose(ours, theirs, rtol=2e-5, atol=small)
    assert differ.sum() <= 1 + 0.01 * ours.numel()


UNITS = {"8bit": 0.2, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6, torch.float64: 1e-13}


@interpreted
@pytest.mark.parametrize("mode, dtypes", ALL, ids=map("-".join, ALL))
@pytest.mark.parametrize("case", WITH_LION, ids=str)
def test_steps_as_on_the_cpu(case, mode, dtypes, engine):
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
                if key in optimizer._states(optimizer.param_groups[0]):
                    kept, known = (precision.View(t, s, (key,)).values[key] for t, s in ((p, state), (q, expected)))
                    assert_close(kept, known, UNITS[optimizer._state_kind(p)])
                elif key == "ema":
                    assert_close(state[key], expected[key], UNITS[dtype])
                elif key in ("step", "rounding_step"):
                    assert float(state[key]) == float(expected[key])
            with torch.no_grad():  # the next step starts alike
                p.copy_(q)
                for key in state:
                    state[key].copy_(expected[key])
