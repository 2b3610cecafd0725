"""What became slower from A to B: two result files, two folders of them, or two commits, measured in turns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import budgets, compare_commits
from .store import read

Row = dict[str, Any]
Key = tuple[str, str, str]  # suite, case, contender
Rows = dict[Key, Row]
SAME = ("machine", "threads", "torch")  # what must not differ where times are compared
TIMES = ("median_ms", "p20_ms", "p80_ms")
BOUND = 0.25  # of the ceiling: what is further below it waits for something else, and is judged by its time


class Difference(NamedTuple):
    key: Key
    a: Row | None
    b: Row | None
    ratio: (
        float  # times: B's over A's; where memory bounds both, each over its ceiling's, and the machine's mood is out
    )
    verdict: str
    fails: bool = False


def load(path: Path) -> Rows:
    """The rows of contenders, of a file or of a folder's files. Raises SystemExit where there are none."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    rows = {
        (file.stem if path.is_dir() else "", row["case"], row["contender"]): row
        for file in files
        for row in read(file)
        if "median_ms" in row
    }
    if not rows:
        raise SystemExit(f"{path} holds no rows with a median_ms: is it a results file or folder, or a commit?")
    return rows


def timed(row: Row | None) -> bool:
    """False of one that was not measured, or that raised."""
    return row is not None and all(isinstance(row.get(key), (int, float)) for key in TIMES)


def _times(row: Row, relative: bool) -> tuple[float, float, float]:
    """Median, p20, p80; relative: over the ceiling's time in the same run."""
    median, low, high = (float(row[key]) for key in TIMES)
    scale = 1 / (row["ceiling_fraction"] * median) if relative else 1.0
    return median * scale, low * scale, high * scale


def difference(key: Key, a: Row | None, b: Row | None, tolerance: float) -> Difference:
    """`tolerance`: the share by which one of ours may become slower, beyond the noise, and not fail."""
    if a is None or b is None:
        return Difference(key, a, b, float("nan"), "only in B" if a is None else "only in A")
    ours = key[2].startswith("fusedopt")
    if b.get("verdict", "ok") != "ok" and a.get("verdict", "ok") == "ok":
        return Difference(key, a, b, float("nan"), f"no longer right: {b['verdict']}", ours)
    if not (timed(a) and timed(b)):
        return Difference(key, a, b, float("nan"), "not measured")
    relative = all((row.get("ceiling_fraction") or 0) >= BOUND for row in (a, b))
    (was, was_low, was_high), (now, now_low, now_high) = _times(a, relative), _times(b, relative)
    verdict = "slower" if now_low > was_high else "faster" if now_high < was_low else "within noise"
    return Difference(key, a, b, now / was, verdict, ours and verdict == "slower" and now / was > 1 + tolerance)


def differences(a: Rows, b: Rows, tolerance: float) -> list[Difference]:
    return [difference(key, a.get(key), b.get(key), tolerance) for key in dict.fromkeys([*a, *b])]


def warnings(a: Rows, b: Rows) -> Iterator[str]:
    """What makes times incomparable."""
    for what in SAME:
        here, there = ({row.get(what) for row in rows.values()} for rows in (a, b))
        if here != there:
            listed = (", ".join(sorted(map(str, found))) for found in (here, there))
            yield f"warning: {what} differs: {' / '.join(listed)}"


def table(found: list[Difference]) -> Table:
    shown = Table(title="B against A; times and middle 60 %", title_justify="left")
    shown.add_column("case / contender", no_wrap=True)
    for heading in ("A ms", "B ms", "B / A", "of ceiling A", "B", "verdict"):
        shown.add_column(heading, justify="right", no_wrap=True)

    def time(row: Row | None) -> str:
        return "{:.4g} ({:.4g} to {:.4g})".format(*(row[key] for key in TIMES)) if timed(row) else ""

    def fraction(row: Row | None) -> str:
        return f"{row['ceiling_fraction']:.0%}" if row and row.get("ceiling_fraction") else ""

    case = None
    for d in found:
        if d.key[:2] != case:
            case = d.key[:2]
            shown.add_section()
            shown.add_row("[bold]" + " ".join(filter(None, case)))
        ratio = f"{d.b['median_ms'] / d.a['median_ms']:.3f}" if timed(d.a) and timed(d.b) else ""
        verdict = f"[bold red]{d.verdict}" if d.fails else d.verdict
        shown.add_row("  " + d.key[2], time(d.a), time(d.b), ratio, fraction(d.a), fraction(d.b), verdict)
    return shown


def tell(a: Rows, b: Rows, tolerance: float) -> int:
    """1 where one of ours became slower beyond noise and tolerance, or wrong."""
    found = differences(a, b, tolerance)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(found))
    for line in warnings(a, b):
        print(line)
    failed = [d for d in found if d.fails]
    for d in failed:
        print(f"{' '.join(filter(None, d.key))}: {d.verdict}" + (f", {d.ratio - 1:+.1%}" if d.ratio == d.ratio else ""))
    return 1 if failed else 0


def tell_counts(a: budgets.Counts, b: budgets.Counts) -> int:
    """1 where B counts more than A, beyond what a budget would allow."""
    as_budgets = {name: {"count": count, "allowed": budgets.allowed(name, count)} for name, count in a.items()}
    verdicts = [v for v in budgets.judge(b, as_budgets) if v.counted != a.get(v.name)]
    if not verdicts:
        print(f"{len(a)} counts, none of which differs")
        return 0
    Console(width=None if sys.stdout.isatty() else 150).print(table_of_counts(a, verdicts))
    print(f"{len(a)} counts, of which {len(verdicts)} differ")
    return 1 if any(v.text.startswith("too many") for v in verdicts) else 0


def table_of_counts(a: budgets.Counts, verdicts: list[budgets.Verdict]) -> Table:
    shown = Table(title="what B counts otherwise than A", title_justify="left")
    shown.add_column("what", no_wrap=True)
    for heading in ("A", "B", "B / A"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for v in verdicts:
        was, now = a.get(v.name), v.counted
        cells = ("" if n is None else f"{n:,.10g}" for n in (was, now))
        shown.add_row(v.name, *cells, f"{now / was:.4f}" if was and now is not None else "")
    return shown


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="a .jsonl file, a folder of them, or a commit")
    command.add_argument("b", metavar="B", help="of the same kind as A")
    command.add_argument("--tolerance", type=float, default=0.05, metavar="SHARE", help="default: 0.05")
    command.add_argument("--suite", default="optim", help="of commits: what is measured; default: optim")
    command.add_argument("--cases", default="", metavar="SUBSTR", help="only cases whose name contains SUBSTR")
    command.add_argument("--rounds", type=int, default=3, metavar="N", help="of commits: turns of each; default: 3")
    command.add_argument("--counts", action="store_true", help="of commits: instructions and loops, not times")


def main(args: argparse.Namespace) -> int:
    """0; 1 where B is slower; 130 after Ctrl-C."""
    paths = [Path(args.a), Path(args.b)]
    if all(path.exists() for path in paths) and not args.counts:
        rows = [{key: row for key, row in load(path).items() if args.cases in key[1]} for path in paths]
        return tell(*rows, args.tolerance)
    try:
        with compare_commits.checkouts([args.a, args.b]) as folders:
            if args.counts:
                return tell_counts(*map(compare_commits.count, folders))
            return tell(*compare_commits.measure(folders, args.suite, args.cases, args.rounds), args.tolerance)
    except KeyboardInterrupt:
        return 130
