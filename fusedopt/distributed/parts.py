"""Tensors that processes hold together (torch.distributed.tensor): the part of each that lies here, gradients placed as
their parameters, and sums over all parts.

Elementwise work needs no more than the parts. Nothing here is imported, and nothing costs, where no tensor is shared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether it is a DTensor. As long as nobody has imported these, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: of a DTensor its local tensor, else itself."""
    if not is_shared(tensor):
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    local = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor, placed as `like`, whose part here is given; where `like` is not shared, the part."""
    if not is_shared(like) or is_shared(part):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def check_placed(tensor: Tensor, like: Tensor, what: str) -> None:
    """Raise ValueError for a tensor, named by `what`, that is shared in another way than `like`."""
    if is_shared(tensor) and not (
        is_shared(like) and (tensor.device_mesh, tensor.placements) == (like.device_mesh, like.placements)
    ):
        raise ValueError(
            f"{what} is {_told(tensor)}, its parameter {_told(like)}: was that placed anew, or the state loaded from "
            "another run? torch.distributed.checkpoint places a state as its parameters"
        )


def placed(tensor: Tensor, like: Tensor, what: str) -> Tensor:
    """`tensor`, of the shape of `like`, as this process holds `like`. Its part is cut out where it is whole here.

    Raises:
        ValueError: it is shared in another way; `what` names it.
    """
    check_placed(tensor, like, what)
    if is_shared(tensor) or not is_shared(like) or tensor.shape != like.shape:
        return tensor
    shape, offset = _box(like)
    here = tensor[tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))]
    return whole(torch.empty_like(part(like), dtype=tensor.dtype).copy_(here), like)


def _box(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of a DTensor's part, and where in the whole it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def elements(tensor: Tensor) -> Tensor | None:
    """(numel,) int64: which elements of the whole a DTensor's part holds, counted and listed in the order in which
    they lie; None for a tensor that is not shared, which holds its own.
    """
    if not is_shared(tensor):
        return None
    shape, offset = _box(tensor)
    here = part(tensor)
    numbers = torch.zeros((), dtype=torch.int64, device=here.device)
    for n, first, stride in zip(shape, offset, tensor.stride(), strict=True):
        along = torch.arange(first, first + n, device=here.device) * stride
        numbers = numbers.unsqueeze(-1) + along
    as_they_lie = torch.empty_like(here, dtype=torch.int64).copy_(numbers)
    return as_they_lie.as_strided((as_they_lie.numel(),), (1,))


def origin(tensor: Tensor) -> tuple[int, int, int] | None:
    """`elements` in closed form, (first, run, stride) as csrc/step.h's Origin has it; None where there is none."""
    if not is_shared(tensor):
        return 0, 1, 1
    shape, offset = _box(tensor)
    strides = tensor.stride()
    if not tensor.numel() or not all(shape):
        return 0, 1, 1
    if not part(tensor).is_contiguous() or any(
        stride != math.prod(tensor.shape[d + 1 :]) for d, stride in enumerate(strides) if tensor.shape[d] > 1
    ):
        return None
    first = sum(start * math.prod(tensor.shape[d + 1 :]) for d, start in enumerate(offset))
    cut = [d for d in range(tensor.ndim) if shape[d] != tensor.shape[d]]
    if not cut or cut == [0]:
        return first, 1, 1
    if cut[:-1] not in ([], [0]):
        return None  # runs that are not evenly apart
    return first, math.prod(shape[cut[-1] :]), math.prod(tensor.shape[cut[-1] :])


def _told(tensor: Tensor) -> str:
    return f"placed {tuple(tensor.placements)}" if is_shared(tensor) else "not shared"


def _partial_dims(param: Tensor, grad: Tensor) -> list[int]:
    """The dimensions of their mesh over which a gradient has yet to be summed.

    Raises:
        RuntimeError: any other difference between how gradient and parameter are placed.
    """
    if is_shared(param) and is_shared(grad) and param.device_mesh == grad.device_mesh:
        pairs = list(enumerate(zip(param.placements, grad.placements, strict=True)))
        partial = [d for d, (p, g) in pairs if p.is_replicate() and g.is_partial() and g.reduce_op in ("sum", "avg")]
        if all(p == g for d, (p, g) in pairs if d not in partial):
            return partial
    raise RuntimeError(
        f"the gradient of a parameter of shape {tuple(param.shape)} is {_told(grad)}, the parameter {_told(param)}: "
        "they must be placed alike on one mesh, or the gradient Partial where the parameter is replicated; "
        "p.grad = p.grad.redistribute(placements=p.placements) before step() does it"
    )


def gradients(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The parts of the parameters' gradients, Partial ones summed: an all-reduce for each mesh dimension and dtype.

    The parameters' own `.grad` stay as they are.

    Raises:
        RuntimeError: a gradient that is not placed as its parameter; nothing has been sent.
    """
    found: dict[Tensor, Tensor] = {}
    partial: dict[Any, list[Tensor]] = {}
    for param in params:
        if param.grad is None:
            continue
        if is_shared(param) or is_shared(param.grad):
            dims = _partial_dims(param, param.grad)
            if dims:
                ops = tuple(param.grad.placements[d].reduce_op for d in dims)
                key = (param.device_mesh, tuple(dims), ops, param.grad.dtype)
                partial.setdefault(key, []).append(param)
        found[param] = part(param.grad)
    for (mesh, dims, ops, _), sharing in partial.items():
        flat = torch.cat([found[param].reshape(-1) for param in sharing])
        for dim, op in zip(dims, ops, strict=True):
            _all_reduce(flat, mesh.get_group(dim))
            if op == "avg":
                flat.div_(mesh.size(dim))
        pieces = flat.split([found[param].numel() for param in sharing])
        found |= {param: piece.view(found[param].shape) for param, piece in zip(sharing, pieces, strict=True)}
    return found


def _all_reduce(tensor: Tensor, group: Any) -> None:
    import torch.distributed as dist

    dist.all_reduce(tensor, group=group)


class Holders:
    """Who holds parts of an optimizer's parameters, and sums over all of them in which each part counts once.

    Holders are numbered: 0 for tensors that are whole in every process. The numbers are of this process alone; sums go
    in the order of the parameters, which is every process's.
    """

    def __init__(self, extra_groups: Iterable[Any] = ()) -> None:
        self.extra_groups = tuple(extra_groups)
        if self.extra_groups:
            import torch.distributed as dist

            for group in self.extra_groups:
                if not isinstance(group, dist.ProcessGroup):
                    raise TypeError(f"extra_groups has {group!r}; expected process groups of torch.distributed")
        self._groups: list[tuple[Any, ...]] = [()]  # of each number: over which a sum goes
        self._devices: list[torch.device | None] = [None]  # where these communicate
        self._known: list[Any] = []  # how the parameters were placed

    def look(self, params: list[Tensor]) -> None:
        """Know these parameters' holders: all of them, whether they have a gradient here or not."""
        known = [param._spec if is_shared(param) else None for param in params]
        if len(known) == len(self._known) and all(a is b or a == b for a, b in zip(known, self._known, strict=True)):
            return
        self._known = known
        self._groups, self._devices = [()], [None]
        for param in params:
            self.number(param)

    def number(self, param: Tensor) -> int:
        """Which holders a parameter has. Raises RuntimeError where it is Partial."""
        if not is_shared(param):
            return 0
        mesh = param.device_mesh
        if any(placement.is_partial() for placement in param.placements):
            raise RuntimeError(f"a parameter of shape {tuple(param.shape)} is {_told(param)}: redistribute it first")
        sharded = [d for d, p in enumerate(param.placements) if not p.is_replicate() and mesh.size(d) > 1]
        groups = tuple(mesh.get_group(d) for d in sharded) if mesh.get_coordinate() is not None else ()
        if groups not in self._groups:
            self._groups.append(groups)
            self._devices.append(_device_of(mesh))
        return self._groups.index(groups)

    @property
    def _process_groups(self) -> list[Any]:
        return list(dict.fromkeys(group for groups in self._groups for group in groups))

    @property
    def communicate(self) -> bool:
        return len(self._groups) > 1 or bool(self.extra_groups)

    def total(self, sums: dict[int, list[Tensor]], found_inf: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """() float64, the sum over all parts of all holders, from those of the parts here; and `found_inf`, not zero
        where any process has found one. One all-reduce for each process group; nothing waits for a device.
        """
        given = [s for of_one in sums.values() for s in of_one] + ([] if found_inf is None else [found_inf])
        devices = [*(s.device for s in given if s.device.type != "cpu"), *filter(None, self._devices)]
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=device)

        def add(values: Iterable[Tensor]) -> Tensor:
            moved = [value.to(device, torch.float64, non_blocking=True) for value in values]
            return torch.stack(moved).sum() if moved else zero

        found = zero if found_inf is None else (found_inf.to(device) != 0).double()
        of_number = [add(sums.get(number, ())) for number in range(len(self._groups))]
        for group in self._process_groups:
            numbers = [number for number, groups in enumerate(self._groups) if group in groups]
            *reduced, found = self._reduce([*(of_number[n] for n in numbers), found], group)
            for number, value in zip(numbers, reduced, strict=True):
                of_number[number] = value
        total = torch.stack(of_number).sum()
        for group in self.extra_groups:
            total, found = self._reduce([total, found], group)
        return total, None if found_inf is None else found

    def _reduce(self, values: list[Tensor], group: Any) -> tuple[Tensor, ...]:
        import torch.distributed as dist

        vector = torch.stack(values)
        where = vector
        if vector.device.type == "cpu" and dist.get_backend(group) == "nccl":
            where = vector.to(torch.device("cuda", torch.cuda.current_device()))
        _all_reduce(where, group)
        return where.to(vector.device).unbind()

    def sum_rows(self, rows: Tensor, params: list[Tensor]) -> Tensor:
        """(n, k) sums over each of n parameters' parts here -> over all its parts, each row by its own holders."""
        numbers = [self.number(param) for param in params]
        for group in self._process_groups:
            mine = [i for i, number in enumerate(numbers) if group in self._groups[number]]
            if mine:
                some = rows[mine].contiguous()
                _all_reduce(some, group)
                rows[mine] = some
        return rows


def _device_of(mesh: Any) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
