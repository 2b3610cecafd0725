"""`python -m benchmarks`: measure, tell, and keep the README in step with the data."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import (
    cases_loss,
    ddp,
    ddp_plot,
    ddp_report,
    machine,
    plot,
    project,
    project_report,
    readme,
    report,
    runner,
    store,
    trial,
)

RESULTS = machine.ROOT / "benchmarks" / "results"
OWN_REPORTS = {"ddp": ddp_report, "project": project_report}  # suites that are no cases of the registry
OWN_PLOTS = {"ddp": ddp_plot, "project": project_report}
QUICK_RESULTS = machine.ROOT / ".benchmarks"  # not under version control: a quick look must not replace a measurement


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    about = {
        "optim": "optimizer steps",
        "step": "whole steps: clipping and the update",
        "loss": "cross entropy and mean squared error, forward and backward",
        "linear_loss": "a head and its cross entropy together, forward and backward",
        "ddp": "distributed steps; under torchrun on its ranks, else on --nproc-per-node of its own",
        "project": "what the optimizer exposes on up to 1024 GPUs: a model, on counted bytes and stated bandwidths",
        "host": "host time of a GPU step, without a GPU",
        "install": "time of `pip install .`",
        "all": "all of these",
        "modes": "training at every precision: losses, bytes, times; an hour, and goes on where it was stopped",
        "peers": "other libraries: which are to be had, run here and are right",
        "codes": "training from states in 8-bit codes of several kinds; goes on where it was stopped",
    }
    for name, text in about.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--quick", action="store_true", help="few turns, nothing compiled: a look, not a figure")
        command.add_argument("--cases", default="", metavar="SUBSTR", help="only cases whose name contains SUBSTR")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose cases; default: cpu")
        command.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<machine>/")
        # the allocator's setting must be there before torch is: the loss cases run in a child process for each
        command.add_argument("--allocator", choices=cases_loss.ALLOCATORS, help=argparse.SUPPRESS)
        if name in ("ddp", "all"):
            command.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks; default: 2, or every GPU")
            command.add_argument("--model", choices=ddp.SIZES, help="default: small, on GPUs gpt2, if quick tiny")
            command.add_argument("--scaling", action="store_true", help="fewer ranks too: weak and strong scaling")
            command.add_argument("--spawned", action="store_true", help=argparse.SUPPRESS)  # who spawned it will tell
        if name == "peers":
            trial.add_arguments(command)
        if name == "project":
            project.add_arguments(command)
    command = commands.add_parser("readme", help="write the tables of README.md from the data")
    command.add_argument("--check", action="store_true", help="write nothing; exit 1 if README and data disagree")
    command.add_argument("--out", type=Path, metavar="DIR", help="one machine's results; default: every machine's")
    command.add_argument("--readme", type=Path, default=machine.ROOT / "README.md", help=argparse.SUPPRESS)
    return top


class Run:
    """One call of the command: where rows go, and the progress bar."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out: Path = args.out or (QUICK_RESULTS if args.quick else RESULTS) / machine.slug(args.device)
        self.environment = machine.environment(args.device)
        self.measured: dict[str, list[str]] = {}  # suite -> cases

    def keep(self, suite: str) -> Callable[[list[dict[str, Any]]], None]:
        study = report.STUDIES.get(suite)
        order = study.cases() if study else [case.name for case in report.registry(suite)]

        def merge(rows: list[dict[str, Any]]) -> None:
            stamped = [row | self.environment | {"quick": self.args.quick} for row in rows]
            store.merge(self.out / f"{suite}.jsonl", stamped, order)
            self.measured.setdefault(suite, []).extend(dict.fromkeys(row["case"] for row in rows))

        return merge

    def run(self, suite: str) -> None:
        on_cpu = self.args.device == "cpu"
        if suite == "loss" and on_cpu and self.args.allocator is None:
            for allocator in cases_loss.ALLOCATORS:
                self.in_child(allocator)
            return
        if suite in report.STUDIES:
            self.study(suite)
            return
        cases = [case for case in report.registry(suite, self.args.device) if self.args.cases in case.name]
        if self.args.allocator:
            cases = [case for case in cases if case.name.endswith(self.args.allocator)]
        if suite == "ddp":
            self.distributed()
            return
        if suite == "project":
            self.project()
            return
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            if suite in report.SINGLE:
                if on_cpu and self.args.cases in suite:
                    measure = report.SINGLE[suite].measure
                    measure(self.args.quick, self.keep(suite), _teller(progress, progress.add_task(suite), suite))
                return
            task = progress.add_task(suite, total=len(cases))
            for case in cases:
                runner.measure(case, self.args.quick, self.keep(suite), _teller(progress, task, case.name))
                progress.advance(task)

    def study(self, suite: str) -> None:
        """The cases of a study that were asked for; without --cases, all that no earlier run has kept."""
        study, args = report.STUDIES[suite], self.args
        self.measured[suite] = []  # its table is of all rows, kept ones too
        rows = [] if args.quick or args.cases else store.read(self.out / f"{suite}.jsonl")
        kept = {row["case"] for row in rows if study.keeps(row)}
        names = [name for name in study.cases(args.quick) if args.cases in name and name not in kept]
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(suite, total=len(names))
            for name in names:
                self.keep(suite)(study.measure(name, args, _teller(progress, task, name)))
                progress.advance(task)

    def distributed(self) -> None:
        """Under torchrun this process is one of the ranks, and rank 0 keeps; else it starts the ranks and waits."""
        if ddp.launched():
            with Progress(TimeElapsedColumn(), TextColumn("{task.description}"), console=Console(stderr=True),
                          transient=True, disable=not ddp.is_main()) as progress:  # fmt: skip
                ddp.measure(self.args, self.keep("ddp"), _teller(progress, progress.add_task("ddp"), "ddp"))
            return
        path = self.out / "ddp.jsonl"
        before = {json.dumps(row) for row in store.read(path)}
        try:
            status = ddp.spawn(self.args, self.out)
        finally:
            cases = (row["case"] for row in store.read(path) if json.dumps(row) not in before)
            self.measured["ddp"] = list(dict.fromkeys(cases))
        if status:
            raise SystemExit(f"the ranks of the ddp cases ended with status {status}; what they measured is kept")

    def project(self) -> None:
        args = self.args if self.args.command == "project" else parser().parse_args(["project"])
        with Progress(TimeElapsedColumn(), TextColumn("{task.description}"), console=Console(stderr=True),
                      transient=True) as progress:  # fmt: skip
            tell = _teller(progress, progress.add_task("project"), "project")
            project.measure(args, self.out, self.keep("project"), tell)

    def in_child(self, allocator: str) -> None:
        """The loss cases of one allocator setting; the child writes to the same file, and stops with us on Ctrl-C."""
        names = [case.name for case in report.registry("loss", "cpu")]
        names = [name for name in names if name.endswith(allocator) and self.args.cases in name]
        if not names:
            return
        command = [sys.executable, "-m", "benchmarks", "loss", "--allocator", allocator, "--out", str(self.out)]
        command += ["--cases", self.args.cases, *(["--quick"] if self.args.quick else [])]
        plain = {key: value for key, value in os.environ.items() if key not in cases_loss.HUGE_PAGES}
        child = subprocess.Popen(command, cwd=machine.ROOT, env=plain | cases_loss.ALLOCATORS[allocator])
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()  # it has had the signal too, and is writing what it has
            status = 130
        written = {row["case"] for row in store.read(self.out / "loss.jsonl")}
        self.measured.setdefault("loss", []).extend(name for name in names if name in written)
        if status == 130:
            raise KeyboardInterrupt
        if status not in (0, 1):
            raise SystemExit(f"the loss cases with the allocator {allocator!r} ended with status {status}")

    def tell(self) -> int:
        """Tables of what was measured, and the plot; 1 if a contender was wrong."""
        console = Console() if sys.stdout.isatty() else Console(width=150)
        wrong = 0
        for suite, names in self.measured.items():
            rows = store.read(self.out / f"{suite}.jsonl")
            if suite not in report.STUDIES:
                rows = [row for row in rows if row["case"] in names]
            told = report.terminal_study if suite in report.STUDIES else OWN_REPORTS.get(suite, report).terminal
            console.print(told(suite, rows))
            console.print(report.provenance(suite, rows), highlight=False)
            wrong += sum(failed(row) for row in rows)
        plot.draw(self.out)
        for suite, own in OWN_PLOTS.items():
            if suite in self.measured:
                own.draw(self.out)
        return 1 if wrong else 0


def _teller(progress: Progress, task: Any, name: str) -> Callable[[str], None]:
    return lambda text: progress.update(task, description=f"{name}: {text}")


def update_readme(args: argparse.Namespace) -> int:
    folders = [args.out] if args.out else sorted(path for path in RESULTS.glob("*") if path.is_dir())
    if not args.check:
        args.readme.write_text(readme.regenerated(args.readme, folders), encoding="utf-8")
        return 0
    difference = readme.difference(args.readme, folders)
    if difference:
        print(f"{difference}\n\n{args.readme.name} does not say what the data say: run python -m benchmarks readme")
    return 1 if difference else 0


def failed(row: dict[str, Any]) -> bool:
    """Not right; of a peer, what it does not take and raises is a finding and no failure."""
    return row["verdict"] != "ok" and not (row["verdict"].startswith("raised") and "fusedopt" not in row["contender"])


def tells(args: argparse.Namespace) -> bool:
    """Not a child process, whose parent tells, and not a rank beside the first."""
    return not args.allocator and not getattr(args, "spawned", False) and ddp.is_main()


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a contender was wrong or the README disagrees; 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    if args.command == "readme":
        return update_readme(args)
    args.out = args.out and args.out.resolve()
    if ddp.launched():
        ddp.use_own_threads()
    run = Run(args)
    try:
        for suite in store.SUITES if args.command == "all" else [args.command]:
            run.run(suite)
    except KeyboardInterrupt:
        if tells(args):
            run.tell()
        return 130
    return run.tell() if tells(args) else 0


if __name__ == "__main__":
    sys.exit(main())
