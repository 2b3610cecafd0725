"""The two kernels of a plain step, for every rule, dtype and number of tensors; precise.py has the other update,
norms.py what some rules need before it.

What they read, in 64-bit words (csrc/step.h):

    rows    (n_rows, 14)  param, state0, state1, state2, step counter, numel, first chunk, group, scale0, scale1,
                          scale2, master, ema, index
    grads   (n_rows,)     pointers, null where the average alone moves
    chunks  (n_chunks,)   int32: the row that a chunk of CHUNK elements belongs to
    groups  (n, 11)       hyper[8] and the gradient's factor (float64 bits), lr pointer, lr is float64

No argument is specialised on its value, so tensors of any shape and number run the same compiled code.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(16384)
ROW = tl.constexpr(14)
GROUP = tl.constexpr(11)


@triton.jit(do_not_specialize=["n_rows", "found_inf", "grad_scale"])
def prepare(
    rows,
    grads,
    groups,
    scratch,  # (n_rows, SCALARS + 1) in the compute type, written: the rule's scalars and the gradient's factor
    n_rows,
    found_inf,  # float32 scalar: where it is not 0 nothing changes
    grad_scale,  # float32 scalar
    DERIVE: tl.constexpr,
    HYPER: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A thread per row: advance its step counter where it has a gradient, derive its rule's scalars. In a launch of its
    own: in `update` many programs work on one row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = row < tl.where(tl.load(found_inf) == 0, n_rows, 0)
    row = row.to(tl.int64)
    group = groups + tl.load(rows + row * ROW + 7, active, other=0) * GROUP

    counter = tl.load(rows + row * ROW + 4, active, other=0)
    counts = active & (counter != 0) & (tl.load(grads + row, active, other=0) != 0)
    counter = counter.to(tl.pointer_type(tl.float32))
    step = tl.load(counter, counts, other=0.0) + 1
    tl.store(counter, step, counts)

    lr = tl.load(group, active, other=0).to(tl.float64, bitcast=True)
    lr_tensor = tl.load(group + 9, active, other=0)
    is_float64 = tl.load(group + 10, active, other=0) != 0
    given32 = (lr_tensor != 0) & ~is_float64
    given64 = (lr_tensor != 0) & is_float64
    lr = tl.where(given32, tl.load(lr_tensor.to(tl.pointer_type(tl.float32)), given32, other=0.0).to(tl.float64), lr)
    lr = tl.where(given64, tl.load(lr_tensor.to(tl.pointer_type(tl.float64)), given64, other=0.0), lr)
    hyper = (lr,)
    for k in tl.static_range(1, HYPER):
        hyper += (tl.load(group + k, active, other=0).to(tl.float64, bitcast=True),)

    scalars = DERIVE(hyper, step.to(tl.float64))
    tl.static_assert(len(scalars) == SCALARS)
    factor = tl.load(group + 8, active, other=0).to(tl.float64, bitcast=True) / tl.load(grad_scale).to(tl.float64)
    scratch += row * (SCALARS + 1)
    for k in tl.static_range(SCALARS):
        tl.store(scratch + k, scalars[k], active)
    tl.store(scratch + SCALARS, factor, active)


@triton.jit
def derived(scratch, row, SCALARS: tl.constexpr):
    """(the rule's scalars, the gradient's factor) of a row, as `prepare` left them."""
    scratch += row * (SCALARS + 1)
    scalars = ()
    for k in tl.static_range(SCALARS):
        scalars += (tl.load(scratch + k),)
    return scalars, tl.load(scratch + SCALARS)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # said of the pointer: said of the integer it is lost in the cast, and every element is loaded alone
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _walk(
    param,  # addresses
    grad,
    state,
    first,  # elements
    last,
    part,
    split,
    scalars,
    factor,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update elements [first, last), this program's part of them: every `split`-th block."""
    param = pointer_to(param, PARAM, ALIGNED)
    grad = pointer_to(grad, GRAD, ALIGNED)
    pointers = ()
    for k in tl.static_range(STATES):
        pointers += (pointer_to(state[k], STATE, ALIGNED),)
    for begin in range(first + part * BLOCK, last, split * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < last
        # gradients and states are not read again before the next step; parameters are, by the next forward pass
        p = tl.load(param + at, mask).to(factor.dtype)
        g = tl.load(grad + at, mask, eviction_policy="evict_first").to(factor.dtype) * factor
        states = ()
        for k in tl.static_range(STATES):
            states += (tl.load(pointers[k] + at, mask, eviction_policy="evict_first").to(factor.dtype),)
        p, states = UPDATE(p, g, states, scalars)
        tl.store(param + at, p.to(PARAM), mask)
        for k in tl.static_range(STATES):
            tl.store(pointers[k] + at, states[k].to(STATE), mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_chunks", "split", "found_inf"])
def update(
    rows,
    grads,
    chunks,
    scratch,
    n_chunks,
    split,  # programs that share a chunk: few chunks do not fill a GPU
    found_inf,
    UPDATE: tl.constexpr,
    SCALARS: tl.constexpr,
    STATES: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Persistent programs walk the chunks."""
    VECTOR: tl.constexpr = 128 // PARAM.primitive_bitwidth  # elements in 16 bytes of the narrowest dtype
    items = tl.where(tl.load(found_inf) == 0, n_chunks * split, 0)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk = item // split
        part = item % split
        row = tl.load(chunks + chunk).to(tl.int64)
        entry = rows + row * ROW
        start = (chunk - tl.load(entry + 6)) * CHUNK
        count = tl.minimum(tl.load(entry + 5) - start, CHUNK).to(tl.int32)

        scalars, factor = derived(scratch, row, SCALARS)

        param = tl.load(entry) + start * (PARAM.primitive_bitwidth // 8)
        grad = tl.load(grads + row) + start * (GRAD.primitive_bitwidth // 8)
        state = ()
        address_bits = param | grad
        for k in tl.static_range(STATES):
            state += (tl.load(entry + 1 + k) + start * (STATE.primitive_bitwidth // 8),)
            address_bits |= state[k]
        # whole vectors, where all pointers allow them; then what is left, element by element
        whole = tl.where(address_bits % 16 == 0, count // VECTOR * VECTOR, 0)
        whole = tl.multiple_of(whole, VECTOR)
        # fmt: off
        _walk(param, grad, state, 0, whole, part, split, scalars, factor,
              UPDATE, STATES, PARAM, GRAD, STATE, BLOCK, True)
        # blocks of another size: of the same, the compiler would give both walks one layout and shuffle between two
        _walk(param, grad, state, whole, count, part, split, scalars, factor,
              UPDATE, STATES, PARAM, GRAD, STATE, BLOCK // 2, False)
        # fmt: on


@triton.jit
def _sum_squares(grad, first, last, GRAD: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Of elements [first, last), a lane at a time; in double, as no square overflows there."""
    grad = pointer_to(grad, GRAD, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        g = tl.load(grad + at, at < last, other=0.0)
        if tl.float64 != GRAD:
            g = g.to(tl.float32)
        g = g.to(tl.float64)
        total += g * g
    return total


@triton.jit(do_not_specialize=["n_chunks"])
def sum_squares(
    rows,
    grads,
    chunks,
    n_chunks,
    partial,  # (n_chunks,) float64, written
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // GRAD.primitive_bitwidth
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        row = tl.load(chunks + chunk).to(tl.int64)
        entry = rows + row * ROW
        start = (chunk - tl.load(entry + 6)) * CHUNK
        count = tl.minimum(tl.load(entry + 5) - start, CHUNK).to(tl.int32)
        address = tl.load(grads + row)
        count = tl.where(address != 0, count, 0)
        grad = address + start * (GRAD.primitive_bitwidth // 8)
        whole = tl.multiple_of(tl.where(grad % 16 == 0, count // VECTOR * VECTOR, 0), VECTOR)
        total = tl.sum(_sum_squares(grad, 0, whole, GRAD, BLOCK, True), 0)
        total += tl.sum(_sum_squares(grad, whole, count, GRAD, BLOCK // 2, False), 0)
        tl.store(partial + chunk, total)
