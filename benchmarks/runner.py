"""The method: contenders of a case take turns in one process, each is checked, the median is told with its spread.

A case says how many bytes must move, or how many operations it takes. In the same turns runs a ceiling over as much
work: what the machine gave at that very time.
"""

from __future__ import annotations

import gc
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import machine

OURS = "fusedopt"  # how the names of our contenders begin
CACHES = ("memory", "warm", "cold")


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
    release: Callable[[], None] | None = None  # before the run whose memory is counted, for `prepare`: forget all
    ceiling: str = ""  # which of the case's it is held against; the first, if it does not say
    version: str | None = None  # of another library; torch's and ours are in every row
    limit: float | None = None  # of its error, where another rule's rounding asks for more than the case's


@dataclass(frozen=True)
class Case:
    """Work that every contender does alike."""

    name: str
    title: str
    bytes: int  # that must move; read and write each count; 0: arithmetic is what it takes
    limit: float  # the error from which a contender is wrong, see `relative_error`
    build: Callable[[bool], list[Contender]]  # quick ->; stock first: its error is every row's `stock_error`
    ceilings: Callable[[], list[Contender]]
    targets: tuple[Target, ...] = ()
    dtype: str = "f32"
    device: str = "cpu"  # on "cuda" a turn's runs are queued, waited for, and timed together
    in_a_row: int = 1  # runs per turn, each timed
    # "memory": far more than the cache holds; "warm": runs in a row, the data stay in the cache; "cold": it is emptied
    cache: str = "memory"
    flops: float = 0.0
    allowed_bytes: int = 0  # the most that ours may take beyond its inputs
    absent: Callable[[], list[str]] = list  # peers that would take part if they were installed
    memory: int = 0  # bytes that building all contenders takes, about; 0: little
    sweep: tuple[str, int] | None = None  # the case is a point of a curve: (what grows, how much of it)
    quick: bool = True  # part of a quick run too


@dataclass(frozen=True)
class Budget:
    """How long the turns of a case go on, all that is not timed included."""

    seconds: float
    warmup: int
    least: int
    most: int

    @classmethod
    def of(cls, quick: bool) -> Budget:
        return cls(0.2, 1, 3, 20) if quick else cls(5.0, 2, 9, 300)


class TooLarge(MemoryError):
    """The contenders of a case do not fit into this machine's memory."""


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


def launches(run: Callable[[], None]) -> int:
    """Kernels, copies and fills that a run puts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    return sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in events)


def empties_cache(device: str) -> Callable[[], None]:
    """A call after which nothing that was used before is in the last cache."""
    nbytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else machine.last_cache_bytes()
    ballast = torch.zeros(max(2 * nbytes, 64 << 20), dtype=torch.uint8, device=device)
    return lambda: ballast.add_(1)


def measure(
    case: Case,
    quick: bool,
    keep: Callable[[list[dict[str, Any]]], None],
    tell: Callable[[str], None] = lambda text: None,
    among: Callable[[str], bool] = lambda name: True,
) -> None:
    """Measure a case and hand its rows to `keep`; after Ctrl-C too, if a few turns were complete, and then raise it.

    `among` says which contenders take part, besides ours and the ceilings. One that raises is a row without figures.

    Raises:
        TooLarge: before anything is built.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what it compiled for the case before holds that one's tensors
    gc.collect()
    free = machine.free_memory(case.device)
    if case.memory > free:
        raise TooLarge(f"{case.name}: takes about {case.memory / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    tell("building")
    contenders = [c for c in case.build(quick) if c.name.startswith(OURS) or among(c.name)]
    ceilings = case.ceilings()
    session = _Session(case, contenders, ceilings, Budget.of(quick), tell)
    collecting = gc.isenabled()
    gc.disable()
    try:
        session.check()
        session.take_turns()
        session.check_again()
    finally:
        if collecting:
            gc.enable()
        if session.complete():
            keep(session.rows())


class _Session:
    """The contenders of one case, and what was seen of them."""

    def __init__(
        self,
        case: Case,
        contenders: list[Contender],
        ceilings: list[Contender],
        budget: Budget,
        tell: Callable[[str], None],
    ):
        self.case, self.budget, self.tell = case, budget, tell
        self.contenders = [*contenders, *ceilings]  # those that raise leave
        self.ceilings = [ceiling.name for ceiling in ceilings]
        self.stock = contenders[0].name if contenders else ""
        self.named = [contender.name for contender in self.contenders]
        self.failed: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.launches: dict[str, int] = {}
        self.times: dict[str, list[float]] = {name: [] for name in self.named}
        self.host: dict[str, list[float]] = {name: [] for name in self.named}
        self.flush = empties_cache(case.device) if case.cache == "cold" else lambda: None

    def check(self) -> None:
        for contender in list(self.contenders):
            self.tell(f"{contender.name}: warm-up and check")
            try:
                self._check(contender)
            except Exception as error:
                if contender.name in self.ceilings:
                    raise
                first = (str(error).strip().splitlines() or [""])[0]
                self.failed[contender.name] = f"raised {type(error).__name__}: {first}"[:200]
                self.contenders.remove(contender)

    def _check(self, contender: Contender) -> None:
        for _ in range(self.budget.warmup):
            contender.prepare()
            contender.run()
        # not at first: compilers and libraries have made their workspaces
        (contender.release or contender.prepare)()
        self.peaks[contender.name] = peak_bytes(contender.run, self.case.device)
        if self.case.device == "cuda":
            contender.prepare()
            self.launches[contender.name] = launches(contender.run)
        self.errors[contender.name] = contender.error()

    def take_turns(self) -> None:
        one = self._runs_on_gpu if self.case.device == "cuda" else self._runs
        end, turn = time.perf_counter() + self.budget.seconds, 0
        while turn < self.budget.least or (time.perf_counter() < end and turn < self.budget.most):
            self.tell(f"turn {turn + 1}")
            for i in range(len(self.contenders)):
                one(self.contenders[(turn + i) % len(self.contenders)])
            turn += 1

    def _runs(self, contender: Contender) -> None:
        for _ in range(self.case.in_a_row):
            contender.prepare()
            self.flush()
            start = time.perf_counter()
            contender.run()
            self.times[contender.name].append(time.perf_counter() - start)

    def _runs_on_gpu(self, contender: Contender) -> None:
        """As many as a queue holds without filling up: `times` is the longer of host and device, `host` the host's."""
        runs = self.case.in_a_row
        contender.prepare()
        self.flush()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            contender.run()
        returned = time.perf_counter() - start
        torch.cuda.synchronize()
        self.times[contender.name].append((time.perf_counter() - start) / runs)
        self.host[contender.name].append(returned / runs)

    def check_again(self) -> None:
        """Whoever drifted while it was timed is found out here."""
        for contender in self.contenders:
            self.errors[contender.name] = max(self.errors[contender.name], contender.error())

    def complete(self) -> bool:
        """A turn of everybody."""
        return all(self.times[contender.name] for contender in self.contenders)

    def rows(self) -> list[dict[str, Any]]:
        present = {contender.name: contender for contender in self.contenders}
        return [self._row(present[name]) if name in present else self._failure(name) for name in self.named]

    def _failure(self, name: str) -> dict[str, Any]:
        return {"case": self.case.name, "contender": name, "dtype": self.case.dtype, "median_ms": None,
                "verdict": self.failed[name]}  # fmt: skip

    def _row(self, contender: Contender) -> dict[str, Any]:
        case, name = self.case, contender.name
        low, median, high = (float(q) for q in np.quantile(self.times[name], (0.2, 0.5, 0.8)))
        ceiling = name if name in self.ceilings else contender.ceiling or self.ceilings[0]
        ceiling_seconds = float(np.median(self.times[ceiling]))
        error, limit = self.errors[name], max(contender.limit or 0.0, case.limit)
        row = {
            "case": case.name,
            "contender": name,
            "dtype": case.dtype,
            "cache": case.cache,
            "median_ms": round(median * 1e3, 4),
            "p20_ms": round(low * 1e3, 4),
            "p80_ms": round(high * 1e3, 4),
            "repeats": len(self.times[name]),
            "bytes": case.bytes,
            "gb_per_s": round(case.bytes / median * 1e-9, 3),
            "ceiling": ceiling,
            "ceiling_ms": round(ceiling_seconds * 1e3, 4),
            "ceiling_fraction": round(ceiling_seconds / median, 4),
            "peak_mib": round(self.peaks[name] / 2**20, 3),
            "error": _json_number(error),
            "stock_error": _json_number(self.errors.get(self.stock, math.nan)),
            "error_limit": limit,
            "verdict": "ok" if error <= limit else "wrong",
        }
        if case.flops:
            row["tflop_per_s"] = round(case.flops / median * 1e-12, 4)
        if case.device == "cuda":
            row["host_ms"] = round(float(np.median(self.host[name])) * 1e3, 4)
            row["launches"] = self.launches[name]
        if case.allowed_bytes:
            row["allowed_mib"] = round(case.allowed_bytes / 2**20, 3)
        if case.sweep:
            row["sweep"] = list(case.sweep)
        if contender.version:
            row["version"] = contender.version
        if absent := case.absent():
            row["absent"] = absent
        return row


def _json_number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return round(value, 3) if math.isfinite(value) else "inf"
