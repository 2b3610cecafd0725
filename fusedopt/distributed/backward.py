"""Steps during backward: each parameter is updated as soon as its gradient is there, and the gradient let go."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from fusedopt.distributed import parts


def step_in_backward(model: nn.Module, optimizer: Any) -> StepInBackward:
    """Let `loss.backward()` update each parameter as its gradient becomes ready, and free that at once.

    The training loop stays as it is: `optimizer.step()` still ends a step, and raises where backward went another way
    than promised. In one process and under FSDP2 there is never more than a gradient or two; under
    DistributedDataParallel the update follows each bucket's all-reduce, and its buckets stay. The numbers are those of
    an ordinary step. Learning-rate schedulers, `ema_weights()` and checkpoints work as before.

    Args:
        model: whose `backward` it is: a module, one with `fully_shard` applied, or DistributedDataParallel of a module
            that has not been given a communication hook.
        optimizer: of fusedopt, over parameters of `model`.

    Returns:
        a handle; `remove()` goes back to ordinary steps.

    Raises:
        TypeError: the optimizer is not fusedopt's.
        ValueError: what needs all gradients at once or before they are used (max_norm, skip_non_finite), parameters
            that are not the model's, LAMB of tensors that processes share, or FullyShardedDataParallel (FSDP1).
        RuntimeError, in backward: a second gradient of one parameter before `step()`, as gradient accumulation gives.
            In `step()`: GradScaler, whose scale the gradients still had when they were used.
    """
    from fusedopt.optim.engine import FusedStep

    if not isinstance(optimizer, FusedStep):
        raise TypeError(f"step_in_backward needs an optimizer of fusedopt, not {type(optimizer).__name__}")
    return StepInBackward(model, optimizer)


class StepInBackward:
    """What `step_in_backward` has put in place."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._check(model)
        self._singles = _singles(optimizer)
        self._done: set[Tensor] = set()  # stepped since the last step()
        self._turn = threading.Lock()  # DDP's buckets are finished by threads of the process group
        self._hooks = []
        self._ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self._on = True
        if self._ddp is not None:
            self._ddp.register_comm_hook(self, _reduce_and_step)
        else:
            for param in self._singles:
                self._hooks.append(param.register_post_accumulate_grad_hook(self._step_and_free))
        optimizer._in_backward = self

    def remove(self) -> None:
        """Go back to ordinary steps; under DDP the hook stays, and does no more than DDP itself would."""
        for hook in self._hooks:
            hook.remove()
        for single in self._singles.values():
            self.optimizer._new_averages += single.new_averages()
        self._on = False
        self.optimizer._in_backward = None

    def _check(self, model: nn.Module) -> None:
        optimizer = self.optimizer
        if optimizer._in_backward is not None:
            raise ValueError("the optimizer already steps in backward: remove() the earlier handle first")
        if optimizer._clip.on:
            raise ValueError(
                "max_norm and skip_non_finite look at all gradients before any is used, and in backward there is never "
                "more than one: leave them out, or step after backward"
            )
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError("FullyShardedDataParallel keeps its gradients flat until backward ends: use fully_shard")
        theirs = set(model.parameters())
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param not in theirs:
                    raise ValueError(f"a parameter of shape {tuple(param.shape)} of the optimizer is not the model's")
                if optimizer.norms and parts.is_shared(param):
                    raise ValueError(
                        f"{type(optimizer).__name__} sums norms over the processes that share a tensor, which in "
                        "backward might meet in another order: step after backward"
                    )

    @torch.no_grad()
    def step_one(self, param: Tensor) -> None:
        """Update a parameter from its gradient."""
        if self.optimizer._swapped:
            raise RuntimeError("backward() inside `with ema_weights()`: the averages are in the parameters' place")
        with self._turn:
            if param in self._done:
                raise RuntimeError(
                    f"a second gradient of a parameter of shape {tuple(param.shape)} before optimizer.step(), and the "
                    "first one has been used: gradients cannot be accumulated when backward steps. Under DDP use "
                    "no_sync(), under FSDP2 set_requires_gradient_sync(False), or remove() the handle"
                )
            self._singles[param].update()
            self._done.add(param)

    def _step_and_free(self, param: Tensor) -> None:
        self.step_one(param)
        param.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """What optimizer.step() is left with: averages of parameters that had no gradient."""
        if getattr(self.optimizer, "grad_scale", None) is not None or getattr(self.optimizer, "found_inf", None):
            raise RuntimeError(
                "GradScaler does not go with step_in_backward: the gradients were used before it could unscale them. "
                "Train in bfloat16, or remove() the handle"
            )
        for param, single in self._singles.items():
            if param not in self._done and (param.grad is not None or self.optimizer._precision.averages):
                single.update()
            if self._ddp is not None and param in self._done:
                param.grad = None  # DDP puts it back when backward ends
        self._done.clear()


class _Single:
    """One parameter's share of an optimizer: its options, its entry of the state, its group as that is now."""

    def __init__(self, optimizer: Any, group: int, param: Tensor, index: int) -> None:
        self._of, self._group, self._param = optimizer, group, param
        self._alone = type(optimizer).__new__(type(optimizer))
        self._alone.__dict__.update(
            defaults=optimizer.defaults,
            state=defaultdict(dict),
            param_groups=[],
            _options=optimizer._options,
            _clip=optimizer._clip,
            _precision=optimizer._precision,
        )
        self._alone._forget()
        self._alone._first_index = index
        # Adagrad has made its state already, and averages that its first step is to fill
        self._alone._new_averages = [p for p in optimizer._new_averages if p is param]

    def new_averages(self) -> list[Tensor]:
        return self._alone._new_averages

    def update(self) -> None:
        alone, param = self._alone, self._param
        if alone.state.get(param) is not self._of.state[param]:  # new, or loaded since
            alone.state = defaultdict(dict, {param: self._of.state[param]})
        alone.param_groups = [{**self._of.param_groups[self._group], "params": [param]}]
        alone._update()


def _singles(optimizer: Any) -> dict[Tensor, _Single]:
    placed = [(g, param) for g, group in enumerate(optimizer.param_groups) for param in group["params"]]
    singles = {param: _Single(optimizer, g, param, index) for index, (g, param) in enumerate(placed)}
    optimizer._new_averages.clear()
    return singles


def _reduce_and_step(handle: StepInBackward, bucket):  # a GradBucket; DDP refuses annotations that are strings
    """DDP's communication hook: the mean of a bucket's gradients, then the update of its parameters."""
    import torch.distributed as dist

    group = handle._ddp.process_group
    reduced = dist.all_reduce(bucket.buffer().div_(group.size()), group=group, async_op=True).get_future()
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))

    def step(reduced: Any) -> Tensor:
        for param, grad in pairs if handle._on else ():
            if param in handle._singles:
                before, param.grad = param.grad, grad
                try:
                    handle.step_one(param)
                finally:
                    param.grad = before  # which DDP will fill
        return reduced.value()[0]

    return reduced.then(step)
