"""Every optimizer of the test table through csrc/cuda/step.cu, on host memory: run with the simulated library's path.

A process of its own, because the library takes the place of fusedopt._native before anything imports that.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

path = sys.argv[1]
loader = importlib.machinery.ExtensionFileLoader("fusedopt._native", path)
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("fusedopt._native", loader))
loader.exec_module(native)
sys.modules["fusedopt._native"] = native
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from optim_table import CASES, DTYPES, SHAPES, STEPS, make_params, oracle, set_grads, stock, train  # noqa: E402

import fusedopt.optim  # noqa: E402
from fusedopt.backends import cuda  # noqa: E402

cuda.device_types = frozenset({"cpu"})
cuda.available = lambda: True
cuda.covers = lambda device: True


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


total = sum(compare(case, dtypes) for case in CASES for dtypes in DTYPES)
grad_scaler()
print(f"{total} tensors agree")
