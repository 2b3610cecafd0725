"""`python -m benchmarks`: measure, tell, and keep the README in step with the data."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from . import (
    budgets,
    cases_loss,
    cases_optim,
    compare,
    ddp,
    ddp_plot,
    ddp_report,
    page,
    plot,
    project,
    project_report,
    readme,
    registry,
    report,
    store,
    tables,
    trial,
)
from .run import LEFT, RESULTS, OutOfTime, Run

OWN_REPORTS = {"ddp": ddp_report, "project": project_report}  # suites that are no cases of the registry
OWN_COMMANDS = {"budgets": budgets, "compare": compare}  # which measure no suite
OWN_PLOTS = {"ddp": ddp_plot, "project": project_report}
ABOUT = {
    "optim": "optimizer steps",
    "step": "whole steps: unscaling, clipping, update, average; 8-bit states",
    "loss": "cross entropy and mean squared error, forward and backward",
    "linear_loss": "a head and its cross entropy together, forward and backward",
    "train": "a training run, stock and fused side by side",
    "ddp": "distributed steps; under torchrun on its ranks, else on --nproc-per-node of its own",
    "project": "what the optimizer exposes on up to 1024 GPUs: a model, on counted bytes and stated bandwidths",
    "host": "host time of a GPU step, without a GPU",
    "install": "time of `pip install .`",
    "all": "all of these",
    "peers": "other libraries: which are to be had, run here and are right",
    "modes": "training at every precision: losses, bytes, times; an hour, and goes on where it was stopped",
    "codes": "training from states in 8-bit codes of several kinds; goes on where it was stopped",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in ABOUT.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--quick", action="store_true", help="few turns, nothing compiled: a look, not a figure")
        command.add_argument("--cases", default="", metavar="SUBSTR", help="only cases whose name contains SUBSTR")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose cases; default: cpu")
        command.add_argument("--dtype", choices=cases_optim.DTYPES, help="only cases of that dtype")
        command.add_argument("--peers", type=_words, metavar="NAMES", help="comma-separated: only contenders whose "
                             "name contains one of them take turns with ours; 'none': ours alone")  # fmt: skip
        command.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<machine>/")
        command.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="begin no case after that "
                             f"time; exit status {LEFT} if any is left, for a next call with --missing")  # fmt: skip
        command.add_argument("--missing", action="store_true", help="only what this commit's results do not have yet")
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
    command = commands.add_parser(
        "readme", help="write the tables of README.md and docs/, and the reports, from the data"
    )
    command.add_argument("--check", action="store_true", help="write nothing; exit 1 if pages and data disagree")
    command.add_argument("--out", type=Path, metavar="DIR", help="one machine's results; default: every machine's")
    command.add_argument("--readme", type=Path, action="append", help=argparse.SUPPRESS)  # pages; default: ours
    for name, own in OWN_COMMANDS.items():
        text = own.__doc__.splitlines()[0]
        own.add_arguments(commands.add_parser(name, help=text, description=own.__doc__))
    return top


def _words(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def tell(run: Run) -> int:
    """Tables of what was measured, the plots and the report; 1 if a contender was wrong."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    wrong = 0
    for suite, names in run.measured.items():
        rows = store.read(run.out / f"{suite}.jsonl")
        if suite not in registry.STUDIES:
            rows = [row for row in rows if row["case"] in names]
        console.print(_teller(suite)(suite, rows))
        console.print(tables.provenance(suite, rows), highlight=False)
        wrong += sum(failed(row, suite) for row in rows)
    for line in run.left_out:
        console.print(f"left out: {line}", highlight=False)
    plot.draw(run.out)
    for suite, own in OWN_PLOTS.items():
        if suite in run.measured:
            own.draw(run.out)
    if run.measured:
        page_path = page.write(run.out)
        console.print(f"all rows and plots: {page_path}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _teller(suite: str) -> Any:
    return report.terminal_study if suite in registry.STUDIES else OWN_REPORTS.get(suite, report).terminal


def update_readme(args: argparse.Namespace) -> int:
    folders = [args.out] if args.out else sorted(path for path in RESULTS.glob("*") if path.is_dir())
    pages = args.readme or readme.PAGES
    wanted = readme.wanted(pages, folders)
    if not args.check:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return 0
    difference = readme.difference(wanted)
    if difference:
        print(f"{difference}\n\nwhat is written is not what the data say: run python -m benchmarks readme")
    return 1 if difference else 0


def failed(row: dict[str, Any], suite: str) -> bool:
    """Not right; of stock and peers what raises, or in a suite of cases is wrong, is a finding and no failure."""
    others = "fusedopt" not in row["contender"] and (suite in registry.COMPARED or row["verdict"].startswith("raised"))
    return row["verdict"] != "ok" and not others


def tells(args: argparse.Namespace) -> bool:
    """Not a child process, whose parent tells, and not a rank beside the first."""
    return not args.allocator and not getattr(args, "spawned", False) and ddp.is_main()


def main(argv: list[str] | None = None) -> int:
    """0; 1 where ours was wrong or the README disagrees; 75 where time ran out; 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    if args.command == "readme":
        return update_readme(args)
    if args.command in OWN_COMMANDS:
        return OWN_COMMANDS[args.command].main(args)
    args.out = args.out and args.out.resolve()
    if ddp.launched():
        ddp.use_own_threads()
    run = Run(args, args if args.command == "project" else parser().parse_args(["project"]))
    status = 0
    try:
        for suite in store.SUITES if args.command == "all" else [args.command]:
            run.suite(suite)
    except KeyboardInterrupt:
        status = 130
    except OutOfTime:
        status = LEFT
    wrong = tell(run) if tells(args) else 0
    return status or wrong


if __name__ == "__main__":
    sys.exit(main())
