"""What torch operations hold, how often they multiply, and whether they wait, seen through the dispatcher."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_")


class Watch(TorchDispatchMode):
    """`peak`: most bytes alive at once of CPU memory that was allocated inside; `products`: matrix products taken."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in PRODUCTS
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.device.type == "cpu" and storage._cdata not in self.known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: row for key, row in self.live.items() if not row[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return out


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device: a tensor's value as a number, a shape that values decide."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))
