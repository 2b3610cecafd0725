"""Other libraries' losses and optimizers, found by import. Those that are not installed are named with the figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Loss = Callable[..., Any]
Peers = dict[str, Callable[[], Loss]]  # name -> import it


def _liger_cross_entropy() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def _liger_linear() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(weight, x, target)


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    # its default leaves out small probabilities, which on random data are nearly all
    return partial(linear_cross_entropy, impl="cce_exact")


def _torchao_adamw() -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit


def _bitsandbytes_adamw() -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


ADAMW_8BIT: Peers = {"torchao": _torchao_adamw, "bitsandbytes": _bitsandbytes_adamw}
CROSS_ENTROPY: Peers = {"liger": _liger_cross_entropy}  # (logits, target); it overwrites the logits
LINEAR: Peers = {"liger": _liger_linear, "cut-cross-entropy": _cut_cross_entropy}  # (x, weight, target)


def installed(peers: Peers) -> dict[str, Loss]:
    found = {}
    for name, load in peers.items():
        try:
            found[name] = load()
        except ImportError:
            continue
    return found


def absent(peers: Peers) -> list[str]:
    found = installed(peers)
    return [name for name in peers if name not in found]
