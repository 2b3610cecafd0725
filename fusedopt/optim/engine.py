"""The fused step, mixed into the torch.optim classes: gather, admit what is new, launch, fall back.

A step walks the parameters natively (csrc/gather.h). Python sees only those that are new or changed in more than a
pointer, and either binds them to a kernel or hands them to torch's own functional, tensor by tensor.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _get_scalar_dtype

from fusedopt import backends
from fusedopt.backends import cpu, reference
from fusedopt.optim import precision
from fusedopt.optim.by_torch import ByTorch
from fusedopt.optim.clip import Clip, squares_by_torch
from fusedopt.optim.precision import Precision
from fusedopt.optim.report import Placement
from fusedopt.optim.tensors import check_memory, real_dtype, same_strides


class _Scaling:
    """GradScaler's scale and found_inf for work on the host, which must wait for them: read only if asked."""

    def __init__(self, found_inf: Tensor | None, scale: Tensor | None) -> None:
        self._found_inf, self._scale = found_inf, scale

    @functools.cached_property
    def skip(self) -> bool:
        return self._found_inf is not None and float(self._found_inf) != 0

    @functools.cached_property
    def inv_scale(self) -> float:
        return 1.0 if self._scale is None else 1.0 / float(self._scale)


class Unfusable(Exception):
    """A tensor that goes to torch's functional; the message is the reason."""


def _option(owner: str, name: str) -> property:
    """An option as it was chosen; the state was laid out for it, so it cannot be changed."""

    def get(self: Any) -> Any:
        return getattr(getattr(self, owner), name)

    def refuse(self: Any, value: Any) -> None:
        raise AttributeError(
            f"{name} is chosen at construction: make a new optimizer with {name}={value!r} and load this one's "
            "state_dict() into it"
        )

    return property(get, refuse)


class FusedStep(ByTorch):
    """What turns a torch.optim class into a fused one. Mixed in ahead of it; see fusedopt.optim.AdamW for the shape."""

    hyper: ClassVar[tuple[str, ...]]  # keys of a parameter group, in the rule's order

    # GradScaler then leaves unscaling and skipping to step().
    _step_supports_amp_scaling = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torchs = next(c for c in cls.__mro__ if issubclass(c, Optimizer) and not issubclass(c, FusedStep))
        stock = inspect.signature(torchs.__init__)
        own = inspect.signature(FusedStep.__init__).parameters
        extra = [p for p in own.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        cls.__signature__ = stock.replace(
            parameters=[*list(stock.parameters.values())[1:], *extra], return_annotation=inspect.Signature.empty
        )

    def __init__(
        self,
        params: Any,
        *args: Any,
        backend: str = "auto",
        max_norm: float | None = None,
        skip_non_finite: bool = False,
        ema_decay: float | None = None,
        state_dtype: torch.dtype | str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        **kwargs: Any,
    ) -> None:
        self._options = {"backend": backends.check(backend)}
        self._clip = Clip(max_norm, skip_non_finite)
        squares = not all(self._signed().values())
        self._precision = Precision(state_dtype, master_weights, stochastic_rounding, ema_decay, squares)
        self._forget()
        super().__init__(params, *args, **kwargs)
        self._precision.check_all([p for group in self.param_groups for p in group["params"]])
        if self.defaults.get("differentiable"):
            if self._clip.on:
                raise ValueError("differentiable=True does not go with max_norm or skip_non_finite: clip the gradients")
            if self._precision.on:
                raise ValueError(
                    "differentiable=True does not go with ema_decay, state_dtype, master_weights or "
                    "stochastic_rounding: what they round or keep has no gradient"
                )
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:  # Adagrad makes its sums at once
                    self._adopt(param, group, stepped=False)

    max_norm = _option("_clip", "max_norm")
    skip_non_finite = _option("_clip", "skip_non_finite")
    ema_decay = _option("_precision", "ema_decay")
    state_dtype = _option("_precision", "state_dtype")
    master_weights = _option("_precision", "master_weights")
    stochastic_rounding = _option("_precision", "stochastic_rounding")

    # --- a step ---

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure (Callable, optional): re-evaluates the model and returns the loss.
        """
        if self._swapped:
            raise RuntimeError("step() inside `with ema_weights()`: the averages are in the parameters' place")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            self._update()
        return loss

    def _update(self) -> None:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        on_host = _Scaling(found_inf, scale)
        if not self._steppers and on_host.skip:
            return  # GradScaler: nothing may change, step counters included

        averages = self._precision.averages
        fallback: list[list[Tensor]] = [[] for _ in self.param_groups]
        held: list[Tensor] = []  # copies and views that must outlive the launch
        if self._table is None:
            for group, tensors in zip(self.param_groups, fallback, strict=True):
                tensors.extend(p for p in group["params"] if p.grad is not None or averages)
        else:
            rules = [cpu.rules()[self._rule(group)][0] for group in self.param_groups]
            for slot in self._table.gather(self.param_groups, self.state, rules, averages):
                param, group_index = self._table.slot(slot)
                try:
                    held += self._admit(slot, param, self.param_groups[group_index], rules[group_index])
                except Unfusable:
                    fallback[group_index].append(param)

        if self._clip.on:
            found_inf, scale = self._clip(self._sums_of_squares(fallback), found_inf, scale)
            on_host = _Scaling(found_inf, scale)
        for group, tensors in zip(self.param_groups, fallback, strict=True):
            if tensors and not on_host.skip:
                self._update_by_torch(group, tensors, on_host.inv_scale)
        if self._table is not None:
            for stepper in self._steppers.values():
                told = () if self._precision.told is None else (self._precision.told,)
                stepper.step(self._table, self._device_groups(stepper.device), found_inf, scale, *told)
            if self._on_cpu and not on_host.skip:
                factor = on_host.inv_scale
                groups = [(self._hyper(group), -factor if group["maximize"] else factor) for group in self.param_groups]
                cpu.step(self._table, groups, self._precision.told)
            # raw writes are invisible to autograd, which would go on with saved tensors that have changed
            torch.autograd.graph.increment_version(self._table.updated())
        for param, average in self._new_averages:
            average.copy_(precision.weight(param, self.state[param]))  # the first is what the first step leaves
        self._new_averages.clear()

    def _sums_of_squares(self, fallback: list[list[Tensor]]) -> list[Tensor]:
        """Of the gradients of this step, where they are."""
        sums = squares_by_torch([p.grad for tensors in fallback for p in tensors if p.grad is not None])
        if self._table is not None:
            if self._on_cpu:
                sums.append(torch.tensor(cpu.sum_of_squares(self._table), dtype=torch.float64))
            for stepper in self._steppers.values():
                sums.append(stepper.sum_of_squares(self._table, self._device_groups(stepper.device)))
        return sums

    def _device_groups(self, device: torch.device) -> list[tuple[list[float], float, int, bool]]:
        """As fusedopt.backends.cuda.Stepper.step takes them: a learning rate on the device is read there."""
        groups = []
        for group in self.param_groups:
            lr = group["lr"]
            stays = isinstance(lr, Tensor) and lr.device == device and lr.dtype in (torch.float32, torch.float64)
            hyper = self._hyper({**group, "lr": 0.0} if stays else group)
            address = lr.data_ptr() if stays else 0
            groups.append((hyper, -1.0 if group["maximize"] else 1.0, address, stays and lr.dtype == torch.float64))
        return groups

    def _hyper(self, group: dict[str, Any]) -> list[float]:
        betas = group.get("betas", ())
        values = {f"beta{i}": beta for i, beta in enumerate(betas, 1)}
        return [float(values[key] if key in values else group[key]) for key in self.hyper]

    # --- one tensor, seen for the first time or changed ---

    def _check_fusable(self, param: Tensor, grad: Tensor | None, group: dict[str, Any]) -> ModuleType:
        """The backend whose kernels take the tensor as it is; raises Unfusable where there is none."""
        backend = backends.select(self._options["backend"], param.device)
        if backend is reference:
            raise Unfusable(
                "asked for"
                if self._options["backend"] == "reference"
                else f"no kernels for {param.device.type} tensors"
            )
        if group.get("differentiable"):
            raise Unfusable("differentiable=True")
        if param.layout != torch.strided or (grad is not None and grad.layout != torch.strided):
            raise Unfusable("sparse")
        real = real_dtype(param.dtype)
        kind = self._state_kind(param)
        if not backend.supports(cpu.rules()[self._rule(group)][0], real, real, kind):
            raise Unfusable(f"no kernel for {param.dtype}" + (f" with {kind} states" if kind != real else ""))
        if param.is_neg() or param.is_conj():
            raise Unfusable("lazily negated or conjugated")
        if obstacle := cpu.obstacle(param):
            raise Unfusable(obstacle)
        return backend

    def _admit(self, slot: int, param: Tensor, group: dict[str, Any], rule: int) -> list[Tensor]:
        """Bind one parameter to its kernel; returns the temporaries that must live until the launch."""
        grad = param.grad
        if grad is not None:
            check_memory(param, grad)
        backend = self._check_fusable(param, grad, group)
        known = bool(self.state.get(param))
        if not known and backend is not cpu and backend.capturing(param.device):
            raise RuntimeError(
                "step() meets a parameter for the first time while a graph is captured: each replay would start its "
                "state anew; take one step before the capture"
            )
        stepped = self._has_stepped(param, group)
        self._stock_lists(group, [param])  # stock's own checks, errors and state
        made = self._adopt(param, group, stepped)
        state = self.state.get(param)
        kind = self._state_kind(param)
        states = []
        for key in self._states(group) if grad is not None else ():
            value = state[key]
            if value.shape != param.shape:
                raise RuntimeError(
                    f"state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}: "
                    "was a checkpoint of another model loaded?"
                )
            fits = value.dtype in (torch.int8, torch.uint8) if kind == "8bit" else real_dtype(value.dtype) == kind
            if not fits or value.device != param.device or value.layout != torch.strided:
                raise Unfusable(f"state {key!r} is {value.dtype} on {value.device}")
            # a contiguous checkpoint in a channels_last model, say; or a new state, better off on huge pages
            if not same_strides(value, param) or (backend is cpu and not known and value.nbytes >= cpu.HUGE):
                fresh = torch.empty_like(param, dtype=value.dtype)
                value = state[key] = (cpu.advised(fresh) if backend is cpu else fresh).copy_(value)
            states.append(value)
        scales = tuple(state[f"{key}_scale"] for key in self._states(group)) if states and kind == "8bit" else ()
        master, average = (None if state is None else state.get(key) for key in ("master", "ema"))
        counts = "rounding_step" if state is not None and "rounding_step" in state else "step"
        counter = None if state is None else state.get(counts)
        if grad is None:
            counter = None
        elif backend is not cpu:
            counter = self._device_counter(param.device, state, counts, fresh=bool(made))
        elif counter is not None and not isinstance(counter, Tensor):
            counter = state[counts] = torch.tensor(float(counter), dtype=_get_scalar_dtype())
        elif counter is not None and counter.device.type != "cpu":
            raise Unfusable(f"step counter on {counter.device}")

        held = []
        lasting = not param.is_complex()
        if grad is not None:
            real = real_dtype(param.dtype)
            grad_dtype = grad.dtype if backend.supports(rule, real, real_dtype(grad.dtype), kind) else param.dtype
            # a lazily negated or conjugated tensor's memory does not hold its values, and DLPack does not tell
            lasting &= not grad.is_neg()
            if grad.dtype != grad_dtype or not same_strides(grad, param) or grad.is_neg() or grad.is_conj():
                grad = torch.empty_like(param, dtype=grad_dtype).copy_(grad)
            held.append(grad)
        if param.is_complex():
            param, grad, average, *states = (
                None if t is None else torch.view_as_real(t) for t in (param, grad, average, *states)
            )
            held += [param, grad, average, *states]
        # the table keeps the memory alive: a state whose .data is swapped goes unnoticed, but must not be freed
        kept = (*states, *scales, *(t for t in (counter, master, average) if t is not None))
        owners = tuple(t.untyped_storage() for t in kept)
        try:
            self._table.bind(
                slot,
                param=param,
                grad=grad,
                state_dict=state,
                states=tuple(states),
                scales=scales,
                master=master,
                ema=average,
                step=counter,
                owners=owners,
                fresh=bool(made),
                lasting=lasting,
                on_device=backend is not cpu,
            )
        except ValueError as error:
            for key in made:
                del state[key]
                state.pop(f"{key}_scale", None)
            raise Unfusable(str(error)) from None
        if backend is cpu:
            self._on_cpu = True
        elif param.device not in self._steppers:
            self._steppers[param.device] = backend.Stepper(param.device)
        return held

    def _device_counter(self, device: torch.device, state: dict[str, Any] | None, counts: str, fresh: bool) -> Tensor:
        """The step counter, which the device advances: state[counts], or one of our own where stock counts no steps."""
        known = None if state is None else state.get(counts)
        if isinstance(known, Tensor) and known.device == device and known.dtype == torch.float32:
            return known
        flat, used = self._counters.get(device, (None, 0))
        if flat is None or used == len(flat):
            flat, used = torch.zeros(sum(len(g["params"]) for g in self.param_groups), device=device), 0
        counter = flat[used]
        self._counters[device] = flat, used + 1
        steps = float(known) if known is not None else float(not fresh)
        if steps:
            counter.fill_(steps)
        if known is not None:
            state[counts] = counter
        return counter

    # --- the instance: reports, copies, checkpoints ---

    @property
    def grad_norm(self) -> Tensor:
        """() float64: the gradients' total norm at the last step, unscaled and before clipping. No sync."""
        return self._clip.norm

    @property
    def skipped_steps(self) -> Tensor:
        """() int64: how many steps `skip_non_finite` has left out. No synchronisation."""
        return self._clip.skipped

    def backend_report(self) -> list[Placement]:
        """Where each parameter's update runs, and why, as far as its present gradient tells."""
        report = []
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                backend, reason = "reference", ""
                try:
                    fused = self._check_fusable(param, param.grad, group)
                    backend, reason = fused.name, f"native, {cpu.isa()}" if fused is cpu else "kernels"
                except Unfusable as unfusable:
                    reason = str(unfusable)
                report.append(Placement(g, i, tuple(param.shape), param.dtype, backend, reason))
        return report

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._precision.check(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        backend = self._options["backend"]
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if backend != "auto" and not backends.takes(backends.select(backend, param.device), param.device):
                group = self.param_groups.pop()
                raise ValueError(
                    f"backend={backend!r} does not run tensors on {param.device} "
                    f"(parameter {i} of {len(group['params'])}); use backend='auto' or move the model"
                )

    def _forget(self) -> None:
        """Drop all that was known of the tensors' whereabouts; the next step looks anew."""
        fusable = self._options["backend"] != "reference" and cpu.available() is True
        self._table = cpu.new_table() if fusable else None
        self._on_cpu = False  # whether any tensor steps there
        self._steppers: dict[torch.device, Any] = {}
        self._counters: dict[torch.device, tuple[Tensor, int]] = {}  # a flat tensor, and how many of it are taken
        self._new_averages: list[tuple[Tensor, Tensor]] = []  # parameters in their first step, and their averages
        self._swapped = False  # inside ema_weights()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_clip": self._clip, "_precision": self._precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
