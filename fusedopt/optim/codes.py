"""csrc/precision.h in PyTorch's operations: 8-bit codes, split master weights, random bits. Any device, no speed."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale: csrc/step.h's kCodeBlock


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _blocks(values: Tensor) -> Tensor:
    """(numel,) as (blocks, BLOCK), the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def quantize(values: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes as a dense float32 tensor lies, int8 (`signed`) or uint8, and (blocks,) float32 scales.

    `random`: (numel,) 16 bits for each element as it lies; unsigned codes are then not the nearest, but one of the two
    around a value, each with the probability that makes the mean the value.
    """
    blocks = _blocks(flat(values))
    largest = blocks.abs().amax(1) if blocks.numel() else blocks.new_empty(0)
    scales = torch.where(largest.isfinite(), largest.clamp(min=2.0**-90), torch.nan)
    part = blocks.abs() * scales.reciprocal()[:, None]
    if signed:
        codes = (127 * part.sqrt()).round().nan_to_num() * blocks.sign().nan_to_num()
    elif random is not None:
        codes = _either(blocks.abs() * (255.0**4 / scales)[:, None], _blocks(random)).clamp(
            min=(blocks > 0).to(part.dtype)
        )
    else:
        codes = (255 * part.sqrt().sqrt()).round().nan_to_num().clamp(min=(blocks > 0).to(part.dtype))
    out = torch.empty_like(values, dtype=torch.int8 if signed else torch.uint8)
    flat(out).copy_(codes.view(-1)[: values.numel()])
    return out, scales


def _either(part: Tensor, random: Tensor) -> Tensor:
    """The code below or above each `part`, in which the value of code c is c^4; the largest has the largest code."""
    near = part.sqrt().sqrt().round().nan_to_num().clamp(max=255)
    square = near * near
    low = torch.where(square * square > part, near - 1, near).clamp(max=254)
    square = low * low
    width = (2 * low + 1) * (2 * square + 2 * low + 1)  # (low + 1)^4 - low^4
    return low + ((random + 0.5) * 2.0**-16 * width < part - square * square)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 values, as the codes lie."""
    signed = codes.dtype == torch.int8
    u = _blocks(flat(codes).float()).mul_(torch.tensor(1 / (127 if signed else 255), dtype=torch.float32))
    values = u.abs().mul_(u)
    del u  # no more than two at a time: an export of many tensors must not need the room of several
    if not signed:
        values.mul_(values)
    values.mul_(scales[:, None])
    out = torch.empty_like(codes, dtype=torch.float32)
    flat(out).copy_(values.view(-1)[: codes.numel()])
    return out


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as (bfloat16, int16) whose `join` it is: rounded half away from zero, and the rest."""
    bits = torch.where(weights.isnan(), 0x7FC00000, weights.view(torch.int32).long())
    rest = (bits & 0xFFFF) - ((bits & 0x8000) << 1)
    return (bits - rest).to(torch.int32).view(torch.float32).to(torch.bfloat16), rest.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that `split` made them of."""
    bits = high.float().view(torch.int32).long() + low
    return bits.to(torch.int32).view(torch.float32)


def random16(seed: int, step: int, parameter: int, tensor: int, n: int, device: torch.device) -> Tensor:
    """(n,) int64: 16 random bits for each element. `tensor`: 0 for the parameter, 1 + k for its state k."""
    return _of_eighths(seed, step, parameter, tensor, torch.arange(-(-n // 8), device=device)).view(-1)[:n]


def random16_of(seed: int, step: int, parameter: int, tensor: int, elements: Tensor) -> Tensor:
    """As `random16`, for these (n,) elements only."""
    bits = _of_eighths(seed, step, parameter, tensor, elements // 8)
    return bits.gather(1, elements[:, None] % 8)[:, 0]


def _of_eighths(seed: int, step: int, parameter: int, tensor: int, eighth: Tensor) -> Tensor:
    """(len(eighth), 8)"""
    mask = 0xFFFFFFFF
    a, b = eighth & mask, (eighth >> 32 << 2 | tensor) & mask
    c, d = torch.full_like(a, step & mask), torch.full_like(a, parameter & mask)
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        (x_high, x_low), (y_high, y_low) = _product(0xD2511F53, a), _product(0xCD9E8D57, c)
        a, b, c, d = y_high ^ b ^ k0, y_low, x_high ^ d ^ k1, x_low
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    words = torch.stack([a, b, c, d], 1)
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1, 8)


def _product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a product of 32-bit numbers, in int64."""
    low, high = x & 0xFFFF, x >> 16
    small, large = constant * low, constant * high
    middle = (small >> 16) + (large & 0xFFFF)
    return (large >> 16) + (middle >> 16), (middle & 0xFFFF) << 16 | small & 0xFFFF


def stochastic(values: Tensor, random: Tensor) -> Tensor:
    """float32 as bfloat16, rounded up with the probability of the part that is cut off; `random` as the values lie."""
    bits = torch.where(values.isnan(), 0x7FC00000, values.view(torch.int32).long() + random.view_as(values))
    return (bits & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)
