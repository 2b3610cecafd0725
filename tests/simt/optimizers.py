"""Optimizers of the test table through csrc/cuda/step.cu, on host memory: `optimizers.py LIBRARY full|few`."""

import simulated  # noqa: F401, I001
import sys

import torch
from optim_table import CASES, DTYPES, SHAPES, STEPS, make_params, oracle, set_grads, stock, train

import fusedopt.optim

FEW = [("Adam", "bf16"), ("AdamW", "f32"), ("RMSprop", "f64"), ("SGD", "f16-f32-grads"), ("Lion", "bf16-f32-grads")]


def table(size):
    """Cases and their dtypes."""
    if size == "full":
        return [(case, dtypes) for case in CASES for dtypes in DTYPES]
    return [(next(case for case in reversed(CASES) if case.name == name), dtypes) for name, dtypes in FEW]


def compare(case, dtypes):
    """As tests/test_optim_values.py; returns how many tensors were compared."""
    ours = train(case.fused(make_params(dtypes), backend="cuda"), dtypes)
    exact = oracle(case, dtypes)
    theirs = stock(case, dtypes) if case.name != "Lion" else None
    ulps = STEPS * torch.finfo(DTYPES[dtypes][0]).eps
    compared = 0
    for i, shape in enumerate(SHAPES):
        assert list(ours.tensors[i]) == list(exact.tensors[i])
        for key, value in exact.tensors[i].items():
            error = (ours.tensors[i][key] - value).abs()
            if exact.doubtful is not None and key == "param":
                error = error[~exact.doubtful[i]]
            if error.numel() == 0:
                continue
            stock_error = (theirs.tensors[i][key] - value).abs().max() if theirs else 0.0
            assert error.max() <= stock_error + ulps * exact.peaks[i][key], (str(case), dtypes, shape, key)
            compared += 1
    return compared


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
