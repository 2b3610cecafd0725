"""What an optimizer's state is outside of it: a state_dict that torch.optim's class of the same name takes on and gives
back, and the averaged weights in the parameters' place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedopt.distributed import parts
from fusedopt.optim import codes, precision
from fusedopt.optim.precision import EXTRAS, STAMPS


class _Held:
    """A tensor that torch's load_state_dict passes on as it is: it casts all others to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Checkpoints:
    """Mixed into FusedStep."""

    @torch._disable_dynamo
    def state_dict(self, *, device: torch.device | str | None = None) -> dict[str, Any]:
        """The state as torch.optim's class of the same name keeps it, and `master`, `ema` and `rounding_step` beside.

        8-bit states are given as float32, which quantise to the same codes again.

        Args:
            device: where the tensors shall be; they are moved one by one, 8-bit states as codes: where they come from
                nothing more is held. None: where they are, not copied; a tensor more than is returned is held.
        """
        self._refuse_if_swapped("state_dict()")
        exported = self.register_state_dict_post_hook(lambda _, given: self._export(given, device), prepend=True)
        try:
            return super().state_dict()
        finally:
            exported.remove()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load an optimizer state, of fusedopt at any precision or of torch.optim's class of the same name.

        Unlike torch.optim's, the loaded tensors are copies: training on does not change `state_dict`. Masters and
        averages that another optimizer carried along without keeping them up are left out, with a warning.

        Raises:
            ValueError: other groups, or a state of another shape than its parameter; nothing has changed.
        """
        self._refuse_if_swapped("load_state_dict()")
        given = {id(value) for state in state_dict["state"].values() for value in state.values()}
        held = self.register_load_state_dict_pre_hook(lambda _, given: self._hold(given))
        placed = self.register_load_state_dict_post_hook(lambda _: self._place(given), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            held.remove()
            placed.remove()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The averaged weights in the parameters' place; afterwards, whatever happens, the parameters' own again.

        Averages are rounded to the parameter's dtype; buffers stay as they are. A parameter that no step has seen keeps
        its weights. No step may be taken inside.
        """
        if not self._precision.averages:
            raise AttributeError("averages are kept with ema_decay=...")
        self._refuse_if_swapped("ema_weights()")
        own: list[tuple[Tensor, Tensor]] = []
        try:
            self._swapped = True
            with torch.no_grad():
                for param in self.state:
                    with self._parts(param) as (here, state):
                        self._precision.drop_stale(here, state)
                        if "ema" in state:
                            own.append((here, here.detach().clone()))
                            here.copy_(state["ema"])
            yield
        finally:
            with torch.no_grad():
                for param, value in own:
                    param.copy_(value)
            self._swapped = False

    def _refuse_if_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} inside `with ema_weights()`: the averages are in the parameters' place")

    # --- out ---

    def _export(self, packed: dict[str, Any], device: torch.device | str | None) -> dict[str, Any]:
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [i for group in packed["param_groups"] for i in group["params"]]
        groups = [group for group in self.param_groups for _ in group["params"]]
        state = dict(packed["state"])
        for i, param, group in zip(ids, params, groups, strict=True):
            if i in state and (self._precision.on or device is not None):
                state[i] = {
                    key: value.to(device=device) if isinstance(value, Tensor) else value
                    for key, value in self._exported(param, state[i], group, device)
                }
        return {**packed, "state": state}

    def _exported(
        self, param: Tensor, state: dict[str, Any], group: dict[str, Any], device: torch.device | str | None
    ) -> Iterator[tuple[str, Any]]:
        with self._parts(param) as (here, kept):
            self._precision.drop_stale(here, kept)
        extras = {key: state[key] for key in EXTRAS if key in state}
        scales = {f"{key}_scale" for key in state}
        if extras.keys() == state.keys():  # has an average but never a gradient: stock needs all or nothing
            state = self._new_stock_state(param, group)
        for key, value in state.items():
            if f"{key}_scale" in state:
                # codes move, a quarter of what they become, which the device then need not hold; a DTensor's part stays
                to = None if parts.is_shared(param) else device
                coded, scale = (t.to(device=to) for t in (parts.part(value), state[f"{key}_scale"]))
                yield key, parts.whole(codes.dequantize(coded, scale), param)
            elif key not in extras and key not in scales:
                yield key, value
        yield from extras.items()
        if "step" in state and extras:
            yield "extras_step", float(state["step"])
        elif extras.keys() - {"rounding_step"}:
            # a part's would be no other world size's, but whoever loads this looks for the same keys
            yield "extras_checksum", precision.UNSTAMPED if parts.is_shared(param) else precision.checksum_of(param)

    def _new_stock_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        stand_in = torch.nn.Parameter(param.detach(), requires_grad=False)
        stand_in.grad = torch.zeros_like(param)
        self._stock_lists(group, [stand_in])
        return self.state.pop(stand_in, {})

    # --- in ---

    def _hold(self, given: dict[str, Any]) -> dict[str, Any]:
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [i for group in given["param_groups"] for i in group["params"]]
        state = dict(given["state"])
        keys = {*self.states, *(key for _, key in self.options.values() if key)}
        extras = {key for key in EXTRAS if key != "rounding_step"}
        for i, param in zip(ids, params, strict=False):  # torch raises where they are not as many
            for key, value in state.get(i, {}).items():
                if key in keys | extras and isinstance(value, Tensor) and value.shape != param.shape:
                    raise ValueError(
                        f"state {key!r} of parameter {i} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(param.shape)}: is it a checkpoint of another model?"
                    )
                if key in keys | extras and isinstance(value, Tensor):
                    parts.check_placed(value, param, f"state {key!r} of parameter {i}")
        if not self._precision.on:
            return {**given, "state": {i: self._without_extras(state[i]) for i in state}}
        for i in state:
            state[i] = {
                key: _Held(value) if isinstance(value, Tensor) and key in {*keys, *EXTRAS} else value
                for key, value in state[i].items()
            }
        return {**given, "state": state}

    def _without_extras(self, state: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if key not in (*EXTRAS, *STAMPS)}

    def _place(self, given: set[int]) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param)
                if not state:
                    continue
                for key, value in state.items():
                    tensor = value.tensor if isinstance(value, _Held) else value
                    if isinstance(tensor, Tensor):
                        if isinstance(value, _Held):
                            tensor = tensor.to(param.device)
                        state[key] = tensor.clone() if id(tensor) in given else tensor
                if self._precision.on or parts.is_shared(param):
                    with self._parts(param) as (here, state):
                        if self._precision.on:
                            self._precision.take_over(here, state)
                            self._adopt_loaded(param, here, state)

    def _adopt_loaded(self, param: Tensor, here: Tensor, state: dict[str, Any]) -> None:
        checksum = state.pop("extras_checksum", None)  # is for the first step: the model may be loaded after this
        self._precision.adopt(here, state, self._signed(), self._precision.kind(param))
        if checksum is not None and not parts.is_shared(param):
            state["extras_checksum"] = checksum

    def _signed(self) -> dict[str, bool]:
        keys = (*self.states, *(key for _, key in self.options.values() if key))
        return {key: key in precision.SIGNED for key in keys}
