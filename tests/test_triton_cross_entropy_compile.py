"""What Triton makes of the cross entropy kernels, for GPUs that are not here; `make thorough` compiles the others."""

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton's kernels are compiled where Triton is installed: pip install triton")

from triton_elsewhere import TARGETS, Code, compiled, forget, pretend

from fusedopt.backends.triton import cross_entropy

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

LONG = 1 << 17
WEIGHT = torch.ones(LONG)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Variant(NamedTuple):
    """A rule of the loss, as fusedopt.nn has it, and what else of the arguments the kernels are compiled for."""

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    probabilities: bool = False
    stats: bool = False


VARIANTS = {
    "plain": Variant(),
    "stats": Variant(stats=True),
    "weight": Variant(WEIGHT),
    "softcap": Variant(softcap=30.0),
    "smoothing": Variant(label_smoothing=0.1),
    "smoothing, weight": Variant(WEIGHT, label_smoothing=0.1),
    "smoothing, weight, softcap": Variant(WEIGHT, label_smoothing=0.1, softcap=30.0),
    "smoothing, weight, softcap, stats": Variant(WEIGHT, label_smoothing=0.1, softcap=30.0, stats=True),
    "probabilities": Variant(probabilities=True),
    "probabilities, weight, softcap": Variant(WEIGHT, softcap=30.0, probabilities=True),
    "probabilities, weight, softcap, stats": Variant(WEIGHT, softcap=30.0, probabilities=True, stats=True),
}
ALL = [(target, dtype, name) for target in TARGETS for dtype in DTYPES for name in VARIANTS]
SOME = [
    (target, dtype, name)
    for target, dtype, name in ALL
    if (name in ("plain", "probabilities, weight, softcap, stats") and dtype != "f16")
    or (target == "sm_90" and dtype == "f32" and "softcap" in name)
]


class Stats(NamedTuple):
    argmax: Tensor
    correct: Tensor
    entropy: Tensor


@pytest.fixture
def elsewhere(monkeypatch):
    yield lambda target: pretend(monkeypatch, target, cross_entropy)
    forget(cross_entropy.forward)
    forget(cross_entropy.backward)


def compile_both(rule, logits, factor=1.0, upstream=None, grad=None):
    n = len(logits)
    target = torch.zeros_like(logits) if rule.probabilities else torch.zeros(n, dtype=torch.int64)
    flags = torch.zeros(n, dtype=torch.bool)
    stats = Stats(torch.zeros(n, dtype=torch.int64), flags, torch.zeros(n)) if rule.stats else None
    rows, lse = torch.zeros(2, n).unbind()
    grad = logits if grad is None else grad
    cross_entropy.cross_entropy_forward(logits, target, rule, grad, factor, rows, lse, stats)
    cross_entropy.cross_entropy_backward(logits, target, rule, grad, factor, upstream, lse)


def check(target, dtype, name, elsewhere, folder):
    elsewhere(target)
    rule = VARIANTS[name]
    compile_both(rule, torch.zeros(2, LONG, dtype=DTYPES[dtype]), upstream=torch.zeros(2))
    arrays = 1 + rule.probabilities
    stores = 1 if rule.probabilities else 2  # the gradient, and zeros for an ignored row
    for kernel, reads in ((cross_entropy.forward, 2), (cross_entropy.backward, 1)):
        (only,) = compiled(kernel, target)
        code, metadata = Code.of(only, folder), only.metadata
        block = only.src.constants[(kernel.arg_names.index("BLOCK"),)]
        each = block * DTYPES[dtype].itemsize // 16 // (metadata.num_warps * TARGETS[target].warp_size)
        assert code.local == 0, code
        assert code.loads >= each * reads * arrays and code.stores >= each * stores, code


@pytest.mark.parametrize(("target", "dtype", "name"), SOME)
def test_kernels_move_16_bytes_at_a_time_and_spill_nothing(target, dtype, name, elsewhere, tmp_path):
    check(target, dtype, name, elsewhere, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(("target", "dtype", "name"), [variant for variant in ALL if variant not in SOME])
def test_so_does_every_other_kernel(target, dtype, name, elsewhere, tmp_path):
    check(target, dtype, name, elsewhere, tmp_path)


def test_one_compilation_serves_all_shapes_strides_addresses_and_numbers(elsewhere):
    elsewhere("sm_90")
    memory = torch.zeros(2 * LONG)
    for rule in (Variant(softcap=30.0), Variant(softcap=1.0, z_loss=1.0, logit_scale=16.0, ignore_index=16)):
        for n, classes, stride, offset in (
            (1, 1 << 16, 1 << 16, 0),
            (2, 50257, 50257, 1),
            (1, LONG - 1, LONG, 3),
            (2, 40000, 40016, 16),
        ):
            logits = memory.as_strided((n, classes), (stride, 1), offset)
            compile_both(rule, logits)
    for kernel in (cross_entropy.forward, cross_entropy.backward):
        assert len(compiled(kernel, "sm_90")) == 1
    # shorter rows: powers of two; a gradient of another alignment
    for classes in (1, 1000, 2047, 2048):
        compile_both(Variant(softcap=30.0), memory[: 2 * classes].view(2, classes))
    compile_both(Variant(softcap=30.0), memory[:50000].view(1, -1), grad=torch.zeros(50001)[1:].view(1, -1))
    assert len(compiled(cross_entropy.forward, "sm_90")) == 3
