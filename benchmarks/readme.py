"""Puts the tables between the pages' markers, writes the reports, and finds what no longer says what the data say.

<!-- benchmarks:NAME --> ... <!-- /benchmarks:NAME -->, where NAME is one of NAMES
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from . import ddp_report, features, page, performance, project_report, report, store
from .machine import ROOT
from .report import TRAINED

MARKED = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks:\2 -->)", re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md"]
NAMES = (*store.SUITES, *store.STUDIES, *TRAINED, *performance.BLOCKS, "plot", "features")
OWN_BLOCKS = {"ddp": ddp_report.block, "project": project_report.block}  # suites that tell in a way of their own


def block(name: str, folders: list[Path], at: Path) -> str:
    """Between the markers `name` of the page `at`: figures of the machine measured last; the others are named."""
    if name not in NAMES:
        raise ValueError(f"{at.name} has a marker benchmarks:{name}; known are {', '.join(NAMES)}")
    if name == "features":
        return features.table()
    found: dict[Path, str] = {}
    for folder in sorted(folders, key=_last, reverse=True):
        shown = Path(os.path.relpath(folder, at.parent)).as_posix()
        if name in performance.BLOCKS:
            text = performance.BLOCKS[name](folder)
        elif name in TRAINED:
            text = report.train_block(folder, shown, name)
        elif name in OWN_BLOCKS:
            text = OWN_BLOCKS[name](folder, shown)
        elif name in (*store.SUITES, *store.STUDIES):
            text = report.suite_block(name, folder)
        else:
            text = report.plot_block(folder, shown)
        if text:
            found[folder] = text
    if not found:
        return "Not measured yet."
    first, *others = found
    links = ", ".join(
        f"[{folder.name}]({Path(os.path.relpath(folder / page.NAME, at.parent)).as_posix()})" for folder in others
    )
    return found[first] + (f"\n\nAlso measured: {links}." if links and name not in store.STUDIES else "")


def _last(folder: Path) -> tuple[str, int]:
    """The day of a folder's last row, and how many rows are of it: of two machines, the one that tells most."""
    days = [row["date"] for path in sorted(folder.glob("*.jsonl")) for row in store.read(path)]
    return (max(days), days.count(max(days))) if days else ("", 0)


def regenerated(path: Path, folders: list[Path]) -> str:
    """The page's text with every marked block as the data have it."""
    text = path.read_text(encoding="utf-8")
    return MARKED.sub(lambda m: f"{m[1]}{block(m[2], folders, path)}\n{m[3]}", text)


def wanted(pages: list[Path], folders: list[Path]) -> dict[Path, str]:
    """What the pages, and each machine's report, ought to hold."""
    texts = {path: regenerated(path, folders) for path in pages}
    return texts | {folder / page.NAME: text for folder in folders if (text := page.text(folder))}


def difference(texts: dict[Path, str]) -> str:
    """How the pages differ from that, as a diff; "" where they do not."""
    lines = []
    for path, new in texts.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        lines += difflib.unified_diff(old.splitlines(), new.splitlines(), path.name, "data", lineterm="")
    return "\n".join(lines)
