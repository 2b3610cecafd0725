"""Cross entropy, forward and backward, the gradient freshly allocated; allocator as installed, and on huge pages.

On a CPU the first touch of a fresh tensor's pages can cost more than all arithmetic: the allocator is part of the case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt.backends import cpu
from fusedopt.nn.functional import cross_entropy

from . import ceilings
from .runner import Case, Contender, Target, compiler_here, relative_error
from .shapes import VOCABULARIES

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch reads it at its first allocation: set it before torch is imported
ALLOCATORS = {"installed": {}, "huge-pages": HUGE_PAGES}  # name -> environment
ALLOCATOR_TITLES = {"installed": "allocator as installed", "huge-pages": "huge pages"}
SHAPES = [(512, VOCABULARIES["gpt2"]), (256, VOCABULARIES["llama-3"])]
SWEEP_ROWS = 256  # of the curve over vocabularies
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Stock rounds log p to the logits' dtype; at log p = -16 half an epsilon of that is 8 of p. Of the largest vocabulary
# log p lies below, where it is 16.
LIMIT = 16.0
STOCK_LIMIT = 32.0
CHECKED_ROWS = 16  # of the gradient; the loss is checked over all rows

RATIOS = {  # (allocator, dtype) -> ours -> over stock eager
    ("installed", "f32"): {"fusedopt": 6.0, "fusedopt inplace": 12.0},
    ("installed", "bf16"): {"fusedopt": 4.0, "fusedopt inplace": 8.0},
    ("huge-pages", "f32"): {"fusedopt": 3.0},
    ("huge-pages", "bf16"): {"fusedopt": 2.0},
}

Loss = Callable[[Tensor, Tensor], Tensor]


INPLACE = "fusedopt inplace"


def forgetting(prepare: Callable[[], None]) -> Callable[[], None]:
    """The same, and no buffer is kept from an earlier run: it must count among what a run takes."""

    def release() -> None:
        prepare()
        cpu.scratch.storage = None

    return release


def contender(name: str, loss: Loss, master: Tensor, target: Tensor, expected: tuple[Tensor, Tensor]) -> Contender:
    """A loss on its own copy of the logits, which some destroy: refilled before each run."""
    logits = master.clone().requires_grad_()  # (N, V), a leaf
    value = torch.empty(())

    def prepare() -> None:
        logits.grad = None
        with torch.no_grad():
            logits.copy_(master)

    def run() -> None:
        nonlocal value
        result = loss(logits, target)
        result.backward()
        value = result.detach()

    def error() -> float:
        prepare()
        run()
        rows = checked(master.shape[0])
        loss_error, grad_error = (
            relative_error(got, oracle, master.dtype)
            for got, oracle in zip((value, logits.grad[rows]), expected, strict=True)
        )
        return max(loss_error, grad_error)

    ceiling = ceilings.STREAM if name == INPLACE else ceilings.COPY
    limit = STOCK_LIMIT if name.startswith("torch") else None
    return Contender(name, run, error, prepare, forgetting(prepare), ceiling, limit=limit)


def checked(rows: int) -> Tensor:
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), dtype=torch.float64).long()


def oracle(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, row by row to spare memory: the mean loss, and the gradient of the checked rows."""
    n = logits.shape[0]
    losses = [x.double().logsumexp(0) - x[y].double() for x, y in zip(logits, target, strict=True)]
    rows = checked(n)
    grad = torch.softmax(logits[rows].double(), dim=1)
    grad[torch.arange(len(rows)), target[rows]] -= 1
    return torch.stack(losses).mean(), grad / n


def case(rows: int, classes: int, dtype_name: str, allocator: str, sweep: bool = False) -> Case:
    dtype = DTYPES[dtype_name]

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        master = torch.randn(rows, classes, generator=generator).to(dtype)
        target = torch.randint(classes, (rows,), generator=generator)
        torch._dynamo.reset()  # it gives up on a function that it has compiled for eight shapes
        losses: dict[str, Loss] = {
            "torch eager": F.cross_entropy,
            "torch compiled": torch.compile(F.cross_entropy, dynamic=False),
            "fusedopt": cross_entropy,
            INPLACE: partial(cross_entropy, inplace=True),
        }
        if quick or not compiler_here():  # compiling takes longer than all the rest
            del losses["torch compiled"]
        expected = oracle(master, target)
        return [contender(name, loss, master, target, expected) for name, loss in losses.items()]

    nbytes = rows * classes * 2 * dtype.itemsize  # read the logits, write the gradient
    ratios = {} if sweep else RATIOS[allocator, dtype_name]
    targets = tuple(Target(ours, "torch eager", ratio) for ours, ratio in ratios.items())
    return Case(
        f"ce-{rows}x{classes}-{dtype_name}-{'sweep-' if sweep else ''}{allocator}",
        f"cross entropy, {rows} x {classes}, {dtype_name}, {ALLOCATOR_TITLES[allocator]}",
        nbytes,
        LIMIT,
        build,
        lambda: [ceilings.copy(nbytes), ceilings.stream(nbytes)],
        targets,
        dtype_name,
        sweep=("vocabulary", classes) if sweep else None,
        quick=allocator == "installed" and (rows, dtype_name) != (512, "bf16"),
    )


def cases() -> list[Case]:
    shapes = [(allocator, shape, dtype) for allocator in ALLOCATORS for shape in SHAPES for dtype in DTYPES]
    curves = [(SWEEP_ROWS, classes, dtype) for dtype in DTYPES for classes in VOCABULARIES.values()]
    return [
        *(case(*shape, dtype, allocator) for allocator, shape, dtype in shapes),
        *(case(*point, "installed", sweep=True) for point in curves),
    ]
