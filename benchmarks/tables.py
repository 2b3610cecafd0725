"""What every table is made of."""

from __future__ import annotations

from typing import Any

from .cases_linear_loss import PRODUCTS
from .ceilings import COPY, STREAM

Row = dict[str, Any]
OURS = ("fusedopt", "fusedopt triton", "fusedopt inplace")
CEILINGS = (STREAM, COPY, PRODUCTS)


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """case -> contender -> row, in the order of the rows."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def timed(contenders: dict[str, Row]) -> dict[str, Row]:
    """Without those that raised."""
    return {name: row for name, row in contenders.items() if row["median_ms"] is not None}


def fastest_other(contenders: dict[str, Row], figure: str = "median_ms") -> Row | None:
    """Of those that are neither ours nor a ceiling, and have the figure."""
    others = [row for name, row in contenders.items() if name not in (*OURS, *CEILINGS) and figure in row]
    return min(others, key=lambda row: row[figure], default=None)


def digits(value: float) -> str:
    """Three significant digits, and all that stand before the point."""
    return f"{value:#.3g}".rstrip(".") if value < 100 else f"{value:.0f}"


def ratio(row: Row, ours: Row, figure: str = "median_ms") -> float:
    """How many times as long as ours."""
    return row[figure] / ours[figure]


def speed(row: Row) -> str:
    """In the unit of what the case counts."""
    if "tflop_per_s" in row:
        return f"{digits(row['tflop_per_s'])} TFLOP/s" if row["tflop_per_s"] >= 1 else (
            f"{digits(row['tflop_per_s'] * 1e3)} GFLOP/s")  # fmt: skip
    return f"{digits(row['gb_per_s'])} GB/s" if row["bytes"] else ""


def fraction(row: Row) -> str:
    """Of the ceiling, and which that is."""
    return f"{row['ceiling_fraction']:.0%}" + (f" of {row['ceiling']}" if "ceiling" in row else "")


def named(row: Row) -> str:
    return row["contender"] + ("" if row["verdict"] == "ok" else " (**wrong**)")


def markdown(header: list[str], rows: list[list[str]], words: int = 3) -> str:
    """A table; figures, which follow the first columns of `words`, to the right."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def where(row: Row) -> str:
    if "gpu" in row:
        return f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}"
    return f"{row['machine']}, {row['cores']} cores, {row['threads']} threads ({row['instruction_set']})"


def provenance(suite: str, rows: list[Row]) -> str:
    """Machine, versions, date and the command; one line for each way in which the rows differ."""
    lines = dict.fromkeys(
        f"{where(r)}; torch {r['torch']}, "
        f"fusedopt {r['fusedopt']} at {r['commit']}, Python {r['python']}; {r['date']}; `python -m benchmarks {suite}`"
        for r in rows
    )
    absent = dict.fromkeys(name for r in rows for name in r.get("absent", ()))
    return "\n\n".join(lines) + (f"\n\nNot installed: {', '.join(absent)}." if absent else "")
