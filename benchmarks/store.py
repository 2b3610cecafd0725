"""Rows on disk: one JSONL file per suite; its first line is a header, every other line one contender of one case."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import ddp_split, project_model, trial

SUITES = ("optim", "step", "loss", "linear_loss", "host", "install", "train", "ddp", "project")
STUDIES = ("modes", "codes", "peers")  # they take many minutes: each only when asked for by name
UNITS = {
    "median_ms, p20_ms, p80_ms": "milliseconds of one run: median and the middle 60 %",
    "bytes": "that must move, read and write each counted",
    "gb_per_s, tflop_per_s": "bytes, or floating-point operations of the matrix products, / median",
    "cache": "memory: the data are far larger than it; warm: runs in a row on data that stay in it; cold: it is "
    "emptied before each run",
    "allocator": "huge pages: THP_MEM_ALLOC_ENABLE=1",
    "host_ms": "on a GPU: median time until the call returns; median_ms is the longer of host and device",
    "ceiling_ms": "median of what `ceiling` names, which takes turns with the contenders: stream, a multiplication in "
    "place over as many bytes; copy, into memory that is there already; three products, without the loss",
    "launches": "kernels, copies and fills that a run puts on the GPU",
    "sweep": "of a curve: what grows, and how large it is here",
    "version": "of another library; torch's and fusedopt's stand in every row",
    "ceiling_fraction": "ceiling_ms / median_ms",
    "peak_mib, allowed_mib": "the most that was allocated at once, beyond the inputs; and what ours may take",
    "absent": "peers that would have taken part if they had been installed",
    "error, stock_error": "max |result - float64 oracle| / max(|oracle|, median |oracle|), in epsilons of the dtype",
    "verdict": "ok where error <= error_limit; of a training run, where its loss is finite",
    "val_loss": "nats per token at the end of a run",
    "exp_avg_error, exp_avg_sq_error": "at the end, relative to moments of the same gradients without codes; median",
    "weights_bytes, states_bytes, masters_bytes": "per parameter, of the tensors that last from step to step",
}
OWN_UNITS = {"ddp": ddp_split.UNITS, "project": project_model.UNITS, "peers": trial.UNITS}  # other things


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without its header; none where there is no file."""
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "case" in line]


def merge(path: Path, rows: list[dict[str, Any]], order: list[str]) -> None:
    """Put rows into a file: they replace those of the same cases; cases stand in `order`, the registry's, if any.

    Rows of cases that the registry has no longer are dropped: nothing would tell of them.
    """
    new = {row["case"] for row in rows}
    places = {name: place for place, name in enumerate(order)}
    kept = [row for row in read(path) if row["case"] not in new and (row["case"] in places or not order)]
    every = sorted(kept + rows, key=lambda row: places.get(row["case"], len(places)))
    units = OWN_UNITS.get(path.stem, UNITS)
    header = {"suite": path.stem, "command": f"python -m benchmarks {path.stem}", "units": units}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(json.dumps(line) + "\n" for line in [header, *every]), encoding="utf-8")
    os.replace(beside, path)
