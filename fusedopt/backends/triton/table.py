"""What the kernels read, kept on the device, and the launches of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedopt.backends import cpu, sums
from fusedopt.backends.triton import PLAIN, Launch, Precision, kernels, norms, precise
from fusedopt.backends.triton.options import options
from fusedopt.backends.triton.precise import Kind
from fusedopt.backends.triton.rules import RULES

_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


_MASTER = {torch.bfloat16: tl.int16, torch.float16: tl.float32}


class Tuning(NamedTuple):
    """How an update is launched: by width of the parameter's dtype, never by a tensor's size."""

    block: int  # elements
    programs: tuple[int, ...]  # resident per multiprocessor, by number of states


# Every byte moves once and none is used again, so loads in flight are all that counts: 16 bytes per thread and array,
# and all the programs that find registers. (More elements per thread take more registers than they bring bytes.) One
# that found none would start when the others end: a test compares the counts with the registers of the kernels.
THREADS = 128
TUNING = {
    8: Tuning(2 * THREADS, (12, 7, 5, 5)),
    4: Tuning(4 * THREADS, (16, 9, 8, 7)),
    2: Tuning(8 * THREADS, (10, 7, 5, 4)),
}

# Of precise.update and norms.norms. Eight elements a thread share a call of Philox, and a warp then has the codes of a
# scale.
PRECISE = {
    8: Tuning(2 * THREADS, (10, 6, 5, 4)),
    4: Tuning(4 * THREADS, (10, 7, 5, 4)),
    2: Tuning(8 * THREADS, (7, 5, 4, 4)),
}
STOCHASTIC = 4  # programs: random bits take registers

SUMS = 4 * THREADS  # of chunks, that `adapt` takes at a time

_TOLD = 2  # words: the first two hold "no inf found" and "gradients are not scaled", for steps without GradScaler
_START = 4


class Tables(NamedTuple):
    """Of one Launch, on the device; to the end of all words, as a kernel asks for no length."""

    rows: Tensor
    grads: Tensor
    chunks: Tensor
    scratch: Tensor  # is written on the device only, as are
    squares: Tensor  # float64, of rules that are normed


class DeviceTable:
    """The tables of one optimizer's tensors on one device; `step` sends what changed and launches.

    All kernels and copies go to the current stream, nothing waits, and a graph may capture it. A capture must have a
    table of its own, which has to live as long as the graph: replays read it.
    """

    def __init__(self, device: torch.device):
        self._device = torch.device(device)
        self._on_gpu = self._device.type != "cpu"  # Triton's interpreter works in host memory
        self._layout: list[Any] = []
        self._groups: Tensor | None = None
        self._words: Tensor | None = None
        self._sent: list[Tensor] = []
        self._precision: Precision | None = None
        self._told = torch.zeros(2, dtype=torch.int64)  # of it
        self._kinds: list[Any] = []
        self._tables: list[Tables] = []
        self._prepares: list[Callable[..., Any]] = []
        self._updates: list[Callable[..., Any]] = []
        self._measures: list[tuple[Callable[..., Any], int]] = []  # and how many chunks
        self._partial: Tensor | None = None

    def sum_of_squares(self, launches: Sequence[Launch], groups: Tensor) -> dict[int, Tensor]:
        """() float64 of all gradients, by their holders; two kernels and one of each Launch."""
        with torch.accelerator.device_index(self._device.index if self._on_gpu else None):
            self._send(launches, torch.as_tensor(groups))
            n = sum(chunks for _, chunks in self._measures)
            if self._partial is None or len(self._partial) != n:
                self._partial = torch.empty(n, dtype=torch.float64, device=self._device)
            begin = 0
            for measure, chunks in self._measures:
                measure(self._partial[begin : begin + chunks])
                begin += chunks
            chunks = [(launch.holders, len(launch.chunk_rows)) for launch in launches]
            return sums.by_holders(chunks, self._partial, self._partial.sum())

    def step(
        self,
        launches: Sequence[Launch],
        groups: Tensor,  # (n_groups, 11) int64
        found_inf: Tensor | None = None,  # float32 scalar on the device
        grad_scale: Tensor | None = None,  # float32 scalar on the device
        precision: Precision | None = None,
    ) -> int:
        """Update the tensors; returns the number of kernels launched: two per Launch, or four where its rule needs
        norms; one or two more where some of its rows have a master weight and others have none."""
        with torch.accelerator.device_index(self._device.index if self._on_gpu else None):
            self._tell(precision)
            self._send(launches, torch.as_tensor(groups))
            self._choose(launches)
            found_inf = self._no_inf if found_inf is None else found_inf
            grad_scale = self._no_scale if grad_scale is None else grad_scale
            for prepare in self._prepares:
                prepare(found_inf, grad_scale)
            for update in self._updates:
                update(found_inf)
        return len(self._prepares) + len(self._updates)

    def _tell(self, precision: Precision | None) -> None:
        if precision == self._precision:
            return
        ema_weight, _, seed = precision or (0.0, False, 0)
        share = torch.tensor([ema_weight], dtype=torch.float64).view(torch.int64)
        self._told = torch.cat([share, torch.tensor([seed], dtype=torch.uint64).view(torch.int64)])
        if self._words is not None:
            self._upload(_TOLD, [(0, self._told)])
        self._precision, self._kinds = precision, []

    def _send(self, launches: Sequence[Launch], groups: Tensor) -> None:
        layout = [groups.shape, *((*launch[:4], len(launch.rows), len(launch.chunk_rows)) for launch in launches)]
        if layout != self._layout:
            self._lay_out(launches, groups)
        elif not any(launch.changed for launch in launches):
            if not torch.equal(groups, self._groups):
                self._upload(_START, [(0, groups)])
                self._groups = groups.clone()
            return
        constants = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float32).view(torch.int64)
        parts = [(0, torch.cat([constants, self._told])), (_START, groups)]
        for launch, (rows, grads, chunks) in zip(launches, self._places, strict=True):
            parts += [(rows, launch.rows), (grads, launch.grads), (chunks, launch.chunk_rows)]
        self._upload(0, parts)
        self._layout, self._groups = layout, groups.clone()

    def _lay_out(self, launches: Sequence[Launch], groups: Tensor) -> None:
        """Allocate for these sizes, and bind what does not depend on how the tensors are kept."""
        self._layout, self._kinds = [], []
        self._places = []
        end = _START + groups.numel()
        for launch in launches:
            place = []
            for words in (14 * len(launch.rows), len(launch.grads), -(-len(launch.chunk_rows) // 2)):
                end += end % 2  # 16-byte alignment, for every table alike: Triton compiles anew for another
                place.append(end)
                end += words
            self._places.append(place)
        written = []
        for launch in launches:
            rule, place = RULES[launch.rule], []
            for words in (len(launch.rows) * (rule.scalars + 1), 2 * len(launch.chunk_rows) if rule.normed else 0):
                end += end % 2
                place.append(end)
                end += words
            written.append(place)
        self._words = torch.empty(end, dtype=torch.int64, device=self._device)
        self._no_inf, self._no_scale = self._words[:1].view(torch.float32)[0], self._words[1:2].view(torch.float32)[0]

        self._tables, self._prepares, self._measures = [], [], []
        for launch, *places in zip(launches, self._places, written, strict=True):
            rows, grads, chunks, scratch, squares = (self._words[at:] for place in places for at in place)
            scratch = scratch.view(torch.float64 if launch.param == torch.float64 else torch.float32)
            tables = Tables(rows, grads, chunks.view(torch.int32), scratch, squares.view(torch.float64))
            self._tables.append(tables)
            self._bind_prepare(launch, tables)
            self._bind_measure(launch, tables)

    def _bind_prepare(self, launch: Launch, tables: Tables) -> None:
        if n_rows := len(launch.rows):
            rule = RULES[launch.rule]
            self._prepares.append(
                functools.partial(
                    kernels.prepare[(-(-n_rows // THREADS),)],
                    *(tables.rows, tables.grads, self._words[_START:], tables.scratch, n_rows),
                    DERIVE=rule.derive,
                    HYPER=len(rule.hyper),
                    SCALARS=rule.scalars,
                    BLOCK=THREADS,
                    **options(self._device, THREADS),
                )
            )

    def _bind_measure(self, launch: Launch, tables: Tables) -> None:
        if n_chunks := len(launch.chunk_rows):
            measure = functools.partial(
                kernels.sum_squares[(min(n_chunks, 8 * _multiprocessors(self._device)),)],
                *(*tables[:3], n_chunks),
                GRAD=_DTYPE[launch.grad],
                BLOCK=16 // launch.grad.itemsize * THREADS,
                **options(self._device, THREADS),
            )
            self._measures.append((measure, n_chunks))

    def _choose(self, launches: Sequence[Launch]) -> None:
        """Bind the updates that the launches need at this precision."""
        if self._kinds and not any(launch.changed for launch in launches):
            return
        kinds = [_kinds(launch, self._precision) for launch in launches]
        if kinds == self._kinds:
            return
        self._updates = []
        for launch, its_kinds, tables in zip(launches, kinds, self._tables, strict=True):
            if RULES[launch.rule].normed and its_kinds:
                self._updates += [self._bind_norms(launch, kind, tables) for kind in its_kinds]
                self._updates.append(self._bind_adapt(launch, tables))
            self._updates += [self._bind_update(launch, kind, tables) for kind in its_kinds]
        self._kinds = kinds

    def _bind_norms(self, launch: Launch, kind: Kind | None, tables: Tables) -> Callable[..., Any]:
        rule, n_chunks = RULES[launch.rule], len(launch.chunk_rows)
        tuning = PRECISE[launch.param.itemsize]
        states = (_DTYPE.get(launch.state),) * len(rule.states)
        kind = kind or Kind(_DTYPE[launch.param], _DTYPE[launch.grad], states, False, None, False, False)
        constants = {
            "ADAPTS": rule.normed.adapts,
            "DIRECTION": rule.normed.direction,
            "SCALARS": rule.scalars,
            "KIND": kind._replace(averaged=False, stochastic=False),
            "BLOCK": tuning.block,
        }
        programs = _multiprocessors(self._device) * tuning.programs[len(rule.states)]
        return self._bind(norms.norms, (min(n_chunks, programs),), (*tables, n_chunks), constants)

    def _bind_adapt(self, launch: Launch, tables: Tables) -> Callable[..., Any]:
        rule, n_rows = RULES[launch.rule], len(launch.rows)
        constants = {"ADAPT": rule.normed.adapt, "SCALARS": rule.scalars, "BLOCK": SUMS}
        grid = (min(n_rows, 8 * _multiprocessors(self._device)),)
        return self._bind(norms.adapt, grid, (tables.rows, tables.scratch, tables.squares, n_rows), constants)

    def _bind_update(self, launch: Launch, kind: Kind | None, tables: Tables) -> Callable[..., Any]:
        rule, n_chunks = RULES[launch.rule], len(launch.chunk_rows)
        tuning = (TUNING if kind is None else PRECISE)[launch.param.itemsize]
        resident = STOCHASTIC if kind is not None and kind.stochastic else tuning.programs[len(rule.states)]
        programs = _multiprocessors(self._device) * resident
        split = max(1, min(programs // n_chunks, kernels.CHUNK.value // tuning.block))
        constants = {"UPDATE": rule.update, "SCALARS": rule.scalars, "BLOCK": tuning.block}
        if kind is None:
            kernel, arguments = kernels.update, (*tables[:4], n_chunks, split)
            constants |= {
                "STATES": len(rule.states),
                "PARAM": _DTYPE[launch.param],
                "GRAD": _DTYPE[launch.grad],
                "STATE": _DTYPE[launch.state],
            }
        else:
            kernel, arguments = precise.update, (*tables[:4], self._words[_TOLD:], n_chunks, split)
            constants["KIND"] = kind
        return self._bind(kernel, (min(n_chunks * split, programs),), arguments, constants)

    def _bind(
        self, kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> Callable[..., Any]:
        """A launch that lacks found_inf; compiled before anything runs: should it fail, no step counter has moved."""
        compiler = options(self._device, THREADS)
        kernel.warmup(*arguments, self._no_inf, grid=grid, **constants, **compiler)
        return functools.partial(kernel[grid], *arguments, **constants, **compiler)

    def _upload(self, begin: int, parts: list[tuple[int, Any]]) -> None:
        """Copy arrays to words begin + offset, in one copy that nobody waits for."""
        parts = [(at, torch.as_tensor(array).reshape(-1)) for at, array in parts]
        size = max(at + -(-array.nbytes // 8) for at, array in parts)
        host = torch.empty(size, dtype=torch.int64, pin_memory=self._on_gpu)
        for at, array in parts:
            scale = 8 // array.itemsize
            host.view(array.dtype)[at * scale : at * scale + len(array)] = array
        self._words[begin : begin + size].copy_(host, non_blocking=True)
        # PyTorch gives a pinned buffer away only after the copies from it are done. Of replays it knows nothing.
        self._sent = [*self._sent, host] if self._capturing() else [host]

    def _capturing(self) -> bool:
        return self._on_gpu and torch.get_device_module(self._device).is_current_stream_capturing()


def _kinds(launch: Launch, precision: Precision | None) -> list[Kind | None]:
    """How a launch's tensors are kept: of the rows without a master weight, and of those with one; or all plainly."""
    plain = (launch.param, launch.grad, launch.state) in PLAIN
    if not len(launch.chunk_rows):
        return []
    if plain and precision is None:
        return [None]
    rows, grads = torch.as_tensor(launch.rows), torch.as_tensor(launch.grads)
    masters = sorted(set(rows[rows[:, 5] != 0, 11].bool().tolist()))  # an empty tensor's is null
    averaged = bool(rows[:, 12].any())
    signed = cpu.rules()[launch.rule][3]
    code = [tl.int8 if signed >> k & 1 else tl.uint8 for k in range(len(RULES[launch.rule].states))]
    coded = launch.state == "8bit"
    rounded = torch.bfloat16 in (launch.param, launch.state) or (coded and tl.uint8 in code)
    stochastic = precision is not None and precision[1] and rounded
    if plain and not (any(masters) or averaged or stochastic) and bool(grads.all()):
        return [None]
    return [
        Kind(
            _DTYPE[launch.param],
            _DTYPE[launch.grad],
            tuple(code if coded else [_DTYPE[launch.state]] * len(code)),
            coded,
            master=_MASTER[launch.param] if has_master else None,
            averaged=averaged,
            stochastic=stochastic,
        )
        for has_master in masters
    ]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count
