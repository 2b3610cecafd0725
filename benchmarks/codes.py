"""The study that chose the 8-bit codes: AdamW's states, rounded after every step as each candidate would keep them.

Stock's optimizer trains fusedopt.train's model with half the layers and a quarter of the vocabulary. After each step,
both moments of all tensors of SMALL elements or more are replaced by what the candidate's code makes of them.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt.optim.precision import SMALL
from fusedopt.train import checks, cli, data
from fusedopt.train.distributed import World
from fusedopt.train.loop import STOCK, Contender

Row = dict[str, Any]
WORDS = 1  # columns of the table that hold words
# part of the block's largest magnitude, -1 to 1 or 0 to 1 -> what is kept of it
Code = Callable[[Tensor, torch.Generator], Tensor]

SETTING = ("--vocab-size", "2048", "--layers", "2", "--steps", "400")  # 0.9 M parameters; the rest is the default
SEEDS = (0, 1, 2)
QUICK_STEPS = 12
MOMENTS = {"exp_avg": "first", "exp_avg_sq": "second"}


def power(levels: int, exponent: int) -> Code:
    """Closed form: u^exponent of `levels` equal steps of u, nearest in u, with the sign. Never 0 but for 0."""

    def code(part: Tensor, generator: torch.Generator) -> Tensor:
        u = (part.abs() ** (1 / exponent) * levels).round()
        return (u / levels) ** exponent * part.sign()

    return code


def never_zero(levels: int, exponent: int) -> Code:
    """`power` for squares: the smallest level is the least that is kept of what is not 0."""
    nearest, least = power(levels, exponent), levels**-exponent
    return lambda part, generator: nearest(part, generator).clamp(min=least) * (part > 0)


def at_random(levels: int, exponent: int) -> Code:
    """The levels of `power`: one of the two around a square, with the probability that makes the mean the square."""

    def code(part: Tensor, generator: torch.Generator) -> Tensor:
        low = (part ** (1 / exponent) * levels).floor().clamp(max=levels - 1)
        below, above = (low / levels) ** exponent, ((low + 1) / levels) ** exponent
        up = torch.rand(part.shape, generator=generator) * (above - below) < part - below
        return torch.where(up, above, below).clamp(min=levels**-exponent) * (part > 0)

    return code


def nearest_of(values: list[float]) -> Code:
    """A table's value that is nearest."""
    table = torch.tensor(sorted(values))
    middles = (table[1:] + table[:-1]) / 2
    return lambda part, generator: table[torch.bucketize(part, middles)]


def dynamic(signed: bool) -> list[float]:
    """The 256-entry dynamic map (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, section 2.1).

    A decade is told by the number of leading zero bits, the place within 0.1 to 1 of it by the bits that are left: half
    as many for each decade down. Seven decades; the unsigned map has the sign's bit for the place. And 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 1 << (6 if signed else 7) - decade
        places = [10.0**-decade * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
        values += places + [-place for place in places if signed]
    return values


def e4m3(part: Tensor, generator: torch.Generator) -> Tensor:
    """8-bit floating point, the block's largest magnitude scaled to its largest number, as torchao's AdamWFp8 does."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (part * largest).to(torch.float8_e4m3fn).to(part.dtype) / largest


@dataclass(frozen=True)
class Candidate:
    name: str
    block: int = 256  # elements that share a scale
    first: Code | None = None  # of first moments; None: float32
    second: Code | None = None  # of second moments


_U2, _U4 = power(127, 2), never_zero(255, 4)  # fusedopt.optim.codes, at any block; a test compares them
BASE = Candidate("float32 states")
OURS = Candidate("u^2, u^4", first=_U2, second=_U4)
CANDIDATES = (
    BASE,
    OURS,
    Candidate(OURS.name, 128, _U2, _U4),
    Candidate(OURS.name, 2048, _U2, _U4),
    Candidate("u^2, u^4 at random", first=_U2, second=at_random(255, 4)),
    Candidate("linear, u^4", first=power(127, 1), second=_U4),
    Candidate("linear, linear", first=power(127, 1), second=never_zero(255, 1)),
    Candidate("dynamic map", first=nearest_of(dynamic(True)), second=nearest_of(dynamic(False))),
    Candidate("float8 e4m3", first=e4m3, second=e4m3),
)


def rounded(values: Tensor, block: int, code: Code, generator: torch.Generator) -> Tensor:
    """What is kept of a tensor whose neighbouring elements share scales."""
    flat = values.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=2.0**-90)
    return (code(blocks / scales, generator) * scales).view(-1)[: len(flat)].view_as(values)


def _case(candidate: Candidate, seed: int) -> str:
    return f"{candidate.name}, blocks of {candidate.block}, seed {seed}"


RUNS = {_case(candidate, seed): (candidate, seed) for seed in SEEDS for candidate in CANDIDATES}


def cases(quick: bool = False) -> list[str]:
    """Names, in the order in which they run and stand in the file."""
    return [name for name, (_, seed) in RUNS.items() if not quick or seed == SEEDS[0]]


def keeps(row: Row) -> bool:
    """Whether a row of an earlier run stands, so that this one need not repeat it."""
    return True


@functools.cache
def _corpus() -> data.Corpus:
    return data.load(_arguments(0, "cpu"))


def _arguments(seed: int, device: str) -> argparse.Namespace:
    words = [*SETTING, "--stock", "--seed", str(seed), "--device", device, "--overwrite"]  # nothing is written
    args = cli.make_parser().parse_args(words)
    checks.check(args)
    return args


def measure(case: str, args: argparse.Namespace, tell: Callable[[str], None]) -> list[Row]:
    """The row of one case."""
    candidate, seed = RUNS[case]
    contender = Contender(STOCK, _arguments(seed, args.device), World())
    steps = QUICK_STEPS if args.quick else contender.args.steps
    exact = Exact(contender.optimizer)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        if step % 10 == 0:
            tell(f"step {step}/{steps}")
        contender.step(data.train_batches(contender.args, _corpus(), step, 0, 1), step)
        _round_states(contender.optimizer, candidate, generator)
    loss = contender.validate(data.validation_batches(contender.args, _corpus()))["val_loss"]
    row = {"case": case, "contender": candidate.name, "block": candidate.block, "seed": seed, "steps": steps}
    row |= {"text": _corpus().digest, "val_loss": loss, **exact.errors(contender.optimizer)}
    return [row | {"verdict": "ok" if math.isfinite(loss) else "wrong"}]


def table(rows: list[Row]) -> tuple[list[str], list[list[str]], str]:
    """Header, cells and a note, for the README."""
    losses = {(row["contender"], row["block"], row["seed"]): row["val_loss"] for row in rows}
    base = [losses[key] for seed in SEEDS if (key := (BASE.name, BASE.block, seed)) in losses]
    header = ["code of first and second moments", "block", "error of first", "of second"]
    header += [f"loss, seed {seed}" for seed in SEEDS]
    cells = []
    for candidate in CANDIDATES:
        mine = [row for row in rows if (row["contender"], row["block"]) == (candidate.name, candidate.block)]
        if candidate is BASE or not mine:
            continue
        errors = [f"{np.mean([row[f'{key}_error'] for row in mine]):.2%}" for key in MOMENTS]
        pairs = [(losses.get((candidate.name, candidate.block, seed)), losses.get((BASE.name, BASE.block, seed)))
                 for seed in SEEDS]  # fmt: skip
        differences = [f"{loss - exact:+.4f}" if loss and exact else "" for loss, exact in pairs]
        cells.append([candidate.name, str(candidate.block), *errors, *differences])
    told = ", ".join(f"{loss:.4f}" for loss in base)
    note = (
        "Error: of the moments at the end, against those of the same gradients without codes; median, relative. "
        f"Loss: validation's, less float32 states' ({told})."
    )
    return header, cells, note


class Exact:
    """Both moments of the gradients that an AdamW is given, never rounded to a code."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.moments: dict[Tensor, dict[str, Tensor]] = {}
        self.hook = optimizer.register_step_pre_hook(self.follow)  # clipped by then

    def follow(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                moments = self.moments.setdefault(p, {key: torch.zeros_like(p) for key in MOMENTS})
                moments["exp_avg"].lerp_(p.grad, 1 - beta1)
                moments["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)

    def errors(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Median of |kept - exact| / |exact| over the tensors that codes are for; nothing where the exact is 0."""
        found = {}
        for key in MOMENTS:
            pairs = [(optimizer.state[p][key], m[key]) for p, m in self.moments.items() if p.numel() >= SMALL]
            each = [((kept - exact).abs() / exact.abs())[exact != 0] for kept, exact in pairs]
            found[f"{key}_error"] = round(float(torch.cat(each).median()), 6)
        return found


def _round_states(optimizer: torch.optim.Optimizer, candidate: Candidate, generator: torch.Generator) -> None:
    for state in optimizer.state.values():
        for key, which in MOMENTS.items():
            code = getattr(candidate, which)
            if code is not None and state[key].numel() >= SMALL:
                state[key].copy_(rounded(state[key], candidate.block, code, generator))
