"""What an optimizer keeps of a parameter: its rule, the state that stock gives it, and the form that it is kept in."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.distributed import parts
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
    _new_averages: list[Tensor]  # parameters in their first step, whose averages are still to be filled

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
            with self._parts(param) as (here, state):
                if self._precision.stochastic_rounding and "step" not in state and param.grad is not None:
                    state.setdefault("rounding_step", torch.tensor(float(stepped)))
                self._precision.adopt(here, state, self._signed(), self._precision.kind(param))
                if self._precision.averages and "ema" not in state:
                    state["ema"] = self._precision.new_average(here)
                    self._new_averages.append(param)
        return made

    @contextlib.contextmanager
    def _parts(self, param: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """A parameter and its state as they lie in this process; a tensor that is put there is placed as the parameter.

        Scales of codes are each process's own: blocks are of its part.
        """
        state = self.state[param]
        if not parts.is_shared(param):
            yield param, state
            return
        placed = {*self._signed(), *EXTRAS[1:]}
        for key in placed & state.keys():
            if isinstance(state[key], Tensor):
                state[key] = parts.placed(state[key], param, f"state {key!r}")
        before = {key: parts.part(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        here = dict(before)
        yield parts.part(param), here
        for key in state.keys() - here.keys():
            del state[key]
        for key, value in here.items():
            if before.get(key) is not value:
                state[key] = parts.whole(value, param) if key in placed else value

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
