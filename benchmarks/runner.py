"""The method: contenders of a case take turns in one process, each is checked, the median is told with its spread.

A case says how many bytes must move. In the same turns runs the ceiling, an in-place stream over as many bytes: what
the machine's memory gave at that very time.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

STREAM = "stream"


@dataclass(frozen=True)
class Target:
    """What a case is there to show: `ours` at least `ratio` times as fast as `against`."""

    ours: str
    against: str
    ratio: float
    figure: str = "median_ms"  # or "host_ms", on a GPU: until the call returns; or "peak_mib"


@dataclass
class Contender:
    """One way to do the work of a case, on tensors of its own."""

    name: str
    run: Callable[[], None]  # timed
    error: Callable[[], float]  # runs once more and compares with the float64 oracle; see `relative_error`
    prepare: Callable[[], None] = lambda: None  # before each run, not timed
    release: Callable[[], None] | None = None  # before the run whose memory is counted, where that is: forget all


@dataclass(frozen=True)
class Case:
    """Work that every contender does alike."""

    name: str
    title: str
    bytes: int  # that must move; read and write each count
    limit: float  # the error from which a contender is wrong, see `relative_error`
    build: Callable[[bool], list[Contender]]  # quick ->; stock first: its error is every row's `stock_error`
    targets: tuple[Target, ...] = ()
    in_a_row: int = 1  # runs per turn, each timed: more than one where a working set that stays cached is the point
    device: str = "cpu"  # on "cuda" a turn's runs are queued, waited for, and timed together
    ceiling: Callable[[], Contender] | None = None  # what cannot be passed, where that is not the stream of `bytes`
    allowed_bytes: int = 0  # the most that ours may take beyond its inputs
    absent: Callable[[], list[str]] = list  # peers that would take part if they were installed


@dataclass(frozen=True)
class Budget:
    """How long the timed turns of a case go on."""

    seconds: float
    warmup: int
    least: int
    most: int

    @classmethod
    def of(cls, quick: bool) -> Budget:
        return cls(0.2, 1, 3, 20) if quick else cls(8.0, 3, 10, 300)


def relative_error(result: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """max |result - oracle| / max(|oracle|, median |oracle|), in machine epsilons of `dtype`.

    The median keeps an element that cancelled to nearly zero from being judged by its own size.
    """
    oracle = oracle.double()
    if oracle.numel() == 0:
        return 0.0
    size = oracle.abs().clamp_min(max(float(oracle.abs().median()), torch.finfo(torch.float32).tiny))
    error = float(((result.double() - oracle).abs() / size).max())
    return error / torch.finfo(dtype).eps if math.isfinite(error) else math.inf


def compiler_here() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """The most memory that was alive at once of what a run allocates through torch."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(alive.max(initial=0))


def stream(nbytes: int, device: str) -> Contender:
    """The ceiling: read and write every byte of a float32 array, in place; on a GPU, a copy from one to another."""
    x = torch.ones(max(1, nbytes // 8), device=device)
    if device == "cuda":
        y = torch.empty_like(x)
        return Contender(STREAM, lambda: y.copy_(x), lambda: 0.0 if torch.equal(x[:1024], y[:1024]) else math.inf)
    factor = -1.0

    def error() -> float:
        before = x[:1024].double()
        x.mul_(factor)
        return relative_error(x[:1024], before * factor, x.dtype)

    return Contender(STREAM, lambda: x.mul_(factor), error)


def measure(
    case: Case,
    quick: bool,
    keep: Callable[[list[dict[str, Any]]], None],
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Measure a case and hand its rows to `keep`; after Ctrl-C too, if a few turns were complete, and then raise it."""
    budget = Budget.of(quick)
    tell("building")
    ceiling = case.ceiling() if case.ceiling else stream(case.bytes, case.device)
    contenders = [*case.build(quick), ceiling]
    errors, peaks = {}, {}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    host: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for contender in contenders:
            tell(f"{contender.name}: warm-up and check")
            for _ in range(budget.warmup):
                contender.prepare()
                contender.run()
            if contender.release:  # not at first: compilers and libraries have made their workspaces
                contender.release()
                peaks[contender.name] = peak_bytes(contender.run, case.device)
            errors[contender.name] = contender.error()
        take_turns = _take_turns_on_gpu if case.device == "cuda" else _take_turns
        take_turns(contenders, case.in_a_row, budget, times, host, tell)
        for contender in contenders:  # whoever drifted while it was timed is found out here
            errors[contender.name] = max(errors[contender.name], contender.error())
    finally:
        if collecting:
            gc.enable()
        if all(times.values()):
            keep(_rows(case, contenders, times, host, errors, peaks))


def _take_turns(
    contenders: list[Contender],
    in_a_row: int,
    budget: Budget,
    times: dict[str, list[float]],
    host: dict[str, list[float]],
    tell: Callable[[str], None],
) -> None:
    spent, turn = 0.0, 0
    while turn < budget.least or (spent < budget.seconds and turn < budget.most):
        tell(f"turn {turn + 1}")
        for i in range(len(contenders)):
            contender = contenders[(turn + i) % len(contenders)]
            for _ in range(in_a_row):
                contender.prepare()
                start = time.perf_counter()
                contender.run()
                seconds = time.perf_counter() - start
                times[contender.name].append(seconds)
                spent += seconds
        turn += 1


def _take_turns_on_gpu(
    contenders: list[Contender],
    in_a_row: int,
    budget: Budget,
    times: dict[str, list[float]],
    host: dict[str, list[float]],
    tell: Callable[[str], None],
) -> None:
    """As many runs as a queue holds without filling up: `times` is the longer of host and device, `host` the host's."""
    spent, turn = 0.0, 0
    while turn < budget.least or (spent < budget.seconds and turn < budget.most):
        tell(f"turn {turn + 1}")
        for i in range(len(contenders)):
            contender = contenders[(turn + i) % len(contenders)]
            contender.prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(in_a_row):
                contender.run()
            returned = time.perf_counter() - start
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            host[contender.name].append(returned / in_a_row)
            times[contender.name].append(seconds / in_a_row)
            spent += seconds
        turn += 1


def _rows(
    case: Case,
    contenders: list[Contender],
    times: dict[str, list[float]],
    host: dict[str, list[float]],
    errors: dict[str, float],
    peaks: dict[str, int],
) -> list[dict[str, Any]]:
    ceiling = float(np.median(times[contenders[-1].name]))
    rows, absent = [], case.absent()
    for contender in contenders:
        low, median, high = (float(q) for q in np.quantile(times[contender.name], (0.2, 0.5, 0.8)))
        error = errors[contender.name]
        rows.append(
            {
                "case": case.name,
                "contender": contender.name,
                "median_ms": round(median * 1e3, 4),
                "p20_ms": round(low * 1e3, 4),
                "p80_ms": round(high * 1e3, 4),
                "repeats": len(times[contender.name]),
                "bytes": case.bytes,
                "gb_per_s": round(case.bytes / median * 1e-9, 3),
                "ceiling_ms": round(ceiling * 1e3, 4),
                "ceiling_fraction": round(ceiling / median, 4),
                "error": _json_number(error),
                "stock_error": _json_number(errors[contenders[0].name]),
                "error_limit": case.limit,
                "verdict": "ok" if error <= case.limit else "wrong",
            }
        )
        if case.device == "cuda":
            rows[-1]["host_ms"] = round(float(np.median(host[contender.name])) * 1e3, 4)
        if contender.name in peaks:
            rows[-1]["peak_mib"] = round(peaks[contender.name] / 2**20, 3)
            rows[-1]["allowed_mib"] = round(case.allowed_bytes / 2**20, 3)
        if absent:
            rows[-1]["absent"] = absent
    return rows


def _json_number(value: float) -> float | str:
    return round(value, 3) if math.isfinite(value) else "inf"
