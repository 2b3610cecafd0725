"""Cross entropy of logits whose classes lie on several ranks: one all-gather forward, none backward."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fusedopt import backends
from fusedopt.distributed import vocab, vocab_rows
from fusedopt.distributed.vocab import VocabShards
from fusedopt.nn import rows as torch_rows
from fusedopt.nn.composed import compute_dtype
from fusedopt.nn.cross_entropy import Rule, Stats, dense_rows, grad_at_forward, overlaps
from fusedopt.nn.linear_passes import target_factor


@torch.compiler.disable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    rule: Rule,
    reduction: str,
    inplace: bool,
    return_stats: bool,
    tp_group: Any,
    vocab_range: tuple[int, int] | None,
    backend: str,
) -> Tensor | tuple[Tensor, Stats]:
    """`fusedopt.nn.functional.cross_entropy` of a rank's shard: plain tensors with a group, or DTensors."""
    backends.check(backend)
    class_dim = 0 if input.dim() < 2 else 1
    check_options(rule, reduction)
    placed = None
    if isinstance(input, DTensor):
        if tp_group is not None or vocab_range is not None:
            raise ValueError("tp_group and vocab_range are for plain tensors; a DTensor knows its shards")
        placed = Placed.of(input, class_dim)
        input, target, rule = input.to_local(), placed.local_target(target, input), placed.local_rule(rule)
    index_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    check_target(target, index_shape, input.device)
    classes, count = input.shape[class_dim], math.prod(index_shape)
    digest = vocab.options_digest(rule[1:], rule.weight is None, reduction, return_stats, input.dtype, count)
    shards = (
        vocab.from_group(tp_group, vocab_range, classes, count, input.device, digest)
        if placed is None
        else placed.shards
    )
    logits = input.movedim(class_dim, -1).reshape(count, classes)
    rule = rule._replace(weight=checked_weight(rule.weight, shards, logits))
    loss, *stats = _VocabCrossEntropy.apply(
        logits, target.reshape(-1), rule, reduction, inplace, return_stats, shards, backend, digest
    )
    results = [loss.view(index_shape) if reduction == "none" else loss, *(s.view(index_shape) for s in stats)]
    if placed is not None:
        results = [placed.wrap(r, per_row=i > 0 or reduction == "none") for i, r in enumerate(results)]
    return (results[0], Stats(*results[1:])) if return_stats else results[0]


class Placed:
    """How a DTensor of logits lies, and what follows for targets and losses."""

    def __init__(self, mesh: Any, shards: VocabShards, row_placements: list[Any], index_shape: torch.Size) -> None:
        self.mesh, self.shards, self.row_placements, self.index_shape = mesh, shards, row_placements, index_shape

    @classmethod
    def of(cls, logits: DTensor, class_dim: int) -> Placed:
        placements, mesh = logits.placements, logits.device_mesh
        classes = logits.shape[class_dim]
        shards = vocab.from_mesh(mesh, placements, class_dim, classes, rows=0 if class_dim else None)
        index_shape = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
        return cls(mesh, shards, [p if p.is_shard(0) and class_dim else Replicate() for p in placements], index_shape)

    def local_target(self, target: Tensor, logits: Tensor) -> Tensor:
        """The targets of this rank's rows."""
        wanted = tuple(self.row_placements)
        if target.is_floating_point() or target.shape != self.index_shape:
            check_target(target, self.index_shape, target.device)
        if not isinstance(target, DTensor):
            if any(p.is_shard() for p in wanted):
                raise ValueError(
                    f"the logits' rows are sharded, {logits.placements}, and target is a plain tensor: whether it is "
                    f"whole is not known; give a DTensor with placements {wanted}, or replicated"
                )
            return target
        fits = all(p == w or p.is_replicate() for p, w in zip(target.placements, wanted, strict=False))
        if target.device_mesh != self.mesh or not fits:
            raise ValueError(
                f"target has placements {target.placements}; expected {wanted}, or replicated, on one mesh"
            )
        return target.redistribute(self.mesh, wanted).to_local()

    def local_rule(self, rule: Rule) -> Rule:
        return rule._replace(weight=replicated(rule.weight, "weight"))

    def wrap(self, result: Tensor, per_row: bool) -> DTensor:
        if not per_row:
            return DTensor.from_local(result, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        strides = torch.empty(self.index_shape, device="meta").stride()
        return DTensor.from_local(
            result, self.mesh, self.row_placements, run_check=False, shape=self.index_shape, stride=strides
        )


def replicated(tensor: Tensor | None, name: str) -> Tensor | None:
    """The whole of a tensor that every rank must hold."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(p.is_replicate() for p in tensor.placements):
        raise ValueError(
            f"{name} has placements {tensor.placements}; every rank needs all of it: {name}.redistribute(placements="
            f"[Replicate()] * {len(tensor.placements)})"
        )
    return tensor.to_local()


# --- what is taken ---


def check_options(rule: Rule, reduction: str) -> None:
    """In torch's words.

    Raises:
        ValueError, RuntimeError: as torch's cross_entropy.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0.0 <= rule.label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {rule.label_smoothing}")


def check_target(target: Tensor, index_shape: torch.Size, device: torch.device) -> None:
    if target.is_floating_point():
        raise ValueError(
            "target holds floating-point numbers: over sharded classes the targets are class indices; class "
            "probabilities need whole logits"
        )
    if target.shape != index_shape or target.dtype != torch.int64 or target.device != device:
        raise ValueError(
            f"expected target of shape {tuple(index_shape)}, int64, on {device}, got {tuple(target.shape)}, "
            f"{target.dtype}, on {target.device}: every class index of the logits' rows"
        )


def checked_weight(weight: Tensor | None, shards: VocabShards, logits: Tensor) -> Tensor | None:
    """The weight of every class, contiguous and in the compute dtype."""
    if weight is None:
        return None
    if weight.shape != (shards.classes,) or weight.device != logits.device:
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)} on {weight.device}; expected the weights of all classes, "
            f"({shards.classes},), on {logits.device}, on every rank"
        )
    return weight.detach().to(compute_dtype(logits.dtype)).contiguous()


def refuse_create_graph(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"create_graph=True: {name} over sharded classes has no second derivative; it needs whole logits"
        )


def ready(tensor: Tensor) -> Tensor:
    """`tensor`, whose collective has ended: of redistribute(async_op=True) the memory comes with it."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def kernels_for(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    name = backends.for_losses(backend, device, dtype)
    return backends.module(name) if name else torch_rows


# --- the loss ---


def reduced(loss: Tensor, factor: float | Tensor, reduction: str, shards: VocabShards) -> tuple[Tensor, float | Tensor]:
    """The loss of the rows (N,) and what multiplies their gradients, over all that share the rows out."""
    if reduction == "none":
        return loss, 1.0
    total = loss.sum(dtype=torch.float64)
    if shards.row_groups:
        count = vocab_rows.per_row(factor, total).reciprocal()
        total, count = vocab.sum_over_rows(torch.stack([total, count]), shards)
        factor = 1.0 if reduction == "sum" else count.reciprocal()
    if isinstance(factor, Tensor):
        factor = factor.to(loss.dtype)
    return (total * factor).to(loss.dtype), factor


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, V_local)
        target: Tensor,  # (N,) int64
        rule: Rule,  # its weight of all classes
        reduction: str,
        inplace: bool,
        return_stats: bool,
        shards: VocabShards,
        backend: str,
        digest: int,
    ) -> tuple[Tensor, ...]:
        x, target = dense_rows(ready(logits)), ready(target)
        kernels = kernels_for(backend, x.device, x.dtype)
        factor = target_factor(target, rule, shards.classes, reduction == "mean", x.dtype, backend)
        targets = vocab_rows.targets_of(target, rule, shards)
        columns = vocab_rows.new_columns(rule, return_stats, x.shape[0], x.dtype, x.device)
        vocab_rows.statistics(x, targets, rule, shards, columns.values, return_stats, kernels)
        gathered = columns.gather(shards, digest)
        rows = vocab_rows.merge(gathered, target, targets, rule, shards, return_stats)
        loss, factor = reduced(rows.loss, factor, reduction, shards)

        ctx.rule, ctx.shards, ctx.kernels, ctx.factor, ctx.grad = (
            rule._replace(weight=None),
            shards,
            kernels,
            factor,
            None,
        )
        ctx.inplace = inplace and not overlaps(x)
        ctx.at_forward = ctx.needs_input_grad[0] and grad_at_forward(x, reduction)
        if ctx.at_forward:
            ctx.grad = _gradient(ctx, x, targets, rule, rows.lse, rows.from_target, 1.0)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, target, rule.weight, rows.lse, rows.from_target)
        if ctx.at_forward and ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # whoever saved the logits learns that they are gone
        if rows.stats is None:
            return (loss,)
        ctx.mark_non_differentiable(*rows.stats)
        return (loss, *rows.stats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        refuse_create_graph("cross_entropy")
        if not ctx.at_forward:
            logits, target, weight, lse, from_target = ctx.saved_tensors
            rule = ctx.rule._replace(weight=weight)
            targets = vocab_rows.targets_of(target, rule, ctx.shards)
            return _gradient(ctx, dense_rows(ready(logits)), targets, rule, lse, from_target, upstream), *rest
        if ctx.grad is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the gradient of cross_entropy has been handed on. "
                "Specify retain_graph=True if you need to backward through the graph a second time."
            )
        grad = ctx.grad
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return grad * upstream, *rest
        ctx.grad = None
        fused = ctx.kernels is not torch_rows and grad.is_contiguous()
        return ctx.kernels.scale_(grad, upstream) if fused else grad.mul_(upstream), *rest


def _gradient(
    ctx: Any, x: Tensor, targets: vocab_rows.Targets, rule: Rule, lse: Tensor, from_target: Tensor,
    upstream: float | Tensor,
) -> Tensor:  # fmt: skip
    """Of the logits (N, V_local), over them where that is allowed and nobody may need them again."""
    over = ctx.inplace and ctx.at_forward
    fused = ctx.kernels is not torch_rows
    grad = x if over else ctx.kernels.new_gradient(x) if fused else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    upstream = vocab_rows.per_row(ctx.factor * upstream, lse)
    vocab_rows.gradient(x, targets, rule, ctx.shards, lse, from_target, upstream, grad, ctx.kernels)
    return grad
