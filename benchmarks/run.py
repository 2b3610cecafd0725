"""One call of the command: which cases run, where their rows go, and the progress bar."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import cases_loss, ddp, machine, project, registry, runner, store
from .runner import Case

RESULTS = machine.ROOT / "benchmarks" / "results"
QUICK_RESULTS = machine.ROOT / ".benchmarks"  # not under version control: a quick look must not replace a measurement
OF_CPU = ("install", "host")  # suites that no GPU changes

Rows = list[dict[str, Any]]


class OutOfTime(Exception):
    """The minutes that the command line gave are spent."""


class Run:
    def __init__(self, args: argparse.Namespace, project_args: argparse.Namespace):
        self.args, self.project_args = args, project_args
        self.out: Path = args.out or (QUICK_RESULTS if args.quick else RESULTS) / machine.slug(args.device)
        self.environment = machine.environment(args.device)
        self.measured: dict[str, list[str]] = {}  # suite -> cases
        self.left_out: list[str] = []  # cases that this machine has no room for, and why
        self.until = time.monotonic() + 60 * args.minutes

    # --- what runs ---

    def suite(self, suite: str) -> None:
        """Measure what is asked for of a suite.

        Raises:
            OutOfTime: before the first case that there is no time for.
        """
        on_cpu = self.args.device == "cpu"
        if suite in registry.STUDIES:
            self.study(suite)
        elif suite == "install" and self.args.quick and self.args.command == "all":
            self.left_out.append("install: minutes, which --quick does not have; python -m benchmarks install")
        elif suite in registry.SINGLE:
            if (on_cpu or suite not in OF_CPU) and self.args.cases in suite and self.wants(suite, suite):
                with self.progress() as progress:
                    tell = _teller(progress, progress.add_task(suite), suite)
                    registry.SINGLE[suite].measure(self.args, self.out, self.keep(suite), tell)
        elif suite == "ddp":
            if self.wants(suite):
                self.distributed()
        elif suite == "project":
            if self.wants(suite):
                self.project()
        elif suite == "loss" and on_cpu and self.args.allocator is None:
            for allocator in cases_loss.ALLOCATORS:
                self.in_child(allocator)
        else:
            self.compared(suite)

    def cases(self, suite: str) -> list[Case]:
        """Of a suite whose contenders take turns, what the command line asks for."""
        args = self.args
        found = [case for case in registry.registry(suite, args.device) if args.cases in case.name]
        return [
            case
            for case in found
            if (args.dtype is None or case.dtype == args.dtype)
            and (case.quick or args.cases or not args.quick)
            and (args.allocator is None or case.name.endswith(args.allocator))
            and not (args.missing and case.name in self.kept(suite))
        ]

    def kept(self, suite: str) -> set[str]:
        """Cases that this commit's results have already."""
        rows = store.read(self.out / f"{suite}.jsonl")
        return {row["case"] for row in rows if row["commit"] == self.environment["commit"]}

    def wants(self, suite: str, case: str | None = None) -> bool:
        """Of a suite that is measured as a whole."""
        kept = self.kept(suite)
        if self.args.missing and (case in kept if case else kept):
            return False
        self.in_time()
        return True

    def in_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def among(self, name: str) -> bool:
        """Whether a contender that is not ours takes part."""
        return self.args.peers is None or any(word in name for word in self.args.peers)

    def compared(self, suite: str) -> None:
        cases, had_group = self.cases(suite), dist.is_initialized()
        try:
            with self.progress() as progress:
                task = progress.add_task(suite, total=len(cases))
                for case in cases:
                    self.in_time()
                    try:
                        teller = _teller(progress, task, case.name)
                        runner.measure(case, self.args.quick, self.keep(suite), teller, self.among)
                    except runner.TooLarge as error:
                        self.left_out.append(str(error))
                    progress.advance(task)
        finally:
            if dist.is_initialized() and not had_group:
                dist.destroy_process_group()  # of the shared cases; the next suite makes its own

    def study(self, suite: str) -> None:
        """The cases of a study that were asked for; without --cases, all that no earlier run has kept."""
        study, args = registry.STUDIES[suite], self.args
        self.measured[suite] = []  # its table is of all rows, kept ones too
        rows = [] if args.quick or args.cases else store.read(self.out / f"{suite}.jsonl")
        kept = {row["case"] for row in rows if study.keeps(row)}
        names = [name for name in study.cases(args.quick) if args.cases in name and name not in kept]
        with self.progress() as progress:
            task = progress.add_task(suite, total=len(names))
            for name in names:
                self.in_time()
                self.keep(suite)(study.measure(name, args, _teller(progress, task, name)))
                progress.advance(task)

    def distributed(self) -> None:
        """Under torchrun this process is one of the ranks, and rank 0 keeps; else it starts the ranks and waits."""
        if ddp.launched():
            with self.progress(disable=not ddp.is_main()) as progress:
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
        with self.progress() as progress:
            tell = _teller(progress, progress.add_task("project"), "project")
            project.measure(self.project_args, self.out, self.keep("project"), tell)

    def in_child(self, allocator: str) -> None:
        """The loss cases of one allocator setting; the child writes to the same file, and stops with us on Ctrl-C."""
        args = self.args
        names = [case.name for case in self.cases("loss") if case.name.endswith(allocator)]
        if not names:
            return
        self.in_time()
        command = [sys.executable, "-m", "benchmarks", "loss", "--allocator", allocator, "--out", str(self.out)]
        command += ["--cases", args.cases, "--minutes", str(max(0.0, self.until - time.monotonic()) / 60)]
        command += ["--dtype", args.dtype] if args.dtype else []
        command += ["--peers", ",".join(args.peers)] if args.peers is not None else []
        command += [flag for flag, on in (("--quick", args.quick), ("--missing", args.missing)) if on]
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
        if status == LEFT:
            raise OutOfTime
        if status not in (0, 1):
            raise SystemExit(f"the loss cases with the allocator {allocator!r} ended with status {status}")

    # --- where it goes ---

    def keep(self, suite: str) -> Callable[[Rows], None]:
        study = registry.STUDIES.get(suite)
        order = study.cases() if study else [case.name for case in registry.registry(suite)]

        def merge(rows: Rows) -> None:
            stamped = [row | self.environment | {"quick": self.args.quick} for row in rows]
            store.merge(self.out / f"{suite}.jsonl", stamped, order)
            self.measured.setdefault(suite, []).extend(dict.fromkeys(row["case"] for row in rows))

        return merge

    def progress(self, disable: bool = False) -> Progress:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        return Progress(*columns, console=Console(stderr=True), transient=True, disable=disable)


LEFT = 75  # exit status: cases are left for which there was no time


def _teller(progress: Progress, task: Any, name: str) -> Callable[[str], None]:
    return lambda text: progress.update(task, description=f"{name}: {text}")
