"""Puts the tables between the README's markers, and finds a README that no longer says what the data say.

<!-- benchmarks:NAME --> ... <!-- /benchmarks:NAME -->, where NAME is one of NAMES
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from . import ddp_report, features, project_report, report, store

MARKED = re.compile(r"(<!-- benchmarks:(\w+) -->\n).*?(<!-- /benchmarks:\2 -->)", re.DOTALL)
TRAINED = ("train", "train_fsdp")  # folders of runs of fusedopt.train
NAMES = (*store.SUITES, *store.STUDIES, *TRAINED, "plot", "features")
OWN_BLOCKS = {"ddp": ddp_report.block, "project": project_report.block}  # suites that tell in a way of their own


def block(name: str, folders: list[Path], readme: Path) -> str:
    """What belongs between the markers `name`: each machine's table, under its folder's name if there are several."""
    if name not in NAMES:
        raise ValueError(f"{readme.name} has a marker benchmarks:{name}; known are {', '.join(NAMES)}")
    if name == "features":
        return features.table()
    found = {}
    for folder in folders:
        shown = Path(os.path.relpath(folder, readme.parent)).as_posix()
        if name in OWN_BLOCKS:
            text = OWN_BLOCKS[name](folder, shown)
        elif name in (*store.SUITES, *store.STUDIES):
            text = report.suite_block(name, folder)
        elif name in TRAINED:
            text = report.train_block(folder, shown, name)
        else:
            text = report.plot_block(folder, shown)
        if text:
            found[folder.name] = text
    if not found:
        return "Not measured yet."
    titles = [f"`{machine}`\n\n" if len(found) > 1 else "" for machine in found]
    return "\n\n".join(title + text for title, text in zip(titles, found.values(), strict=True))


def regenerated(readme: Path, folders: list[Path]) -> str:
    """The README's text with every marked block as the data have it."""
    text = readme.read_text(encoding="utf-8")
    return MARKED.sub(lambda m: f"{m[1]}{block(m[2], folders, readme)}\n{m[3]}", text)


def difference(readme: Path, folders: list[Path]) -> str:
    """How the README differs from the data, as a diff; "" where it does not."""
    old, new = readme.read_text(encoding="utf-8").splitlines(), regenerated(readme, folders).splitlines()
    return "\n".join(difflib.unified_diff(old, new, readme.name, "data", lineterm=""))
