"""Launches of steps and losses on the simulated GPU, and the bytes that they move: `counts.py LIBRARY`; prints JSON.

LIBRARY is of the kind "counted" (build.py). Bytes are those of parameters, gradients, states and logits, as threads ask
for them; not of tables, partial sums and step counters, whose number does not grow with the elements.
"""

import simulated  # noqa: I001
import ctypes
import json

import torch

from fusedopt import optim
from fusedopt.backends import cuda
from fusedopt.nn.functional import cross_entropy

NUMEL = (4096, 8192)  # of each tensor: whole vectors, and blocks of codes
ROWS, CLASSES = 3, 4096
F32, BF16 = torch.float32, torch.bfloat16
STEPS = {
    # name: class, options, dtypes of the tensors
    "adamw f32": (optim.AdamW, {}, [F32]),
    "adamw bf16": (optim.AdamW, {}, [BF16]),
    "adamw f32 and bf16": (optim.AdamW, {}, [F32, BF16]),
    "adamw amsgrad f32": (optim.AdamW, {"amsgrad": True}, [F32]),
    "adamw f32, max_norm": (optim.AdamW, {"max_norm": 1.0}, [F32]),
    "adamw f32, ema": (optim.AdamW, {"ema_decay": 0.999}, [F32]),
    "adamw f32, max_norm, ema": (optim.AdamW, {"max_norm": 1.0, "ema_decay": 0.999}, [F32]),
    "adamw bf16, master": (optim.AdamW, {"master_weights": True}, [BF16]),
    "adamw f32, 8-bit": (optim.AdamW, {"state_dtype": "8bit"}, [F32]),
    "adamw bf16, 8-bit": (optim.AdamW, {"state_dtype": "8bit"}, [BF16]),
    "lamb f32": (optim.LAMB, {"weight_decay": 0.01}, [F32]),
    "adagrad f32": (optim.Adagrad, {}, [F32]),
    "rmsprop f32": (optim.RMSprop, {}, [F32]),
    "sgd momentum f32": (optim.SGD, {"lr": 1e-3, "momentum": 0.9}, [F32]),
    "lion f32": (optim.Lion, {}, [F32]),
}
control = simulated.control
control.fusedopt_simt_watch.argtypes = ctypes.c_void_p, ctypes.c_size_t
control.fusedopt_simt_bytes.argtypes = (ctypes.c_bool,)
control.fusedopt_simt_bytes.restype = control.fusedopt_simt_launch_count.restype = ctypes.c_size_t


def watch(tensor):
    control.fusedopt_simt_watch(tensor.data_ptr(), tensor.nbytes)
    return tensor


def begin(tensors):
    control.fusedopt_simt_reset()
    control.fusedopt_simt_unwatch()
    for tensor in tensors:
        watch(tensor)


def counted(elements):
    moved = [control.fusedopt_simt_bytes(written) / elements for written in (False, True)]
    return {"launches": control.fusedopt_simt_launch_count(), "read": moved[0], "written": moved[1]}


def step(cls, options, dtypes):
    """A step after the first two, per parameter."""
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for dtype in dtypes for n in NUMEL]
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)
    optimizer = cls(params, backend="cuda", **options)
    for _ in range(2):
        optimizer.step()
    assert {row.backend for row in optimizer.backend_report()} == {"cuda"}
    begin(t for p in params for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1)
    optimizer.step()
    return counted(sum(p.numel() for p in params))


def loss(dtype, inplace=False):
    """Forward and backward, per logit. The gradient lies where the kernels' own buffer lies, or over the logits."""
    leaf = torch.randn(ROWS, CLASSES).to(dtype).requires_grad_()
    logits = leaf * 1
    target = torch.randint(CLASSES, (ROWS,))
    begin([logits])
    cross_entropy(logits, target, inplace=inplace, backend="cuda").backward()
    return counted(ROWS * CLASSES)


torch.set_num_threads(1)
torch.manual_seed(0)
own_gradient = cuda.new_gradient
cuda.new_gradient = lambda logits: watch(own_gradient(logits))
found = {name: step(*row) for name, row in STEPS.items()}
for label, dtype in (("f32", F32), ("bf16", BF16)):
    found[f"cross entropy {label}"] = loss(dtype)
    found[f"cross entropy inplace {label}"] = loss(dtype, inplace=True)
print(json.dumps(found))
