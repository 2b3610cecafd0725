"""How far a student's softmax q is from a teacher's p, row by row: the value and its gradient, in torch operations.

With m = beta p + (1 - beta) q,

    KL(p || q)                                    by log q:  q - p
    KL(q || p)                                               q (log q - log p - KL(q || p))
    JSD = beta KL(p || m) + (1 - beta) KL(q || m)            (1 - beta) q (log q - log m - KL(q || m))

A class whose probability rounds to 0 adds nothing to what is weighted by that probability, whatever its logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("forward_kl", "reverse_kl", "jsd")


def log_softmax(scores: Tensor, temperature: float) -> Tensor:  # (n, V)
    """Of scores / temperature, from the maximum: divided first, large ones would lose what tells them apart."""
    log = (scores - scores.amax(1, keepdim=True)).div_(temperature)
    return log.sub_(log.exp().sum(1, keepdim=True).log_())


def divergence(
    log_p: Tensor, log_q: Tensor, name: str, beta: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:  # (n, V) each -> (n,), (n, V)
    """The rows' divergences, and their gradient by the student's scores / temperature; over log_p and log_q."""
    p = log_p.exp()
    if name == "forward_kl":
        loss = _expected(p, log_p.sub_(log_q))
        return loss, log_q.exp_().sub_(p) if with_grad else None
    q = log_q.exp()
    d = log_p.sub_(log_q)
    if name == "reverse_kl":
        weight, teacher_part, log_ratio = 1.0, 0.0, d.neg_()
    else:
        # log m = max(log p, log q) + log(1 + c expm1(-|d|)) with c the smaller one's share: log p itself where p is q
        share = torch.full_like(d, beta).masked_fill_(d > 0, 1 - beta)
        log_m = torch.abs(d, out=log_q).neg_().expm1_().mul_(share).log1p_()  # less that maximum
        log_m.clamp_(min=min(math.log(beta), math.log1p(-beta)))  # where 1 - c rounds to 0
        weight, teacher_part = 1 - beta, beta * _expected(p, d.clamp(max=0).sub_(log_m))
        log_ratio = d.clamp_(min=0).add_(log_m).neg_()
    log_ratio.masked_fill_(q == 0, 0)
    student_part = _expected(q, log_ratio)
    loss = teacher_part + weight * student_part
    return loss, log_ratio.sub_(student_part[:, None]).mul_(q).mul_(weight) if with_grad else None


def differentiable(p_scores: Tensor, q_scores: Tensor, temperature: float, name: str, beta: float) -> Tensor:  # (n,)
    """The same of the two sides' scores (n, V), any number of times differentiable."""
    log_p, log_q = ((s / temperature).log_softmax(1) for s in (p_scores, q_scores))
    if name == "forward_kl":
        return _expected(log_p.exp(), log_p - log_q)
    if name == "reverse_kl":
        return _expected(log_q.exp(), log_q - log_p)
    m = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = m.clamp(min=torch.finfo(m.dtype).tiny).log()  # 0 has no slope
    return beta * _expected(log_p.exp(), log_p - log_m) + (1 - beta) * _expected(log_q.exp(), log_q - log_m)


def _expected(probability: Tensor, value: Tensor) -> Tensor:
    """(n,): the row sums of probability * value, in which 0 times anything is 0."""
    return (probability * value.masked_fill(probability == 0, 0)).sum(1)
