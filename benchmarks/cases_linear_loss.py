"""Linear cross entropy, forward and backward: hidden states (N, H) and a head (V, H), gradients of both.

The ceiling is not memory but arithmetic: the three matrix products that the work consists of, into memory that is
there already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt.nn import chunks
from fusedopt.nn.functional import linear_cross_entropy

from . import peers
from .cases_loss import forgetting
from .runner import Case, Contender, Target, relative_error
from .shapes import LINEAR

PRODUCTS = "three products"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
PEERS = "linear-cross-entropy"  # their kind
CHECKED = 16  # rows of each gradient
# Sums over thousands of terms that cancel, judged by their median: stock's own error is of this order.
LIMIT = {"f32": 512.0, "bf16": 64.0}
AGAINST_TORCH = {"f32": 1.0, "bf16": 1.2}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def some(n: int) -> Tensor:
    return torch.linspace(0, n - 1, min(n, CHECKED), dtype=torch.float64).long()


def oracle(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: the mean loss, and the checked rows of the gradients of x and weight."""
    n = x.shape[0]
    rows, classes, w = some(n), some(weight.shape[0]), weight.double()
    loss, dw = 0.0, torch.zeros(len(classes), x.shape[1], dtype=torch.float64)
    for begin in range(0, n, 256):
        part, labels = x[begin : begin + 256].double(), target[begin : begin + 256]
        log_p = (part @ w.t()).log_softmax(1)
        loss -= log_p.gather(1, labels[:, None]).sum()
        dw += (log_p[:, classes].exp() - (labels[:, None] == classes).double()).t() @ part
    p = (x[rows].double() @ w.t()).softmax(1)
    p[torch.arange(len(rows)), target[rows]] -= 1
    return loss / n, p @ w / n, dw / n


def contender(
    name: str,
    loss: Loss,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    expected: tuple[Tensor, Tensor, Tensor],
    peer: bool = False,
) -> Contender:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    value = torch.empty(())

    def prepare() -> None:
        x.grad = weight.grad = None

    def run() -> None:
        nonlocal value
        result = loss(x, weight, target)
        result.backward()
        value = result.detach()

    def error() -> float:
        prepare()
        run()
        found = (value, x.grad[some(len(x))], weight.grad[some(len(weight))])
        return max(relative_error(got, want, x.dtype) for got, want in zip(found, expected, strict=True))

    return Contender(name, run, error, prepare, forgetting(prepare), version=peers.version(name) if peer else None)


def three_products(x: Tensor, weight: Tensor) -> Contender:
    """The logits, and from a gradient of their shape those of x and weight."""
    logits = x.new_empty(x.shape[0], weight.shape[0])
    grad = torch.full_like(logits, 1e-4)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(grad, weight, out=dx)
        torch.mm(grad.t(), x, out=dw)

    def error() -> float:
        run()
        rows = some(len(x))
        return relative_error(logits[rows], x[rows].double() @ weight.double().t(), x.dtype)

    return Contender(PRODUCTS, run, error)


def torchs() -> dict[str, Loss]:
    losses: dict[str, Loss] = {"torch whole logits": lambda x, w, t: F.cross_entropy(F.linear(x, w), t)}
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        losses["torch linear"] = F.linear_cross_entropy
        losses["torch linear chunked"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=chunked)
    return losses


def case(n: int, h: int, v: int, dtype_name: str) -> Case:
    dtype = DTYPES[dtype_name]

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, h, generator=generator).to(dtype)
        weight = (torch.randn(v, h, generator=generator) / h**0.5).to(dtype)
        return x, weight, torch.randint(v, (n,), generator=generator)

    def build(quick: bool) -> list[Contender]:
        x, weight, target = inputs()
        losses = {**torchs(), "fusedopt": linear_cross_entropy}
        found = {} if quick else peers.found(PEERS, "cpu")  # it compiles
        expected = oracle(x, weight, target)
        return [
            contender(name, loss, x, weight, target, expected, name in found) for name, loss in (losses | found).items()
        ]

    wide = v * h * 4 if dtype != torch.float32 else 0
    return Case(
        f"linear-ce-{n}x{h}x{v}-{dtype_name}",
        f"linear cross entropy, N {n}, H {h}, V {v}, {dtype_name}",
        0,
        LIMIT[dtype_name],
        build,
        lambda: [three_products(*inputs()[:2])],
        (
            Target("fusedopt", PRODUCTS, round(1 / 1.12, 3)),
            Target("fusedopt", "torch linear", AGAINST_TORCH[dtype_name]),
            Target("fusedopt", "torch linear chunked", 2.0),
        ),
        dtype_name,
        flops=6.0 * n * h * v,
        quick=dtype_name == "bf16",
        absent=lambda: peers.absent(PEERS, "cpu"),
        allowed_bytes=(n + v) * h * dtype.itemsize + wide + chunks.CHUNK_BYTES["cpu"],
    )


def cases() -> list[Case]:
    return [case(*shape, dtype_name) for shape in LINEAR for dtype_name in DTYPES]
