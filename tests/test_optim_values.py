"""Every optimizer and option against the same algorithm in float64, on every engine, dtype and layout."""

import pytest
import torch
from optim_table import (
    CASES,
    DTYPES,
    ENGINES,
    SHAPES,
    make_params,
    no_further_from_float64_than_stock,
    train,
    use_engine,
)

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
    # Lion by torch's operations rounds twice
    roundings = 2 if engine == "reference" else 1
    no_further_from_float64_than_stock(
        ours, case, dtypes, roundings, torchs_bits=lambda shape: engine == "reference" or not shape.fuses
    )


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_report_says_where_and_why(dtypes):
    optimizer = fusedopt.optim.AdamW(make_params(dtypes), backend="cpu")
    train(optimizer, dtypes, 1)
    for row, (name, shape) in zip(optimizer.backend_report(), SHAPES.items(), strict=True):
        assert row.backend == ("cpu" if shape.fuses else "reference"), name
        assert row.reason == ("strides with gaps or overlaps" if not shape.fuses else f"native, {ENGINES[1]}")
        assert (row.group, row.shape, row.dtype) == (0, tuple(shape.param(row.dtype).shape), DTYPES[dtypes][0])
