"""Checkpoints: written whole or not at all, refused when they belong to another run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from .errors import UsageError

CHECKPOINT = "checkpoint.pt"
FOLDER = "checkpoint-"  # and the step
RUN = "run.pt"  # in the folder: all but the tensors
PARTS = (RUN, ".metadata")  # the latter is torch.distributed.checkpoint's, and its last file
LOG = "log.jsonl"
LAYOUT = 2  # of what is in them: raise it when weights of the same name and shape mean something else


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
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename inside of it durable."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(out: Path, step: int, essential: dict[str, Any], contenders: dict[str, dict]) -> None:
    """Replace the checkpoint in ``out``, of a process alone.

    Batches and dropout are functions of (seed, step, rank): the step is the position in the data, and no
    random state need be kept.
    """
    with atomic(out / CHECKPOINT) as file:
        torch.save({"layout": LAYOUT, "step": step, "args": essential, "contenders": contenders}, file)


def checkpoints(out: Path) -> list[Path]:
    """All that has the name of one."""
    numbered = [path for path in out.glob(f"{FOLDER}*") if path.name.removeprefix(FOLDER).isdecimal()]
    file = out / CHECKPOINT
    return [
        *([file] if file.is_file() else []),
        *sorted(numbered, key=lambda path: int(path.name.removeprefix(FOLDER))),
    ]


def latest(out: Path) -> Path | None:
    """The last whole checkpoint: a folder that many processes have written, or else the file of a process alone."""
    whole = [path for path in checkpoints(out) if path.is_file() or all((path / part).is_file() for part in PARTS)]
    return whole[-1] if whole else None


def unfinished(out: Path) -> list[str]:
    """Names of what a kill cut short, or a copy left out something of: never taken for a checkpoint."""
    whole = latest(out)
    return sorted(path.name for pattern in (f"{FOLDER}*", f".{FOLDER}*") for path in out.glob(pattern) if path != whole)


def read(path: Path) -> dict[str, Any]:
    """What `latest` has found: of a folder all but the tensors of models and optimizers."""
    try:
        state = torch.load(path / RUN if path.is_dir() else path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise UsageError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); give a checkpoint that is whole"
        ) from error
    if state.get("layout") != LAYOUT:
        raise UsageError(
            f"{path}: was written before the weights of attention had the order they have now; start afresh with "
            "--overwrite or another --out"
        )
    return state


def compare(path: Path, state: dict[str, Any], essential: dict[str, Any]) -> None:
    """Raise UsageError if an argument that must match does not."""
    for name, now in essential.items():
        before = state["args"].get(name)
        if before != now:
            raise UsageError(
                f"--resume: {name} was {before} when {path} was written, and is {now} now; "
                f"give {before} again, or start afresh with --overwrite or another --out"
            )


def weights(path: Path, state: dict[str, Any], contender: str) -> dict[str, Tensor]:
    """A contender's trained model, its state_dict, whole."""
    if path.is_dir():
        from . import sharded  # torch.distributed's parts take a second to import

        return sharded.weights(path, contender)
    return state["contenders"][contender]["model"]


def remove(path: Path) -> None:
    """Remove a checkpoint, at once as far as `latest` can see."""
    if path.is_dir():
        doomed = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.old.tmp"))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


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
