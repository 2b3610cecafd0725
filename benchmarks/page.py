"""A machine's results as one page, report.md: every row of every suite, the plots, and who was absent."""

from __future__ import annotations

import os
from pathlib import Path

from . import ddp_report, project_report, report, store
from .registry import COMPARED, titles
from .report import TRAINED
from .tables import Row, by_case, digits, fraction, markdown, provenance, ratio, speed, timed, where

NAME = "report.md"
HEADER = ["case", "contender", "version", "median", "p20", "p80", "speed", "of ceiling", "ours is faster by", "peak",
          "error, eps", "verdict"]  # fmt: skip


def text(folder: Path) -> str:
    """The page; "" where nothing was measured."""
    parts, first = [], None
    for suite in COMPARED:
        if rows := store.read(folder / f"{suite}.jsonl"):
            first = first or rows[0]
            parts += [f"## {suite}", _about(rows), _table(rows), *_picture(folder, f"{suite}.png"),
                      provenance(suite, rows)]  # fmt: skip
    for name in ("tensors.png", "vocabulary.png"):
        parts += _picture(folder, name)
    others = {suite: report.suite_block(suite, folder) for suite in ("host", "install")}
    others |= {run: report.train_block(folder, ".", run) for run in TRAINED}
    others |= {"ddp": ddp_report.block(folder, "."), "project": project_report.block(folder, ".")}
    for title, block in others.items():
        if block:
            parts += [f"## {title}", block]
    if not parts:
        return ""
    title = f"# {where(first)}" if first else f"# {folder.name}"
    head = (
        "Generated from the rows beside it by `python -m benchmarks readme`. Contenders of a case take turns in one "
        "process; each is checked against a float64 oracle in the same run, and one that errs by more than its limit "
        "is marked. The ceiling is what the machine gave over as many bytes (or in the matrix products alone) in the "
        "same turns: stream, in place; copy, into memory that is there. Units stand in each file's first line."
    )
    return "\n\n".join([title, head, *parts]) + "\n"


def write(folder: Path) -> str:
    """Put the page beside its rows; returns its path, for a person to open."""
    (folder / NAME).write_text(text(folder), encoding="utf-8")
    return os.path.relpath(folder / NAME)


def _about(rows: list[Row]) -> str:
    allocators = dict.fromkeys(row["allocator"] for row in rows if "allocator" in row)
    return f"Allocator {' and '.join(allocators)}." if allocators else ""


def _picture(folder: Path, name: str) -> list[str]:
    return [f"![{Path(name).stem}]({name})"] if (folder / name).exists() else []


def _table(rows: list[Row]) -> str:
    titled = titles()
    lines = []
    for name, contenders in by_case(rows).items():
        ours = timed(contenders).get("fusedopt")
        for row in contenders.values():
            title = titled.get(name, name)
            if row["median_ms"] is None:
                lines.append([title, row["contender"], row.get("version", ""), *[""] * 8, row["verdict"]])
                continue
            own = row["contender"].startswith("fusedopt")
            version = row.get("version") or (row["fusedopt"] if own else row["torch"])
            times = [f"{digits(row[key])} ms" for key in ("median_ms", "p20_ms", "p80_ms")]
            lines.append([
                title, row["contender"], version, *times,
                speed(row), fraction(row),
                f"{ratio(row, ours):.2f}x" if ours else "", f"{row['peak_mib']:.1f} MiB" if "peak_mib" in row else "",
                f"{row['error']:.3g}" if isinstance(row["error"], float) else str(row["error"]), row["verdict"],
            ])  # fmt: skip
    return markdown(HEADER, lines, words=3)
