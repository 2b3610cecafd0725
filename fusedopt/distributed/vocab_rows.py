"""Rows of logits of which each rank holds some classes: statistics, their merging, the gradient.

A backend's kernels see a rank's classes as a vocabulary of its own. They give its log-sum-exp; with the log-sum-exp of
all classes they write the gradient. The target of a row may lie elsewhere: the kernels are then told class 0, and the
element that this makes wrong is written over, from its own logit.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.distributed.vocab import Columns, VocabShards
from fusedopt.nn import rows as torch_rows
from fusedopt.nn.composed import compute_dtype
from fusedopt.nn.cross_entropy import Rule, Stats

IGNORED = torch.iinfo(torch.int64).min  # ignore_index may be one of this rank's classes
BLOCK = 16 << 20  # bytes of float32 temporaries


class Targets(NamedTuple):
    """A row's target as this rank has it. (N,) each."""

    label: Tensor  # int64, for kernels: the class here, 0 where it is elsewhere, IGNORED; or what is no class at all
    here: Tensor  # bool
    counts: Tensor  # bool: not ignored
    wrong: Tensor  # bool: no class at all
    weight: Tensor | None  # compute dtype: the class's

    @property
    def column(self) -> Tensor:
        return self.label.where(self.here, 0)


def targets_of(target: Tensor, rule: Rule, shards: VocabShards) -> Targets:
    """`rule.weight` is of all classes."""
    counts = target != rule.ignore_index
    known = (target >= 0) & (target < shards.classes)
    here = counts & (target >= shards.first) & (target < shards.last)
    label = (target - shards.first).where(here, 0).masked_fill(~counts, IGNORED)
    wrong = counts & ~known
    weight = None if rule.weight is None else rule.weight[target.where(known, 0)]
    return Targets(target.where(wrong, label), here, counts, wrong, weight)


def column_count(rule: Rule, with_stats: bool) -> int:
    """lse, lse less the target's logit; with smoothing the sum of lse less each logit; largest, argmax, entropy."""
    return 2 + (rule.label_smoothing > 0) + 3 * with_stats


def _integers(column: Tensor) -> Tensor:
    """The memory of a column as integers: a float32 has no class from 2^24 on."""
    return column.view(torch.int32 if column.dtype == torch.float32 else torch.int64)


def _local_rule(rule: Rule) -> Rule:
    return Rule(None, IGNORED, 0.0, 0.0, rule.softcap, rule.logit_scale)


def statistics(
    logits: Tensor,  # (N, V_local), class stride 1
    targets: Targets,
    rule: Rule,
    shards: VocabShards,
    out: Tensor,  # (column_count, N), zeros; written
    with_stats: bool,
    kernels: ModuleType,
) -> None:
    """What this rank tells of each row, in one pass over its classes."""
    lse, from_target = out[0], out[1]
    if not logits.shape[1] or not logits.shape[0]:
        lse.fill_(-torch.inf)
        return
    smoothed = rule.label_smoothing > 0
    local = _local_rule(rule)
    if smoothed:  # the kernel's loss is then the mean of weight * (lse - s)
        local = local._replace(label_smoothing=1.0)
        if rule.weight is not None:
            local = local._replace(weight=rule.weight[shards.first : shards.last].contiguous())
    loss = torch.empty_like(lse)
    # on devices for the largest logit alone: see _where_nothing
    stats = None
    if with_stats or logits.device.type != "cpu":
        stats = torch_rows.new_stats(lse.shape[0], lse.dtype, lse.device)._replace(lse=lse)
    kernels.cross_entropy_forward(logits, targets.label, local, None, 1.0, loss, lse, stats)
    if smoothed:
        at_label = _at(logits, targets.column[:, None], rule)[:, 0]
        # the kernels multiply this class's logit by 0 once more
        out[2] = (loss * logits.shape[1]).masked_fill(at_label == -torch.inf, torch.inf)
        loss = lse - at_label
    from_target.copy_(loss.where(targets.here, 0))
    nothing = _where_nothing(logits, rule, lse, stats)
    if nothing is not None:
        lse.masked_fill_(nothing, -torch.inf)
        out[1 : 2 + smoothed].masked_fill_(nothing, 0)
    if with_stats:
        largest, argmax, entropy = out[-3], out[-2], out[-1]
        # the cap keeps the order, but not the difference of what it caps
        largest.copy_(_at(logits, stats.argmax[:, None], rule._replace(softcap=None))[:, 0])
        _integers(argmax).copy_(stats.argmax)
        entropy.copy_(stats.entropy)
        if nothing is not None:
            entropy.masked_fill_(nothing, 0)


def _at(logits: Tensor, columns: Tensor, rule: Rule) -> Tensor:  # (N, k) -> (N, k) compute dtype
    return torch_rows.scores(logits.gather(1, columns.clamp(0, logits.shape[1] - 1)), rule)


def _where_nothing(logits: Tensor, rule: Rule, lse: Tensor, stats: Stats | None) -> Tensor | None:
    """(N,) bool: every logit here is -inf, as in a padded vocabulary; the kernels' lse is NaN there."""
    if stats is not None:
        return _at(logits, stats.argmax[:, None], rule)[:, 0] == -torch.inf
    suspects = lse.isnan().nonzero()[:, 0]
    if not suspects.numel():
        return None
    found = torch_rows.scores(logits.index_select(0, suspects), rule).amax(1) == -torch.inf
    return torch.zeros_like(lse, dtype=torch.bool).index_copy_(0, suspects, found)


class Merged(NamedTuple):
    """Of the rows, over all classes, (N,) each in the compute dtype."""

    loss: Tensor
    lse: Tensor
    from_target: Tensor  # lse less the target's logit
    stats: Stats | None


def merge(
    gathered: Tensor, target: Tensor, targets: Targets, rule: Rule, shards: VocabShards, with_stats: bool
) -> Merged:
    """What the ranks told, (world, column_count, N), put together; the same on every rank."""
    dtype = gathered.dtype
    first, last = shards.bounds(target.device)
    told = gathered[:, : 2 + (rule.label_smoothing > 0)].double()
    lse = told[:, 0].logsumexp(0)
    above = lse - told[:, 0]  # (world, N)
    owner = targets.counts & (target >= first) & (target < last)
    from_target = (above + told[:, 1]).where(owner, 0).sum(0)
    hot, _ = _masses(targets, rule, shards)
    loss = hot * from_target
    if rule.label_smoothing:
        held = (last - first).double()
        if rule.weight is not None:
            until = torch.cat([held.new_zeros(1), rule.weight.double().cumsum(0)])
            held = until[last] - until[first]
        spread = rule.label_smoothing / shards.classes
        loss = loss + spread * (held * above + told[:, 2]).where(last > first, 0).sum(0)
    if rule.z_loss:
        loss = loss + rule.z_loss * lse.square()
    loss = loss.masked_fill(targets.wrong, torch.nan).masked_fill(~targets.counts, 0)
    stats = _merged_stats(gathered, target, targets, above, lse, shards) if with_stats else None
    return Merged(loss.to(dtype), lse.to(dtype), from_target.to(dtype), stats)


def _merged_stats(
    gathered: Tensor, target: Tensor, targets: Targets, above: Tensor, lse: Tensor, shards: VocabShards
) -> Stats:
    dtype = gathered.dtype
    # in the order of the classes: of equal logits the first counts
    order = shards.order(gathered.device)
    best = order[gathered[order, -3].argmax(0)][None]
    first, _ = shards.bounds(gathered.device)
    argmax = (_integers(gathered[:, -2].contiguous()).long() + first).gather(0, best)[0]
    share = (-above).exp()
    entropy = (share * (gathered[:, -1].double() + above)).where(share != 0, 0).sum(0)
    lse = lse.where(lse.isfinite(), torch.nan)
    return Stats(lse.to(dtype), argmax, (argmax == target) & targets.counts, (entropy + 0 * lse).to(dtype))


def per_row(value: Tensor | float, like: Tensor) -> Tensor:  # (N,)
    """A number, or a () or (N,) tensor, for every row; made on the device, which nobody waits for."""
    return value.to(like.dtype).expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)


def _masses(targets: Targets, rule: Rule, shards: VocabShards) -> tuple[Tensor | float, Tensor | float]:
    """y at the target beyond its dense part, and the sum of a row's y; see csrc/softmax.h."""
    keep, spread = 1.0 - rule.label_smoothing, rule.label_smoothing / shards.classes
    if rule.weight is None:
        return keep, 1.0
    hot = keep * targets.weight
    return hot, hot + spread * rule.weight.sum() if spread else hot


def gradient(
    logits: Tensor,  # (N, V_local), class stride 1
    targets: Targets,
    rule: Rule,
    shards: VocabShards,
    lse: Tensor,  # (N,), of all classes
    from_target: Tensor,  # (N,)
    upstream: Tensor,  # (N,) compute dtype: what multiplies the row's gradient
    grad: Tensor,  # (N, V_local), written; may be the logits
    kernels: ModuleType,
) -> None:
    """upstream * ((mass + 2 z_loss lse) softmax(s) - y) ds/dx of this rank's classes, rounded once."""
    if not logits.numel():
        return
    upstream = upstream.masked_fill(targets.wrong, torch.nan)
    hot, mass = _masses(targets, rule, shards)
    per_lse = mass + 2 * rule.z_loss * lse  # what multiplies softmax
    spread = rule.label_smoothing / shards.classes
    dense: Tensor | float = spread
    if spread and rule.weight is not None:
        dense = rule.weight[shards.first : shards.last] * spread  # (V_local,)

    # the elements that the kernels, told class 0 where they are not told the target, may have wrong
    columns = torch.stack([torch.zeros_like(targets.column), targets.column], 1)  # (N, 2)
    values = _elements(logits, columns, targets, rule, hot, per_lse, dense, lse, from_target) * upstream[:, None]
    values = values.masked_fill(~targets.counts[:, None], 0).to(grad.dtype)
    local = _local_rule(rule)
    if not spread:
        scale = (upstream * per_lse).to(lse.dtype).contiguous()
        kernels.cross_entropy_backward(logits, targets.label, local, grad, 1.0, scale, lse)
    elif rule.weight is None:
        label = targets.label.masked_fill(targets.here, 0)
        local = local._replace(
            label_smoothing=rule.label_smoothing, z_loss=rule.z_loss, weight=_stand_in_weight(logits, rule, shards)
        )
        kernels.cross_entropy_backward(logits, label, local, grad, 1.0, upstream.contiguous(), lse)
    else:
        _write_dense(logits, targets, rule, per_lse * upstream, dense, upstream, lse, grad)
    grad.scatter_(1, columns, values)


def _elements(
    logits: Tensor, columns: Tensor, targets: Targets, rule: Rule, hot: Tensor | float, per_lse: Tensor,
    dense: Tensor | float, lse: Tensor, from_target: Tensor,
) -> Tensor:  # (N, 2) compute dtype  # fmt: skip
    """The gradient of the logits at `columns`, from themselves."""
    s = _at(logits, columns, rule)
    is_target = targets.here[:, None] & (columns == targets.column[:, None])
    log_p = (-from_target[:, None]).where(is_target, s - lse[:, None])
    hot = per_row(hot, lse)[:, None].where(is_target, 0)
    y = dense[columns] if isinstance(dense, Tensor) else dense
    # p - 1 of a target that is nearly certain keeps its digits
    g = (per_lse[:, None] - hot) * log_p.exp() + hot * log_p.expm1() - y
    g = g * rule.logit_scale
    return g if rule.softcap is None else g * (1 - (s / rule.softcap).square())


def _stand_in_weight(logits: Tensor, rule: Rule, shards: VocabShards) -> Tensor:  # (V_local,)
    """Class weights with which a kernel, told class 0, has y = spread at every other class, and 1 for the sum of y.

    So smoothing over all classes comes from a kernel that smooths over those it sees.
    """
    here = logits.shape[1]
    share = here / shards.classes
    weight = torch.full((here,), share, dtype=compute_dtype(logits.dtype), device=logits.device)
    rest = rule.label_smoothing * share * (here - 1) / here
    weight[0] = (1 - rest) / (1 - rule.label_smoothing + rule.label_smoothing / here)
    return weight


def _write_dense(
    logits: Tensor, targets: Targets, rule: Rule, per_lse: Tensor, dense: Tensor, upstream: Tensor, lse: Tensor,
    grad: Tensor,
) -> None:  # fmt: skip
    """The gradient but for the targets' part in torch's operations, some rows at a time: smoothing by class weights.

    There the sum of y differs from row to row, and y from class to class, which no kernel can be told.
    """
    step = max(1, BLOCK // (logits.shape[1] * 4))
    for begin in range(0, logits.shape[0], step):
        rows = slice(begin, begin + step)
        s = torch_rows.scores(logits[rows], rule)
        g = (s - lse[rows, None]).exp_().mul_(per_lse[rows, None]).sub_(upstream[rows, None] * dense)
        g.mul_(rule.logit_scale)
        if rule.softcap is not None:
            g.mul_((s / rule.softcap).square_().neg_().add_(1))
        grad[rows] = g.masked_fill_(~targets.counts[rows, None], 0)


def new_columns(rule: Rule, with_stats: bool, rows: int, dtype: torch.dtype, device: torch.device) -> Columns:
    return Columns(column_count(rule, with_stats), rows, compute_dtype(dtype), device)
