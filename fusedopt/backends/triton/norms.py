"""Between `prepare` and the update, for rules whose step depends on norms of a whole tensor: two kernels that find them
and tell each row's rule.

In double, as no square overflows there, and in one order whatever the number of programs: a sum for each chunk, then
theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedopt.backends.triton.kernels import CHUNK, ROW, derived
from fusedopt.backends.triton.precise import CODES, locate, place, pointers_to, read


@triton.jit
def _sums(
    addresses,
    first,  # elements
    last,
    scalars,
    factor,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Of the squares of elements [first, last): the weights', their direction's."""
    pointers = pointers_to(addresses, KIND, ALIGNED)
    weights = tl.zeros((BLOCK,), tl.float64)
    along = tl.zeros((BLOCK,), tl.float64)
    for begin in range(first, last, BLOCK):
        elements, blocks = place(begin, last, True, KIND, BLOCK)
        _, p, g, states = read(pointers, elements, blocks, factor, KIND, BLOCK)
        there = elements[1]
        d = tl.where(there, DIRECTION(p, g, states, scalars), 0.0).to(tl.float64)
        p = tl.where(there, p, 0.0).to(tl.float64)
        weights += p * p
        along += d * d
    return tl.sum(weights, 0), tl.sum(along, 0)


@triton.jit(do_not_specialize=["n_chunks", "found_inf"])
def norms(
    rows,
    grads,
    chunks,
    scratch,
    squares,  # (n_chunks, 2) float64, written: 0 where a row does not step or adapt
    n_chunks,
    found_inf,
    ADAPTS: tl.constexpr,
    DIRECTION: tl.constexpr,
    SCALARS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Persistent programs walk the chunks of rows that have a master weight, or of those that have none."""
    chunks_now = tl.where(tl.load(found_inf) == 0, n_chunks, 0)
    for chunk in range(tl.program_id(0), chunks_now, tl.num_programs(0)):
        row, _, count, whole, addresses = locate(rows, grads, chunks, chunk, scratch.dtype.element_ty, KIND)
        scalars, factor = derived(scratch, row, SCALARS)
        adapts = ADAPTS(scalars)
        count = tl.where(adapts, count, 0)
        whole = tl.multiple_of(tl.where(adapts, whole, 0), CODES)
        weights, along = _sums(addresses, 0, whole, scalars, factor, DIRECTION, KIND, BLOCK, True)
        # blocks of another size, as in the update
        half: tl.constexpr = min(BLOCK // 2, CODES)
        rest = _sums(addresses, whole, count, scalars, factor, DIRECTION, KIND, half, False)
        mine = (tl.load(rows + row * ROW + 11) != 0) == (KIND.master is not None)
        tl.store(squares + 2 * chunk, weights + rest[0], mine)
        tl.store(squares + 2 * chunk + 1, along + rest[1], mine)


@triton.jit(do_not_specialize=["n_rows", "found_inf"])
def adapt(
    rows,
    scratch,
    squares,
    n_rows,
    found_inf,
    ADAPT: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row tells its rule."""
    rows_now = tl.where(tl.load(found_inf) == 0, n_rows, 0)
    for row in range(tl.program_id(0).to(tl.int64), rows_now, tl.num_programs(0)):
        entry = rows + row * ROW
        first = tl.load(entry + 6)
        last = first + (tl.load(entry + 5) + (CHUNK - 1)) // CHUNK
        weights = tl.zeros((BLOCK,), tl.float64)
        along = tl.zeros((BLOCK,), tl.float64)
        for begin in range(first, last, BLOCK):
            chunk = begin + tl.arange(0, BLOCK)
            weights += tl.load(squares + 2 * chunk, chunk < last, other=0.0)
            along += tl.load(squares + 2 * chunk + 1, chunk < last, other=0.0)
        of_weights, of_along = tl.sum(weights, 0), tl.sum(along, 0)
        ratio = tl.where((of_weights > 0) & (of_along > 0), tl.sqrt(of_weights / of_along), 1.0)
        scalars, _ = derived(scratch, row, SCALARS)
        scalars = ADAPT(scalars, ratio)
        for k in tl.static_range(SCALARS):
            tl.store(scratch + row * (SCALARS + 1) + k, scalars[k])
