"""What a step leaves when a launch or a call in it fails: `failures.py LIBRARY` lets each of them fail once."""

import re

import simulated
import torch
from simulated import control

import fusedopt.optim

LAUNCH_FAILURE, OUT_OF_MEMORY = 719, 2  # of cudaError
OCCUPANCY = "cudaOccupancyMaxActiveBlocksPerMultiprocessor"
LOST = "after its step counters were advanced: reload a checkpoint"
control.fusedopt_simt_launch_count.restype = simulated.ctypes.c_size_t


def fresh(kind):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 20000)]
    for p in params:
        p.grad = p.detach().cos()
    return getattr(fusedopt.optim, kind)(params, lr=0.1, weight_decay=0.01, backend="cuda")


def everything(optimizer):
    params = optimizer.param_groups[0]["params"]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


def after(steps, kind="AdamW"):
    optimizer = fresh(kind)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def same(a, b):
    return all(map(torch.equal, everything(a), everything(b)))


def launches(steps, kind):
    """How many kernels a step launches, after so many before it."""
    optimizer = after(steps, kind)
    control.fusedopt_simt_reset()
    optimizer.step()
    return control.fusedopt_simt_launch_count()


def message(optimizer):
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("the step did not fail")


def fail_each_launch(steps, kind="AdamW"):
    """The kernels that the messages name; in a step after so many."""
    names = []
    for n in range(1, launches(steps, kind) + 1):
        optimizer = after(steps, kind)
        control.fusedopt_simt_fail_launch(n, LAUNCH_FAILURE)
        text = message(optimizer)
        name = re.match(rf"(\w+)(<{kind.lower()}>)?(, [^:]*: [^:]*)?: cudaErrorLaunchFailure: simulated$", text)
        assert name, text
        names.append(name[1])
        if name[1] in ("norms", "adapt", "update"):
            assert LOST in text and name[2], text
            assert all(optimizer.state[p]["step"] == steps + 1 for p in optimizer.param_groups[0]["params"])
            optimizer.step()
        else:
            assert LOST not in text, text
            if steps:  # the first step makes the state
                assert same(optimizer, after(steps, kind)), name[1]
            optimizer.step()
            assert same(optimizer, after(steps + 1, kind)), name[1]
    return names


def fail_each_call():
    for call in ("cudaGetDevice", "cudaDeviceGetAttribute", OCCUPANCY):
        optimizer = after(1)
        control.fusedopt_simt_fail_call(call.encode(), 1, OUT_OF_MEMORY)
        text = message(optimizer)
        assert text == f"{call}: cudaErrorMemoryAllocation: simulated", text
        assert same(optimizer, after(1)), call
        optimizer.step()
        assert same(optimizer, after(2)), call


def two_dtypes():
    """What fails when other tensors were stepped already says so."""
    failures = {
        "prepare<adamw>": lambda: control.fusedopt_simt_fail_launch(3, LAUNCH_FAILURE),
        OCCUPANCY: lambda: control.fusedopt_simt_fail_call(OCCUPANCY.encode(), 2, OUT_OF_MEMORY),
    }
    for what, fail in failures.items():
        params = [torch.nn.Parameter(torch.ones(9, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = fusedopt.optim.AdamW(params, backend="cuda")
        optimizer.step()
        fail()
        text = message(optimizer)
        assert text.startswith(f"{what}, after other tensors were stepped: reload a checkpoint: cuda"), text
        assert sorted(float(optimizer.state[p]["step"]) for p in params) == [1, 2]


torch.set_num_threads(1)
first, second = fail_each_launch(0), fail_each_launch(1)
assert first == ["unpack", "unpack", "map_chunks", "unpack", "prepare", "update"], first
assert second == ["prepare", "update"], second
normed = fail_each_launch(1, "LAMB")
assert normed == ["prepare", "norms", "adapt", "update"], normed
fail_each_call()
two_dtypes()
print("every failure is told")
