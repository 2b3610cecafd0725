"""All-pairs designs: few rows in which every pair of values occurs that can occur at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch


def all_pairs(factors: Mapping[str, Sequence[Any]], possible: Callable[..., bool], seed: int = 0) -> list[dict]:
    """Rows of one value per factor; `possible` takes some of the factors by name and tells whether they go together.

    Greedy: the first pair that is missing, in the one of 64 possible rows that brings the most pairs.
    """
    sizes = [len(values) for values in factors.values()]
    rows = possible_rows(factors, possible)
    generator = torch.Generator().manual_seed(seed)
    missing = {}
    for i, j in combinations(range(len(sizes)), 2):
        missing[i, j] = torch.zeros(sizes[i], sizes[j], dtype=torch.bool)
        missing[i, j][rows[:, i], rows[:, j]] = True
    chosen = []
    for (i, j), table in missing.items():
        while table.any():
            a, b = table.nonzero()[0].tolist()
            candidates = rows[(rows[:, i] == a) & (rows[:, j] == b)]
            candidates = candidates[torch.randint(len(candidates), (64,), generator=generator)]
            gains = sum(left[candidates[:, k], candidates[:, m]].int() for (k, m), left in missing.items())
            row = candidates[gains.argmax()]
            for (k, m), left in missing.items():
                left[row[k], row[m]] = False
            chosen.append(row.tolist())
    return [named(factors, row) for row in chosen]


def possible_rows(factors: Mapping[str, Sequence[Any]], possible: Callable[..., bool]) -> torch.Tensor:
    """(rows, factors) int64: an index into each factor's values."""
    names = possible.__code__.co_varnames[: possible.__code__.co_argcount]
    asked = torch.cartesian_prod(*(torch.arange(len(factors[name])) for name in names)).tolist()
    goes = [possible(*(factors[name][k] for name, k in zip(names, row, strict=True))) for row in asked]
    asked = torch.tensor(asked)[torch.tensor(goes)]
    free = [name for name in factors if name not in names]
    others = torch.cartesian_prod(*(torch.arange(len(factors[name])) for name in free))
    both = torch.cat([asked.repeat_interleave(len(others), 0), others.repeat(len(asked), 1)], 1)
    order = [*names, *free]
    return both[:, [order.index(name) for name in factors]]


def named(factors: Mapping[str, Sequence[Any]], row: Sequence[int]) -> dict[str, Any]:
    return {name: values[k] for (name, values), k in zip(factors.items(), row, strict=True)}
