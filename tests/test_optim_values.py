"""Every optimizer and option against the same algorithm in float64, on every engine, dtype and layout."""

import pytest
import torch
from optim_table import CASES, DTYPES, ENGINES, SHAPES, STEPS, make_params, oracle, stock, train, use_engine

import fusedopt.optim


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_float64_than_stock(case, dtypes, engine):
    if engine == "reference" and dtypes.endswith("grads") and case.name != "Lion":
        pytest.skip("stock takes gradients of the parameter's dtype only")
    # one engine with threads is enough: torch's many small parallel loops stall where other processes hold the cores
    torch.set_num_threads(2 if engine == ENGINES[-1] else 1)
    ours = train(case.fused(make_params(dtypes), backend=use_engine(engine)), dtypes)
    exact = oracle(case, dtypes)
    theirs = stock(case, dtypes) if case.name != "Lion" else None
    # A stored value is rounded once a step, by half an ulp of at most the largest value that its tensor held; what a
    # rounded state does to the parameter is less than that again. Lion by torch's operations rounds twice.
    ulps = (2 if engine == "reference" else 1) * STEPS * torch.finfo(DTYPES[dtypes][0]).eps
    for i, (name, shape) in enumerate(SHAPES.items()):
        assert list(ours.tensors[i]) == list(exact.tensors[i])
        for key, value in exact.tensors[i].items():
            got, tolerance = ours.tensors[i][key], ulps * exact.peaks[i][key]
            assert got.shape == value.shape
            if value.numel() == 0:
                continue
            error = (got - value).abs()
            if exact.doubtful is not None and key == "param":
                assert error.max() <= 2 * STEPS * float(case.options["lr"]) + tolerance
                error = error[~exact.doubtful[i]]
                assert error.numel() > 0.8 * value.numel() or value.numel() == 1
                error = torch.cat([error.flatten(), torch.zeros(1, dtype=torch.float64)])
            stock_error = (theirs.tensors[i][key] - value).abs().max() if theirs else 0.0
            assert error.max() <= stock_error + tolerance, f"{name} {key}"
            if theirs and (engine == "reference" or not shape.fuses):
                assert torch.equal(got, theirs.tensors[i][key]), (
                    f"{name} {key}: torch's own functional, so torch's bits"
                )


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_report_says_where_and_why(dtypes):
    optimizer = fusedopt.optim.AdamW(make_params(dtypes), backend="cpu")
    train(optimizer, dtypes, 1)
    for row, (name, shape) in zip(optimizer.backend_report(), SHAPES.items(), strict=True):
        assert row.backend == ("cpu" if shape.fuses else "reference"), name
        assert row.reason == ("strides with gaps or overlaps" if not shape.fuses else f"native, {ENGINES[1]}")
        assert (row.group, row.shape, row.dtype) == (0, tuple(shape.param(row.dtype).shape), DTYPES[dtypes][0])
