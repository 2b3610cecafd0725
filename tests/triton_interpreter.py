"""Triton's interpreter: kernels run on the CPU, by NumPy.

Triton looks at TRITON_INTERPRET when it is imported, so a file of such tests runs twice: under pytest it starts itself
anew with the variable set, once, for all its tests. TRITON_INTERPRET=1 pytest tests/test_triton_step.py names each.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, which the first test starts")


def run_anew(file, which="not thorough"):
    """Run a file's tests in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", which, "--timeout=600", "-p", "no:cacheprovider", file]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    print(run.stdout.splitlines()[-1])


# What the interpreter gets wrong. It truncates where it should round to bfloat16, and reads bfloat16's subnormal
# numbers as others; GPUs have an instruction for the first, and the second is a shift.
_cast = interpreter.InterpreterBuilder.cast_impl


def _exact_cast(self, src, dst_type):
    types = src.dtype.scalar, dst_type.scalar
    if types == (tl.bfloat16, tl.float32):
        data = (src.data.astype(np.uint32) << 16).view(np.float32)
    elif types == (tl.float32, tl.bfloat16):
        data = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    else:
        return _cast(self, src, dst_type)
    return interpreter.TensorHandle(data, dst_type.scalar)


def _splat(self, ret_ty, arg):
    # a comparison of scalars is a bool; its own says the type of what was compared
    return interpreter.TensorHandle(np.full(ret_ty.shape, arg.data.reshape(-1)[0]), arg.dtype.scalar)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor, scope):
    _patch_tensor(tensor, scope)
    # NumPy 2.4 makes no number of an array of one, as Triton 3.6 asks
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patch_language = interpreter._patch_lang
_patched = set()


def _patch_once(fn):
    # It looks through the whole language again at every launch and call: half of the time. Here all is interpreted.
    if fn.__module__ not in _patched:
        _patch_language(fn)
        _patched.add(fn.__module__)
    return interpreter._LangPatchScope()  # which restores nothing


if INTERPRETED:
    interpreter.InterpreterBuilder.cast_impl = _exact_cast
    interpreter.InterpreterBuilder.create_splat = _splat
    interpreter._patch_lang_tensor = _patch_tensor_for_numpy
    interpreter._patch_lang = _patch_once
