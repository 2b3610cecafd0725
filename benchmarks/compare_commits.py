"""Two commits side by side: each built in a folder of its own, both measured by this checkout's program."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import store
from .counting import callgrind, loops
from .machine import ROOT

Rows = dict[tuple[str, str, str], dict[str, Any]]
BENCHMARKS = Path(__file__).resolve().parent


def _git(*arguments: str | Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"git {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def checkouts(refs: list[str]) -> Iterator[list[Path]]:
    """A folder for each ref, its native library built; all gone afterwards, whatever happens.

    Raises:
        SystemExit: what is no commit, or does not build, by name.
    """
    commits = [_git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}") for ref in _known(refs)]
    with tempfile.TemporaryDirectory(prefix="fusedopt-compare-") as parent:
        folders = [Path(parent) / name / "source" for name in ("a", "b")]
        try:
            for ref, commit, folder in zip(refs, commits, folders, strict=True):
                _git("worktree", "add", "--detach", "--force", folder, commit)
                print(f"building {ref} ({commit[:10]})", file=sys.stderr)
                build(folder)
                # what is on the path of the measuring process besides: this checkout's program, not that commit's
                (folder.parent / "benchmarks").symlink_to(BENCHMARKS, target_is_directory=True)
                (folder.parent / "tests").symlink_to(ROOT / "tests", target_is_directory=True)
            yield folders
        finally:
            for folder in folders:
                subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, capture_output=True)
            subprocess.run(["git", "worktree", "prune"], cwd=ROOT, capture_output=True)


def _known(refs: list[str]) -> list[str]:
    for ref in refs:
        if subprocess.run(["git", "rev-parse", "-q", "--verify", f"{ref}^{{commit}}"], cwd=ROOT,
                          capture_output=True).returncode:  # fmt: skip
            raise SystemExit(f"{ref!r} is neither a results file or folder that exists nor a commit")
    return refs


def build(folder: Path) -> None:
    environment = {**os.environ, "FUSEDOPT_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{folder} does not build:\n{done.stdout[-3000:]}")


def path_of(folder: Path) -> list[Path]:
    """Where a process finds this checkout's benchmarks, and after them that commit's fusedopt."""
    return [folder.parent, folder]


def round_of(folder: Path, suite: str, cases: str, out: Path) -> list[dict[str, Any]]:
    """Measure ours and the ceilings once, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path_of(folder)))}
    command = [sys.executable, "-m", "benchmarks", suite, "--cases", cases, "--out", out, "--peers", "none"]
    done = subprocess.run(command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: a contender was wrong, and its row says so
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return store.read(out / f"{suite}.jsonl")


def measure(folders: list[Path], suite: str, cases: str, rounds: int) -> list[Rows]:
    """The rows of each, of `rounds` turns A, B, A, B, ...: of every figure the median."""
    turns: list[list[list[dict[str, Any]]]] = [[], []]
    for turn in range(rounds):
        for side, folder in enumerate(folders):
            print(f"round {turn + 1} of {rounds}: {'AB'[side]}", file=sys.stderr)
            turns[side].append(round_of(folder, suite, cases, folder.parent / f"results-{turn}"))
    return [{(suite, row["case"], row["contender"]): row for row in combined(rows)} for rows in turns]


def combined(turns: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Rows of several runs as one row for each contender; the verdict is the worst."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for rows in turns for row in rows if "median_ms" in row):
        grouped.setdefault((row["case"], row["contender"]), []).append(row)
    for rows in grouped.values():
        figures = {
            key: statistics.median(row[key] for row in rows)
            for key in ("median_ms", "p20_ms", "p80_ms", "ceiling_fraction")
            if all(isinstance(row.get(key), (int, float)) for row in rows)
        }
        wrong = [row["verdict"] for row in rows if row.get("verdict", "ok") != "ok"]
        yield rows[0] | figures | ({"verdict": wrong[0]} if wrong else {})


def count(folder: Path) -> dict[str, float]:
    """What of a commit's native code can be counted here. Raises SystemExit where nothing can."""
    found: dict[str, float] = {}
    library = next((folder / "fusedopt").glob("_native*.so"))
    reasons = [tool.missing() for tool in (callgrind, loops)]
    if all(reasons):
        raise SystemExit(f"nothing can be counted: {'; '.join(reasons)}")
    for reason in filter(None, reasons):
        print(f"left out: {reason}", file=sys.stderr)
    if not reasons[0]:
        found |= callgrind.count(path_of(folder))
    if not reasons[1]:
        found |= loops.count(library)
    return found
