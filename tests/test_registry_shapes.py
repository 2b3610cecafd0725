"""The benchmarks' registry, by its own names: every model's tensors and every vocabulary against float64."""

from __future__ import annotations

from functools import partial

import loss_oracle
import pytest
import torch
from optim_table import ENGINES, use_engine, values

from benchmarks.shapes import MODELS, TENSOR_COUNTS, VOCABULARIES, numel, smaller
from fusedopt import optim as fused
from fusedopt.nn.functional import cross_entropy

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
STEPS = 3


def test_models_are_those_that_they_are_called():
    counted = {name: (len(shapes), numel(shapes)) for name, shapes in MODELS.items()}
    assert counted["gpt2-small"] == (148, 124_439_808)
    assert counted["gpt2-xl"] == (580, 1_557_611_200)
    assert counted["vit-tiny"] == (152, 5_717_416)
    assert counted["llama-1b-shard"] == (146, 1_235_814_400 // 8)
    assert counted["llama-7b-shard"] == (291, 6_738_415_616 // 16)
    assert max(TENSOR_COUNTS) == 10000 and max(VOCABULARIES.values()) == 262144


def trained(build, shapes, dtype, double=False):
    """Parameters and states, flattened into one float64 vector each, after some steps."""
    params = []
    for seed, shape in enumerate(shapes):
        data = values(torch.Size(shape), seed % 50).to(dtype)
        params.append(torch.nn.Parameter(data.double() if double else data))
    optimizer = build(params)
    for step in range(1, STEPS + 1):
        for seed, p in enumerate(params):
            p.grad = values(p.shape, 1000 * step + seed % 50).to(dtype).to(p.dtype)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    found = {"param": params} | {key: [s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")}
    return {key: torch.cat([t.detach().double().flatten() for t in tensors]) for key, tensors in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_steps_as_in_float64(model, dtype):
    """At a size that a test has time for; as many tensors, of as many dimensions."""
    shapes, dtype = smaller(MODELS[model], 1 << 12 if model.startswith("one") else 48), DTYPES[dtype]
    exact = trained(partial(torch.optim.AdamW, foreach=False), shapes, dtype, double=True)
    stock = trained(partial(torch.optim.AdamW, foreach=True), shapes, dtype)
    for engine in ENGINES:
        ours = trained(partial(fused.AdamW, backend=use_engine(engine)), shapes, dtype)
        for key, value in exact.items():
            rounding = STEPS * torch.finfo(dtype).eps * value.abs().max()  # of what is stored, once a step
            allowed = (stock[key] - value).abs().max() + rounding
            assert (ours[key] - value).abs().max() <= allowed, f"{model} {engine} {key}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_vocabulary_against_float64(vocabulary, dtype):
    inputs = loss_oracle.make((5, VOCABULARIES[vocabulary]), DTYPES[dtype])
    for engine in ENGINES:
        loss_oracle.assert_as_good_as_composition(partial(cross_entropy, backend=use_engine(engine)), *inputs)
