"""The native library: names agree with Python's, builds share no symbol, conversions are exact."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt.optim
from fusedopt.backends import cpu
from fusedopt.optim.engine import FusedStep

pytestmark = pytest.mark.skipif(cpu.available() is not True, reason=str(cpu.available()))

ISAS = cpu._native.cpu_isas() if cpu.available() is True else []
HALVES = [torch.bfloat16, torch.float16]
OBJECTS = Path(__file__).parent.parent / "build"


def sgd_step(start, grad, lr=1.0, maximize=False):
    param = nn.Parameter(start.clone())
    if grad.dtype != start.dtype:
        param.grad_dtype = grad.dtype
    param.grad = grad
    optimizer = fusedopt.optim.SGD([param], lr=lr, maximize=maximize, backend="cpu")
    optimizer.step()
    assert optimizer.backend_report()[0].backend == "cpu"
    return param.detach()


def bits(tensor):
    return tensor.view(torch.int16)


# --- names ---


def classes():
    return [c for c in vars(fusedopt.optim).values() if isinstance(c, type) and issubclass(c, FusedStep)]


def rule_names(cls):
    """Every combination of a class's options: the rule's name and its states."""
    rows = [(cls.rule, cls.states)]
    for suffix, state in cls.options.values():
        rows += [(name + suffix, (*states, state) if state else states) for name, states in rows]
    return dict(rows)


def test_rules_agree_between_cpp_and_python():
    native = {
        name: (hyper.split(", "), [s for s in states.split(", ") if s], n)
        for name, hyper, states, n, _ in cpu._native.rules()
    }
    python = {}
    for cls in classes():
        for name, states in rule_names(cls).items():
            python.setdefault(name, (list(cls.hyper), list(states), len(states)))
            assert python[name] == (list(cls.hyper), list(states), len(states)), name
    assert python == native
    assert list(cpu.rules()) == [row[0] for row in cpu._native.rules()]
    assert [cpu.rules()[name][0] for name in cpu.rules()] == list(range(len(native)))


@pytest.mark.parametrize("cls", classes(), ids=lambda c: c.__name__)
def test_groups_hold_every_hyperparameter(cls):
    group = cls([nn.Parameter(torch.ones(2))]).param_groups[0]
    betas = {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}
    assert set(cls.hyper) <= {*group, *betas}
    assert set(cls.options) <= set(group)


# --- builds ---


@pytest.mark.parametrize("engine", ["step", "cross_entropy", "mse"])
def test_instruction_sets_share_no_weak_symbol(engine):
    objects = sorted(OBJECTS.glob(f"native-*/{engine}_*[!u].o"))  # not nvcc's .cu.o
    if len(objects) < 2:
        pytest.skip("no object files of two instruction sets lie in build/: the library was not built here")
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine")
    owner = {}
    for path in objects:
        listing = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        symbols = {line.split()[-1] for line in listing.splitlines() if line.split()[-2] in "WwVvu"}
        for symbol in symbols:
            assert symbol not in owner or owner[symbol].parent != path.parent, (
                f"{path.name} and {owner[symbol].name}: {symbol}"
            )
            owner[symbol] = path


def test_instruction_sets_switch():
    assert ISAS[-1] in ("baseline", "neon", "portable")
    for isa in ISAS:
        assert cpu._native.use_cpu_isa(isa)
        assert cpu.isa() == isa
    assert not cpu._native.use_cpu_isa("mmx")
    assert cpu.isa() == ISAS[-1]


# --- element conversions ---


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_bit_pattern_survives_a_step_of_nothing(dtype, isa):
    assert cpu._native.use_cpu_isa(isa)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for zero in (torch.zeros(2**16, dtype=dtype), torch.zeros(2**16)):
        after = sgd_step(patterns, zero)
        assert torch.equal(after.isnan(), patterns.isnan())
        number = ~patterns.isnan()
        expected = bits(patterns)[number]
        assert torch.equal(bits(after)[number], expected)  # subnormals, infinities and both zeros among them


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_every_bit_pattern_are_read_exactly(dtype, isa):
    assert cpu._native.use_cpu_isa(isa)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    after = sgd_step(torch.zeros(2**16, dtype=dtype), patterns, maximize=True)
    assert torch.equal(after.isnan(), patterns.isnan())
    number = ~patterns.isnan()
    assert torch.equal(after[number], patterns[number])


def rounding_cases(dtype):
    """float32 numbers: all magnitudes, every tie between neighbours of `dtype`, their neighbours, the odd ones out."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32).view(torch.float32)
    grid = torch.arange(0, 2**15, dtype=torch.int16).view(dtype)
    grid = grid[grid.isfinite()].float()
    ties = (grid[:-1].double() + grid[1:].double()).div(2).float()
    least = torch.tensor([-1, 1], dtype=torch.int32)
    near = (ties.view(torch.int32)[:, None] + least).flatten().view(torch.float32)
    # 65520 is the tie between float16's largest number and infinity
    special = torch.tensor(
        [0.0, torch.inf, torch.nan, 65519.996, 65520.0, 65536.0, 3.4028235e38, 1e-45, 2.0**-25, 2.0**-134]
    )
    signless = torch.cat([ties, near, special])
    return torch.cat([anything, signless, -signless])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_torchs(dtype, isa):
    assert cpu._native.use_cpu_isa(isa)
    exact = rounding_cases(dtype)
    after = sgd_step(torch.zeros(exact.numel(), dtype=dtype), exact, maximize=True)
    expected = exact.to(dtype)
    assert torch.equal(after.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(after[number], expected[number])
    nonzero = number & (exact != 0)  # 0 + -0 is +0
    assert torch.equal(bits(after)[nonzero], bits(expected)[nonzero])


@pytest.mark.parametrize("isa", ISAS)
def test_a_sign_apart_nothing_differs(isa):
    """Engines are compiled apart from one source: negating everything negates the result, bit for bit."""
    assert cpu._native.use_cpu_isa(isa)
    x, g = torch.randn(2, 1013)
    assert torch.equal(-sgd_step(x, g, lr=0.37), sgd_step(-x, -g, lr=0.37))
