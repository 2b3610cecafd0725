"""csrc/softmax.h once more, for Triton: the arithmetic of logits, a tile of a row at a time.

With s the logits, scaled and capped, and y the targets, smoothed and weighted,

    y[c] = hot * [c == label] + spread * w[c]            (class indices)
    y[c] = w[c] * (keep * t[c] + spread)                 (probabilities)
    loss = mass * lse - sum_c y[c] s[c] + z_loss * lse^2,   mass = sum_c y[c]
    d loss / ds_c = (mass + 2 z_loss lse) * softmax(s)[c] - y[c]

Logits count from the row's maximum throughout: mass * lse and sum y s alone may each be 1e4 times the loss.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF, LOWEST = tl.constexpr(float("inf")), tl.constexpr(float("-inf"))


@triton.jit
def _tanh(x):
    near = x * x
    series = x + x * near * (  # within an ulp below 0.625 (Cephes); beyond, the exponential is
        (((-5.70498872745e-3 * near + 2.06390887954e-2) * near - 5.37397155531e-2) * near + 1.33314422036e-1) * near
        - 3.33332819422e-1
    )
    power = tl.exp(-2 * tl.abs(x))
    far = (1 - power) / (1 + power)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0, -far, far))


@triton.jit
def scaled(x, logit_scale, softcap):
    """s and ds/dx of raw logits."""
    if softcap is None:
        return x * logit_scale, logit_scale
    else:
        t = _tanh(x * (logit_scale / softcap))
        return softcap * t, logit_scale * (1 - t * t)


@triton.jit
def dense_targets(probabilities, weight, at, cols, mask, keep, spread):
    """y[c] of a tile, but for the one-hot part of a class index, and t[c]; 0 outside the mask.

    `at` are the tile's places from `probabilities` on, `cols` its columns in the row.
    """
    y = tl.where(mask, spread, 0.0)
    t = y
    if probabilities is not None:
        t = tl.load(probabilities + at, mask, other=0.0).to(tl.float32)
        y += keep * t
    if weight is not None:
        y *= tl.load(weight + cols, mask, other=0.0)
    return y, t


@triton.jit
def nothing():
    """A row's sums before its first tile: see absorb."""
    lowest, zero = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    nowhere = tl.full((), 2**31 - 1, tl.int32)
    return lowest, nowhere, zero, zero, zero, zero, nowhere, lowest


@triton.jit
def _first_of_largest(index, largest, values, cols, mask):
    top = tl.max(tl.where(mask, values, LOWEST), 0)
    first = tl.min(tl.where(mask & (values == top), cols, 2**31 - 1), 0)
    index = tl.where(top > largest, first, tl.where(top == largest, tl.minimum(index, first), index))
    return index, tl.maximum(largest, top)


@triton.jit
def absorb(
    sums,
    s,
    y,
    t,
    cols,
    mask,
    DENSE: tl.constexpr,
    LIKELIEST: tl.constexpr,
    STATS: tl.constexpr,
):
    """The online softmax: a row's sums after one more tile.

    They are the largest s and its first column; of all columns so far, with e = exp(s - largest), the sums of e, y,
    y (s - largest) and e (s - largest); the first column of the largest t, and that.
    """
    largest, index, total, mass, dot, moment, likeliest, likely = sums
    s = tl.where(mask, s, LOWEST)
    ordered = tl.where(s == s, s, INF)  # NaN counts as infinite: then exp(NaN - largest) makes the row NaN
    if STATS:
        index, new = _first_of_largest(index, largest, ordered, cols, mask)
    else:
        new = tl.maximum(largest, tl.max(ordered, 0))
    if LIKELIEST:
        likeliest, likely = _first_of_largest(likeliest, likely, t, cols, mask)
    # nothing but -inf so far: any finite number will do
    origin, shift = tl.where(largest == LOWEST, 0.0, largest), tl.where(new == LOWEST, 0.0, new)
    rise = shift - origin
    kept = tl.exp(largest - shift)
    from_max = s - shift
    e = tl.exp(from_max)
    if DENSE:
        dot += tl.sum(tl.where(mask, y * from_max, 0.0), 0) - mass * rise
        mass += tl.sum(y, 0)
    if STATS:
        moment = (moment - total * rise) * kept + tl.sum(tl.where(e > 0, e * from_max, 0.0), 0)
    total = total * kept + tl.sum(e, 0)
    return new, index, total, mass, dot, moment, likeliest, likely
