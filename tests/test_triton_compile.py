"""What Triton makes of the optimizers' kernels, for GPUs that are not here: no device is needed to compile.

`make thorough` compiles every rule with every dtype for every target; here each stands once for many.
"""

import os

import pytest
import torch
from optim_table import DTYPES

from fusedopt.backends import triton as backend

pytest.importorskip("triton", reason="Triton's kernels are compiled where Triton is installed: pip install triton")

from triton_elsewhere import TARGETS, Code, check_norms, compiled, forget, pretend

from fusedopt.backends.triton import kernels, norms, table
from fusedopt.backends.triton.rules import RULES

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

ALL = [(target, rule, dtypes) for target in TARGETS for rule in RULES for dtypes in DTYPES]
# each rule in one dtype; the most states everywhere
SOME = [
    (target, rule, dtypes)
    for target, rule, dtypes in ALL
    if (target == "sm_90" and dtypes == ("f32", "bf16")[list(RULES).index(rule) % 2])
    or (rule == "adam_amsgrad" and dtypes in ("f32", "bf16", "f64"))
    or (rule, target, dtypes) == ("lamb", "gfx942", "bf16")
]


@pytest.fixture
def elsewhere(monkeypatch):
    yield lambda target: pretend(monkeypatch, target, table)
    for kernel in (kernels.prepare, norms.norms, norms.adapt, kernels.update):
        forget(kernel)


def launch(rule, dtypes, rows=3, chunks=5):
    dtype, grad_dtype = DTYPES[dtypes]
    words = torch.zeros(rows, 14, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    return backend.Launch(rule, dtype, grad_dtype, dtype, *words, torch.zeros(chunks, dtype=torch.int32), True)


def groups(n=1):
    return torch.zeros(n, 11, dtype=torch.int64)


def check(target, rule, dtypes, elsewhere, folder):
    elsewhere(target)
    backend.new_table(torch.device("cpu")).step([launch(rule, dtypes)], groups())
    (prepare,), (update,) = compiled(kernels.prepare, target), compiled(kernels.update, target)
    assert Code.of(prepare, folder).local == 0
    code, states = Code.of(update, folder), len(RULES[rule].states)
    assert code.local == 0, code
    assert code.loads >= 2 + states and code.stores >= 1 + states, code  # of each array
    programs = table.TUNING[DTYPES[dtypes][0].itemsize].programs[states]
    assert code.resident(target, table.THREADS) >= programs, code
    if RULES[rule].normed:
        check_norms(target, DTYPES[dtypes][0], states, folder)


@pytest.mark.parametrize(("target", "rule", "dtypes"), SOME)
def test_kernels_move_16_bytes_at_a_time_and_spill_nothing(target, rule, dtypes, elsewhere, tmp_path):
    check(target, rule, dtypes, elsewhere, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(("target", "rule", "dtypes"), [variant for variant in ALL if variant not in SOME])
def test_so_does_every_other_kernel(target, rule, dtypes, elsewhere, tmp_path):
    check(target, rule, dtypes, elsewhere, tmp_path)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_compilation_serves_all_sizes_counts_and_addresses(target, elsewhere):
    """Triton compiles anew for an integer of 1, for multiples of 16, for addresses that are not."""
    elsewhere(target)
    tables = [backend.new_table(torch.device("cpu")) for _ in range(2)]
    memory = torch.zeros(3)
    for scaling in ((), (memory[0], memory[1]), (memory[1], memory[2])):
        for rows in (1, 2, 16, 17, 129):
            for chunks in (1, 16, 33, 1000):
                for own in tables:
                    steps = [launch("adamw", "f32", rows, chunks), launch("adamw", "bf16", 2, 3)]
                    assert own.step(steps, groups(rows), *scaling) == 4
    assert len(compiled(kernels.prepare, target)) == 1
    assert len(compiled(kernels.update, target)) == 2  # float32, bfloat16
