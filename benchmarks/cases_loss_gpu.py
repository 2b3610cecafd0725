"""Losses on a GPU, forward and backward: against the device's own copy, torch, and the peers that are installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt import backends
from fusedopt.nn.functional import cross_entropy, mse_loss

from . import cases_loss, cases_loss_dense, ceilings, peers
from .runner import Case, Contender, Target, compiler_here, relative_error
from .shapes import IMAGES, VOCABULARIES

DEVICE = "cuda"
ROWS = {"32k": 16384, "gpt2": 8192, "llama-3": 8192, "gemma": 4096}
SHAPES = [(rows, VOCABULARIES[name]) for name, rows in ROWS.items()]  # float32: half as many rows
ELEMENTS = cases_loss_dense.ELEMENTS
SWEEP_ROWS = 4096  # of the curve over vocabularies
DTYPES = cases_loss.DTYPES
LIMIT = cases_loss.LIMIT
CHECKED = 16  # rows of the gradient
PEERS = "cross-entropy"  # their kind
IN_A_ROW = 4  # as in training nobody waits for a loss before what follows is queued

Loss = Callable[[Tensor, Tensor], Tensor]


def ours() -> dict[str, str]:
    """Contender -> backend: the fastest, and Triton beside it where that is another."""
    named = {"fusedopt": "cuda", "fusedopt triton": "triton"}
    return {name: backend for name, backend in named.items() if backends.available()[backend] is True}


def contender(
    name: str,
    loss: Loss,
    master: Tensor,
    target: Tensor,
    expected: tuple[Tensor, Tensor],
    checked: Callable[[Tensor], Tensor],
    destroys: bool = False,  # its input: it gets a copy, restored before each turn
    version: str | None = None,  # of a peer
) -> Contender:
    """Its runs may be queued one after the other: each drops the gradient of the one before."""
    leaf = (master.clone() if destroys else master.detach()).requires_grad_()
    value = torch.empty(())

    def prepare() -> None:
        if destroys:
            with torch.no_grad():
                leaf.copy_(master)

    def run() -> None:
        nonlocal value
        leaf.grad = None
        result = loss(leaf, target)
        result.backward()
        value = result.detach()

    def error() -> float:
        prepare()
        run()
        found = (value, checked(leaf.grad))
        return max(relative_error(got, oracle, master.dtype) for got, oracle in zip(found, expected, strict=True))

    limit = cases_loss.STOCK_LIMIT if name.startswith("torch") else None
    return Contender(name, run, error, prepare, version=version, limit=limit)


def contenders(
    stock: Loss,
    fused: Loss,
    input: Tensor,
    target: Tensor,
    oracle: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    checked: Callable[[Tensor], Tensor],
    quick: bool,
    others: str = "",  # the kind of the peers that take part
) -> list[Contender]:
    losses: dict[str, Loss] = {"torch eager": stock}
    if compiler_here() and not quick:
        torch._dynamo.reset()  # it gives up on a function that it has compiled for eight shapes
        losses["torch compiled"] = torch.compile(stock, dynamic=False)
    losses |= {name: partial(fused, backend=backend) for name, backend in ours().items()}
    found = peers.found(others, "cuda")
    with torch.device(DEVICE):  # where an oracle makes its indices
        expected = oracle(input, target)
    return [
        *(contender(name, loss, input, target, expected, checked) for name, loss in losses.items()),
        *(contender(name, loss, input, target, expected, checked, True, peers.version(name))
          for name, loss in found.items()),
    ]  # fmt: skip


def rows_case(rows: int, classes: int, dtype_name: str, sweep: bool = False) -> Case:
    dtype = DTYPES[dtype_name]

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator, device=DEVICE).to(dtype)
        target = torch.randint(classes, (rows,), generator=generator, device=DEVICE)
        some = lambda grad: grad[cases_loss.checked(rows)]  # noqa: E731
        return contenders(F.cross_entropy, cross_entropy, logits, target, cases_loss.oracle, some, quick, PEERS)

    targets = [
        Target("fusedopt", "torch eager", 3.5),
        Target("fusedopt", "torch compiled", 2.0),
        Target("fusedopt", "liger", 2.0),
    ]
    if dtype == torch.bfloat16:
        targets.append(Target("fusedopt", ceilings.COPY, 0.85))
    nbytes = rows * classes * 2 * dtype.itemsize  # read the logits, write the gradient
    return Case(
        f"gpu-ce-{rows}x{classes}-{dtype_name}{'-sweep' if sweep else ''}",
        f"cross entropy, {rows} x {classes}, {dtype_name}",
        nbytes,
        LIMIT,
        build,
        partial(ceilings.memory, nbytes, DEVICE),
        () if sweep else tuple(targets),
        dtype_name,
        DEVICE,
        IN_A_ROW,
        absent=lambda: peers.absent(PEERS, "cuda"),
        memory=nbytes * 5,
        sweep=("vocabulary", classes) if sweep else None,
    )


def images_case() -> Case:
    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        logits = torch.randn(IMAGES, generator=generator, device=DEVICE)
        target = torch.randint(IMAGES[1], (IMAGES[0], *IMAGES[2:]), generator=generator, device=DEVICE)
        oracle, some = cases_loss_dense.image_oracle, cases_loss_dense.first_pixels
        return contenders(F.cross_entropy, cross_entropy, logits, target, oracle, some, quick)

    nbytes = 2 * 4 * math.prod(IMAGES)
    return Case(
        f"gpu-ce-images-{'x'.join(map(str, IMAGES))}-f32",
        f"cross entropy, images {IMAGES}, f32",
        nbytes,
        LIMIT,
        build,
        partial(ceilings.memory, nbytes, DEVICE),
        in_a_row=IN_A_ROW,
        device=DEVICE,
    )


def mse_case(dtype_name: str) -> Case:
    dtype = DTYPES[dtype_name]

    def build(quick: bool) -> list[Contender]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        input, target = (torch.randn(ELEMENTS, generator=generator, device=DEVICE).to(dtype) for _ in range(2))
        oracle, some = cases_loss_dense.mse_oracle, cases_loss_dense.first_elements
        return contenders(F.mse_loss, mse_loss, input, target, oracle, some, quick)

    nbytes = 3 * dtype.itemsize * ELEMENTS  # read input and target, write the gradient
    return Case(
        f"gpu-mse-64M-{dtype_name}",
        f"mean squared error, 64 M elements, {dtype_name}",
        nbytes,
        LIMIT,
        build,
        partial(ceilings.memory, nbytes, DEVICE),
        (Target("fusedopt", ceilings.COPY, 0.85),),
        dtype_name,
        DEVICE,
        IN_A_ROW,
    )


def cases() -> list[Case]:
    rows = [
        rows_case(rows // (dtype.itemsize // 2), classes, name)
        for rows, classes in SHAPES
        for name, dtype in reversed(DTYPES.items())
    ]
    curve = [rows_case(SWEEP_ROWS, classes, "bf16", sweep=True) for classes in VOCABULARIES.values()]
    return [*rows, images_case(), *map(mse_case, DTYPES), *curve]
