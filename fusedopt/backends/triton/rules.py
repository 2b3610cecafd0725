"""The update rules of csrc/rules.h once more, for Triton: the same names, the same order of operations.

A rule is two functions. `derive(hyper, step)` runs once per tensor, in float64: what a tensor's elements need of its
group's hyperparameters and of its step count, from 1. `update(p, g, states, scalars)` runs once per element, in the
compute type: parameter, gradient, a tuple of states and the derived scalars; it returns the new parameter and states.
Both are elementwise, on blocks. Precision, scaling and memory belong to kernels.py, a whole tensor's norms to norms.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Normed(NamedTuple):
    """What a rule has besides whose step depends on norms of a whole tensor."""

    adapts: Any  # adapts(scalars): whether this tensor's step does
    direction: Any  # direction(p, g, states, scalars), once per element, ahead of the update: what it will go along
    adapt: Any  # adapt(scalars, ratio) -> scalars: the norm of the parameter over its direction's, or 1 if either is 0


class Rule(NamedTuple):
    hyper: tuple[str, ...]
    states: tuple[str, ...]
    scalars: int  # how many derive returns
    derive: Any
    update: Any
    normed: Normed | None = None


# --- what the rules share ---


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)  # tl.sqrt is an approximation in float32


@triton.jit
def divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)  # and so is `/`


@triton.jit
def _power(base, exponent):
    # within an ulp of 1 of pow(), which not every target has; log2(0) is -inf, and exp2 of that 0
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def lerp_scalars(weight):
    near = weight < 0.5
    return tl.where(near, -1.0, 1.0), tl.where(near, weight, weight - 1)


# torch.lerp, exact at both ends: it starts from the nearer one.
@triton.jit
def lerp(start, end, side, weight):
    return tl.where(side > 0, end, start) + weight * (end - start)


# Not `g + weight_decay * p` at zero: an infinite parameter must not turn the gradient into NaN.
@triton.jit
def _with_l2(g, p, weight_decay):
    return tl.where(weight_decay != 0, g + weight_decay * p, g)


# --- Adam, AdamW and their AMSGrad ---


@triton.jit
def _adam_scalars(lr, beta1, beta2, eps, decay, l2, step):
    side, weight = lerp_scalars(1 - beta1)
    step_size = lr / (1 - _power(beta1, step))
    inv_sqrt_correction2 = 1 / tl.sqrt(1 - _power(beta2, step))
    return side, weight, decay, l2, beta2, 1 - beta2, step_size, inv_sqrt_correction2, eps


@triton.jit
def adam_scalars(hyper, step):
    lr, beta1, beta2, eps, weight_decay = hyper
    return _adam_scalars(lr, beta1, beta2, eps, 1.0, weight_decay, step)


@triton.jit
def adamw_scalars(hyper, step):
    lr, beta1, beta2, eps, weight_decay = hyper
    return _adam_scalars(lr, beta1, beta2, eps, 1 - lr * weight_decay, 0.0, step)


@triton.jit
def _adam_moments(p, g, m, v, scalars):
    side, weight, decay, l2, beta2, one_minus_beta2, _, _, _ = scalars
    p = p * decay
    g = _with_l2(g, p, l2)
    return p, lerp(m, g, side, weight), v * beta2 + one_minus_beta2 * g * g


@triton.jit
def _adam_move(p, m, v, scalars):
    _, _, _, _, _, _, step_size, inv_sqrt_correction2, eps = scalars
    return p - divide(step_size * m, _sqrt(v) * inv_sqrt_correction2 + eps)


@triton.jit
def adam(p, g, states, scalars):
    m, v = states
    p, m, v = _adam_moments(p, g, m, v, scalars)
    return _adam_move(p, m, v, scalars), (m, v)


@triton.jit
def adam_amsgrad(p, g, states, scalars):
    m, v, v_max = states
    p, m, v = _adam_moments(p, g, m, v, scalars)
    v_max = tl.where((v_max < v) | (v != v), v, v_max)  # torch.maximum: NaN wins
    return _adam_move(p, m, v_max, scalars), (m, v, v_max)


# --- RMSprop ---


@triton.jit
def rmsprop_scalars(hyper, step):
    lr, alpha, eps, weight_decay, momentum = hyper
    side, weight = lerp_scalars(1 - alpha)
    return side, weight, lr, alpha, 1 - alpha, eps, weight_decay, momentum


@triton.jit
def _rmsprop_average(p, g, sq, scalars):
    _, _, _, alpha, one_minus_alpha, _, l2, _ = scalars
    g = _with_l2(g, p, l2)
    return g, sq * alpha + one_minus_alpha * g * g


# The variance of a constant gradient is zero, and rounds below it: clamped, where stock's square root gives NaN.
@triton.jit
def _rmsprop_center(g, sq, g_avg, scalars):
    side, weight, _, _, _, _, _, _ = scalars
    g_avg = lerp(g_avg, g, side, weight)
    variance = sq - g_avg * g_avg
    return g_avg, tl.where(variance < 0, 0.0, variance)


@triton.jit
def _rmsprop_move(p, g, variance, scalars):
    _, _, lr, _, _, eps, _, _ = scalars
    return p - divide(lr * g, _sqrt(variance) + eps)


@triton.jit
def _rmsprop_move_with_momentum(p, g, variance, buffer, scalars):
    _, _, lr, _, _, eps, _, momentum = scalars
    buffer = momentum * buffer + divide(g, _sqrt(variance) + eps)
    return p - lr * buffer, buffer


@triton.jit
def rmsprop(p, g, states, scalars):
    (sq,) = states
    g, sq = _rmsprop_average(p, g, sq, scalars)
    return _rmsprop_move(p, g, sq, scalars), (sq,)


@triton.jit
def rmsprop_momentum(p, g, states, scalars):
    sq, buffer = states
    g, sq = _rmsprop_average(p, g, sq, scalars)
    p, buffer = _rmsprop_move_with_momentum(p, g, sq, buffer, scalars)
    return p, (sq, buffer)


@triton.jit
def rmsprop_centered(p, g, states, scalars):
    sq, g_avg = states
    g, sq = _rmsprop_average(p, g, sq, scalars)
    g_avg, variance = _rmsprop_center(g, sq, g_avg, scalars)
    return _rmsprop_move(p, g, variance, scalars), (sq, g_avg)


@triton.jit
def rmsprop_centered_momentum(p, g, states, scalars):
    sq, g_avg, buffer = states
    g, sq = _rmsprop_average(p, g, sq, scalars)
    g_avg, variance = _rmsprop_center(g, sq, g_avg, scalars)
    p, buffer = _rmsprop_move_with_momentum(p, g, variance, buffer, scalars)
    return p, (sq, g_avg, buffer)


# --- Adagrad ---


@triton.jit
def adagrad_scalars(hyper, step):
    lr, lr_decay, eps, weight_decay = hyper
    return lr / (1 + (step - 1) * lr_decay), eps, weight_decay


@triton.jit
def adagrad(p, g, states, scalars):
    (total,) = states
    step_size, eps, l2 = scalars
    g = _with_l2(g, p, l2)
    total = total + g * g
    return p - divide(step_size * g, _sqrt(total) + eps), (total,)


# --- SGD: the first step of a tensor fills the buffer, undampened ---


@triton.jit
def sgd_scalars(hyper, step):
    lr, weight_decay, momentum, dampening, nesterov = hyper
    keep = tl.where(step == 1, 0.0, momentum)
    take = tl.where(step == 1, 1.0, 1 - dampening)
    return lr, weight_decay, momentum, keep, take, nesterov


@triton.jit
def sgd(p, g, states, scalars):
    lr, l2, _, _, _, _ = scalars
    return p - lr * _with_l2(g, p, l2), states


@triton.jit
def sgd_momentum(p, g, states, scalars):
    (buffer,) = states
    lr, l2, momentum, keep, take, nesterov = scalars
    g = _with_l2(g, p, l2)
    buffer = keep * buffer + take * g
    return p - lr * tl.where(nesterov > 0, g + momentum * buffer, buffer), (buffer,)


# --- Lion ---


@triton.jit
def lion_scalars(hyper, step):
    lr, beta1, beta2, weight_decay = hyper
    blend_side, blend = lerp_scalars(1 - beta1)
    average_side, average = lerp_scalars(1 - beta2)
    return blend_side, blend, average_side, average, lr, 1 - lr * weight_decay


@triton.jit
def lion(p, g, states, scalars):
    (m,) = states
    blend_side, blend, average_side, average, lr, decay = scalars
    direction = lerp(m, g, blend_side, blend)
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))  # 0 and NaN stay
    return p * decay - lr * sign, (lerp(m, g, average_side, average),)


# --- LAMB ---


@triton.jit
def lamb_scalars(hyper, step):
    lr, beta1, beta2, eps, weight_decay, always_adapt = hyper
    side, weight = lerp_scalars(1 - beta1)
    inv_correction1 = 1 / (1 - _power(beta1, step))
    inv_sqrt_correction2 = 1 / tl.sqrt(1 - _power(beta2, step))
    adapted = tl.where((weight_decay != 0) | (always_adapt != 0), 1.0, 0.0)
    return side, weight, lr, beta2, 1 - beta2, inv_correction1, inv_sqrt_correction2, eps, weight_decay, adapted


@triton.jit
def lamb_adapts(scalars):
    _, _, _, _, _, _, _, _, _, adapted = scalars
    return adapted != 0


@triton.jit
def lamb_adapt(scalars, ratio):
    side, weight, lr, beta2, one_minus_beta2, inv_correction1, inv_sqrt_correction2, eps, decay, adapted = scalars
    lr = lr * ratio.to(lr.dtype)
    return side, weight, lr, beta2, one_minus_beta2, inv_correction1, inv_sqrt_correction2, eps, decay, adapted


@triton.jit
def _lamb_move(p, g, states, scalars):
    m, v = states
    side, weight, _, beta2, one_minus_beta2, inv_correction1, inv_sqrt_correction2, eps, decay, _ = scalars
    m = lerp(m, g, side, weight)
    v = v * beta2 + one_minus_beta2 * g * g
    return divide(m * inv_correction1, _sqrt(v) * inv_sqrt_correction2 + eps) + decay * p, (m, v)


@triton.jit
def lamb_direction(p, g, states, scalars):
    direction, _ = _lamb_move(p, g, states, scalars)
    return direction


@triton.jit
def lamb(p, g, states, scalars):
    _, _, lr, _, _, _, _, _, _, _ = scalars
    direction, states = _lamb_move(p, g, states, scalars)
    return p - lr * direction, states


# --- every rule, in the order of csrc/rules.h ---

_ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay")
_RMSPROP = ("lr", "alpha", "eps", "weight_decay", "momentum")
_SGD = ("lr", "weight_decay", "momentum", "dampening", "nesterov")
_LAMB = (*_ADAM, "always_adapt")

RULES: dict[str, Rule] = {
    "adam": Rule(_ADAM, ("exp_avg", "exp_avg_sq"), 9, adam_scalars, adam),
    "adam_amsgrad": Rule(_ADAM, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 9, adam_scalars, adam_amsgrad),
    "adamw": Rule(_ADAM, ("exp_avg", "exp_avg_sq"), 9, adamw_scalars, adam),
    "adamw_amsgrad": Rule(_ADAM, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 9, adamw_scalars, adam_amsgrad),
    "rmsprop": Rule(_RMSPROP, ("square_avg",), 8, rmsprop_scalars, rmsprop),
    "rmsprop_momentum": Rule(_RMSPROP, ("square_avg", "momentum_buffer"), 8, rmsprop_scalars, rmsprop_momentum),
    "rmsprop_centered": Rule(_RMSPROP, ("square_avg", "grad_avg"), 8, rmsprop_scalars, rmsprop_centered),
    "rmsprop_centered_momentum": Rule(
        _RMSPROP, ("square_avg", "grad_avg", "momentum_buffer"), 8, rmsprop_scalars, rmsprop_centered_momentum
    ),
    "adagrad": Rule(("lr", "lr_decay", "eps", "weight_decay"), ("sum",), 3, adagrad_scalars, adagrad),
    "sgd": Rule(_SGD, (), 6, sgd_scalars, sgd),
    "sgd_momentum": Rule(_SGD, ("momentum_buffer",), 6, sgd_scalars, sgd_momentum),
    "lion": Rule(("lr", "beta1", "beta2", "weight_decay"), ("exp_avg",), 6, lion_scalars, lion),
    "lamb": Rule(
        _LAMB, ("exp_avg", "exp_avg_sq"), 10, lamb_scalars, lamb, Normed(lamb_adapts, lamb_direction, lamb_adapt)
    ),
}
