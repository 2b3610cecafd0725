"""Other libraries' optimizers and losses: what each takes, found by import, and why one is absent.

`benchmarks.trial` tries every one of them on its own and keeps what happened.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import reasons

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}  # torch's defaults, the same rule


@dataclass(frozen=True)
class Peer:
    name: str  # as tables show it
    package: str  # the distribution, which has a version
    kind: str  # of KINDS
    devices: tuple[str, ...]  # where it is said to run; tried elsewhere only to hear what it says
    load: Callable[[], Callable[..., Any]]  # import it; AdamW: params -> Optimizer; else the loss
    install: tuple[str, ...] = ()  # pip's words, where they are not the package's name
    on_index: bool = True  # False: built from its own source, and the name on the index is another project's
    limit: float | None = None  # its error may be this many epsilons, where that is more than ours may be


KINDS = {  # kind -> what a table calls it; a loss takes (logits, target), a linear one (x, weight, target)
    "adamw": "AdamW",
    "adamw-8bit": "AdamW, 8-bit states",
    "adamw-fp8": "AdamW, float8 states",
    "adamw-4bit": "AdamW, 4-bit states",
    "cross-entropy": "cross entropy",
    "linear-cross-entropy": "linear cross entropy",
}


def _optimi() -> Callable[..., Any]:
    from optimi import AdamW  # its own betas and eps are others than torch's

    return partial(AdamW, kahan_sum=False, **ADAMW)  # by itself it compensates 16-bit parameters: another rule


def _deepspeed_cpu() -> Callable[..., Any]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()  # compiles C++ for a minute when it is first used: fail here, not in a case
    return partial(DeepSpeedCPUAdam, adamw_mode=True, **ADAMW)


def _deepspeed_fused() -> Callable[..., Any]:
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load()  # on a CPU, CPUAdam's loop behind the same interface
    return partial(FusedAdam, adam_w_mode=True, **ADAMW)


def _apex() -> Callable[..., Any]:
    from apex.optimizers import FusedAdam

    return partial(FusedAdam, adam_w_mode=True, **ADAMW)  # its own weight_decay is 0


def _transformer_engine() -> Callable[..., Any]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return partial(FusedAdam, adam_w_mode=True, **ADAMW)  # its own weight_decay is 0


def _bitsandbytes_32bit() -> Callable[..., Any]:
    from bitsandbytes.optim import AdamW

    return AdamW


def _bitsandbytes() -> Callable[..., Any]:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def _torchao() -> Callable[..., Any]:
    from torchao.optim import AdamW8bit

    return AdamW8bit


def _torchao_fp8() -> Callable[..., Any]:
    from torchao.optim import AdamWFp8

    return AdamWFp8


def _torchao_4bit() -> Callable[..., Any]:
    from torchao.optim import AdamW4bit

    return AdamW4bit


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()  # overwrites the logits with their gradient


def _liger_linear() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(weight, x, target)  # its weight comes first


def _cut_cross_entropy() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    # its default leaves small gradients out, which on random data are nearly all
    return partial(linear_cross_entropy, impl="cce", filter_eps=None)


def _cut_cross_entropy_compiled() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, impl="torch_compile")


def _quack() -> Callable[..., Any]:
    from quack import cross_entropy

    return cross_entropy


def _quack_linear() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _flash_attn() -> Callable[..., Any]:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()


CPU, CUDA, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
# It derives 1 - beta2 in float32: 1 - 0.999f is 108 epsilons off 0.001, and so is the second moment at first.
DEEPSPEED_LIMIT = 128.0
# both build against the torch that is there, and their own documentation says so
TE_WORDS = ("--no-build-isolation", "transformer-engine[pytorch]")
FLASH_WORDS = ("--no-build-isolation", "flash-attn")

PEERS = (  # those of a package together: they are tried in one environment
    Peer("torch-optimi", "torch-optimi", "adamw", BOTH, _optimi),
    Peer("DeepSpeed CPUAdam", "deepspeed", "adamw", CPU, _deepspeed_cpu, limit=DEEPSPEED_LIMIT),
    Peer("DeepSpeed FusedAdam", "deepspeed", "adamw", BOTH, _deepspeed_fused, limit=DEEPSPEED_LIMIT),
    Peer("apex", "apex", "adamw", CUDA, _apex, on_index=False),
    Peer("TransformerEngine", "transformer-engine", "adamw", CUDA, _transformer_engine, TE_WORDS),
    Peer("bitsandbytes 32-bit", "bitsandbytes", "adamw", BOTH, _bitsandbytes_32bit),
    Peer("bitsandbytes", "bitsandbytes", "adamw-8bit", BOTH, _bitsandbytes),
    Peer("torchao", "torchao", "adamw-8bit", BOTH, _torchao),
    Peer("torchao float8", "torchao", "adamw-fp8", BOTH, _torchao_fp8),
    Peer("torchao 4-bit", "torchao", "adamw-4bit", BOTH, _torchao_4bit),
    Peer("liger", "liger-kernel", "cross-entropy", CUDA, _liger),
    Peer("liger linear", "liger-kernel", "linear-cross-entropy", CUDA, _liger_linear),
    Peer("cut-cross-entropy", "cut-cross-entropy", "linear-cross-entropy", CUDA, _cut_cross_entropy),
    Peer("cut-cross-entropy compiled", "cut-cross-entropy", "linear-cross-entropy", CPU, _cut_cross_entropy_compiled),
    Peer("quack", "quack-kernels", "cross-entropy", CUDA, _quack),
    Peer("quack linear", "quack-kernels", "linear-cross-entropy", CUDA, _quack_linear),
    Peer("flash-attn", "flash-attn", "cross-entropy", CUDA, _flash_attn, FLASH_WORDS),
)
BY_NAME = {peer.name: peer for peer in PEERS}


@functools.cache  # DeepSpeed compiles; and who failed once is not asked again
def loaded(peer: Peer) -> tuple[Callable[..., Any] | None, str]:
    """What `load` gives, or None and why: not only ImportError, a build or a missing library raises anything."""
    try:
        return peer.load(), ""
    except Exception as error:
        return None, reasons.of_error(error)


def _of(kind: str, device: str) -> list[Peer]:
    return [peer for peer in PEERS if peer.kind == kind and device in peer.devices]


def found(kind: str, device: str) -> dict[str, Callable[..., Any]]:
    """Name -> AdamW builder or loss, of those that load here."""
    each = {peer.name: loaded(peer)[0] for peer in _of(kind, device)}
    return {name: what for name, what in each.items() if what is not None}


def absent(kind: str, device: str) -> list[str]:
    """Names of those that would take part on the device if they loaded."""
    return [peer.name for peer in _of(kind, device) if loaded(peer)[0] is None]


def reason(name: str) -> str:
    """Why a peer is absent; "" where it is not."""
    return loaded(BY_NAME[name])[1]


def version(name: str) -> str | None:
    """Of the installed package; None where there is none."""
    try:
        return importlib.metadata.version(BY_NAME[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None


def states(optimizer: Optimizer, params: list[Tensor], sample: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """Whatever an AdamW keeps for each element, under torch's names and in its meaning, and the `step` if it counts.

    `sample`, of a tensor for each parameter: the elements that are compared, in float64.
    """
    group = optimizer.param_groups[0]
    names = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # bitsandbytes'
    kept = [key for key, value in optimizer.state[params[0]].items() if key != "step" and isinstance(value, Tensor)]
    kept = [key for key in kept if optimizer.state[params[0]][key].shape == params[0].shape]
    result = {names.get(key, key): sample([optimizer.state[p][key] for p in params]) for key in kept}
    # apex, TransformerEngine and torch-optimi count in the group; DeepSpeed's FusedAdam in the last parameter's state
    counts = [optimizer.state[p]["step"] for p in params if "step" in optimizer.state[p]] or [group.get("step")]
    if counts[0] is not None:
        result["step"] = torch.tensor(max(map(float, counts)))
    if "beta1" in group:  # torch-optimi keeps the averages corrected for their bias
        for key, beta in (("exp_avg", group["beta1"]), ("exp_avg_sq", group["beta2"])):
            result[key] = result[key] * (1 - beta ** float(result["step"]))
    return result
