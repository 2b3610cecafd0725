"""The products of a linear layer under a loss, a chunk of rows at a time: its logits are never whole in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fusedopt.backends import cpu

# The default budget. Each chunk but the first reads and writes the weight's gradient again, H (4 + 4) bytes a class,
# for 2 H rows flops: a CPU of 10 to 20 flops a byte hides that behind a few hundred rows, a GPU of 300 needs thousands.
CHUNK_BYTES = {"cpu": 64 << 20}
DEVICE_CHUNK_BYTES = 1 << 30
# bytes of a product that waits in the cache to be added in float32
BLOCK = {"cpu": 4 << 20}
DEVICE_BLOCK = 32 << 20
HALVES = (torch.bfloat16, torch.float16)


def budget(device: torch.device) -> int:
    """Bytes that the logits of one chunk, and what is computed beside them, may take."""
    return CHUNK_BYTES.get(device.type, DEVICE_CHUNK_BYTES)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, on huge pages where large and on the CPU."""
    out = torch.empty(shape, dtype=dtype, device=device)
    return cpu.advised(out) if device.type == "cpu" and cpu.READY else out


def rows_per_chunk(rows: int, row_bytes: int, chunk_bytes: int, max_rows: int | None) -> int:
    """Chunks of equal size, as few as the budget allows; a row at least."""
    most = max(1, chunk_bytes // row_bytes)
    most = min(most, max_rows) if max_rows else most
    return math.ceil(rows / math.ceil(rows / most)) if rows else 1


def scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype, keep: bool) -> Tensor | None:
    """grad * scale, rounded once to `dtype`; over grad itself unless that is to be kept."""
    if grad is None:
        return None
    if grad.device.type == "cpu":
        factor = float(scale)
        if factor == 1.0:
            return grad.to(dtype, copy=keep)
        return (grad * factor if keep else grad.mul_(factor)).to(dtype)
    if grad.dtype in HALVES:  # a tensor of no dimension would first be rounded to grad's dtype
        return (grad.float() * scale).to(dtype)
    return (grad * scale if keep else grad.mul_(scale)).to(dtype)


class Products:
    """`logits(rows)` of one chunk after the other, and `accumulate(rows, grad)` of what their gradient brings.

    The products are taken in `dtype`. The weight's gradient is summed over chunks in float32 (float64 for float64);
    the first chunk writes it. `keep` lists the rows that count where not all do: the others take part in no product.
    """

    def __init__(
        self,
        x: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        dtype: torch.dtype,
        *,
        keep: Tensor | None = None,  # (n,) int64
        chunk: int,  # rows
        needs: tuple[bool, bool, bool] = (False, False, False),  # gradients of x, weight, bias
        wide: bool = False,  # leave float16 sums in float32: they are to be scaled before they are rounded
    ) -> None:
        self.x, self.keep, self.dtype, self.chunk = x, keep, dtype, chunk
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.weight_dtype, self.bias_dtype, self.wide = weight.dtype, None if bias is None else bias.dtype, wide
        self.rows = x.shape[0] if keep is None else keep.shape[0]
        device = x.device
        shape = torch.Size((min(chunk, self.rows), weight.shape[0]))
        native = device.type == "cpu" and cpu.READY
        self.buffer = cpu.scratch.empty(shape, dtype) if native else torch.empty(shape, dtype=dtype, device=device)
        self.first = True
        self.needs_dx = needs[0]
        self.dx = self.dw = self.db = self.dw_dtype = None  # dx and dw are made when they are first written
        if needs[1]:
            one_rounding = self.rows <= chunk and weight.dtype == dtype and not wide
            self.dw_dtype = dtype if one_rounding else _sum_dtype(dtype)
        if needs[2]:
            self.db = torch.zeros(weight.shape[0], dtype=_sum_dtype(dtype), device=device)

    def chunks(self) -> Iterator[slice]:
        for begin in range(0, self.rows, self.chunk):
            yield slice(begin, min(self.rows, begin + self.chunk))

    def logits(self, rows: slice) -> Tensor:  # (rows, V), overwritten by the next chunk's
        x = self.x[rows] if self.keep is None else self.x.index_select(0, self.keep[rows])
        self.x_chunk = x.to(self.dtype)
        out = self.buffer[: rows.stop - rows.start]
        if self.bias is None:
            return torch.mm(self.x_chunk, self.weight.t(), out=out)
        return torch.addmm(self.bias, self.x_chunk, self.weight.t(), out=out)

    def accumulate(self, rows: slice, grad: Tensor) -> None:
        """Add what `grad`, the gradient of the logits that were made last, gives to x, weight and bias."""
        if self.dw_dtype is not None:  # before dx is there: this product takes the most memory of its own
            if self.first:
                self.dw = empty(tuple(self.weight.shape), self.dw_dtype, grad.device)
            self._accumulate_weight(grad)
        if self.needs_dx:
            if self.first:
                shape, dtype = tuple(self.x.shape), self.x.dtype
                self.dx = empty(shape, dtype, grad.device) if self.keep is None else torch.zeros_like(self.x)
            if self.keep is None and self.dx.dtype == self.dtype:
                torch.mm(grad, self.weight, out=self.dx[rows])
            elif self.keep is None:
                self.dx[rows] = torch.mm(grad, self.weight)
            else:
                self.dx.index_copy_(0, self.keep[rows], torch.mm(grad, self.weight).to(self.dx.dtype))
        if self.db is not None:
            if grad.is_cuda:
                self.db += grad.sum(0, dtype=self.db.dtype)
            else:  # a sum in another dtype would convert the whole chunk first
                self.db += torch.mm(grad.new_ones(1, grad.shape[0]), grad)[0]
        self.first = False

    def _accumulate_weight(self, grad: Tensor) -> None:
        x, dw = self.x_chunk, self.dw
        if dw.dtype == grad.dtype:
            _ = torch.mm(grad.t(), x, out=dw) if self.first else dw.addmm_(grad.t(), x)
            return
        if self.first and grad.is_cuda:
            torch.mm(grad.t(), x, out_dtype=dw.dtype, out=dw)
            return
        classes = max(1, BLOCK.get(x.device.type, DEVICE_BLOCK) // (4 * max(x.shape)))
        for begin in range(0, dw.shape[0], classes):
            some = slice(begin, begin + classes)
            part = _product(grad[:, some].t(), x)
            _ = dw[some].copy_(part) if self.first else dw[some].add_(part)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias, in their dtypes unless `wide`; zeros where no row counted."""
        if self.first and self.dw_dtype is not None:
            self.dw = torch.zeros(self.weight.shape, dtype=self.dw_dtype, device=self.weight.device)
        if self.first and self.needs_dx:
            self.dx = torch.zeros_like(self.x)
        if self.wide:
            return self.dx, self.dw, self.db
        return (
            self.dx,
            None if self.dw is None else self.dw.to(self.weight_dtype),
            None if self.db is None else self.db.to(self.bias_dtype),
        )


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half precision, in float32 where there is such a kernel."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16 and a.device.type == "cpu":  # a sum over a chunk may pass 65504
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b)
