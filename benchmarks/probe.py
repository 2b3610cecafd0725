"""One peer in a process of its own: import it, check it against float64, time a small case beside ours.

`python -m benchmarks.probe NAME DEVICE TURNS FILE`, as benchmarks.trial calls it; the file holds what happened.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from fusedopt import optim as fused
from fusedopt.nn.functional import cross_entropy, linear_cross_entropy

from . import cases_linear_loss, cases_loss, cases_loss_gpu, cases_optim, cases_step, peers, reasons
from .peers import Peer
from .runner import Contender, relative_error

RAN, WRONG, NOT_RUN, NOT_IMPORTED = "ran", "wrong", "failed to run", "failed to import"
NEEDS_GPU = "needs a GPU"
WARMUP = 2  # turns

STEPS = 3
CHECKED = [(64, 48), (4097,), (1,)]  # parameters of an optimizer that keeps float32 states
TIMED = [(1024, 1024)] * 4
LOGITS = (128, 32768)  # float32
HEAD = (256, 256, 8192)  # N, H, V; bfloat16


def attempt(peer: Peer, device: str, turns: int, stage: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What happened. `stage` hears what will have failed if nothing more is heard."""
    told: dict[str, Any] = {"version": peers.version(peer.name)}
    stage(told | {"outcome": NOT_IMPORTED})
    what, reason = peers.loaded(peer)
    if what is None:
        return told | _failure(peer, NOT_IMPORTED, reason)
    stage(told | {"outcome": NOT_RUN})
    kind = KINDS[peer.kind]
    limit = peer.limit or kind.limit
    try:
        error = kind.error(what, device)
        times = _times(kind.timed(what, device), kind.timed(kind.ours, device), device, turns)
    except Exception as raised:
        return told | _failure(peer, NOT_RUN, reasons.of_error(raised))
    told |= {"outcome": RAN if error <= limit else WRONG, "reason": "", **times}
    return told | {"error": round(error, 3) if math.isfinite(error) else "inf", "error_limit": limit}


def _failure(peer: Peer, outcome: str, reason: str) -> dict[str, Any]:
    """Whether the peer says itself that it wants a GPU, where there is none."""
    wants = "cpu" not in peer.devices and not torch.cuda.is_available() and reasons.WANTS_GPU.search(reason)
    missing = reason.startswith("ModuleNotFoundError")  # a library that was not built, whatever its name
    return {"outcome": NEEDS_GPU if wants and not missing else outcome, "reason": reason}


def steps_error(make: Callable[[list[Tensor]], Optimizer], device: str) -> float:
    """Of parameters and states after STEPS steps."""
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, generator=generator, device=device) * 0.02 for shape in CHECKED]
    exact = [p.double().requires_grad_() for p in params]
    params = [p.requires_grad_() for p in params]
    optimizer, oracle = make(params), AdamW(exact, foreach=False)
    for _ in range(STEPS):
        for p, q in zip(params, exact, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, device=device) * 0.01
            q.grad = p.grad.double()
        optimizer.step()
        oracle.step()

    def every(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double().cpu()

    got, expected = (
        {"param": every(tensors), **peers.states(each, tensors, every)}
        for each, tensors in ((optimizer, params), (oracle, exact))
    )
    return max(relative_error(got[key], expected[key], torch.float32) for key in expected)


def _optimizer(make: Callable[[list[Tensor]], Optimizer], device: str) -> Contender:
    """To be timed."""
    params = [torch.full(shape, 0.02, device=device).requires_grad_() for shape in TIMED]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    return Contender("", make(params).step, lambda: math.nan)  # checked on its own


def _cross_entropy(loss: Callable[..., Tensor], device: str) -> Contender:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(*LOGITS, generator=generator, device=device)
    target = torch.randint(LOGITS[1], LOGITS[:1], generator=generator, device=device)
    with torch.device(device):  # where the oracle makes its indices
        expected = cases_loss.oracle(logits, target)
    some = lambda grad: grad[cases_loss.checked(LOGITS[0])]  # noqa: E731
    return cases_loss_gpu.contender("", loss, logits, target, expected, some, destroys=True)


def _linear(loss: Callable[..., Tensor], device: str) -> Contender:
    n, h, v = HEAD
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, h, generator=generator, device=device).bfloat16()
    weight = (torch.randn(v, h, generator=generator, device=device) / h**0.5).bfloat16()
    target = torch.randint(v, (n,), generator=generator, device=device)
    with torch.device(device):
        expected = cases_linear_loss.oracle(x, weight, target)
    return cases_linear_loss.contender("", loss, x, weight, target, expected)


@dataclass(frozen=True)
class Kind:
    """How peers of a kind are tried."""

    work: str
    limit: float  # from which a result is wrong
    ours: Callable[..., Any]
    timed: Callable[[Callable[..., Any], str], Contender]
    error: Callable[[Callable[..., Any], str], float]


CODES = Kind(
    "the first step checked, 4 M parameters timed, f32; ours has 8-bit states",
    cases_step.CODES_LIMIT,
    partial(fused.AdamW, state_dtype="8bit"),
    _optimizer,
    cases_step.first_step_error,
)
KINDS = {
    "adamw": Kind(
        f"{STEPS} steps checked, 4 M parameters timed, f32",
        STEPS * cases_optim.LIMIT,
        fused.AdamW,
        _optimizer,
        steps_error,
    ),
    **dict.fromkeys(("adamw-8bit", "adamw-fp8", "adamw-4bit"), CODES),
    "cross-entropy": Kind(
        f"{LOGITS[0]} x {LOGITS[1]}, f32, forward and backward",
        cases_loss.LIMIT,
        cross_entropy,
        _cross_entropy,
        lambda loss, device: _cross_entropy(loss, device).error(),
    ),
    "linear-cross-entropy": Kind(
        f"N {HEAD[0]}, H {HEAD[1]}, V {HEAD[2]}, bf16, forward and backward",
        cases_linear_loss.LIMIT["bf16"],
        linear_cross_entropy,
        _linear,
        lambda loss, device: _linear(loss, device).error(),
    ),
}


def _times(theirs: Contender, ours: Contender, device: str, turns: int) -> dict[str, float]:
    """Median milliseconds, taken in turns."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[list[float]] = [[], []]
    for turn in range(WARMUP + turns):
        for place in (0, 1) if turn % 2 else (1, 0):
            contender = (theirs, ours)[place]
            contender.prepare()
            wait()
            start = time.perf_counter()
            contender.run()
            wait()
            times[place].append((time.perf_counter() - start) * 1e3)
    median, mine = (round(float(np.median(each[WARMUP:])), 4) for each in times)
    return {"median_ms": median, "ours_ms": mine}


def main(argv: list[str]) -> None:
    name, device, turns, path = argv
    write = lambda row: Path(path).write_text(json.dumps(row), encoding="utf-8")  # noqa: E731
    write(attempt(peers.BY_NAME[name], device, int(turns), write))


if __name__ == "__main__":
    main(sys.argv[1:])
