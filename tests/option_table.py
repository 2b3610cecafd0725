"""The options of a step crossed with each other: which go together, one run of them, and the same run in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import papers
import torch
from optim_table import DTYPES, ENGINES, Case, Shape, _empty, values
from torch import Tensor, nn

from fusedopt.optim import precision

# No moment of the gradients below underflows in float16 after two steps, nor does decay cancel a gradient.
CASES = [
    Case("Adam", {"lr": 0.01, "betas": (0.9, 0.95), "amsgrad": True, "weight_decay": 0.01}),
    Case("AdamW", {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "centered": True}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    Case("SGD", {"lr": 0.1}),
    Case("Lion", {"lr": 0.01, "weight_decay": 0.1}),
    Case("LAMB", {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}),
]
SQUARES = ("Adam", "AdamW", "RMSprop", "Adagrad", "LAMB")  # have a state without a sign
FACTORS = {
    "case": CASES,
    "engine": ENGINES,
    "dtypes": list(DTYPES),
    "state_dtype": [None, torch.float32, torch.bfloat16, "8bit"],
    "master_weights": [False, True],
    "stochastic_rounding": [False, True],
    "max_norm": [None, 30.0],  # of about 54
    "skip_non_finite": [False, True],
    "scaler": ["none", "scales", "scales and finds inf"],
    "ema_decay": [None, 0.75],
}
OPTIONS = ("state_dtype", "master_weights", "stochastic_rounding", "max_norm", "skip_non_finite", "ema_decay")
SHAPES = {
    "zero-dim": Shape(_empty()),
    "size-0": Shape(_empty(3, 0)),
    "small": Shape(_empty(5, 7)),
    "codes": Shape(lambda dtype: torch.empty(17, 257, dtype=dtype).t()),  # 17 blocks of 256 and one of 17
    "param-with-gaps": Shape(lambda dtype: torch.empty(6, 14, dtype=dtype)[:, ::2], _empty(6, 7), fuses=False),
    "idle": Shape(_empty(11)),  # never has a gradient
}
STEPS = 5
NON_FINITE, FOUND_INF = 2, 3  # the steps that are left out, where the options leave any out
SCALE = 1024.0


def reason_against(
    name: str, dtype: torch.dtype, state_dtype: torch.dtype | str | None, master: bool, stochastic: bool
) -> tuple[str, str] | None:
    """The option that cannot be, and a word of the reason; None where all of them can."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    if state_dtype is not None and dtype == torch.float64:
        return "state_dtype", "as wide as it is"
    if master and not narrow:
        return "master_weights", "lack of a float32" if dtype == torch.float64 else "are whole"
    rounded = torch.bfloat16 in (dtype if state_dtype is None else state_dtype, None if master else dtype)
    if stochastic and not (rounded or (state_dtype == "8bit" and name in SQUARES)):
        return "stochastic_rounding", "bfloat16"
    return None


def possible(case: Case, engine: str, dtypes: str, state_dtype: Any, master_weights: bool, stochastic_rounding: bool):
    if engine == "reference" and dtypes.endswith("f32-grads") and not (master_weights or state_dtype is not None):
        return False  # torch's functions take gradients of the parameter's dtype only
    given = case.name, DTYPES[dtypes][0], state_dtype, master_weights, stochastic_rounding
    return reason_against(*given) is None


def make_params(dtypes: str) -> list[nn.Parameter]:
    dtype, grad_dtype = DTYPES[dtypes]
    params = []
    for seed, shape in enumerate(SHAPES.values()):
        data = shape.param(dtype)
        params.append(nn.Parameter(data.copy_(values(data.shape, seed))))
        if grad_dtype != dtype and shape.fuses:
            params[-1].grad_dtype = grad_dtype
    return params


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Of each step its own, in magnitude 0.25 to 1.25, but each element's of one sign.

    So no moment cancels or changes its sign, which would magnify the rounding of what is kept.
    """
    for seed, (param, shape) in enumerate(zip(params[:-1], SHAPES.values(), strict=False)):
        grad = (shape.grad or shape.param)(param.grad_dtype or param.dtype)
        exact = values(grad.shape, 1000 * step + seed).abs() * values(grad.shape, 900 + seed).sign()
        param.grad = grad.copy_(exact).mul_(scale)


def step_of(optimizer: torch.optim.Optimizer, scaler: str, found_inf: bool) -> None:
    """As GradScaler calls it."""
    if scaler != "none":
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(float(found_inf))
    optimizer.step()
    if scaler != "none":
        del optimizer.grad_scale, optimizer.found_inf


def left_out(row: dict[str, Any]) -> set[int]:
    steps = {NON_FINITE} if row["skip_non_finite"] else set()
    return steps | ({FOUND_INF} if "inf" in row["scaler"] else set())


def double(tensor: Tensor) -> Tensor:
    """A float64 copy without gaps."""
    return tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


class Exact(NamedTuple):
    """What one parameter is after a run in float64."""

    param: Tensor
    average: Tensor | None
    state: dict[str, Any]
    path: float  # how far its farthest element has moved, summed over the steps


class Oracle:
    """A run of torch.optim, or of a paper's formula, in float64, gradients clipped and averages kept by hand."""

    def __init__(self, case: Case, params: list[nn.Parameter], max_norm: float | None, ema_decay: float | None):
        self.params = [nn.Parameter(double(p.detach())) for p in params]
        self.averages: list[Tensor] | None = None
        self.max_norm, self.ema_decay = max_norm, ema_decay
        self.paths = [0.0 for _ in params]
        make = getattr(papers if case.name in ("Lion", "LAMB") else torch.optim, case.name)
        self.optimizer = make(self.params, **case.options)
        self.norm = torch.zeros(())

    @torch.no_grad()
    def step(self, params: list[nn.Parameter]) -> None:
        """With the gradients of these, as they are rounded."""
        for p, q in zip(params, self.params, strict=True):
            q.grad = None if p.grad is None else double(p.grad)
        before = [q.detach().clone() for q in self.params]
        self.norm = nn.utils.clip_grad_norm_(self.params, self.max_norm or torch.inf)
        self.optimizer.step()
        for i, (q, old) in enumerate(zip(self.params, before, strict=True)):
            self.paths[i] += (q - old).abs().max().item() if q.numel() else 0.0
        if self.ema_decay is None:
            return
        if self.averages is None:  # the first is what the first step leaves
            self.averages = [q.detach().clone() for q in self.params]
        for average, q in zip(self.averages, self.params, strict=True):
            average.lerp_(q, 1 - self.ema_decay)

    def rows(self) -> list[Exact]:
        averages = self.averages or [None] * len(self.params)
        states = [self.optimizer.state.get(q, {}) for q in self.params]
        return [Exact(q.detach(), *rest) for q, *rest in zip(self.params, averages, states, self.paths, strict=True)]


def unit_of_state(optimizer: Any, param: Tensor) -> float:
    """By how much of itself storing a state changes it, at most.

    8-bit: of a block whose smallest value is 0.2 of its largest (squares: 0.04), as the gradients' magnitudes have it,
    where half a code is 0.5 / 127 / u * 2 (squares: 0.5 / 255 / u * 4), with u = 0.2 ** 0.5 (0.04 ** 0.25).
    """
    kind, stochastic = optimizer._state_kind(param), optimizer.stochastic_rounding
    if kind == "8bit":
        return 0.018 * (1 + stochastic)
    return torch.finfo(kind).eps / 2 * (1 + (stochastic and kind == torch.bfloat16))


def allowed(optimizer: Any, param: Tensor, exact: Exact, steps: int, by_torch: bool) -> tuple[float, float]:
    """By how much the weight may be off, and by which part of themselves its states: what the kept precision allows."""
    group, plain = optimizer.param_groups[0], not optimizer._precision.on
    states = len(optimizer._states(group))
    arithmetic = 2.0**-20 if param.dtype != torch.float64 else 2.0**-46
    if plain and by_torch:  # torch's functions round at every operation
        arithmetic += 4 * torch.finfo(param.dtype).eps
    # each state as it was stored a step ago, and one that a small difference of two stands for
    part = steps * (states * unit_of_state(optimizer, param) * (3 if group.get("centered") else 1) + arithmetic)
    whole = "master" in optimizer.state.get(param, {})
    unit = torch.finfo(torch.promote_types(param.dtype, torch.float32) if whole else param.dtype).eps / 2
    unit *= 1 + (optimizer.stochastic_rounding and param.dtype == torch.bfloat16)
    largest = exact.param.abs().max().item()
    return part * exact.path + steps * (3 if plain and by_torch else 1) * (unit + arithmetic / 16) * largest, part


def kept(optimizer: Any, param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight and its states, master and codes read, in float64."""
    state = optimizer.state.get(param, {})
    view = precision.View(param, state, optimizer._states(optimizer.param_groups[0]))
    return view.weight.double(), {key: value.double() for key, value in view.values.items()}
