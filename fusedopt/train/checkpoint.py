"""Checkpoints: written whole or not at all, refused when they belong to another run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@contextlib.contextmanager
def atomic(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that replaces ``path`` when, and only when, the body has succeeded and the disk has it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is durable only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(out: Path, step: int, essential: dict[str, Any], contenders: dict[str, dict]) -> None:
    """Replace the checkpoint in ``out``.

    Batches and dropout are functions of (seed, step, rank): the step is the position in the data, and no
    random state need be kept.
    """
    with atomic(out / CHECKPOINT) as file:
        torch.save({"step": step, "args": essential, "contenders": contenders}, file)


def load(out: Path, essential: dict[str, Any], fail: Callable[[str], Exception]) -> dict[str, Any]:
    """Read the checkpoint in ``out``; raise ``fail(message)`` if an argument that must match does not."""
    path = out / CHECKPOINT
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, now in essential.items():
        before = state["args"].get(name)
        if before != now:
            raise fail(
                f"--resume: {name} was {before} when {path} was written, and is {now} now; "
                f"give {before} again, or start afresh with --overwrite or another --out"
            )
    return state


def truncate_log(out: Path, step: int) -> None:
    """Drop the rows after ``step``, and a line that a kill cut short: the run writes them again."""
    path = out / LOG
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    with atomic(path, "w") as file:
        file.writelines(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)


def read_log(out: Path) -> list[dict[str, Any]]:
    """All rows of the log."""
    return [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
