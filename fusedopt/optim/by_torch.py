"""Steps by torch's own functional, tensor by tensor: for what no kernel takes."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.distributed import parts
from fusedopt.distributed.parts import Holders
from fusedopt.optim import precision
from fusedopt.optim.precision import View
from fusedopt.optim.states import States


class ByTorch(States):
    """Mixed into FusedStep."""

    functional: ClassVar[Callable[..., None]]  # torch's own update of lists of tensors

    _holders: Holders
    _first_index: int

    def _update_by_torch(
        self, group: dict[str, Any], params: list[Tensor], grads: dict[Tensor, Tensor], inv_scale: float
    ) -> None:
        """`grads`: what of the gradients lies here. Tensors that processes share are stepped part by part."""
        if not self._precision.on:
            stepped, _, lists = self._stock_lists(group, params)
            lists = {name: [parts.part(value) if isinstance(value, Tensor) else value for value in values]
                     for name, values in lists.items()}  # fmt: skip
            weights = [parts.part(param) for param in stepped]
            self._run_functional(group, stepped, weights, [grads[param] for param in stepped], lists, inv_scale)
            for param, buffer in zip(stepped, lists.get("momentum_buffer_list", ()), strict=False):
                # SGD's function makes the first one
                if parts.part(self.state[param].get("momentum_buffer")) is not buffer:
                    self.state[param]["momentum_buffer"] = parts.whole(buffer, param)
            return
        before = [self._has_stepped(param, group) for param in params]
        self._stock_lists(group, params)
        for param, stepped in zip(params, before, strict=True):
            self._adopt(param, group, stepped, buffers=False)
        stepped, _, lists = self._stock_lists(group, params)
        every = (param for group in self.param_groups for param in group["params"])
        index = {param: i for i, param in enumerate(every, self._first_index)}
        with contextlib.ExitStack() as stack:
            views = [View(*stack.enter_context(self._parts(param)), self._states(group)) for param in stepped]
            if views:
                wide = {id(view.state[key]): value for view in views for key, value in view.values.items()}
                lists = {name: [self._widened(value, wide) for value in values] for name, values in lists.items()}
                narrow = [grads[param].to(view.weight.dtype) for param, view in zip(stepped, views, strict=True)]
                self._run_functional(group, stepped, [view.weight for view in views], narrow, lists, inv_scale)
            for param, view, buffer in zip(stepped, views, lists.get("momentum_buffer_list", ()), strict=False):
                if view.state.get("momentum_buffer") is None:  # SGD's function made it
                    view.state["momentum_buffer"] = torch.zeros_like(view.param)
                    view.values["momentum_buffer"] = buffer
                    self._precision.adopt(view.param, view.state, self._signed(), self._precision.kind(param))
            for param, view in zip(stepped, views, strict=True):
                stochastic = self._precision.stochastic_rounding
                view.store(index[param], stochastic, parts.elements(param) if stochastic else None)
        if self._precision.averages:
            for param in params:
                with self._parts(param) as (here, state):
                    state["ema"].lerp_(precision.weight(here, state), 1 - self._precision.ema_decay)

    @staticmethod
    def _widened(value: Any, wide: dict[int, Tensor]) -> Any:
        value = parts.part(value) if isinstance(value, Tensor) else value
        return wide.get(id(value), value)

    def _run_functional(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        weights: list[Tensor],
        grads: list[Tensor],
        lists: dict[str, list],
        inv_scale: float,
    ) -> None:
        """`weights`: what of the parameters lies here, at the precision at which it is computed."""
        if inv_scale != 1.0:
            grads = [grad * inv_scale for grad in grads]
        known = {
            **group,
            **{f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)},
            "has_complex": any(p.is_complex() for p in params),
            "has_sparse_grad": any(g.is_sparse for g in grads),
            "fused": False,
            "sum_over_parts": functools.partial(self._holders.sum_rows, params=params),
        }
        wanted = inspect.signature(self.functional).parameters
        keywords = {key: known[key] for key in wanted if key in known and key != "params"}
        self.functional(weights, grads, **lists, **keywords)
