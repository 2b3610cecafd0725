"""Losses over dense maps, forward and backward: cross entropy of images as they lie, and the mean squared error."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt.nn.functional import cross_entropy, mse_loss

from . import ceilings
from .cases_loss import ALLOCATOR_TITLES, ALLOCATORS, forgetting
from .runner import Case, Contender, Target, compiler_here, relative_error
from .shapes import DENSE_ELEMENTS, IMAGES

ELEMENTS = DENSE_ELEMENTS
LIMIT = 16.0
CHECKED = 1 << 16  # elements of the gradient, or pixels

Loss = Callable[[Tensor, Tensor], Tensor]
Oracle = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # -> loss, the checked part of the gradient


def contender(
    name: str, loss: Loss, input: Tensor, target: Tensor, expected: tuple[Tensor, Tensor], checked: Callable
) -> Contender:
    leaf = input.clone().requires_grad_()
    value = torch.empty(())

    def prepare() -> None:
        leaf.grad = None

    def run() -> None:
        nonlocal value
        result = loss(leaf, target)
        result.backward()
        value = result.detach()

    def error() -> float:
        prepare()
        run()
        found = (value, checked(leaf.grad))
        return max(relative_error(got, oracle, input.dtype) for got, oracle in zip(found, expected, strict=True))

    return Contender(name, run, error, prepare, forgetting(prepare))


def contenders(
    stock: Loss, ours: Loss, input: Tensor, target: Tensor, oracle: Oracle, checked: Callable, quick: bool
) -> list[Contender]:
    losses = {"torch eager": stock, "torch compiled": torch.compile(stock, dynamic=False), "fusedopt": ours}
    if quick or not compiler_here():
        del losses["torch compiled"]
    expected = oracle(input, target)
    return [contender(name, loss, input, target, expected, checked) for name, loss in losses.items()]


def first_pixels(grad: Tensor) -> Tensor:
    return grad[0].flatten(1)[:, :CHECKED]


def first_elements(grad: Tensor) -> Tensor:
    return grad[:CHECKED]


def image_oracle(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, image by image: the mean loss, and the gradient of the first pixels of the first image."""
    total = sum(
        F.cross_entropy(x[None].double(), t[None], reduction="sum") for x, t in zip(logits, target, strict=True)
    )
    first = logits[0].flatten(1)[:, :CHECKED].double().requires_grad_()
    F.cross_entropy(first.t(), target[0].flatten()[:CHECKED], reduction="sum").backward()
    return total / target.numel(), first.grad / target.numel()


def mse_oracle(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    parts = zip(input.split(1 << 22), target.split(1 << 22), strict=True)
    total = sum((a.double() - b.double()).square_().sum() for a, b in parts)
    first = (input[:CHECKED].double() - target[:CHECKED].double()) * 2
    return total / input.numel(), first / input.numel()


def images(allocator: str) -> Case:
    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(IMAGES, generator=generator)
        target = torch.randint(IMAGES[1], (IMAGES[0], *IMAGES[2:]), generator=generator)
        return contenders(F.cross_entropy, cross_entropy, logits, target, image_oracle, first_pixels, quick)

    nbytes = 2 * 4 * math.prod(IMAGES)  # read the logits, write the gradient
    return Case(
        f"ce-images-{'x'.join(map(str, IMAGES))}-f32-{allocator}",
        f"cross entropy, images {IMAGES}, f32, {ALLOCATOR_TITLES[allocator]}",
        nbytes,
        LIMIT,
        build,
        lambda: [ceilings.copy(nbytes)],
        (Target("fusedopt", "torch eager", 2.0),),
        quick=allocator == "installed",
    )


def mse(allocator: str) -> Case:
    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator().manual_seed(0)
        input, target = torch.randn(2, ELEMENTS, generator=generator)
        return contenders(F.mse_loss, mse_loss, input, target, mse_oracle, first_elements, quick)

    nbytes = 3 * 4 * ELEMENTS  # read input and target, write the gradient
    return Case(
        f"mse-64M-f32-{allocator}",
        f"mean squared error, 64 M elements, f32, {ALLOCATOR_TITLES[allocator]}",
        nbytes,
        LIMIT,
        build,
        lambda: [ceilings.copy(nbytes)],
        (Target("fusedopt", "torch eager", 1.8),),
        quick=allocator == "installed",
    )


def cases() -> list[Case]:
    return [case(allocator) for allocator in ALLOCATORS for case in (images, mse)]
