"""Checkpoints of many processes, by torch.distributed.checkpoint: each rank writes and reads its own shards.

A folder ``checkpoint-<step>`` holds, of each contender, the tensors

    <contender>.model.<name>, .optimizer.<name of the parameter>.<key>, .average.<...>

whatever the number of processes and ``--parallel``, so that any other can read them; and ``run.pt``: step, arguments,
schedules and scalers. It has another name until it is whole.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from .checkpoint import FOLDER, LAYOUT, RUN, atomic, checkpoints, remove, sync_folder
from .distributed import World
from .errors import UsageError
from .loop import Contender
from .peers import is_of_a_collective

RATES = ("lr", "initial_lr")  # of a group: what a schedule changes, and starts from


class Shards:
    """A contender's tensors by name, as far as this rank has them: to be written, or to be read into."""

    def __init__(self, contender: Contender, world: World):
        self.contender = contender
        self.holder = contender.parallel.holder(contender.optimizer)
        self.owns = any(group["params"] for group in self.holder.param_groups)
        # a new optimizer is made to step, to have states; where a step is all ranks' business, all must
        new = any(world.everyones(self.owns and not self.holder.state))
        self.model = get_model_state_dict(contender.model)
        self.optimizer = get_optimizer_state_dict(contender.model, self.holder) if self.owns or new else {"state": {}}
        self.average = {} if contender.average is None else contender.average.state_dict()

    def flat(self) -> dict[str, Any]:
        name = self.contender.name
        return {
            **{f"{name}.model.{key}": value for key, value in self.model.items()},
            **{f"{name}.average.{key}": value for key, value in self.average.items()},
            **{f"{name}.optimizer.{parameter}.{key}": value
               for parameter, state in self.optimizer["state"].items() for key, value in state.items()},
        }  # fmt: skip

    def put(self, flat: dict[str, Any]) -> None:
        """Give the contender what has been read."""
        name = self.contender.name
        set_model_state_dict(self.contender.model, {key: flat[f"{name}.model.{key}"] for key in self.model})
        if self.average:
            self.contender.average.load_state_dict({key: flat[f"{name}.average.{key}"] for key in self.average})
        if self.owns and self.optimizer["state"]:
            states = {
                parameter: {key: flat[f"{name}.optimizer.{parameter}.{key}"] for key in state}
                for parameter, state in self.optimizer["state"].items()
            }
            set_optimizer_state_dict(self.contender.model, self.holder, {**self.optimizer, "state": states})


def save(out: Path, step: int, essential: dict[str, Any], contenders: list[Contender], world: World) -> None:
    """Write a checkpoint; every rank calls, and ``out`` is one folder for all. The last one goes once this is whole."""
    folder = out / f"{FOLDER}{step:06}"
    partial = folder.with_name(f".{folder.name}.tmp")
    flat = {key: value for contender in contenders for key, value in Shards(contender, world).flat().items()}
    with world.agreeing():
        if world.is_main:
            remove(partial)
            partial.mkdir()
    try:
        with told_alone():
            dcp.save(flat, storage_writer=dcp.FileSystemWriter(partial), no_dist=not world.launched)
    except CheckpointException as error:
        if is_of_a_collective(error):
            raise
        raise RuntimeError(
            f"{folder} could not be written, the checkpoint before it is whole: {told(error)}"
        ) from error
    with world.agreeing():
        if world.is_main:
            states = {contender.name: beside(contender) for contender in contenders}
            with atomic(partial / RUN) as file:
                torch.save({"layout": LAYOUT, "step": step, "args": essential, "contenders": states}, file)
            remove(folder)  # an unfinished one, or there would be no such step to be saved
            partial.rename(folder)
            sync_folder(out)
            for path in checkpoints(out):
                if path != folder:
                    remove(path)


def beside(contender: Contender) -> dict[str, Any]:
    """What every rank has, and is not of a tensor."""
    rates = [{key: group[key] for key in RATES if key in group} for group in contender.optimizer.param_groups]
    return {"scheduler": contender.scheduler.state_dict(), "scaler": contender.scaler.state_dict(), "rates": rates}


def load(path: Path, state: dict[str, Any], contenders: list[Contender], world: World) -> None:
    """Give the contenders a checkpoint, a folder or the file of a process alone, that `checkpoint.read` has read."""
    shards = [Shards(contender, world) for contender in contenders]
    flat = {key: value for of_one in shards for key, value in of_one.flat().items()}
    if path.is_dir():
        try:
            with told_alone():
                dcp.load(flat, storage_reader=dcp.FileSystemReader(path), no_dist=not world.launched)
        except CheckpointException as error:
            if is_of_a_collective(error):
                raise
            raise UsageError(
                f"--resume: {path} cannot be read: {told(error)}; give a checkpoint that is whole"
            ) from error
    else:
        whole = {key: value for c in contenders for key, value in of_file(c, state["contenders"][c.name]).items()}
        flat = {key: like(value, whole[key]) for key, value in flat.items()}
    for of_one in shards:
        of_one.put(flat)
    for contender in contenders:
        given = state["contenders"][contender.name]
        contender.scheduler.load_state_dict(given["scheduler"])
        contender.scaler.load_state_dict(given["scaler"])
        rates = given["rates"] if path.is_dir() else given["optimizer"]["param_groups"]
        for group, rate in zip(contender.optimizer.param_groups, rates, strict=True):
            group |= {key: rate[key] for key in RATES if key in rate}


def of_file(contender: Contender, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a process alone under the names that they have here."""
    name_of = {parameter: name for name, parameter in contender.model.named_parameters()}
    names = [name_of[parameter] for group in contender.optimizer.param_groups for parameter in group["params"]]
    flat = {f"{contender.name}.{part}.{key}": value
            for part in ("model", "average") for key, value in state.get(part, {}).items()}  # fmt: skip
    for index, values in state["optimizer"]["state"].items():
        flat |= {f"{contender.name}.optimizer.{names[index]}.{key}": value for key, value in values.items()}
    return flat


def like(value: Any, whole: Any) -> Any:
    """A whole tensor, placed as another is."""
    if not isinstance(value, DTensor):
        return whole
    placed = whole.to(value.device, value.dtype)
    return distribute_tensor(placed, value.device_mesh, value.placements, src_data_rank=None)


def weights(path: Path, contender: str) -> dict[str, Tensor]:
    """A contender's model, its state_dict, whole, for this process alone."""
    prefix = f"{contender}.model."
    kept = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    flat = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in kept.items() if key.startswith(prefix)}
    with told_alone():
        dcp.load(flat, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {key.removeprefix(prefix): value for key, value in flat.items()}


@contextlib.contextmanager
def told_alone() -> Iterator[None]:
    """Without the warning that one process is assumed, which is what it has been told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def told(error: CheckpointException) -> str:
    """The first of the causes, and whose it is."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"{type(cause).__name__} on rank {rank}: {cause}"
