"""Optimizers of the test table through csrc/cuda/step*.cu, on host memory: `optimizers.py LIBRARY full|few`."""

import simulated  # noqa: F401, I001
import sys

import torch
from optim_table import CASES, DTYPES, SHAPES, make_params, no_further_from_float64_than_stock, set_grads, train

import fusedopt.optim

FEW = [("Adam", "bf16"), ("AdamW", "f32"), ("RMSprop", "f64"), ("SGD", "f16-f32-grads"), ("Lion", "bf16-f32-grads")]


def table(size):
    """Cases and their dtypes."""
    if size == "full":
        return [(case, dtypes) for case in CASES for dtypes in DTYPES]
    return [(next(case for case in reversed(CASES) if case.name == name), dtypes) for name, dtypes in FEW]


def compare(case, dtypes):
    ours = train(case.fused(make_params(dtypes), backend="cuda"), dtypes)
    return no_further_from_float64_than_stock(ours, case, dtypes, torchs_bits=lambda shape: not shape.fuses)


def grad_scaler():
    """An overflow changes nothing, step counters included; the scale divides the gradient."""
    params = make_params("f32")
    optimizer = fusedopt.optim.AdamW(params, lr=0.01, backend="cuda")
    train(optimizer, "f32", 2)
    report = [row.backend for row in optimizer.backend_report()]
    assert report == ["cuda" if shape.fuses else "reference" for shape in SHAPES.values()], report

    def snapshot():
        return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]

    before = snapshot()
    set_grads(params, "f32", 3)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, snapshot()))
    for p in params:
        p.grad.mul_(4)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    plain = make_params("f32")
    train(fusedopt.optim.AdamW(plain, lr=0.01, backend="cuda"), "f32", 3)
    assert all(map(torch.equal, params, plain))


torch.set_num_threads(1)
total = sum(compare(case, dtypes) for case, dtypes in table(sys.argv[2]))
grad_scaler()
print(f"{total} tensors agree")
