"""Sums of squares of what several processes hold together, kept apart from those of what others hold."""

from __future__ import annotations

from torch import Tensor


def by_holders(chunks: list[tuple[int, int]], partial: Tensor, total: Tensor) -> dict[int, Tensor]:
    """The sum of each holders' share of `partial`: (holders, how many), in order. `total` is that of all."""
    if len({holders for holders, _ in chunks}) == 1:
        return {chunks[0][0]: total}
    sums: dict[int, Tensor] = {}
    for (holders, _), share in zip(chunks, partial.split([n for _, n in chunks]), strict=True):
        sums[holders] = sums[holders] + share.sum() if holders in sums else share.sum()
    return sums
