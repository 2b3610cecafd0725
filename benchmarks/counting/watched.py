"""What runs under valgrind, `python -m benchmarks.counting.watched MARKS`: all work that is counted, at two sizes.

MARKS is the library compiled from marks.c. The difference of two sizes is free of what a call costs whatever its size.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedopt import optim
from fusedopt.nn.functional import cross_entropy, linear_cross_entropy, mse_loss

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], Any]


class Work(NamedTuple):
    """One kind of work; `make(size)` gets all ready that is not counted, and returns the call that is."""

    name: str
    make: Callable[[int], Call]
    sizes: tuple[int, int]
    unit: str = "element"
    of: str = "kernels"  # or "norm", "host": whose instructions, see callgrind.counts
    units: int = 1  # to one of size


# name, class, options. Not of every combination: what has a loop of its own.
RULES: tuple[tuple[str, type, dict[str, Any]], ...] = (
    ("adam", optim.Adam, {}),
    ("adam amsgrad", optim.Adam, {"amsgrad": True}),
    ("adamw", optim.AdamW, {}),
    ("adamw amsgrad", optim.AdamW, {"amsgrad": True}),
    ("rmsprop", optim.RMSprop, {}),
    ("rmsprop centered", optim.RMSprop, {"centered": True}),
    ("rmsprop momentum", optim.RMSprop, {"momentum": 0.9}),
    ("rmsprop centered momentum", optim.RMSprop, {"centered": True, "momentum": 0.9}),
    ("adagrad", optim.Adagrad, {}),
    ("sgd", optim.SGD, {"lr": 1e-3}),
    ("sgd momentum", optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    ("lion", optim.Lion, {}),
    ("lamb", optim.LAMB, {"weight_decay": 0.01}),  # without, it needs no norms
)
PRECISIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("adamw 8-bit", "f32", {"state_dtype": "8bit"}),
    ("adamw 8-bit", "bf16", {"state_dtype": "8bit"}),
    ("adamw 8-bit stochastic", "bf16", {"state_dtype": "8bit", "stochastic_rounding": True}),
    ("adamw clip ema", "f32", {"max_norm": 1.0, "ema_decay": 0.999}),
    ("adamw clip ema", "bf16", {"max_norm": 1.0, "ema_decay": 0.999}),
    ("adamw stochastic", "bf16", {"stochastic_rounding": True}),
    ("adamw master", "bf16", {"master_weights": True}),
)
STEP_SIZES = (8192, 24576)  # elements: whole blocks and codes, one thread's share, and long enough to look ahead
LOSS_SIZES = (4096, 12288)  # classes
ROWS = 4
TENSOR_COUNTS = (1000, 2000)
SMALL = 64  # elements


def stepping(cls: type, options: dict[str, Any], dtype: torch.dtype, shapes: list[int]) -> optim.AdamW:
    """An optimizer whose states are there and whose tensors are known."""
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    optimizer = cls(params, **options)
    for _ in range(2):
        optimizer.step()
    return optimizer


def one_tensor(cls: type, options: dict[str, Any], dtype: torch.dtype, size: int) -> Call:
    return stepping(cls, options, dtype, [size]).step


def small_tensors(options: dict[str, Any], moved: bool, count: int) -> Call:
    optimizer = stepping(optim.AdamW, options, torch.float32, [SMALL] * count)
    if moved:  # as after zero_grad(set_to_none=True)
        kept = [p.grad for group in optimizer.param_groups for p in group["params"]]
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.grad.clone()
        optimizer.kept = kept  # so that no new gradient lies where an old one lay
    return optimizer.step


def _loss(loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Call:
    def forward_and_backward() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss(*inputs, **options).backward()

    forward_and_backward()
    return forward_and_backward


def _leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def ce(dtype: torch.dtype, classes: int) -> Call:
    return _loss(cross_entropy, _leaf(dtype, ROWS, classes), torch.randint(classes, (ROWS,)))


def ce_inplace(dtype: torch.dtype, classes: int) -> Call:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits * 1, target, inplace=True)

    return _loss(loss, _leaf(dtype, ROWS, classes), torch.randint(classes, (ROWS,)))


def linear_ce(dtype: torch.dtype, classes: int) -> Call:
    hidden = 8
    inputs = _leaf(dtype, ROWS, hidden), _leaf(dtype, classes, hidden), torch.randint(classes, (ROWS,))
    return _loss(linear_cross_entropy, *inputs)


def mse(dtype: torch.dtype, size: int) -> Call:
    return _loss(mse_loss, _leaf(dtype, size), torch.randn(size).to(dtype))


def work() -> Iterator[Work]:
    for label, dtype in DTYPES.items():
        for name, cls, options in RULES:
            yield Work(f"{name} {label}", partial(one_tensor, cls, options, dtype), STEP_SIZES)
    for name, label, options in PRECISIONS:
        yield Work(f"{name} {label}", partial(one_tensor, optim.AdamW, options, DTYPES[label]), STEP_SIZES)
    for label, dtype in DTYPES.items():
        clipped = partial(one_tensor, optim.AdamW, {"max_norm": 1.0}, dtype)
        yield Work(f"norm pass {label}", clipped, STEP_SIZES, of="norm")
        yield Work(f"cross entropy {label}", partial(ce, dtype), LOSS_SIZES, "logit", units=ROWS)
        yield Work(f"cross entropy inplace {label}", partial(ce_inplace, dtype), LOSS_SIZES, "logit", units=ROWS)
        yield Work(f"linear cross entropy, softmax {label}", partial(linear_ce, dtype), LOSS_SIZES, "logit", units=ROWS)
        yield Work(f"mse {label}", partial(mse, dtype), STEP_SIZES)
    for what, options in (("", {}), (", max_norm", {"max_norm": 1.0})):
        for how, moved in (("nothing changed", False), ("gradients moved", True)):
            yield Work(f"host{what}, {how}", partial(small_tensors, options, moved), TENSOR_COUNTS, "tensor", "host")


def main(marks: ctypes.CDLL) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    # all is made ready first: what callgrind has translated is thrown away when it is switched on or off
    calls = [(f"{kind.name}|{size}".encode(), kind.make(size)) for kind in work() for size in kind.sizes]
    marks.start()
    for part, call in calls:
        marks.begin()
        call()
        marks.end(part)
    marks.stop()


if __name__ == "__main__":
    main(ctypes.CDLL(sys.argv[1]))
