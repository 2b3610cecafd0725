"""Every optimizer, mode of precision and dtype on the simulated GPU: `precision.py LIBRARY full|few`."""

import simulated  # noqa: F401, I001
import sys

import torch
from optim_table import DTYPES, SHAPES, WITH_LION
from test_precision import MODES, ROWS, large_params, set_all_grads

from fusedopt.optim import codes
from fusedopt.optim.precision import weight

FEW = [
    ("Adam", "8bit-stochastic-ema", "bf16"),
    ("AdamW", "8bit-master-ema-clip", "f16-f32-grads"),
    ("RMSprop", "bf16-master-stochastic", "bf16-f32-grads"),
    ("SGD", "stochastic-states", "f32"),
    ("Lion", "ema", "f64"),
]


def table(size):
    """Cases, modes and dtypes."""
    if size == "full":
        return ROWS
    return [(next(case for case in WITH_LION if case.name == name), *pair) for name, *pair in FEW]


def unaligned_param(dtype):
    return torch.nn.Parameter(torch.linspace(-1, 1, 5000).to(dtype)[3:])


def run(case, options, dtypes, backend):
    """Five steps: without some gradients, without others, with an overflow, with a scale, and a last one.

    The norm of `max_norm` is measured, and never reached: a coefficient is a float32 on a GPU and a double on the CPU.
    """
    dtype, grad_dtype = DTYPES[dtypes]
    params = [*large_params(dtypes), unaligned_param(dtype)]
    if grad_dtype != dtype:
        params[-1].grad_dtype = grad_dtype
    optimizer = case.fused(params, backend=backend, **{**options, "max_norm": 1e9})
    norms = []
    for step in range(1, 6):
        set_all_grads(params[:-1], dtypes, step)
        params[-1].grad = torch.linspace(-step, 2, 4997).to(grad_dtype)
        for i in {1: (3, 7, -2), 2: (0, 4, 8)}.get(step, ()):
            params[i].grad = None
        optimizer.found_inf = torch.tensor(float(step == 3))
        optimizer.grad_scale = torch.tensor(4.0 if step == 4 else 1.0)
        optimizer.step()
        if step != 3:  # the CPU does not even measure
            norms.append(float(optimizer.grad_norm))
    return params, optimizer, norms


def same_bits(state, expected, _):
    """Here the same arithmetic is compiled by the same compiler, without fused multiply-adds."""
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key].nan_to_num(), value.nan_to_num()), key


def close_codes(state, expected, dtype):
    """From codes the CPU divides and takes roots to 1e-5; a rounding may then fall otherwise."""
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if key == "master":  # a part of "param"
            continue
        got, unit = state[key].double(), 0.005 if "master" in expected else 0.005 + 2 * torch.finfo(dtype).eps
        if f"{key}_scale" in expected:
            assert (got != value).double().mean() < 0.001, key
            got, value = (codes.dequantize(one[key], one[f"{key}_scale"]) for one in (state, expected))
            unit = 2 / 127 * value.abs().max()
        error = (got - value).abs()
        assert error.max() <= unit, key
        assert error.mean() <= 1e-5 * value.abs().max(), key


def compare(case, options, dtypes, uncoded=same_bits):
    """Every tensor that a step keeps; `uncoded`: how, where there are no codes."""
    ours, optimizer, norms = run(case, options, dtypes, "cuda")
    theirs, on_cpu, cpu_norms = run(case, options, dtypes, "cpu")
    fuses = [*(shape.fuses for shape in SHAPES.values()), True, True]
    assert [row.backend == "cuda" for row in optimizer.backend_report()] == fuses
    torch.testing.assert_close(norms, cpu_norms, rtol=1e-6, atol=0)
    compared = 0
    for p, q in zip(ours, theirs, strict=True):
        state, expected = (
            {**one.state[t], "param": weight(t, one.state[t])} for t, one in ((p, optimizer), (q, on_cpu))
        )
        coded = any(key.endswith("_scale") for key in expected)
        (close_codes if coded else uncoded)(state, expected, p.dtype)
        compared += len(expected)
    return compared


torch.set_num_threads(1)
if __name__ == "__main__":
    total = sum(compare(case, MODES[mode], dtypes) for case, mode, dtypes in table(sys.argv[2]))
    print(f"{total} tensors agree")
