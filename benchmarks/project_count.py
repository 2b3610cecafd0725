"""The collectives of a wrapping at any size, counted as torch issues them under its `fake` process group.

FSDP2 and HSDP run a step at the real width on tensors without memory (FakeTensorMode), with one, two and three blocks:
blocks are alike, so that bytes and calls are linear in their number, which the third proves. ZeroRedundancyOptimizer
steps all parameters at their real sizes in the same way. DDP's reducer wants memory: it runs a narrow model of as many
blocks, buckets narrowed alike, at two widths, whose bytes per parameter must agree.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from fusedopt.train.models import GPT

from .ddp_collectives import Call, Collectives, summed
from .ddp_contenders import MAX_NORM, OPTIMIZERS
from .project_model import CONTENDERS, Counted, Host

BUCKET_MB = 25  # DDP's default
NARROW = (32, 64)  # widths at which DDP is counted
SMALL = 4096  # bytes; a norm's collective is below, a model's above
HOST_TENSORS, HOST_RUNS = 300, 15


@dataclass(frozen=True)
class Shape:
    """A GPT as `fusedopt.train.models.GPT` has it; its sizes follow Brown et al. 2020, table 2.1."""

    layers: int
    hidden: int
    vocab: int = 50304
    seq: int = 2048

    def model(self, layers: int | None = None, hidden: int | None = None) -> GPT:
        width = hidden or self.hidden
        vocab = self.vocab if hidden is None else max(1, self.vocab * hidden // self.hidden)
        seq = self.seq if hidden is None else max(8, self.seq * hidden // self.hidden)
        return GPT(vocab, seq, layers or self.layers, width, max(1, width // 128))

    @property
    def about(self) -> int:
        """Parameters, but for biases and norms."""
        return self.hidden * (12 * self.layers * self.hidden + 2 * self.vocab + self.seq)

    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        with torch.device("meta"):
            return [p.numel() for p in self.model().parameters()]


PRESETS = {
    "125M": Shape(12, 768),
    "350M": Shape(24, 1024),
    "760M": Shape(24, 1536),
    "1.3B": Shape(24, 2048),
    "2.7B": Shape(32, 2560),
    "6.7B": Shape(32, 4096),
    "13B": Shape(40, 5120),
    "30B": Shape(48, 7168),
    "70B": Shape(80, 8192),
    "175B": Shape(96, 12288),
}


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """This process as rank 0 of `world`, none of the others there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def backward(model: nn.Module, tokens: torch.Tensor) -> None:
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


def sharded(shape: Shape, layers: int, mesh: DeviceMesh) -> list[Call]:
    """Of a clipped step under FSDP2, or HSDP if the mesh has two dimensions."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = shape.model(layers)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        params = list(model.parameters())
        optimizer = AdamW(params, fused=True)
        with Collectives() as seen:
            backward(model, torch.zeros(1, 9, dtype=torch.int64))
            clip_grad_norm_(params, MAX_NORM)
            optimizer.step()
    return seen.calls


def linear(shape: Shape, mesh: DeviceMesh) -> dict[str, list[int]]:
    """kind -> [calls, bytes] of all blocks; what is small is the norm's, whose calls do not grow, as "norm".

    Raises:
        RuntimeError: the third block adds something else than the second.
    """
    one, two, three = (_totals(sharded(shape, n, mesh)) for n in (1, 2, 3))
    found = {}
    for kind in one:
        first, second, third = (np.array(totals.get(kind, [0, 0])) for totals in (one, two, three))
        if kind != "norm" and (third - second != second - first).any():
            raise RuntimeError(f"{kind} is not linear in the blocks: {first}, {second}, {third}")
        found[kind] = (first + (shape.layers - 1) * (second - first)).tolist() if kind != "norm" else one[kind]
    return found


def _totals(calls: list[Call]) -> dict[str, list[int]]:
    small = [call for call in calls if call.kind == "all-reduce" and call.bytes < SMALL]
    totals = summed([call for call in calls if call not in small])
    return totals | {"norm": [len(small), sum(call.bytes for call in small)]}


def replicated(shape: Shape) -> tuple[float, int]:
    """Bytes per parameter and buckets of DDP.

    Raises:
        RuntimeError: the two widths disagree on the bytes.
    """
    per_parameter, buckets = [], 0
    whole = sum(shape.sizes())
    for width in NARROW:
        model = shape.model(hidden=width)
        parameters = sum(p.numel() for p in model.parameters())
        wrapped = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB * parameters / whole)
        wrapped.register_comm_hook(None, reduced)
        for _ in range(2):  # buckets are made anew after the first
            with Collectives() as seen:
                backward(wrapped, torch.zeros(1, 9, dtype=torch.int64))
        (buckets, nbytes) = summed(seen.calls)["all-reduce"]
        per_parameter.append(nbytes / parameters)
    if per_parameter[0] != per_parameter[1]:
        raise RuntimeError(f"DDP's bytes per parameter depend on the width: {per_parameter}")
    return per_parameter[0], buckets


def reduced(_, bucket):  # DDP looks at the annotations, and takes no strings
    """What DDP does by itself, but for the future of a fake all-reduce, which is empty."""
    buffer = bucket.buffer()
    dist.all_reduce(buffer)
    done = torch.futures.Future()
    done.set_result(buffer)
    return done


def broadcast(shape: Shape) -> list[Call]:
    """Of a step of ZeroRedundancyOptimizer."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = list(shape.model().parameters())
        optimizer = ZeroRedundancyOptimizer(params, AdamW, fused=True, parameters_as_bucket_view=True)
        for p in params:
            p.grad = torch.zeros_like(p)
        with Collectives() as seen:
            optimizer.step()
    return seen.calls


def count(shape: Shape, world: int, per_node: int) -> tuple[dict[str, Counted], int]:
    """Each wrapping's, float32, and the parameters of ZeRO-1's fullest rank as its buckets have them."""
    found = {}
    with fake_ranks(world):
        mesh = init_device_mesh("cpu", (world,))
        nodes = max(1, world // per_node)
        both = init_device_mesh("cpu", (nodes, world // nodes), mesh_dim_names=("nodes", "ranks"))
        for name, over in (("FSDP2", mesh), ("HSDP", both)):
            totals = linear(shape, over)
            moved = sum(totals[kind][1] for kind in ("all-gather", "reduce-scatter"))
            calls = sum(totals[kind][0] for kind in totals if kind != "norm")
            found[name] = Counted(totals.get("all-reduce", [0, 0])[1], moved, calls, totals["norm"][0])
        per_parameter, buckets = replicated(shape)
        nbytes = per_parameter * sum(shape.sizes())
        found["DDP"] = Counted(nbytes, 0, buckets)
        sent = broadcast(shape)
        found["ZeRO-1"] = Counted(nbytes, sum(call.bytes for call in sent), buckets + len(sent))
    return found, max(call.bytes for call in sent) // 4


def host_times() -> Host:
    """Clipping and step() of many tensors of one element: microseconds per tensor, on this machine."""
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,))
        return Host(*({name: _host_time(name, on) for name in CONTENDERS} for on in (None, mesh)))


def _host_time(name: str, mesh: DeviceMesh | None) -> float:
    tensors = [torch.ones(1) for _ in range(2 * HOST_TENSORS)]
    if mesh is not None:
        tensors = [DTensor.from_local(t, mesh, [Shard(0)]) for t in tensors]
    params, grads = tensors[:HOST_TENSORS], tensors[HOST_TENSORS:]
    for p, g in zip(params, grads, strict=True):
        p.requires_grad_().grad = g
    inside = name == "fusedopt"
    optimizer = OPTIMIZERS[name](params, **({"max_norm": MAX_NORM} if inside else {}))
    times = []
    for _ in range(HOST_RUNS):
        start = time.thread_time()  # not what the thread waited for a core
        if not inside:
            clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        times.append(time.thread_time() - start)
    return float(np.median(times)) * 1e6 / HOST_TENSORS
