"""The table that drives the optimizer tests: cases, dtypes, layouts, engines, and the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import papers
import torch
from torch import Tensor

import fusedopt.optim
from fusedopt.backends import cpu

STEPS = 5


class Case(NamedTuple):
    """An optimizer and its options."""

    name: str
    options: dict[str, Any] = {}

    def __str__(self) -> str:
        options = (
            f"{key}={value.item() if isinstance(value, Tensor) else value}" for key, value in self.options.items()
        )
        return "-".join([self.name, *options])

    def fused(self, params: Any, **keywords: Any) -> torch.optim.Optimizer:
        return getattr(fusedopt.optim, self.name)(params, **self.options, **keywords)

    def stock(self, params: Any, **keywords: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.name)(params, **self.options, **keywords)


# Tensors are powers of two: the same number in every dtype.
CASES = [
    Case("Adam"),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("Adam", {"lr": 0.01, "amsgrad": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    Case("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    Case("Adam", {"lr": 0.01, "betas": (0.3, 0.8), "eps": 1e-3}),  # beta1 < 0.5: lerp's other end
    Case("Adam", {"lr": torch.tensor(2.0**-7)}),
    Case("AdamW"),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.3, "maximize": True}),
    Case("AdamW", {"lr": 0.01, "amsgrad": True}),
    Case("AdamW", {"lr": torch.tensor(2.0**-7), "betas": (0.0, 0.5)}),
    Case("RMSprop"),
    Case("RMSprop", {"weight_decay": 0.1, "maximize": True, "lr": torch.tensor(2.0**-7)}),
    Case("RMSprop", {"momentum": 0.9}),
    Case("RMSprop", {"centered": True, "alpha": 0.9}),
    Case("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-3}),
    Case("Adagrad"),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}),
    Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.25, "maximize": True}),
    Case("Adagrad", {"lr": torch.tensor(2.0**-5), "eps": 1e-3}),
    Case("SGD", {"lr": 0.1}),
    Case("SGD", {"lr": torch.tensor(2.0**-4), "weight_decay": 0.5, "maximize": True}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    Case("Lion", {"lr": 0.01}),
    Case("Lion", {"lr": torch.tensor(2.0**-7), "weight_decay": 0.5}),
    Case("Lion", {"lr": 0.01, "betas": (0.4, 0.6), "maximize": True}),
]
ONE_EACH = [
    Case("Adam", {"lr": 0.01, "amsgrad": True}),
    Case("AdamW", {"lr": 0.01}),
    Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    Case("SGD", {"lr": 0.1}),
]
WITH_LION = [*ONE_EACH, Case("Lion", {"lr": 0.01})]

DTYPES = {
    "f32": (torch.float32, torch.float32),
    "f64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "bf16-f32-grads": (torch.bfloat16, torch.float32),
    "f16-f32-grads": (torch.float16, torch.float32),
}

# "reference", and every instruction set that this machine runs
ENGINES = ["reference", *(cpu._native.cpu_isas() if cpu.available() is True else [])]


def use_engine(engine: str) -> str:
    """Switch the instruction set; returns the value of `backend=`. tests/conftest.py switches back."""
    if engine == "reference":
        return "reference"
    assert cpu._native.use_cpu_isa(engine)
    return "cpu"


class Shape(NamedTuple):
    """How a parameter and its gradient lie in memory: both views of fresh storage, to be filled."""

    param: Callable[[torch.dtype], Tensor]
    grad: Callable[[torch.dtype], Tensor] | None = None  # None: as the parameter
    fuses: bool = True


def _empty(
    *shape: int, memory_format: torch.memory_format = torch.contiguous_format
) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype, memory_format=memory_format)


SHAPES = {
    "zero-dim": Shape(_empty()),
    "size-0": Shape(_empty(3, 0, 2)),
    "size-1": Shape(_empty(1)),
    "prime": Shape(_empty(13, 31)),
    "odd": Shape(_empty(7, 9, 5)),
    "channels-last": Shape(_empty(4, 3, 5, 6, memory_format=torch.channels_last)),
    "transposed": Shape(lambda dtype: torch.empty(17, 12, dtype=dtype).t()),
    "unaligned": Shape(lambda dtype: torch.empty(1000, dtype=dtype)[3:968]),
    "over-a-block": Shape(_empty(70001)),
    "grad-of-other-strides": Shape(_empty(4, 3, 5, 6), _empty(4, 3, 5, 6, memory_format=torch.channels_last)),
    "grad-with-gaps": Shape(_empty(11, 8), lambda dtype: torch.empty(11, 16, dtype=dtype)[:, ::2]),
    "grad-unaligned": Shape(_empty(515), lambda dtype: torch.empty(600, dtype=dtype)[1:516]),
    "param-with-gaps": Shape(lambda dtype: torch.empty(10, 14, dtype=dtype)[:, ::2], _empty(10, 7), fuses=False),
}


@functools.cache
def values(shape: torch.Size, seed: int) -> Tensor:
    """Signed float64 numbers of magnitude 0.25 to 1.25.

    No square underflows in float16, whose stock Adam would divide 0 by 0, and no L2 decay of 0.1 cancels a gradient,
    which would magnify its rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.25
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return magnitude * sign


def make_params(
    dtypes: str, *, double: bool = False, same_grad: bool = False, device: str = "cpu"
) -> list[torch.nn.Parameter]:
    """One parameter per row of SHAPES, rounded to the dtype; as plain float64 copies if `double`."""
    dtype, grad_dtype = DTYPES[dtypes]
    params = []
    for seed, shape in enumerate(SHAPES.values()):
        with torch.device(device):
            data = shape.param(dtype)
        data.copy_(values(data.shape, seed))
        param = torch.nn.Parameter(data.double().contiguous() if double else data)
        if grad_dtype != dtype and shape.fuses and not double and not same_grad:
            param.grad_dtype = grad_dtype
        params.append(param)
    return params


def set_grads(params: list[torch.nn.Parameter], dtypes: str, step: int) -> None:
    """The gradients of one step, the same for every copy of the parameters; Shape says where they lie.

    Where torch's functional must do the work the gradient has the parameter's dtype: it takes no other.
    """
    dtype, grad_dtype = DTYPES[dtypes]
    for seed, (param, shape) in enumerate(zip(params, SHAPES.values(), strict=True)):
        with param.device:
            grad = (shape.grad or shape.param)(param.grad_dtype or param.dtype)
        grad.copy_(values(grad.shape, 1000 * step + seed).to(grad_dtype if shape.fuses else dtype))
        param.grad = grad


def train(optimizer: torch.optim.Optimizer, dtypes: str, steps: int = STEPS) -> Outcome:
    """Take the steps; returns what they leave."""
    params = optimizer.param_groups[0]["params"]
    peaks = [{} for _ in params]
    for step in range(1, steps + 1):
        set_grads(params, dtypes, step)
        optimizer.step()
        rows = [{"param": p, **optimizer.state.get(p, {})} for p in params]
        rows = [
            {key: torch.as_tensor(t).detach().cpu().double().contiguous() for key, t in row.items()} for row in rows
        ]
        note_peaks(peaks, rows)
    return Outcome(rows, peaks)


class Outcome(NamedTuple):
    """What an optimizer leaves, in float64: a dict of tensors per parameter, "param" and the state."""

    tensors: list[dict[str, Tensor]]
    peaks: list[dict[str, float]]  # the largest magnitude that each held after any step
    doubtful: list[Tensor] | None = None  # elements where the sign is decided by rounding


def note_peaks(peaks: list[dict[str, float]], rows: list[dict[str, Tensor]]) -> None:
    for peak, row in zip(peaks, rows, strict=True):
        for key, tensor in row.items():
            peak[key] = max(peak.get(key, 0.0), tensor.abs().max().item() if tensor.numel() else 0.0)


def lion_oracle(options: dict[str, Any], dtypes: str) -> Outcome:
    """Lion in float64, and which elements' signs rounding decides."""
    eps = torch.finfo(DTYPES[dtypes][0]).eps
    params = make_params(dtypes, double=True)
    optimizer = papers.Lion(params, **{**options, "lr": float(options["lr"])})
    peaks = [{} for _ in params]
    doubtful = [torch.zeros_like(p, dtype=torch.bool) for p in params]
    for step in range(1, STEPS + 1):
        set_grads(params, dtypes, step)
        averages = [optimizer.state[p].get("exp_avg", torch.zeros_like(p)).clone() for p in params]
        optimizer.step()
        for param, average, doubt in zip(params, averages, doubtful, strict=True):
            # the stored average is off by half an ulp per step
            doubt |= optimizer.state[param]["direction"].abs() <= 4 * eps * (average.abs() + param.grad.abs())
        rows = [{"param": p.detach(), "exp_avg": optimizer.state[p]["exp_avg"]} for p in params]
        note_peaks(peaks, rows)
    return Outcome(rows, peaks, doubtful)


@functools.cache
def _oracle(key: int, dtypes: str) -> Outcome:
    case = CASES[key]
    options = {k: v.item() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    if case.name == "Lion":
        return lion_oracle(options, dtypes)
    return train(Case(case.name, options).stock(make_params(dtypes, double=True), foreach=False), dtypes)


@functools.cache
def _stock(key: int, dtypes: str) -> Outcome:
    return train(CASES[key].stock(make_params(dtypes, same_grad=True), foreach=False), dtypes)


def oracle(case: Case, dtypes: str) -> Outcome:
    """The case in float64 from the same rounded parameters and gradients: stock, or for Lion the paper's formula."""
    return _oracle(CASES.index(case), dtypes)


def stock(case: Case, dtypes: str) -> Outcome:
    """The case by stock single-tensor torch.optim in the same dtype (gradients too: it takes no others)."""
    return _stock(CASES.index(case), dtypes)


def no_further_from_float64_than_stock(
    ours: Outcome, case: Case, dtypes: str, roundings: int = 1, *, torchs_bits: Callable[[Shape], bool]
) -> int:
    """Assert it of every tensor, and of some that they have torch's very bits; returns how many were compared.

    A stored value is rounded once a step, by half an ulp of at most the largest value that its tensor held; what a
    rounded state does to the parameter is less than that again. `roundings`: where it is rounded more often.
    """
    exact = oracle(case, dtypes)
    theirs = stock(case, dtypes) if case.name != "Lion" else None
    ulps = roundings * STEPS * torch.finfo(DTYPES[dtypes][0]).eps
    compared = 0
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
            assert error.max() <= stock_error + tolerance, f"{case} {dtypes} {name} {key}"
            if theirs and torchs_bits(shape):
                assert torch.equal(got, theirs.tensors[i][key]), f"{name} {key}: torch's own functional"
            compared += 1
    return compared


def close(actual: Tensor, expected: Tensor, ulps: float = 16) -> None:
    """Equal but for rounding: `ulps` ulps of the expected tensor's largest element; NaN and infinities alike."""
    assert (actual.shape, actual.dtype, actual.layout) == (expected.shape, expected.dtype, expected.layout)
    actual, expected = (t.detach().to_dense().resolve_conj() for t in (actual, expected))
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if expected.numel() else 0.0
    tolerance = ulps * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer, ulps: float = 16) -> None:
    """Parameters and state of two optimizers: the same keys in the same order, and values that are close."""
    for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            close(p, q, ulps)
            state_p, state_q = a.state.get(p, {}), b.state.get(q, {})
            assert list(state_p) == list(state_q)
            for key in state_q:
                if not isinstance(state_q[key], Tensor):
                    assert state_p[key] == state_q[key]
                elif key == "step":
                    assert float(state_p[key]) == float(state_q[key])
                else:
                    close(state_p[key], state_q[key], ulps)
