"""What the kernels read, kept on the device, and the launches of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedopt.backends.triton import Launch, kernels
from fusedopt.backends.triton.options import options
from fusedopt.backends.triton.rules import RULES

_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Tuning(NamedTuple):
    """How `update` is launched: by width of the parameter's dtype, never by a tensor's size."""

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

_START = 2  # words: the first two hold "no inf found" and "gradients are not scaled", for steps without GradScaler


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
        self._prepares: list[Callable[..., Any]] = []
        self._updates: list[Callable[..., Any]] = []
        self._measures: list[tuple[Callable[..., Any], int]] = []  # and how many chunks
        self._partial: Tensor | None = None

    def sum_of_squares(self, launches: Sequence[Launch], groups: Tensor) -> Tensor:
        """() float64: of all gradients; two kernels and one of each Launch."""
        with torch.accelerator.device_index(self._device.index if self._on_gpu else None):
            self._send(launches, torch.as_tensor(groups))
            n = sum(chunks for _, chunks in self._measures)
            if self._partial is None or len(self._partial) != n:
                self._partial = torch.empty(n, dtype=torch.float64, device=self._device)
            begin = 0
            for measure, chunks in self._measures:
                measure(self._partial[begin : begin + chunks])
                begin += chunks
            return self._partial.sum()

    def step(
        self,
        launches: Sequence[Launch],
        groups: Tensor,  # (n_groups, 11) int64
        found_inf: Tensor | None = None,  # float32 scalar on the device
        grad_scale: Tensor | None = None,  # float32 scalar on the device
    ) -> int:
        """Update the tensors; returns the number of kernels launched: at most two per Launch."""
        with torch.accelerator.device_index(self._device.index if self._on_gpu else None):
            self._send(launches, torch.as_tensor(groups))
            found_inf = self._no_inf if found_inf is None else found_inf
            grad_scale = self._no_scale if grad_scale is None else grad_scale
            for prepare in self._prepares:
                prepare(found_inf, grad_scale)
            for update in self._updates:
                update(found_inf)
        return len(self._prepares) + len(self._updates)

    def _send(self, launches: Sequence[Launch], groups: Tensor) -> None:
        layout = [groups.shape, *((*launch[:4], len(launch.rows), len(launch.chunk_rows)) for launch in launches)]
        if layout != self._layout:
            self._lay_out(launches, groups)
        elif not any(launch.changed for launch in launches):
            if not torch.equal(groups, self._groups):
                self._upload(_START, [(0, groups)])
                self._groups = groups.clone()
            return
        constants = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float32)
        parts = [(0, constants), (_START, groups)]
        for launch, (rows, grads, chunks) in zip(launches, self._places, strict=True):
            parts += [(rows, launch.rows), (grads, launch.grads), (chunks, launch.chunk_rows)]
        self._upload(0, parts)
        self._layout, self._groups = layout, groups.clone()

    def _lay_out(self, launches: Sequence[Launch], groups: Tensor) -> None:
        """Allocate for these sizes, and bind the launches to their addresses."""
        self._layout = []
        self._places = []
        end = _START + groups.numel()
        for launch in launches:
            place = []
            for words in (14 * len(launch.rows), len(launch.grads), -(-len(launch.chunk_rows) // 2)):
                end += end % 2  # 16-byte alignment, for every table alike: Triton compiles anew for another
                place.append(end)
                end += words
            self._places.append(place)
        scratch = []  # is written on the device only
        for launch in launches:
            end += end % 2
            scratch.append(end)
            end += len(launch.rows) * (RULES[launch.rule].scalars + 1)
        self._words = torch.empty(end, dtype=torch.int64, device=self._device)
        self._no_inf, self._no_scale = self._words[:1].view(torch.float32)[0], self._words[1:2].view(torch.float32)[0]

        self._prepares, self._updates, self._measures = [], [], []
        for launch, place, scratch_at in zip(launches, self._places, scratch, strict=True):
            self._bind(launch, *(self._words[at:] for at in (_START, *place, scratch_at)))

    def _bind(
        self, launch: Launch, groups: Tensor, rows: Tensor, grads: Tensor, chunks: Tensor, scratch: Tensor
    ) -> None:
        rule, tuning = RULES[launch.rule], TUNING[launch.param.itemsize]
        scratch = scratch.view(torch.float64 if launch.param == torch.float64 else torch.float32)
        n_rows, n_chunks = len(launch.rows), len(launch.chunk_rows)
        compiler = options(self._device, THREADS)
        if n_rows:
            self._prepares.append(
                functools.partial(
                    kernels.prepare[(-(-n_rows // THREADS),)],
                    *(rows, groups, scratch, n_rows),
                    DERIVE=rule.derive,
                    HYPER=len(rule.hyper),
                    SCALARS=rule.scalars,
                    BLOCK=THREADS,
                    **compiler,
                )
            )
        if n_chunks:
            programs = _multiprocessors(self._device) * tuning.programs[len(rule.states)]
            split = max(1, min(programs // n_chunks, kernels.CHUNK.value // tuning.block))
            arguments = (rows, grads, chunks.view(torch.int32), scratch, n_chunks, split)
            constants = {
                "UPDATE": rule.update,
                "SCALARS": rule.scalars,
                "STATES": len(rule.states),
                "PARAM": _DTYPE[launch.param],
                "GRAD": _DTYPE[launch.grad],
                "STATE": _DTYPE[launch.state],
                "BLOCK": tuning.block,
            }
            grid = (min(n_chunks * split, programs),)
            # compiled before anything runs: should it fail, no step counter has moved
            kernels.update.warmup(*arguments, self._no_inf, grid=grid, **constants, **compiler)
            measures = min(n_chunks, 8 * _multiprocessors(self._device))
            block = 16 // launch.grad.itemsize * THREADS
            measure = kernels.sum_squares[(measures,)]
            tables = (rows, grads, chunks.view(torch.int32), n_chunks)
            bound = functools.partial(measure, *tables, GRAD=_DTYPE[launch.grad], BLOCK=block, **compiler)
            self._measures.append((bound, n_chunks))
            self._updates.append(functools.partial(kernels.update[grid], *arguments, **constants, **compiler))

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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count
