"""The rows of `benchmarks ddp` as tables: for the terminal every contender, for the README what optimizers expose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from . import store
from .ddp_split import CLIPPED, NO_COMMUNICATION, NO_OPTIMIZER, PARTS
from .tables import by_case, markdown, provenance

Row = dict[str, Any]
OPTIMIZERS = ("torch default", "torch foreach", "torch fused", "fusedopt")
TITLES = {
    "ddp-view": "DDP, bucket views",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "fsdp2": "FSDP2, resharded",
    "fsdp2-keep": "FSDP2, kept",
}
PLOT = "ddp.png"
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "broadcast")


def caption(row: Row) -> str:
    """What the figures are good for."""
    if "gpu" in row:
        return "nccl, one GPU per rank, timed by CUDA events; every step as long as its slowest rank's."
    return (
        "gloo, all ranks on one machine's CPU: this shows that results are right and what share of a step is whose, "
        "not the speed of a network. Every step is as long as its slowest rank's."
    )


def size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f} MB" if nbytes >= 1e4 else f"{nbytes:.0f} B"


def title(row: Row) -> str:
    ranks = f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
    return f"{TITLES[row['wrapping']]}, {ranks}, {row['tokens_per_rank']} tokens each"


def counted(row: Row) -> str:
    """The collectives of a step in words."""
    words = [f"{calls} {kind}{'s' if calls > 1 else ''} of {size(nbytes)}" for kind, (calls, nbytes) in
             row.get("collectives", {}).items()]  # fmt: skip
    return f"{', '.join(words)}; {size(row['sent_bytes'])} sent per rank" if words else "no collectives"


def terminal(suite: str, rows: list[Row]) -> Group:
    """A table per case: every contender."""
    headings = (
        "step",
        "p20",
        "p80",
        "fwd",
        "bwd",
        "comm",
        "clip",
        "opt",
        "exposed",
        "p20",
        "p80",
        "host",
        "tok/s",
        "MiB",
    )
    tables = []
    for contenders in by_case(rows).values():
        first = next(iter(contenders.values()))
        table = Table(title=f"[bold]{title(first)}[/]: {counted(first)}", title_justify="left")
        table.add_column("contender", no_wrap=True)
        for heading in (*headings, "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict")
        for name, row in contenders.items():
            verdict = row["verdict"] if row["verdict"] == "ok" else f"[bold red]{escape(row['verdict'])}"
            if "median_ms" not in row:
                table.add_row(name, *[""] * (len(headings) + 1), verdict)
                continue
            keys = ("median_ms", "p20_ms", "p80_ms", *(f"{part}_ms" for part in PARTS))
            cells = [f"{row[key]:.2f}" for key in keys]
            exposed = ("exposed_optimizer_ms", "exposed_p20_ms", "exposed_p80_ms")
            cells += [f"{row[key]:.2f}" if key in row else "" for key in exposed]
            cells += [
                f"{row['host_ms']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['peak_mib']:.1f}",
                f"{row['error']}",
            ]
            table.add_row(name, *cells, verdict)
        tables.append(table)
    heading = f"{suite}: milliseconds; {caption(rows[0])}" if rows else f"{suite}: nothing measured"
    return Group(heading, *tables)


def latest(rows: list[Row]) -> list[Row]:
    """The weak cases of the most ranks: what the plot and most tables show."""
    weak = [row for row in rows if row["scaling"] == "weak"]
    most = max((row["ranks"] for row in weak), default=0)
    return [row for row in weak if row["ranks"] == most]


def cell(row: Row | None, text: str) -> str:
    """A figure, or why there is none."""
    if row is None:
        return ""
    if "median_ms" not in row:
        return row["verdict"].split(":")[0]
    return text if row["verdict"] == "ok" else f"{text} (**wrong**)"


def exposed(rows: list[Row]) -> str:
    """Exposed optimizer time of each contender, and its share of the step."""
    lines = []
    for contenders in by_case(rows).values():
        plain = contenders.get(NO_OPTIMIZER)
        if plain is None:
            continue
        for clip in ("", CLIPPED):
            cells = []
            for name in OPTIMIZERS:
                row = contenders.get(name + clip)
                text = ""
                if row is not None and "median_ms" in row:
                    ms = row["exposed_optimizer_ms"]
                    text = f"{ms:.2f} ms, {ms / row['median_ms']:.0%}"
                cells.append(cell(row, text))
            lines.append([TITLES[plain["wrapping"]], "yes" if clip else "no", f"{plain['median_ms']:.1f} ms", *cells])
    return markdown(["exposed optimizer time", "clipped", "step without it", *OPTIMIZERS], lines)


def split(rows: list[Row]) -> str:
    """The clipped step of torch's fastest and ours, part by part."""
    lines = []
    for contenders in by_case(rows).values():
        for name in ("torch fused", "fusedopt"):
            row = contenders.get(name + CLIPPED)
            if row is not None and "median_ms" in row:
                cells = [f"{row[f'{part}_ms']:.2f}" for part in PARTS]
                spread = f"{row['median_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
                more = [f"{row['host_ms']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['peak_mib']:.0f}"]
                lines.append([TITLES[row["wrapping"]], cell(row, name), spread, *cells, *more])
    header = ["clipped, ms", "contender", "step (p20 to p80)", "forward", "backward", "exposed communication"]
    header += ["norm and clip", "optimizer", "host time", "tokens/s per rank", "peak MiB"]
    return markdown(header, lines)


def calls(row: Row) -> int:
    return sum(count for count, _ in row.get("collectives", {}).values())


def communication(rows: list[Row]) -> str:
    """Collectives of a step, counted, and how much of them is hidden."""
    lines = []
    for contenders in by_case(rows).values():
        row = contenders.get(NO_OPTIMIZER)
        if row is None:
            continue
        kinds = row["collectives"]
        cells = [f"{kinds[kind][0]} x, {size(kinds[kind][1])}" if kind in kinds else "" for kind in KINDS]
        times = [f"{row['communication_ms']:.1f} of {row['communication_alone_ms']:.1f} ms"]
        times.append(f"{row['overlap']:.0%}" if "overlap" in row else "")
        norms = []
        for name in ("torch fused", "fusedopt"):
            pair = [contenders.get(name + clip, {}) for clip in ("", CLIPPED)]
            norms.append(str(calls(pair[1]) - calls(pair[0])) if all("collectives" in one for one in pair) else "")
        lines.append([TITLES[row["wrapping"]], cells[0], cells[1], *cells[2:], size(row["sent_bytes"]), *times, *norms])
    header = ["collectives of a step", *KINDS, "sent per rank", "exposed", "hidden", "for torch's norm", "for ours"]
    return markdown(header, lines)


def scaling(rows: list[Row]) -> str:
    """Tokens per second and rank over the numbers of ranks; "" where only one was measured."""
    cases = sorted({(row["scaling"] == "strong", row["ranks"]) for row in rows})
    if len(cases) < 2:
        return ""
    lines = []
    for wrapping in dict.fromkeys(row["wrapping"] for row in rows):
        for name in ("torch fused", "fusedopt"):
            found = {(row["scaling"] == "strong", row["ranks"]): row for row in rows if row["wrapping"] == wrapping and
                     row["contender"] == name + CLIPPED and "median_ms" in row}  # fmt: skip
            alone = found.get((False, 1))
            cells = []
            for case in cases:
                row = found.get(case)
                share = f" ({row['tokens_per_s'] / alone['tokens_per_s']:.0%})" if row and alone else ""
                cells.append(f"{row['tokens_per_s']:,.0f}{share}" if row else "")
            if found:
                lines.append([TITLES[wrapping], name, *cells])
    names = [f"{'strong' if strong else 'weak'}, {n} rank{'s' if n > 1 else ''}" for strong, n in cases]
    return markdown(["tokens/s per rank, clipped", "contender", *names], lines)


def block(folder: Path, shown: str) -> str:
    """The README's part of one machine; `shown` is the folder as the README sees it."""
    rows = store.read(folder / "ddp.jsonl")
    if not rows:
        return ""
    main = latest(rows)
    about = f"{main[0]['parameters'] / 1e6:.2f} M parameters in {main[0]['tensors']} tensors, float32, " \
            f"{main[0]['ranks']} ranks, {main[0]['tokens_per_rank']} tokens per rank and step. "  # fmt: skip
    image = f"![Steps split]({shown}/{PLOT})" if (folder / PLOT).exists() else ""
    tables = [exposed(main), split(main), communication(main), scaling(rows)]
    command = "ddp --scaling" if any(row["ranks"] != main[0]["ranks"] for row in rows) else "ddp"
    return "\n\n".join(filter(None, [about + caption(main[0]), *tables, provenance(command, rows), image]))


def parts(row: Row) -> list[float]:
    """Milliseconds of `PARTS`; communication is 0 where there is none."""
    return [0.0 if row["contender"] == NO_COMMUNICATION and part == "communication" else row[f"{part}_ms"]
            for part in PARTS]  # fmt: skip
