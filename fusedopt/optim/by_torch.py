"""Steps by torch's own functional, tensor by tensor: for what no kernel takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.optim import precision
from fusedopt.optim.precision import View
from fusedopt.optim.states import States


class ByTorch(States):
    """Mixed into FusedStep."""

    functional: ClassVar[Callable[..., None]]  # torch's own update of lists of tensors

    def _update_by_torch(self, group: dict[str, Any], params: list[Tensor], inv_scale: float) -> None:
        if not self._precision.on:
            params, grads, lists = self._stock_lists(group, params)
            self._run_functional(group, params, grads, lists, inv_scale)
            for param, buffer in zip(params, lists.get("momentum_buffer_list", ()), strict=False):
                self.state[param]["momentum_buffer"] = buffer  # SGD's function makes the first one
            return
        stepped = [self._has_stepped(param, group) for param in params]
        self._stock_lists(group, params)
        for param, before in zip(params, stepped, strict=True):
            self._adopt(param, group, before, buffers=False)
        stepped, grads, lists = self._stock_lists(group, params)
        views = [View(param, self.state[param], self._states(group)) for param in stepped]
        if views:
            wide = {id(view.state[key]): value for view in views for key, value in view.values.items()}
            lists = {name: [wide.get(id(value), value) for value in values] for name, values in lists.items()}
            grads = [grad.to(view.weight.dtype) for grad, view in zip(grads, views, strict=True)]
            self._run_functional(group, [view.weight for view in views], grads, lists, inv_scale)
        for view, buffer in zip(views, lists.get("momentum_buffer_list", ()), strict=False):
            if view.state.get("momentum_buffer") is None:  # SGD's function made it
                view.state["momentum_buffer"] = torch.zeros_like(view.param)
                view.values["momentum_buffer"] = buffer
                self._precision.adopt(view.param, view.state, self._signed())
        index = {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}
        for view in views:
            view.store(index[view.param], self._precision.stochastic_rounding)
        if self._precision.averages:
            for param in params:
                kept = precision.weight(param, self.state[param])
                self.state[param]["ema"].lerp_(kept, 1 - self._precision.ema_decay)

    def _run_functional(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], lists: dict[str, list], inv_scale: float
    ) -> None:
        if inv_scale != 1.0:
            grads = [grad * inv_scale for grad in grads]
        known = {
            **group,
            **{f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)},
            "has_complex": any(p.is_complex() for p in params),
            "has_sparse_grad": any(g.is_sparse for g in grads),
            "fused": False,
        }
        wanted = inspect.signature(self.functional).parameters
        keywords = {key: known[key] for key in wanted if key in known and key != "params"}
        self.functional(params, grads, **lists, **keywords)
