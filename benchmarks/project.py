"""`python -m benchmarks project --params 7e9 --world 256`: what an optimizer would expose where none is measured.

Bytes are counted (project_count), bandwidths stated (project_model.Assumptions), and the same arithmetic is put beside
what `benchmarks ddp` measured on one and two ranks of a CPU. Nothing here is a measurement of a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from . import project_count, project_model, store
from .ddp_split import CLIPPED, rounded
from .project_count import PRESETS, Shape
from .project_model import CONTENDERS, RANKS, WRAPPINGS, Assumptions, Counted, Host

Row = dict[str, Any]
OF_MEASURED = {"ddp-view": "DDP", "ddp": "DDP", "zero1": "ZeRO-1", "fsdp2": "FSDP2", "fsdp2-keep": "FSDP2"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--params", type=float, default=7e9, help="of the model; the nearest of Brown et al.'s sizes "
                         "gives the shape, bytes are scaled; default: 7e9")  # fmt: skip
    command.add_argument("--world", type=int, default=256, help="ranks at which collectives are counted; default: 256")
    command.add_argument("--layers", type=int, help="with --hidden instead of the nearest size")
    command.add_argument("--hidden", type=int, help="with --layers; a multiple of 128")
    command.add_argument("--vocab", type=int, default=50304, help="default: 50304")
    for item in fields(Assumptions):
        flag = "--" + item.name.replace("_", "-")
        command.add_argument(flag, type=type(item.default), default=item.default, help=item.metadata["help"])


def shape_of(args: argparse.Namespace) -> Shape:
    """The model's shape.

    Raises:
        SystemExit: half a shape, a width that has no heads, or ranks that do not fill their nodes.
    """
    if (args.layers is None) != (args.hidden is None):
        raise SystemExit("--layers and --hidden belong together: give both, or --params alone")
    if args.hidden is not None and (args.hidden < 128 or args.hidden % 128 or args.layers < 1):
        raise SystemExit(f"--layers {args.layers} --hidden {args.hidden}: at least 1, and a multiple of 128")
    if args.world < 2 or (args.world > args.ranks_per_node and args.world % args.ranks_per_node):
        raise SystemExit(f"--world {args.world}: at least 2, and whole nodes of --ranks-per-node {args.ranks_per_node}")
    if args.hidden is not None:
        return Shape(args.layers, args.hidden, args.vocab)
    near = min(PRESETS.values(), key=lambda shape: abs(shape.about - args.params))
    return Shape(near.layers, near.hidden, args.vocab)


def measure(
    args: argparse.Namespace, out: Path, keep: Callable[[list[Row]], None], tell: Callable[[str], None]
) -> None:
    """Count, time the host, project; rows of every wrapping and of the check, if `out` has rows of ddp."""
    given = Assumptions(**{item.name: getattr(args, item.name) for item in fields(Assumptions)})
    shape = shape_of(args)
    torch.set_num_threads(1)  # host time is one thread's
    tell("host time per tensor")
    host = project_count.host_times()
    tell("collectives")
    counted, zero = project_count.count(shape, args.world, given.ranks_per_node)
    sizes = shape.sizes()
    assert zero == project_model.fullest(sizes, args.world)[0], "ZeRO-1's partition is not what the model takes it for"
    scale = args.params / sum(sizes) if args.hidden is None else 1.0
    keep([*projected([round(n * scale) for n in sizes], scaled(counted, scale), args.world, shape, given, host)])
    if checks := checked(store.read(out / "ddp.jsonl")):
        keep(checks)


def scaled(counted: dict[str, Counted], scale: float) -> dict[str, Counted]:
    return {name: Counted(c.reduced * scale, c.moved * scale, c.calls, c.norm_calls) for name, c in counted.items()}


def projected(sizes: list[int], counted: dict[str, Counted], world: int, shape: Shape, given: Assumptions,
              host: Host) -> list[Row]:  # fmt: skip
    """A row per wrapping and contender; times over `RANKS`. HSDP starts at one whole node."""
    rows = []
    for wrapping in WRAPPINGS:
        one = counted[wrapping]
        sent = sent_bytes(wrapping, world, given, one) / sum(sizes)
        for contender in CONTENDERS:
            exposed, step = [], []
            for n in RANKS:
                exposed.append(project_model.exposed(wrapping, contender, sizes, n, given, host, one))
                moving = project_model.communication(wrapping, n, given, one)
                step.append(project_model.step(sum(sizes), exposed[-1], moving, given))
            row = {"case": wrapping, "contender": contender, "parameters": sum(sizes), "tensors": len(sizes)}
            row |= {"layers": shape.layers, "hidden": shape.hidden, "world": world, "calls": one.calls}
            row |= {"norm_calls": project_model.norm_calls(wrapping, contender, one)}
            row |= {"sent_bytes_per_parameter": sent, "ranks": list(RANKS)}
            row |= {"exposed_ms": [round(s * 1e3, 4) for s in exposed], "step_ms": [round(s * 1e3, 3) for s in step]}
            row["share"] = [round(e / s, 5) for e, s in zip(exposed, step, strict=True)]
            sharded = wrapping in ("FSDP2", "HSDP")
            row |= {"host_us": (host.dtensor if sharded else host.plain)[contender], "assumptions": asdict(given)}
            rows.append(rounded(row) | {"verdict": "ok"})
    return rows


def sent_bytes(wrapping: str, world: int, given: Assumptions, counted: Counted) -> float:
    """That each rank sends: within its node and between nodes together."""
    inside = min(world, given.ranks_per_node) if wrapping == "HSDP" else world
    over = max(1, world // given.ranks_per_node) if wrapping == "HSDP" else world
    moved, reduced = counted.moved * (inside - 1) / inside, counted.reduced * 2 * (over - 1) / over
    return (moved + reduced) * given.dtype_bytes / 4


def checked(rows: list[Row]) -> list[Row]:
    """The model against every measured row that it knows: weak cases, clipped and not."""
    found = []
    for row in rows:
        name = row["contender"].removesuffix(CLIPPED)
        if row["scaling"] != "weak" or name not in CONTENDERS or "exposed_optimizer_ms" not in row or "gpu" in row:
            continue
        clip = row["contender"].endswith(CLIPPED)
        wrapping, stepped = OF_MEASURED[row["wrapping"]], row["local_parameters"]
        moved = project_model.memory_bytes(wrapping, name, stepped, row["parameters"], clip)
        # host_ms has the norm's small all-reduces in it, as they were
        told = project_model.predicted_on_cpu(moved, row["stream_gb_per_s"], row["host_ms"])
        measured = row["exposed_optimizer_ms"]
        one = {"case": f"check of {row['case']}", "contender": row["contender"], "ranks": row["ranks"]}
        one |= {"wrapping": row["wrapping"], "predicted_ms": told, "measured_ms": measured}
        found.append(rounded(one | {"off": told / measured - 1 if measured else None}) | {"verdict": "ok"})
    return found
