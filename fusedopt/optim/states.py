"""What an optimizer keeps of a parameter: its rule, the state that stock gives it, and the form in which that is kept."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.optim.checkpoints import Checkpoints
from fusedopt.optim.precision import EXTRAS, STAMPS, Precision
from fusedopt.optim.tensors import real_dtype


class States(Checkpoints):
    """Mixed into FusedStep."""

    rule: ClassVar[str]  # of csrc/rules.h
    states: ClassVar[tuple[str, ...]]  # keys of state[p], in the rule's order
    # Group options that choose another rule: key -> (what they append to its name, the state they add)
    options: ClassVar[dict[str, tuple[str, str | None]]] = {}

    _precision: Precision
    _new_averages: list[tuple[Tensor, Tensor]]  # parameters in their first step, and their averages

    def _rule(self, group: dict[str, Any]) -> str:
        return self.rule + "".join(suffix for key, (suffix, _) in self.options.items() if group[key])

    def _states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states + tuple(state for key, (_, state) in self.options.items() if state and group[key])

    def _state_kind(self, param: Tensor) -> torch.dtype | str:
        kind = self._precision.kind(param)
        return kind if isinstance(kind, str) else real_dtype(kind)

    def _has_stepped(self, param: Tensor, group: dict[str, Any]) -> bool:
        """As far as a state without a step counter tells."""
        state = self.state.get(param, {})
        return any(state.get(key) is not None for key in self._states(group))

    def _adopt(self, param: Tensor, group: dict[str, Any], stepped: bool, buffers: bool = True) -> list[str]:
        """Bring a parameter's state into the form in which it is kept; returns the keys made: SGD's buffer."""
        made = []
        if param.grad is not None and buffers:
            for key in self._states(group):
                if self.state[param].get(key) is None:
                    self.state[param][key] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    made.append(key)
        if self._precision.on:
            state = self.state[param]
            if self._precision.stochastic_rounding and "step" not in state and param.grad is not None:
                state.setdefault("rounding_step", torch.tensor(float(stepped)))
            self._precision.adopt(param, state, self._signed())
            if self._precision.averages and "ema" not in state:
                state["ema"] = self._precision.new_average(param)
                self._new_averages.append((param, state["ema"]))
        return made

    def _stock_lists(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list, list, dict[str, list]]:
        """Stock's `_init_group` for some parameters of a group: it raises what stock raises and fills their state."""
        names = list(inspect.signature(self._init_group).parameters)[3:]
        lists: dict[str, list] = {name: [] for name in names}
        with_grad: list[Tensor] = []
        grads: list[Tensor] = []
        # stock fills states that are empty: what is kept beside its own is out of its sight
        hidden = {}
        for param in params if self._precision.on else ():
            state = self.state.get(param, {})
            hidden[param] = {key: state.pop(key) for key in (*EXTRAS, *STAMPS) if key in state}
        try:
            self._init_group({**group, "params": params}, with_grad, grads, *lists.values())
        finally:
            for param, extras in hidden.items():
                if extras:
                    self.state[param].update(extras)
        return with_grad, grads, lists
