"""What the times of a distributed step say: the slowest rank of each, and which share is whose. Arithmetic only.

A case is one wrapping of the model; its contenders take turns, step by step, on all ranks at once. Two of them are
there to be subtracted:

- `no optimizer`: the same step, communication included, whose optimizer does nothing and which does not clip;
- `no communication`: the same, over a process group whose collectives return at once (torch's `fake`; gathers leave the
  rank's own shard in every place, a copy within its memory), so that what is left is computing.

Exposed optimizer time is T(step) - T(no optimizer), exposed communication T(no optimizer) - T(no communication): what
each adds to a step, whatever ran beside it. Both are differences of steps of the same turn; medians are of those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

PHASES = ("forward", "backward", "clip", "optimizer")  # as they are marked within a step
PARTS = ("forward", "backward", "communication", "clip", "optimizer")  # as they are told
NO_OPTIMIZER, NO_COMMUNICATION = "no optimizer", "no communication"
CLIPPED = ", clip"  # ends the name of a contender that clips

UNITS = {
    "median_ms, p20_ms, p80_ms": "milliseconds of a step on its slowest rank: median and the middle 60 %",
    "forward_ms, backward_ms, communication_ms, clip_ms, optimizer_ms": "the step split: medians of the phases of its "
    "slowest rank, less the communication exposed in each; communication_ms = T(no optimizer) - T(no communication); "
    "for a contender that clips within its step clip_ms is what its optimizer takes longer than without clipping",
    "exposed_optimizer_ms": "T(step) - T(no optimizer) of the same turn, median; exposed_p20_ms and exposed_p80_ms",
    "communication_alone_ms": "the step's collectives one after another, with nothing beside them",
    "overlap": "1 - communication_ms / communication_alone_ms: the share that is hidden behind computing",
    "host_ms": "clipping and step() of as many tensors of the same kind with one element each, until the call returns",
    "peak_mib": "what stays between steps (parameters, states, DDP's buckets) and the most that a step allocates at "
    "once beyond it; largest rank",
    "collectives": "of one step: kind -> [calls, bytes]; bytes of the whole tensor, not of a rank's part",
    "sent_bytes": "that each rank sends in a step, by the ring convention: 2 (n - 1) / n of a reduced tensor, "
    "(n - 1) / n of one that is gathered, scattered or broadcast",
    "local_parameters": "that the optimizer of the fullest rank steps",
    "stream_gb_per_s": "in-place multiplication of a large array, all ranks at once, in the same turns; slowest rank",
    "small_all_reduce_ms": "of one number, in the same turns",
    "error": "|parameters - float64 oracle's| / |oracle's - initial|, over the model, after all steps; worst rank",
    "verdict": "ok where error <= error_limit; or what the contender raised",
}


def slowest(times: Times) -> Times:
    """(ranks, turns, contenders, phases) -> (turns, contenders, phases): those of the rank whose step took longest."""
    worst = times.sum(-1).argmax(0)
    return np.take_along_axis(times, worst[None, ..., None], axis=0)[0]


def spread(values: Times) -> tuple[float, float, float]:
    """p20, median, p80."""
    low, middle, high = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)))
    return low, middle, high


def split(times: dict[str, Times], clips_inside: set[str]) -> dict[str, dict[str, float]]:
    """Figures of every contender, milliseconds, from its (turns, phases).

    `clips_inside`: contenders whose clipping is no phase of its own; the same without `CLIPPED` is subtracted.
    """
    whole = {name: phases.sum(-1) for name, phases in times.items()}
    exposed = np.median(times[NO_OPTIMIZER] - times[NO_COMMUNICATION], axis=0)  # communication, by phase
    communication = float(np.median(whole[NO_OPTIMIZER] - whole[NO_COMMUNICATION]))
    found = {}
    for name, phases in times.items():
        low, median, high = spread(whole[name])
        own = np.median(phases, axis=0) - (0 if name == NO_COMMUNICATION else exposed)
        figures = {"median_ms": median, "p20_ms": low, "p80_ms": high}
        figures |= {f"{phase}_ms": float(own[i]) for i, phase in enumerate(PHASES)}
        figures["communication_ms"] = 0.0 if name == NO_COMMUNICATION else communication
        twin = name.removesuffix(CLIPPED)
        if name in clips_inside and twin in times:
            last = PHASES.index("optimizer")
            figures["clip_ms"] = float(np.median(phases[:, last] - times[twin][:, last]))
            figures["optimizer_ms"] -= figures["clip_ms"]
        if name not in (NO_OPTIMIZER, NO_COMMUNICATION):
            low, median, high = spread(whole[name] - whole[NO_OPTIMIZER])
            figures |= {"exposed_optimizer_ms": median, "exposed_p20_ms": low, "exposed_p80_ms": high}
        found[name] = figures
    return found


def overlap(exposed_ms: float, alone_ms: float) -> float:
    """The share of the communication that costs no time; below 0 where it slows the computing beside it."""
    return 1 - exposed_ms / alone_ms


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """A ten-thousandth of a millisecond is below what a clock tells; an error is small."""
    kept = ("error", "error_limit")
    return {k: round(v, 4) if isinstance(v, float) and k not in kept else v for k, v in figures.items()}
