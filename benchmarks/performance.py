"""The tables of docs/performance.md: of each kernel the floor, the measured fraction, and who comes next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import store
from .registry import COMPARED, registry
from .tables import OURS, by_case, digits, fastest_other, fraction, markdown, provenance, ratio, speed, timed

HEADER = ["kernel and case", "floor", "time", "speed", "of the ceiling", "beyond inputs", "next", "its time over ours"]


def fractions(suite: str, folder: Path) -> str:
    """Every row of ours in a suite; "" where it was not measured."""
    rows = store.read(folder / f"{suite}.jsonl")
    grouped, lines = by_case(rows), []
    for case in registry(suite):
        present = timed(grouped.get(case.name, {}))
        fastest = fastest_other(present)
        for name in filter(present.get, OURS):
            row = present[name]
            title = case.title if name == "fusedopt" else f"{case.title}, {name.removeprefix('fusedopt ')}"
            lines.append([
                title, floor(row), f"{digits(row['median_ms'])} ms", speed(row), fraction(row),
                f"{row['peak_mib']:.1f} MiB" if "peak_mib" in row else "", fastest["contender"] if fastest else "",
                f"{ratio(fastest, row):.2f}x" if fastest else "",
            ])  # fmt: skip
    return f"{markdown(HEADER, lines, words=1)}\n\n{provenance(suite, rows)}" if lines else ""


def floor(row: dict) -> str:
    """What must be done whoever does it: bytes moved, or the matrix products."""
    return f"{digits(row['bytes'] / 1e6)} MB" if row["bytes"] else f"{digits(row['ceiling_ms'])} ms of products"


BLOCKS: dict[str, Callable[[Path], str]] = {f"fractions_{suite}": partial(fractions, suite) for suite in COMPARED}
