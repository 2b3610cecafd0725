"""The update at a precision of the user's choice: csrc/precision.h once more, for Triton.

Tables and programs are those of kernels.py. What is kept in which form is known when a kernel is compiled (`Kind`);
whether a row has a gradient or an average is asked at run time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedopt.backends.triton.kernels import CHUNK, ROW, derived, pointer_to
from fusedopt.backends.triton.rules import lerp, lerp_scalars

CODES = tl.constexpr(256)  # that share a scale: csrc/step.h's kCodeBlock


class Kind(NamedTuple):
    """How a launch's tensors are kept."""

    param: Any  # Triton's dtypes
    grad: Any
    states: tuple[Any, ...]  # int8 and uint8 for codes that are signed and not
    coded: bool
    master: Any  # int16 rest of a bfloat16, float32 of a float16; None
    averaged: bool
    stochastic: bool  # rounds at random what is bfloat16, but for weights with a master, and squares' codes


# --- random bits ---


@triton.jit
def _random16(noise, begin, TENSOR: tl.constexpr, BLOCK: tl.constexpr):
    """16 random bits for each element of a block: a call of Philox for eight neighbours."""
    seed, step, parameter, eighth = noise
    low = eighth.to(tl.uint32) + (begin // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint32)  # of a chunk: no carry
    high = (eighth >> 32).to(tl.uint32) << 2 | TENSOR
    w0, w1, w2, w3 = tl.philox(seed, low, high, step, parameter)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16)


# --- 8-bit codes, CODES of them with a scale ---

_INTEGER = tl.constexpr(8388608.0)  # a float of 2^23 has no bits below 1, so adding it rounds


@triton.jit
def _by_block(x, BLOCK: tl.constexpr):
    return tl.reshape(x, (BLOCK // CODES, CODES))


@triton.jit
def _decode(codes, scale, CODE: tl.constexpr, BLOCK: tl.constexpr):
    if tl.int8 == CODE:
        u = codes.to(tl.float32) * (1.0 / 127)
        part = u * tl.abs(u)
    else:
        u = codes.to(tl.float32) * (1.0 / 255)
        part = u * u
        part = part * part
    return tl.reshape(scale[:, None] * _by_block(part, BLOCK), (BLOCK,))


@triton.jit
def _nearest(x):
    return (x + _INTEGER).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit
def _either(part, random):
    """The code below or above a part, in which the value of code c is c^4, each with the probability that makes the
    mean the part. The largest has the largest code, whatever the bits: its part is within an ulp of 255^4."""
    near = (tl.sqrt(tl.sqrt(part)) + _INTEGER) - _INTEGER  # a root off by one does no harm
    square = near * near
    below = tl.where(square * square > part, near - 1, near)
    low = tl.where(below > 254, 254.0, below)
    square = low * low
    width = (2 * low + 1) * (2 * square + 2 * low + 1)  # (low + 1)^4 - low^4
    chance = (random.to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 65536)
    return tl.where(chance * width < part - square * square, low + 1, low)


@triton.jit
def _encode(values, noise, begin, TENSOR: tl.constexpr, CODE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """(codes, scales); squares' codes at random: they decay by less than half a code."""
    BLOCK: tl.constexpr = values.shape[0]
    LARGEST: tl.constexpr = 127.0 * 127 if tl.int8 == CODE else 255.0 * 255 * 255 * 255
    x = _by_block(values, BLOCK)
    # the magnitudes' bits: their order puts NaN above infinity above numbers
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = tl.where(largest >= 0x7F800000, 0x7FC00000, tl.maximum(largest, 0x12800000))
    scale = scale.to(tl.float32, bitcast=True)
    part = tl.abs(x) * tl.div_rn(LARGEST, scale)[:, None]
    # approximate roots are within an ulp; codes lie further apart
    if tl.int8 == CODE:
        code = _nearest(tl.sqrt(part))
        code = tl.where(x < 0, -code, code)
    else:
        if STOCHASTIC:
            code = _nearest(_either(part, _by_block(_random16(noise, begin, TENSOR, BLOCK), BLOCK)))
        else:
            code = _nearest(tl.sqrt(tl.sqrt(part)))
        code = tl.where((code == 0) & (x > 0), 1, code)
    return tl.reshape(code.to(CODE), (BLOCK,)), scale


# --- bfloat16 and float16 ---


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _high(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _join(stored, master):
    """The float32 weight."""
    if master.dtype == tl.int16:
        high = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return (high.to(tl.int32, bitcast=True) + master.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        same = master.to(tl.float16).to(tl.int16, bitcast=True) == stored.to(tl.int16, bitcast=True)
        return tl.where(same, master, stored.to(tl.float32))


@triton.jit
def _split(x, PARAM: tl.constexpr):
    """(weight as stored, master)"""
    if tl.bfloat16 == PARAM:
        bits = tl.where(_is_nan(_bits(x)), 0x7FC00000, _bits(x))
        return _high(bits + 0x8000), bits.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return x.to(PARAM), x


@triton.jit
def _narrow(x, noise, begin, TENSOR: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STOCHASTIC and tl.bfloat16 == DTYPE:
        bits = _bits(x)
        random = _random16(noise, begin, TENSOR, x.shape[0])
        return _high(tl.where(_is_nan(bits), 0x7FC00000, bits + random))
    else:
        return x.to(DTYPE)


# --- a chunk's tensors ---


@triton.jit
def _advanced(address, elements, DTYPE: tl.constexpr):
    return tl.where(address != 0, address + elements * (DTYPE.primitive_bitwidth // 8), 0)


@triton.jit
def locate(rows, grads, chunks, chunk, COMPUTE: tl.constexpr, KIND: tl.constexpr):
    """(row, first element, how many, how many in whole blocks that all pointers allow to be aligned, addresses); none
    where the row is of another kind."""
    row = tl.load(chunks + chunk).to(tl.int64)
    entry = rows + row * ROW
    start = (chunk - tl.load(entry + 6)) * CHUNK
    count = tl.minimum(tl.load(entry + 5) - start, CHUNK).to(tl.int32)
    master = tl.load(entry + 11)
    count = tl.where((master != 0) == (KIND.master is not None), count, 0)
    if not KIND.averaged:
        count = tl.where(tl.load(grads + row) != 0, count, 0)

    param = _advanced(tl.load(entry), start, KIND.param)
    grad = _advanced(tl.load(grads + row), start, KIND.grad)
    average = _advanced(tl.load(entry + 12), start, COMPUTE)
    address_bits = param | grad | average
    state = ()
    scale = ()
    for k in tl.static_range(len(KIND.states)):
        state += (_advanced(tl.load(entry + 1 + k), start, KIND.states[k]),)
        scale += (_advanced(tl.load(entry + 8 + k), start // CODES, tl.float32),)
        address_bits |= state[k]
    if KIND.master is not None:
        master = _advanced(master, start, KIND.master)
        address_bits |= master
    whole = tl.multiple_of(tl.where(address_bits % 16 == 0, count // CODES * CODES, 0), CODES)
    return row, start, count, whole, (param, grad, state, scale, master, average)


@triton.jit
def pointers_to(addresses, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    param, grad, state, scale, master, _ = addresses
    states = ()
    scales = ()
    for k in tl.static_range(len(KIND.states)):
        states += (pointer_to(state[k], KIND.states[k], ALIGNED),)
        scales += (scale[k].to(tl.pointer_type(tl.float32)),)
    if KIND.master is not None:
        master = pointer_to(master, KIND.master, ALIGNED)
    return pointer_to(param, KIND.param, ALIGNED), pointer_to(grad, KIND.grad, ALIGNED), states, scales, master


@triton.jit
def place(begin, last, moves, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """(elements, which are there, which of them move), (their scales, which move)"""
    at = begin + tl.arange(0, BLOCK)
    there = at < last
    mask = there
    if KIND.averaged:
        mask = there & moves
    blocks = ()
    if KIND.coded:
        block = begin // CODES + tl.arange(0, BLOCK // CODES)
        block_mask = block * CODES < last
        if KIND.averaged:
            block_mask = block_mask & moves
        blocks = (block, block_mask)
    return (at, there, mask), blocks


@triton.jit
def read(pointers, elements, blocks, factor, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """(the parameter as stored, the weight, the gradient, the states)"""
    param, grad, state, scale, master = pointers
    at, there, mask = elements
    stored = tl.load(param + at, there)
    g = tl.load(grad + at, mask, other=0.0, eviction_policy="evict_first").to(factor.dtype) * factor
    weight = stored.to(factor.dtype)
    if KIND.master is not None:
        weight = _join(stored, tl.load(master + at, there, eviction_policy="evict_first"))
    states = ()
    for k in tl.static_range(len(KIND.states)):
        s = tl.load(state[k] + at, mask, other=0, eviction_policy="evict_first")
        if KIND.coded:
            scales = tl.load(scale[k] + blocks[0], blocks[1], other=0.0)
            states += (_decode(s, scales, KIND.states[k], BLOCK),)
        else:
            states += (s.to(factor.dtype),)
    return stored, weight, g, states


# --- the update ---


@triton.jit
def _walk(
    addresses,
    first,  # elements
    last,
    part,
    split,
    scalars,
    factor,
    share,  # of the new weights in their averages: lerp's side and weight
    noise,
    UPDATE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update elements [first, last), this program's part of them: every `split`-th block."""
    moves, averages = addresses[1] != 0, addresses[5] != 0
    pointers = pointers_to(addresses, KIND, ALIGNED)
    param, _, state, scale, master = pointers
    average = pointer_to(addresses[5], factor.dtype, ALIGNED)
    for begin in range(first + part * BLOCK, last, split * BLOCK):
        elements, blocks = place(begin, last, moves, KIND, BLOCK)
        at, there, mask = elements
        stored, old, g, states = read(pointers, elements, blocks, factor, KIND, BLOCK)

        p, states = UPDATE(old, g, states, scalars)

        for k in tl.static_range(len(KIND.states)):
            if KIND.coded:
                s = states[k]
                if not ALIGNED:  # else whole blocks are masked, or nothing of them
                    s = tl.where(mask, s, 0.0)
                s, scales = _encode(s, noise, begin, 1 + k, KIND.states[k], KIND.stochastic)
                tl.store(scale[k] + blocks[0], scales, blocks[1])
            else:
                s = _narrow(states[k], noise, begin, 1 + k, KIND.states[k], KIND.stochastic)
            tl.store(state[k] + at, s, mask, eviction_policy="evict_first")
        if KIND.averaged:
            p = tl.where(moves, p, old)
        if KIND.master is not None:
            stored, rest = _split(p, KIND.param)
            tl.store(master + at, rest, mask, eviction_policy="evict_first")
        else:
            stored = _narrow(p, noise, begin, 0, KIND.param, KIND.stochastic)
            p = stored.to(factor.dtype)
        tl.store(param + at, stored, mask)
        if KIND.averaged:
            a = tl.load(average + at, there & averages, eviction_policy="evict_first")
            a = lerp(a, p, share[0], share[1])
            tl.store(average + at, a, there & averages, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_chunks", "split", "found_inf"])
def update(
    rows,
    grads,
    chunks,
    scratch,
    told,  # (2,) int64: the new weights' share in their averages (float64 bits), the seed
    n_chunks,
    split,  # programs that share a chunk
    found_inf,
    UPDATE: tl.constexpr,
    SCALARS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Persistent programs walk the chunks of rows that have a master weight, or of those that have none."""
    COMPUTE: tl.constexpr = scratch.dtype.element_ty
    side, weight = lerp_scalars(tl.load(told).to(tl.float64, bitcast=True))
    share = side.to(COMPUTE), weight.to(COMPUTE)
    seed = tl.load(told + 1)
    items = tl.where(tl.load(found_inf) == 0, n_chunks * split, 0)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        part = item % split
        row, start, count, whole, addresses = locate(rows, grads, chunks, item // split, COMPUTE, KIND)
        scalars, factor = derived(scratch, row, SCALARS)
        entry = rows + row * ROW
        counter = tl.load(entry + 4)
        step = tl.load(counter.to(tl.pointer_type(tl.float32)), counter != 0, other=0.0)
        noise = (seed, step.to(tl.int64).to(tl.uint32), tl.load(entry + 13).to(tl.uint32), start // 8)
        # whole blocks, then what is left, element by element
        # fmt: off
        _walk(addresses, 0, whole, part, split, scalars, factor, share, noise,
              UPDATE, KIND, BLOCK, True)
        # blocks of another size: of the same, the compiler would give both walks one layout and shuffle between two
        _walk(addresses, whole, count, part, split, scalars, factor, share, noise,
              UPDATE, KIND, min(BLOCK // 2, CODES), False)
        # fmt: on
