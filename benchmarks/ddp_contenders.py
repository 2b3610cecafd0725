"""Who takes part in `benchmarks ddp`: AdamW four times, with and without clipping, on each wrapping of a small GPT."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from fusedopt import optim as fused
from fusedopt.train.models import GPT

from .ddp_split import CLIPPED, NO_COMMUNICATION, NO_OPTIMIZER

LR, MAX_NORM = 1e-3, 0.5  # the norm is above it at every step, so that clipping changes the result

WRAPPINGS = {
    "ddp-view": "DDP, gradients as bucket views",
    "ddp": "DDP, gradients copied from buckets",
    "zero1": "ZeRO-1: DDP and ZeroRedundancyOptimizer",
    "fsdp2": "FSDP2, resharded after forward",
    "fsdp2-keep": "FSDP2, kept after forward",
}


@dataclass(frozen=True)
class Size:
    """The model and the work of a rank."""

    vocab: int
    seq: int
    layers: int
    dim: int
    heads: int
    batch: int  # sequences per rank

    def model(self) -> GPT:
        torch.manual_seed(0)
        return GPT(self.vocab, self.seq, self.layers, self.dim, self.heads)


SIZES = {
    "tiny": Size(vocab=256, seq=32, layers=1, dim=32, heads=2, batch=2),
    "small": Size(vocab=4096, seq=16, layers=4, dim=192, heads=4, batch=4),
    "gpt2": Size(vocab=50304, seq=1024, layers=12, dim=768, heads=12, batch=4),
}


class Nothing(Optimizer):
    """The optimizer of `no optimizer`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        pass


@dataclass(frozen=True)
class Entry:
    """A contender by name: its optimizer, and how it clips: not, by torch before the step, or within it."""

    name: str
    make: Callable[..., Optimizer]
    clips: str = ""  # "", "before", "inside"


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "torch default": partial(AdamW, lr=LR),
    "torch foreach": partial(AdamW, lr=LR, foreach=True),
    "torch fused": partial(AdamW, lr=LR, fused=True),
    "fusedopt": partial(fused.AdamW, lr=LR),
}


def entries() -> list[Entry]:
    """All contenders; the two that do not step come first."""
    found = [Entry(NO_OPTIMIZER, Nothing), Entry(NO_COMMUNICATION, Nothing)]
    for name, make in OPTIMIZERS.items():
        found.append(Entry(name, make))
        inside = name == "fusedopt"
        clipping = partial(make, max_norm=MAX_NORM) if inside else make
        found.append(Entry(name + CLIPPED, clipping, "inside" if inside else "before"))
    return found


class Clock:
    """Marks between the phases of a step: CUDA events on the device's own time line, the host's clock on the CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between one mark and the next; waits for the device."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            self.marks[-1].synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]


def at_once(_, bucket):  # DDP looks at the annotations, and takes no strings
    """A communication hook of DDP that does not communicate."""
    buffer = bucket.buffer()
    done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    done.set_result(buffer)
    return done


class Contender:
    """A model in its wrapping, with its optimizer.

    Args:
        group: the ranks that take part; for `no communication` one of the backend "fake".
    """

    def __init__(self, entry: Entry, wrapping: str, size: Size, group: dist.ProcessGroup, device: torch.device):
        self.entry, self.group, self.device = entry, group, device
        model = size.model().to(device)
        if wrapping.startswith("fsdp2"):
            mesh = DeviceMesh.from_group(group, device.type)
            keep = {"reshard_after_forward": False} if wrapping.endswith("keep") else {}
            for block in model.blocks:
                fully_shard(block, mesh=mesh, **keep)
            self.model: nn.Module = fully_shard(model, mesh=mesh, **keep)
        else:
            self.model = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                process_group=group,
                gradient_as_bucket_view=wrapping != "ddp",
            )
            if entry.name == NO_COMMUNICATION:
                self.model.register_comm_hook(None, at_once)  # the future of a fake all-reduce is empty
        self.params = list(self.model.parameters())
        self.make = entry.make if isinstance(entry.make, partial) else partial(entry.make)
        if wrapping == "zero1":
            if entry.clips == "inside":  # an inner optimizer sees its own parameters only, the norm is of all ranks'
                self.make = partial(self.make, extra_groups=(group,))
            # a partial: ZeRO puts its own keywords into the groups, which are about some parameters each
            self.optimizer: Optimizer = ZeroRedundancyOptimizer(
                self.params, self.make, process_group=group, parameters_as_bucket_view=True
            )
        else:
            self.optimizer = self.make(self.params)

    def step(self, tokens: Tensor) -> Clock:
        """One step on (B, T + 1) tokens; the clock has marks between `ddp_split.PHASES`."""
        clock = Clock(self.device)
        clock.mark()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        clock.mark()
        loss.backward()
        clock.mark()
        if self.entry.clips == "before":
            clip_grad_norm_(self.params, MAX_NORM)
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark()
        return clock

    def whole(self) -> Iterator[Tensor]:
        """Each parameter, unsharded; a collective under FSDP2."""
        for param in self.params:
            yield param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()

    @property
    def inner(self) -> Optimizer:
        """The optimizer that steps this rank's parameters."""
        return self.optimizer.optim if isinstance(self.optimizer, ZeroRedundancyOptimizer) else self.optimizer

    def stepped(self) -> list[Tensor]:
        """The local parts of what this rank's optimizer steps."""
        return local(p for group in self.inner.param_groups for p in group["params"])

    def held(self) -> int:
        """Bytes that stay between steps: parameters, states, and the buckets that DDP has for gradients."""
        states = (value for state in self.inner.state.values() for value in state.values())
        storages = [t.untyped_storage() for t in local([*self.params, *filter(torch.is_tensor, states)])]
        buckets = sum(p.nbytes for p in self.params) if isinstance(self.model, DistributedDataParallel) else 0
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + buckets

    def host_twin(self) -> Callable[[], None]:
        """Clipping and step() alone, on as many tensors of the same kind, of one element each."""
        ones = [torch.ones(1, device=self.device) for _ in self.stepped()]
        grads = [torch.ones_like(p) for p in ones]
        if isinstance(self.params[0], DTensor):
            mesh = self.params[0].device_mesh
            ones, grads = ([DTensor.from_local(t, mesh, [Shard(0)]) for t in tensors] for tensors in (ones, grads))
        params = [p.requires_grad_() for p in ones]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer = self.make(params) if params else None  # a rank may have none

        def run() -> None:
            if optimizer is not None:
                if self.entry.clips == "before":
                    clip_grad_norm_(params, MAX_NORM)
                optimizer.step()

        return run


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each lies in this process."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def oracle(size: Size, batches: list[Tensor], clip: bool, device: torch.device) -> list[Tensor]:
    """The parameters after a step on each of the (B, T + 1) batches, in one process, in float64; as many sequences at
    once as a rank has."""
    model = size.model().double().to(device)
    params = list(model.parameters())
    optimizer = AdamW(params, lr=LR)
    for tokens in batches:
        for part in tokens.split(size.batch):
            loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            (loss * len(part) / len(tokens)).backward()
        if clip:
            clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in params]
