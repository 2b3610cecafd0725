"""Linear cross entropy on a GPU: against the three products alone, torch, and the peers that are installed."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt.nn import chunks
from fusedopt.nn.functional import linear_cross_entropy

from . import peers
from .cases_linear_loss import PEERS, PRODUCTS, Loss, contender, oracle, three_products, torchs
from .cases_loss_gpu import ours
from .runner import Case, Contender, Target, compiler_here
from .shapes import LINEAR_ON_GPU

DEVICE = "cuda"
SHAPES = LINEAR_ON_GPU
DTYPE = torch.bfloat16
LIMIT = 64.0  # as on the CPU


def case(n: int, h: int, v: int) -> Case:
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        x = torch.randn(n, h, generator=generator, device=DEVICE).to(DTYPE)
        weight = (torch.randn(v, h, generator=generator, device=DEVICE) / h**0.5).to(DTYPE)
        return x, weight, torch.randint(v, (n,), generator=generator, device=DEVICE)

    def build(quick: bool) -> list[Contender]:
        x, weight, target = inputs()
        losses: dict[str, Loss] = torchs()
        if compiler_here() and not quick:
            torch._dynamo.reset()
            losses["torch compiled"] = torch.compile(lambda x, w, t: F.cross_entropy(F.linear(x, w), t), dynamic=False)
        losses |= {name: partial(linear_cross_entropy, backend=backend) for name, backend in ours().items()}
        found = peers.found(PEERS, "cuda")
        with torch.device(DEVICE):  # where the oracle makes its indices
            expected = oracle(x, weight, target)
        return [
            contender(name, loss, x, weight, target, expected, name in found) for name, loss in (losses | found).items()
        ]

    return Case(
        f"gpu-linear-ce-{n}x{h}x{v}-bf16",
        f"linear cross entropy, N {n}, H {h}, V {v}, bf16",
        0,
        LIMIT,
        build,
        lambda: [three_products(*inputs()[:2])],
        (Target("fusedopt", PRODUCTS, round(1 / 1.12, 3)), Target("fusedopt", "liger linear", 2.0)),
        "bf16",
        DEVICE,
        flops=6.0 * n * h * v,
        # the gradients, the weight's sum in float32, and a chunk
        allowed_bytes=(n + v) * h * DTYPE.itemsize + v * h * 4 + chunks.DEVICE_CHUNK_BYTES,
        absent=lambda: peers.absent(PEERS, "cuda"),
    )


def cases() -> list[Case]:
    return [case(*shape) for shape in SHAPES]
