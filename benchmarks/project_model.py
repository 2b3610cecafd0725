"""What an optimizer exposes at sizes that nobody here can measure: arithmetic on counted bytes and stated bandwidths.

Time of clipping and the update on a rank:

    memory = bytes per parameter x parameters it steps / memory bandwidth
    host   = tensors x host time per tensor
    exposed = max(memory, host) + small all-reduces for the norm     on a GPU, whose queue the host fills as it drains
    exposed = memory + host                                           on the CPU, one thread; the norm's are in host

and of a step, to have a share of: max(compute, communication) + exposed, all communication hidden that can be.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

# Bytes per float32 parameter: read p, g, m, v and write p, m, v at once; foreach walks them in eight passes.
STEP_BYTES = {"torch foreach": 80, "torch fused": 28, "fusedopt": 28}
# the norm reads the gradients; scaling them reads and writes once more, a coefficient within the step does not
CLIP_BYTES = {"torch foreach": 12, "torch fused": 12, "fusedopt": 4}
CONTENDERS = tuple(STEP_BYTES)
WRAPPINGS = ("DDP", "ZeRO-1", "FSDP2", "HSDP")
RANKS = tuple(2**i for i in range(11))

UNITS = {
    "sent_bytes_per_parameter": "by each rank in a step at `world`, ring convention, of the element size `dtype_bytes`",
    "calls": "collectives of a step; norm_calls: small ones of clipping",
    "ranks": "of exposed_ms, step_ms and share = exposed_ms / step_ms: modelled, clipped steps",
    "host_us": "of clipping and step() per tensor, measured on this machine's CPU, one element each; the thread's time",
    "predicted_ms, measured_ms": "exposed optimizer time on the CPU: the model with bandwidth, host time and small "
    "all-reduce measured in the run of the ddp row `case`, and that row's",
    "off": "predicted_ms / measured_ms - 1",
}


@dataclass(frozen=True)
class Assumptions:
    """Of the machines; whoever knows better says so on the command line. All per GPU and direction, in SI units."""

    hbm: float = field(default=3.35e12, metadata={"help": "memory, bytes/s; H100 SXM5 data sheet: 3.35e12"})
    intra: float = field(
        default=450e9, metadata={"help": "within a node, bytes/s; H100 data sheet: NVLink 900e9 both ways"}
    )
    inter: float = field(
        default=50e9, metadata={"help": "between nodes, bytes/s; one 400 Gbit/s adapter per GPU: 50e9"}
    )
    flops: float = field(default=989e12, metadata={"help": "bf16, 1/s; H100 SXM5 data sheet, dense: 989e12"})
    utilization: float = field(default=0.4, metadata={"help": "share of --flops that a model reaches; 0.4 is a guess"})
    latency: float = field(default=5e-6, metadata={"help": "of one hop of a small message, s; 5e-6 is a guess"})
    ranks_per_node: int = field(default=8, metadata={"help": "GPUs per node; default: 8"})
    dtype_bytes: float = field(default=4.0, metadata={"help": "per communicated element; 4, or 2 for bf16"})
    tokens: int = field(default=8192, metadata={"help": "per rank and step; default: 8192"})


@dataclass(frozen=True)
class Counted:
    """What one rank of a wrapping communicates in a step, counted; float32 bytes of whole tensors."""

    reduced: float = 0.0  # all-reduced over all ranks, or for HSDP over the nodes
    moved: float = 0.0  # all-gathered, reduce-scattered or broadcast: over all ranks, or for HSDP within a node
    calls: int = 0
    norm_calls: int = 0  # small all-reduces of torch's clip_grad_norm_


@dataclass(frozen=True)
class Host:
    """Microseconds of clipping and step() per tensor, measured: of plain tensors and of DTensors."""

    plain: dict[str, float]
    dtensor: dict[str, float]


def fullest(sizes: list[int], ranks: int) -> tuple[int, int]:
    """(parameters, tensors) of ZeRO-1's fullest rank: largest tensor first, to whoever has least; none is divided."""
    loads = [(0, rank, 0) for rank in range(ranks)]
    for size in sorted(sizes, reverse=True):
        load, rank, count = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, rank, count + 1))
    load, _, count = max(loads)
    return load, count


def share(wrapping: str, sizes: list[int], ranks: int, per_node: int) -> tuple[int, int]:
    """(parameters, tensors) that a rank steps, where it steps most."""
    if wrapping == "ZeRO-1":
        return fullest(sizes, ranks)
    divided = {"DDP": 1, "FSDP2": ranks, "HSDP": min(ranks, per_node)}[wrapping]
    return -(-sum(sizes) // divided), len(sizes)


def small_all_reduce(ranks: int, latency: float) -> float:
    """Seconds for a number: up a binary tree and down."""
    return 2 * math.ceil(math.log2(ranks)) * latency if ranks > 1 else 0.0


def memory_bytes(wrapping: str, contender: str, stepped: int, parameters: int, clip: bool) -> float:
    """That clipping and the update move on a rank, float32."""
    if not clip:
        return stepped * STEP_BYTES[contender]
    # clip_grad_norm_ beside ZeRO-1 scales the whole model's gradients, which every rank has
    clipped = parameters if wrapping == "ZeRO-1" and contender != "fusedopt" else stepped
    return stepped * STEP_BYTES[contender] + clipped * CLIP_BYTES[contender]


def norm_calls(wrapping: str, contender: str, counted: Counted) -> int:
    """Small all-reduces; the norm of gradients that every rank has whole needs none."""
    if wrapping == "DDP":
        return 0
    return 1 if contender == "fusedopt" else counted.norm_calls


def exposed(wrapping: str, contender: str, sizes: list[int], ranks: int, given: Assumptions, host: Host,
            counted: Counted) -> float:  # fmt: skip
    """Seconds that clipping and the update of a GPU's rank add to its step."""
    stepped, tensors = share(wrapping, sizes, ranks, given.ranks_per_node)
    memory = memory_bytes(wrapping, contender, stepped, sum(sizes), clip=True) / given.hbm
    each = (host.dtensor if wrapping in ("FSDP2", "HSDP") else host.plain)[contender]
    group = min(ranks, given.ranks_per_node) if wrapping == "HSDP" else ranks
    norm = norm_calls(wrapping, contender, counted) * small_all_reduce(group, given.latency)
    return max(memory, tensors * each * 1e-6) + norm


def communication(wrapping: str, ranks: int, given: Assumptions, counted: Counted) -> float:
    """Seconds on the wire by the ring convention: each rank sends 2 (n - 1) / n of what is reduced, (n - 1) / n of the
    rest. Between nodes as many rings run as there are adapters, so that together they are at most as fast as within."""
    scale = given.dtype_bytes / 4
    between = min(given.intra, given.inter * given.ranks_per_node)

    def seconds(reduced: float, moved: float, n: int, bandwidth: float) -> float:
        return (2 * reduced + moved) * scale * (n - 1) / n / bandwidth

    if wrapping == "HSDP":
        inside = min(ranks, given.ranks_per_node)
        nodes = max(1, ranks // given.ranks_per_node)
        # every rank of a node reduces its own shard, through its own adapter
        return seconds(0, counted.moved, inside, given.intra) + seconds(counted.reduced, 0, nodes, given.inter)
    return seconds(counted.reduced, counted.moved, ranks, given.intra if ranks <= given.ranks_per_node else between)


def step(parameters: int, exposed_s: float, communication_s: float, given: Assumptions) -> float:
    """Seconds: 6 operations per parameter and token (Kaplan et al. 2020), communication beside them, the optimizer."""
    compute = 6 * parameters * given.tokens / (given.flops * given.utilization)
    return max(compute, communication_s) + exposed_s


def predicted_on_cpu(bytes_moved: float, stream_gb_per_s: float, host_ms: float) -> float:
    """Milliseconds, for the check against what was measured on a few ranks of a CPU; a norm's all-reduce is host's."""
    return bytes_moved / stream_gb_per_s * 1e-6 + host_ms
