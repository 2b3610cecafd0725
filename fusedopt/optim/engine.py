"""The fused step, mixed into the torch.optim classes: gather, admit what is new, launch, fall back.

A step walks the parameters natively (csrc/gather.h). Python sees only those that are new or changed in more than a
pointer, and either binds them to a kernel or hands them to torch's own functional, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _get_scalar_dtype

from fusedopt import backends
from fusedopt.backends import cpu, reference
from fusedopt.distributed import parts
from fusedopt.distributed.parts import Holders
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
    norms: ClassVar[bool] = False  # whether a tensor's update depends on norms over all of it

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
        extra_groups: Iterable[Any] = (),
        **kwargs: Any,
    ) -> None:
        self._options = {"backend": backends.check(backend), "extra_groups": Holders(extra_groups).extra_groups}
        self._clip = Clip(max_norm, skip_non_finite)
        squares = not all(self._signed().values())
        self._precision = Precision(state_dtype, master_weights, stochastic_rounding, ema_decay, squares)
        self._forget()
        super().__init__(params, *args, **kwargs)
        for group in self.param_groups:
            # ZeroRedundancyOptimizer writes its keywords into the groups of which it gives each process a share
            if misplaced := {"max_norm", "skip_non_finite", "extra_groups"} & group.keys():
                raise ValueError(
                    f"a parameter group has {', '.join(sorted(misplaced))}: these are the whole optimizer's, of all "
                    "parameters in all processes. Under ZeroRedundancyOptimizer: optimizer_class="
                    f"functools.partial({type(self).__name__}, max_norm=..., extra_groups=[process_group])"
                )
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
        if self._in_backward is not None:
            self._in_backward.finish()
            return loss
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            self._update()
        return loss

    def _update(self) -> None:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        slots = self._gather()
        for _, param, _ in slots:
            if parts.is_shared(param) and param in self.state:
                with self._parts(param):  # placed as the parameter, or an error before anything is sent
                    pass
        grads = parts.gradients(param for _, param, _ in slots)
        together = self._holders.communicate  # then no process may turn back by what it alone has found
        if together and not self._clip.on and found_inf is not None:
            _, found_inf = self._holders.total({}, found_inf)
        on_host = _Scaling(found_inf, scale)
        if not self._steppers and not (together and self._clip.on) and on_host.skip:
            return  # GradScaler: nothing may change, step counters included

        fallback: list[list[Tensor]] = [[] for _ in self.param_groups]
        held: list[Tensor] = []  # copies and views that must outlive the launch
        for slot, param, group_index in slots:
            try:
                held += self._admit(slot, param, grads.get(param), self.param_groups[group_index])
            except Unfusable:
                fallback[group_index].append(param)

        if self._clip.on:
            total, found_inf = self._holders.total(self._sums_of_squares(fallback, grads), found_inf)
            found_inf, scale = self._clip(total, found_inf, scale)
            on_host = _Scaling(found_inf, scale)
        for group, tensors in zip(self.param_groups, fallback, strict=True):
            if tensors and not on_host.skip:
                self._update_by_torch(group, tensors, grads, on_host.inv_scale)
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
        for param in self._new_averages:
            with self._parts(param) as (here, state):
                state["ema"].copy_(precision.weight(here, state))  # the first is what the first step leaves
        self._new_averages.clear()

    def _gather(self) -> list[tuple[int, Tensor, int]]:
        """(slot, parameter, group index) of the parameters of this step that are not bound as they are now."""
        averages = self._precision.averages
        if self._table is None:
            slots = [
                (-1, param, g)
                for g, group in enumerate(self.param_groups)
                for param in group["params"]
                if param.grad is not None or averages
            ]
        else:
            rules = [cpu.rules()[self._rule(group)][0] for group in self.param_groups]
            found = self._table.gather(self.param_groups, self.state, rules, averages)
            slots = [(slot, *self._table.slot(slot)) for slot in found]
        known = None if self._table is None else self._table.filled()
        if slots or known != self._known:
            self._holders.look([param for group in self.param_groups for param in group["params"]])
            self._known = known
        return slots

    def _sums_of_squares(self, fallback: list[list[Tensor]], grads: dict[Tensor, Tensor]) -> dict[int, list[Tensor]]:
        """Of the gradients of this step, where they are, by the number of who holds them."""
        sums: dict[int, list[Tensor]] = {}
        by_torch: dict[int, list[Tensor]] = {}
        for param in (p for tensors in fallback for p in tensors if p in grads):
            by_torch.setdefault(self._holders.number(param), []).append(grads[param])
        for number, some in by_torch.items():
            sums.setdefault(number, []).extend(squares_by_torch(some))
        if self._table is not None:
            if self._on_cpu:
                for number, total in cpu.sum_of_squares(self._table).items():
                    sums.setdefault(number, []).append(torch.tensor(total, dtype=torch.float64))
            for stepper in self._steppers.values():
                found = stepper.sum_of_squares(self._table, self._device_groups(stepper.device))
                for number, total in found.items():
                    sums.setdefault(number, []).append(total)
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
        if self._table is None or backend is reference:
            raise Unfusable(
                "asked for"
                if self._options["backend"] == "reference"
                else f"no kernels for {param.device.type} tensors"
            )
        if group.get("differentiable"):
            raise Unfusable("differentiable=True")
        if self.norms and self._holders.number(param):
            raise Unfusable("its norms are sums over processes")
        if self._precision.stochastic_rounding and parts.is_shared(param):
            origin = parts.origin(param)
            if origin is None or (backend is not cpu and origin != (0, 1, 1)):
                raise Unfusable("random bits of a part")
        kind, param = self._state_kind(param), parts.part(param)
        if param.layout != torch.strided or (grad is not None and grad.layout != torch.strided):
            raise Unfusable("sparse")
        real = real_dtype(param.dtype)
        if not backend.supports(cpu.rules()[self._rule(group)][0], real, real, kind):
            raise Unfusable(f"no kernel for {param.dtype}" + (f" with {kind} states" if kind != real else ""))
        if param.is_neg() or param.is_conj():
            raise Unfusable("lazily negated or conjugated")
        if obstacle := cpu.obstacle(param):
            raise Unfusable(obstacle)
        return backend

    def _admit(self, slot: int, param: Tensor, grad: Tensor | None, group: dict[str, Any]) -> list[Tensor]:
        """Bind one parameter to its kernel; returns the temporaries that must live until the launch.

        `grad`: what of its gradient lies here, summed where it was Partial.
        """
        if grad is not None:
            check_memory(parts.part(param), grad)
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
        has_state = param in self.state
        with self._parts(param) if has_state else contextlib.nullcontext((parts.part(param), {})) as (here, state):
            told, held = self._read(here, grad, state, group, backend, self._state_kind(param), bool(made), known)
        if parts.is_shared(param):
            told["spec"] = param._spec
            told["grad_spec"] = None if grad is None else param.grad._spec
            told["lasting"] &= grad is None or grad is param.grad._local_tensor
            if self._precision.stochastic_rounding:
                told["origin"] = parts.origin(param)
        try:
            self._table.bind(
                slot,
                state_dict=self.state[param] if has_state else None,
                holders=self._holders.number(param),
                index=self._first_index + slot,
                fresh=bool(made),
                on_device=backend is not cpu,
                **told,
            )
        except ValueError as error:
            for key in made:
                del self.state[param][key]
                self.state[param].pop(f"{key}_scale", None)
            raise Unfusable(str(error)) from None
        if backend is cpu:
            self._on_cpu = True
        elif here.device not in self._steppers:
            self._steppers[here.device] = backend.Stepper(here.device)
        return held

    def _read(
        self,
        param: Tensor,
        grad: Tensor | None,
        state: dict[str, Any],
        group: dict[str, Any],
        backend: ModuleType,
        kind: torch.dtype | str,
        fresh: bool,
        known: bool,
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """What the table is told of a parameter's tensors, and those that must live until the launch."""
        rule = cpu.rules()[self._rule(group)][0]
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
        master, average = (state.get(key) for key in ("master", "ema"))
        counts = "rounding_step" if "rounding_step" in state else "step"
        counter = state.get(counts)
        if grad is None:
            counter = None
        elif backend is not cpu:
            counter = self._device_counter(param.device, state, counts, fresh)
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
        told = {
            "param": param,
            "grad": grad,
            "states": tuple(states),
            "scales": scales,
            "master": master,
            "ema": average,
            "step": counter,
            "owners": tuple(t.untyped_storage() for t in kept),
            "lasting": lasting,
        }
        return told, held

    def _device_counter(self, device: torch.device, state: dict[str, Any], counts: str, fresh: bool) -> Tensor:
        """The step counter, which the device advances: state[counts], or one of our own where stock counts no steps."""
        known = state.get(counts)
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
        if getattr(self, "_in_backward", None) is not None:
            raise RuntimeError("add_param_group() while backward steps: remove() the handle of step_in_backward first")
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
        self._new_averages: list[Tensor] = []
        self._holders = Holders(self._options["extra_groups"])
        self._known: int | None = None  # the table's tensors for which holders were looked up
        self._swapped = False  # inside ema_weights()
        self._first_index = 0  # of the parameters, among those whose random bits are told from each other
        self._in_backward: Any = None  # fusedopt.distributed.backward.StepInBackward

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_clip": self._clip, "_precision": self._precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        in_backward = getattr(self, "_in_backward", None)  # load_state_dict() comes here too
        self._forget()
        self._in_backward = in_backward
