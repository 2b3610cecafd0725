"""Counted budgets: instructions, vector loops, launches and bytes against benchmarks/budgets.json; never a time.

What is counted is the same on every run, so that a slower kernel fails the build and a busy machine does not.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fusedopt.backends import cpu

from .counting import callgrind, gpu, loops
from .machine import ROOT

PATH = ROOT / "benchmarks" / "budgets.json"
Counts = dict[str, float]

# (pattern of names, how much more than counted is allowed, as a share and in units), the first that fits
TOLERANCES = (
    (r": a call, native, Python and torch$", 0.10, 0.0),  # addresses decide how long Python looks into a dict
    (r"^(cpu|host)\b", 0.03, 0.0),
    (r": instructions for 16$", 0.0, 1.0),
    (r"", 0.0, 0.0),
)


class Part(NamedTuple):
    """What is counted in one go; its budgets are those whose names begin with one of `prefixes`."""

    prefixes: tuple[str, ...]
    missing: Callable[[], str]
    count: Callable[[], Counts]
    compiled: bool  # depends on the compiler that built the library


PARTS = {
    "cpu": Part(("cpu ", "host"), callgrind.missing, lambda: callgrind.count([ROOT]), True),
    "loops": Part(("loop ",), loops.missing, lambda: loops.count(Path(cpu._native.__file__)), True),
    "gpu": Part(("gpu ",), gpu.missing, gpu.count, False),
}


class Verdict(NamedTuple):
    name: str
    counted: float | None
    budget: float | None  # the most that is allowed
    text: str
    fails: bool = False


def allowed(name: str, count: float) -> float:
    share, units = next((share, units) for pattern, share, units in TOLERANCES if re.search(pattern, name))
    return round(count * (1 + share) + units, 4)


def _floor(name: str, count: float) -> float:
    """Below it a budget is too wide."""
    return 2 * count - allowed(name, count)


def judge(counted: Counts, budgets: dict[str, dict[str, float]]) -> list[Verdict]:
    """Every name of either. A count below its budget is told and is no failure."""
    verdicts = []
    for name in dict.fromkeys([*budgets, *counted]):
        got, budget = counted.get(name), budgets.get(name)
        if got is None:
            verdicts.append(Verdict(name, None, budget["allowed"], "no longer counted: --write", True))
        elif budget is None:
            verdicts.append(Verdict(name, got, None, "no budget: --write", True))
        elif got > budget["allowed"]:
            over = f"{got / budget['count'] - 1:+.1%}" if budget["count"] else f"+{got:g}"
            verdicts.append(Verdict(name, got, budget["allowed"], f"too many: {over}", True))
        elif got < _floor(name, budget["count"]):
            verdicts.append(Verdict(name, got, budget["allowed"], "tighten the budget: --write"))
        else:
            verdicts.append(Verdict(name, got, budget["allowed"], "within"))
    return verdicts


def environment() -> dict[str, str]:
    """What counts depend on besides the source."""
    return {
        "compiler": cpu.build_info().get("compiler", "none"),
        "architecture": platform.machine(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def _major(compiler: str) -> str:
    """The name and major version: "c++ (Debian 12.2.0-14) 12.2.0" -> "c++ 12"."""
    name, version = compiler.split(" ")[0], re.search(r"(\d+)(?:\.\d+)*$", compiler)
    return f"{name} {version[1] if version else compiler}"


def left_out(part: Part, here: dict[str, str], then: dict[str, str]) -> str:
    """Why a part is not counted here; "" where it is. `then`: of the budgets, {} where there are none yet."""
    if cpu.available() is not True:
        return str(cpu.available())
    if reason := part.missing():
        return reason
    if part.compiled and then:
        if here["architecture"] != then["architecture"]:
            return f"the budgets are of {then['architecture']}, and this is {here['architecture']}"
        ours, theirs = _major(here["compiler"]), _major(then["compiler"])
        if ours != theirs:
            return f"the budgets are of {theirs}'s code, and the library was built by {ours}"
    return ""


def comparable(name: str, here: dict[str, str], then: dict[str, str]) -> bool:
    """Python's and torch's own instructions change with their versions."""
    return (
        not name.endswith("Python and torch") or not then or all(here[key] == then[key] for key in ("python", "torch"))
    )


def read() -> dict[str, Any]:
    """{"counted_with": {part: environment}, "budgets": {name: {"count", "allowed"}}}; empty where there is no file."""
    empty = {"counted_with": {}, "budgets": {}}
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else empty


def write(file: dict[str, Any], counted: dict[str, Counts]) -> None:
    """Put the counts of the parts that were counted in the place of theirs; `file` as read() gives it."""
    stale = tuple(prefix for name in counted for prefix in PARTS[name].prefixes)
    budgets = {name: budget for name, budget in file["budgets"].items() if not name.startswith(stale)}
    for counts in counted.values():
        budgets |= {name: {"count": count, "allowed": allowed(name, count)} for name, count in counts.items()}
    with_ = file["counted_with"] | dict.fromkeys(counted, environment())
    budgets = {name: budgets[name] for part in PARTS.values() for name in budgets if name.startswith(part.prefixes)}

    def listed(entries: dict[str, Any]) -> str:
        return ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())

    text = f'{{\n "counted_with": {{\n{listed(with_)}\n }},\n "budgets": {{\n{listed(budgets)}\n }}\n}}\n'
    PATH.write_text(text, encoding="utf-8")


def table(verdicts: list[Verdict]) -> Table:
    shown = Table(title="counted, against the most that is allowed", title_justify="left")
    shown.add_column("what", no_wrap=True)
    for heading in ("counted", "budget"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for verdict in verdicts:
        numbers = ("" if n is None else f"{n:,.10g}" for n in (verdict.counted, verdict.budget))
        shown.add_row(verdict.name, *numbers, f"[bold red]{verdict.text}" if verdict.fails else verdict.text)
    return shown


def add_arguments(command: argparse.ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="exit 1 if any count exceeds its budget")
    what.add_argument("--write", action="store_true", help="write the counts to benchmarks/budgets.json as the budgets")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")


def main(args: argparse.Namespace) -> int:
    """0; 1 where --check finds a count that exceeds its budget. What cannot be counted here is said, and no failure."""
    here, file = environment(), read()
    counted: dict[str, Counts] = {}
    verdicts: list[Verdict] = []
    for name in args.parts:
        part, then = PARTS[name], {} if args.write else file["counted_with"].get(name, {})
        if reason := left_out(part, here, then):
            print(f"left out: the budgets of {name}: {reason}")
            continue
        print(f"counting: {name}", file=sys.stderr)
        counted[name] = part.count()
        own = {key: budget for key, budget in file["budgets"].items() if key.startswith(part.prefixes)}
        apart = [key for key in own | counted[name] if not comparable(key, here, then)]
        if apart:
            print(
                f"left out: {len(apart)} budgets of {name} with Python's and torch's own instructions, of Python "
                f"{then['python']} and torch {then['torch']}: these are {here['python']} and {here['torch']}"
            )
        verdicts += judge(
            {key: count for key, count in counted[name].items() if key not in apart},
            {key: budget for key, budget in own.items() if key not in apart},
        )
    if args.write:
        write(file, counted)
        print(f"{sum(map(len, counted.values()))} budgets written to {PATH.relative_to(ROOT)}")
        return 0
    Console(width=None if sys.stdout.isatty() else 150).print(table(verdicts))
    failed = [verdict for verdict in verdicts if verdict.fails]
    wide = sum(verdict.text.startswith("tighten") for verdict in verdicts)
    print(f"{len(verdicts)} counted: {len(failed)} not within their budgets, {wide} far below")
    for verdict in failed:
        print(f"{verdict.name}: {verdict.text}")
    return 1 if args.check and failed else 0
