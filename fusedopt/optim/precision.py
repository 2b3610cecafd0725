"""At which precision an optimizer keeps weights, states and averages: the user's choice, and what it makes of a state.

In `state[p]`, beside stock's keys:

    exp_avg, ...        8-bit codes (int8, or uint8 where nothing is negative), under state_dtype="8bit"
    exp_avg_scale, ...  (blocks,) float32: their scales
    master              int16: what a bfloat16 weight lacks of a float32; or the float32 of a float16 weight
    ema                 the average of the weights
    rounding_step       () float32, where stock counts no steps: which random bits come next
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fusedopt.optim import codes

SMALL = 4096  # elements below which a tensor's states stay float32: norms and biases, few bytes and much harm
EXTRAS = ("rounding_step", "master", "ema")
SIGNED = frozenset({"exp_avg", "grad_avg", "momentum_buffer"})  # the states that are not squares
STAMPS = ("extras_step", "extras_checksum")
UNSTAMPED = 0  # a checksum that says nothing
SEED = 0  # the same on every rank, whatever each seeds its own generators with


class Precision:
    """`state_dtype`, `master_weights`, `stochastic_rounding` and `ema_decay` of one optimizer."""

    def __init__(
        self,
        state_dtype: torch.dtype | str | None,
        master_weights: bool,
        stochastic_rounding: bool,
        ema_decay: float | None,
        squares: bool,
    ) -> None:
        """`squares`: whether the optimizer has a state that is not in SIGNED."""
        if state_dtype not in (None, torch.float32, torch.bfloat16, "8bit"):
            raise ValueError(f'state_dtype={state_dtype!r} is not None, torch.float32, torch.bfloat16 or "8bit"')
        if ema_decay is not None and (not isinstance(ema_decay, (int, float)) or not 0 <= ema_decay <= 1):
            raise ValueError(f"ema_decay={ema_decay!r} must be a number from 0 to 1, or None")
        self.state_dtype, self.ema_decay = state_dtype, ema_decay
        self.master_weights, self.stochastic_rounding = bool(master_weights), bool(stochastic_rounding)
        self.on = state_dtype is not None or ema_decay is not None or self.master_weights or self.stochastic_rounding
        self.averages = ema_decay is not None
        self._rounds_codes = self.stochastic_rounding and state_dtype == "8bit" and squares

    @property
    def told(self) -> tuple[float, bool, int] | None:
        """What the kernels are told, as csrc/step.h's Precision; None for a plain step."""
        return (1 - (self.ema_decay or 0.0), self.stochastic_rounding, SEED) if self.on else None

    # --- what goes with what ---

    def check(self, params: Iterable[Tensor]) -> None:
        """Raise ValueError for the parameter whose dtype an option cannot take."""
        for param in params:
            rounds = self._rounds_codes or torch.bfloat16 in (param.dtype, self._kind(param.dtype))
            narrow = (torch.float32, torch.bfloat16, torch.float16)
            for option, wanted, takes, reason in (
                (
                    f"state_dtype={self.state_dtype!r}",
                    self.state_dtype is not None,
                    param.dtype in narrow,
                    "its states stay as wide as it is",
                ),
                (
                    "master_weights=True",
                    self.master_weights,
                    param.dtype in narrow,
                    "a master holds what bfloat16 and float16 weights lack of a float32",
                ),
                (
                    "stochastic_rounding=True",
                    self.stochastic_rounding,
                    rounds or param.dtype == torch.float32,
                    "neither it nor its states are bfloat16",
                ),
            ):
                if wanted and not takes:
                    raise ValueError(
                        f"{option} cannot serve a parameter of {param.dtype}, shape {tuple(param.shape)}: {reason}"
                    )

    def check_all(self, params: list[Tensor]) -> None:
        """Raise ValueError for an option that does nothing for any parameter of an optimizer."""
        dtypes = {param.dtype for param in params}
        if self.master_weights and not dtypes & {torch.bfloat16, torch.float16}:
            raise ValueError("master_weights=True needs bfloat16 or float16 parameters: float32 weights are whole")
        rounded = {torch.bfloat16} & {self._kind(dtype) for dtype in dtypes}
        if not self.master_weights:
            rounded |= {torch.bfloat16} & dtypes
        if self.stochastic_rounding and not (rounded or self._rounds_codes):
            raise ValueError(
                "stochastic_rounding=True needs bfloat16 parameters without a master, bfloat16 states, or 8-bit states "
                "that are squares (those of either sign are rounded to the nearest code); these parameters are "
                + ", ".join(sorted(map(str, dtypes)))
            )

    def _kind(self, dtype: torch.dtype) -> torch.dtype | str:
        return dtype if self.state_dtype is None else self.state_dtype

    def kind(self, param: Tensor) -> torch.dtype | str:
        """How a parameter's states are kept: a dtype, or "8bit". By its whole size, however many processes share it."""
        kind = self._kind(param.dtype)
        return torch.float32 if kind == "8bit" and param.numel() < SMALL else kind

    # --- a state in and out of the form in which it is kept ---

    def adopt(self, param: Tensor, state: dict[str, Any], signed: dict[str, bool], kind: torch.dtype | str) -> None:
        """Bring a parameter's state into this form: stock's new one, or what a checkpoint brought.

        `signed`: the keys of its rule's states, and whether they take either sign. `kind`: how they are kept.
        """
        if not self.on:
            return
        self.drop_stale(param, state)
        for key in [key for key in signed if key in state] if self.state_dtype is not None else ():
            value = state[key]
            scale = state.get(f"{key}_scale")
            coded = scale is not None
            if coded and (kind != "8bit" or value.stride() != param.stride()):
                value, coded = codes.dequantize(value, scale), False
                del state[f"{key}_scale"]
            if kind == "8bit" and not coded:
                value = torch.empty_like(param, dtype=torch.float32).copy_(value)
                value, state[f"{key}_scale"] = codes.quantize(value, signed[key])
            elif kind != "8bit":
                value = value.to(kind)
            state[key] = value
        if self.master_weights and "master" not in state:
            if param.dtype == torch.bfloat16:
                state["master"] = torch.zeros_like(param, dtype=torch.int16)
            elif param.dtype == torch.float16:
                state["master"] = param.detach().float()
        for key in ("master", "ema"):  # of a checkpoint, say, from before the model was made channels_last
            if key in state and state[key].stride() != param.stride():
                state[key] = torch.empty_like(param, dtype=state[key].dtype).copy_(state[key])

    def take_over(self, param: Tensor, state: dict[str, Any]) -> None:
        """Drop what a checkpoint brought that this optimizer does not keep, or that stock has cast."""
        wide = torch.promote_types(param.dtype, torch.float32)
        master = {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(param.dtype)
        for key, kept, dtype in (("ema", self.averages, wide), ("master", self.master_weights, master)):
            if key in state and not kept:
                del state[key]
            elif key in state and state[key].dtype != dtype:
                self.drop(state, [key], f"it is {state[key].dtype}, not {dtype}")
        if not self.stochastic_rounding:
            state.pop("rounding_step", None)
        elif "rounding_step" in state:
            state["rounding_step"] = state["rounding_step"].to(torch.float32)
        if not {"ema", "master"} & state.keys():
            for stamp in STAMPS:
                state.pop(stamp, None)

    def new_average(self, param: Tensor) -> Tensor:
        wide = torch.promote_types(param.dtype, torch.float32)
        return torch.empty_like(param, dtype=wide).copy_(param.detach())

    def drop_stale(self, param: Tensor, state: dict[str, Any]) -> None:
        """Drop a checkpoint's extras that another optimizer has since carried on without keeping them."""
        stamp, checksum = (state.pop(key, None) for key in STAMPS)
        if stamp is not None and float(stamp) != float(state.get("step", -1)):
            reason = f"written at step {float(stamp):.0f}, and the state is of step {float(state.get('step', -1)):.0f}"
        elif checksum is not None and int(checksum) not in (UNSTAMPED, checksum_of(param)):
            reason = "written for other weights than the parameter now has"
        else:
            return
        self.drop(state, ("master", "ema"), reason)

    def drop(self, state: dict[str, Any], keys: Iterable[str], reason: str) -> None:
        dropped = [key for key in keys if state.pop(key, None) is not None]
        if dropped:
            warnings.warn(
                f"the checkpoint's {' and '.join(map(repr, dropped))} are left out and start anew: {reason}",
                stacklevel=2,
            )


def weight(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The parameter as it is computed with: itself where that is wide enough, else a new float32."""
    param = param.detach()
    master = state.get("master")
    if param.dtype == torch.bfloat16:
        return param.float() if master is None else codes.join(param, master)
    if param.dtype == torch.float16:
        return param.float() if master is None else torch.where(master.half() == param, master, param.float())
    return param


class View:
    """One parameter's tensors as torch's functional takes them: itself what is wide enough, else float32 copies."""

    def __init__(self, param: Tensor, state: dict[str, Any], keys: tuple[str, ...]) -> None:
        self.param, self.state, self.keys = param, state, keys
        self.weight = weight(param, state)
        self.values = {key: self._read(key) for key in keys if state.get(key) is not None}

    def _read(self, key: str) -> Tensor:
        kept, scale = self.state[key], self.state.get(f"{key}_scale")
        if scale is not None:
            return codes.dequantize(kept, scale)
        return kept.float() if kept.dtype in (torch.bfloat16, torch.float16) else kept

    def store(self, parameter: int, stochastic: bool, elements: Tensor | None) -> None:
        """`parameter`: its index in the optimizer, which tells its random bits from others'. `elements`: which of them
        these are, where not all are here.
        """
        step = 0
        if stochastic:
            if "rounding_step" in self.state:
                self.state["rounding_step"] += 1
            step = int(self.state["rounding_step" if "rounding_step" in self.state else "step"])

        def random(value: Tensor, tensor: int) -> Tensor:  # by place in memory
            if elements is None:
                return codes.random16(SEED, step, parameter, tensor, value.numel(), value.device)
            return codes.random16_of(SEED, step, parameter, tensor, elements)

        def narrow(value: Tensor, to: Tensor, tensor: int) -> None:
            if stochastic and to.dtype == torch.bfloat16:
                bits = torch.empty_like(value)
                codes.flat(bits).copy_(random(value, tensor))
                value = codes.stochastic(value, bits.long())
            to.copy_(value)

        param, master = self.param.detach(), self.state.get("master")
        if param.dtype == torch.bfloat16 and master is not None:
            high, low = codes.split(self.weight)
            param.copy_(high)
            master.copy_(low)
        elif param.dtype in (torch.bfloat16, torch.float16):
            narrow(self.weight, param, 0)
            if master is not None:
                master.copy_(self.weight)
        for k, key in enumerate(self.keys):
            kept, value = self.state.get(key), self.values.get(key)
            if value is None or value is kept:
                continue
            if f"{key}_scale" in self.state:
                bits = random(value, 1 + k) if stochastic and key not in SIGNED else None
                coded, scale = codes.quantize(value, key in SIGNED, bits)
                kept.copy_(coded)
                self.state[f"{key}_scale"].copy_(scale)
            else:
                narrow(value, kept, 1 + k)


def checksum_of(param: Tensor) -> int:
    """Of a parameter's bits; any step changes it."""
    bits = param.detach().contiguous().view(-1)
    bits = torch.view_as_real(bits).view(-1) if bits.is_complex() else bits
    return int(bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).sum(dtype=torch.int64))
