"""Every optimizer and option against the same algorithm in float64, on every engine, dtype and layout."""

import pytest
import torch
from optim_table import CASES, DTYPES, ENGINES, SHAPES, STEPS, make_params, oracle, outcome, stock, train, use_engine

import fusedopt.optim


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_float64_than_stock(case, dtypes, engine):
    if engine == "reference" and dtypes.endswith("grads") and case.name != "Lion":
        pytest.skip("stock takes gradients of the parameter's dtype only")
    optimizer = case.fused(make_params(dtypes), backend=use_engine(engine))
    train(optimizer, dtypes)
    exact, ours = oracle(case, dtypes), outcome(optimizer)
    theirs = stock(case, dtypes) if case.name != "Lion" else None
    # A stored value is rounded once a step, by half an ulp of at most the tensor's largest value; what a rounded state
    # does to the parameter is less than that again. Lion by torch's operations rounds the parameter twice.
    ulps = (2 if engine == "reference" else 1) * STEPS * torch.finfo(DTYPES[dtypes][0]).eps
    for i, (name, shape) in enumerate(SHAPES.items()):
        assert list(ours.tensors[i])[1:] == list(exact.tensors[i])[1:]
        for key, value in exact.tensors[i].items():
            got = ours.tensors[i][key]
            assert got.shape == value.shape
            if value.numel() == 0:
                continue
            error = (got - value).abs()
            # an average whose terms cancel is as exact as its terms: the largest value of that key is the measure
            largest = max(t[key].abs().max() for t in exact.tensors if key in t and t[key].numel())
            if exact.doubtful is not None and key == "param":
                lr = float(case.options["lr"])
                assert error.max() <= 2 * STEPS * lr * 1.01 + ulps * largest
                error = error[~exact.doubtful[i]]
                assert error.numel() > 0.8 * value.numel() or value.numel() == 1
                if error.numel() == 0:
                    continue
            stock_error = torch.zeros(())
            if theirs:
                stock_error = (theirs.tensors[i][key] - value).abs()
                # float16's eps and small squares are 0: stock divides 0 by 0, and says nothing of what is exact there
                comparable = stock_error.isfinite()
                if not comparable.all():
                    assert DTYPES[dtypes][0] == torch.float16
                    error, stock_error = error[comparable], stock_error[comparable]
                if error.numel() == 0:
                    continue
            assert error.max() <= stock_error.max() + ulps * largest, f"{name} {key}"
            if theirs and (engine == "reference" or not shape.fuses) and not dtypes.endswith("grads"):
                # torch's own functional, so torch's bits
                torch.testing.assert_close(got, theirs.tensors[i][key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_report_says_where_and_why(dtypes):
    optimizer = fusedopt.optim.AdamW(make_params(dtypes), backend="cpu")
    train(optimizer, dtypes, 1)
    for row, (name, shape) in zip(optimizer.backend_report(), SHAPES.items(), strict=True):
        assert row.backend == ("cpu" if shape.fuses else "reference"), name
        assert row.reason == ("strides with gaps or overlaps" if not shape.fuses else f"native, {ENGINES[1]}")
        assert (row.group, row.shape, row.dtype) == (0, tuple(shape.param(row.dtype).shape), DTYPES[dtypes][0])
