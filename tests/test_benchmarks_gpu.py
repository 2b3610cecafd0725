"""The losses' GPU benchmarks, on the CPU and small: names, bytes, oracles, peers. Their times say nothing."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from test_benchmarks import measured

from benchmarks import cases_linear_loss_gpu, cases_loss_gpu, ceilings, peers, registry, tables

F32, BF16 = 4, 2
BYTES = {
    "gpu-ce-40x1003-bf16": 40 * 1003 * 2 * BF16,
    "gpu-ce-20x1003-f32": 20 * 1003 * 2 * F32,
    "gpu-ce-10x2050-bf16": 10 * 2050 * 2 * BF16,
    "gpu-ce-5x2050-f32": 5 * 2050 * 2 * F32,
    "gpu-ce-images-2x5x16x8-f32": 2 * 5 * 16 * 8 * 2 * F32,
    "gpu-mse-64M-f32": 3001 * 3 * F32,
    "gpu-mse-64M-bf16": 3001 * 3 * BF16,
    "gpu-ce-6x1003-bf16-sweep": 6 * 1003 * 2 * BF16,
    "gpu-ce-6x2050-bf16-sweep": 6 * 2050 * 2 * BF16,
    "gpu-linear-ce-50x64x700-bf16": 0,
}


class Overwriting(torch.autograd.Function):
    """As Liger does it: the gradient lies where the logits lay."""

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf, target)
        ctx.grad = logits.detach().copy_(torch.autograd.grad(loss, leaf)[0])
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.grad * upstream, None


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (cases_loss_gpu, cases_linear_loss_gpu):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "ours", lambda: {"fusedopt": "cpu", "fusedopt triton": "cpu"})
    monkeypatch.setattr(cases_loss_gpu, "SHAPES", [(40, 1003), (10, 2050)])
    monkeypatch.setattr(cases_loss_gpu, "SWEEP_ROWS", 6)
    monkeypatch.setattr(cases_loss_gpu, "VOCABULARIES", {"one": 1003, "two": 2050})
    monkeypatch.setattr(cases_loss_gpu, "IMAGES", (2, 5, 16, 8))
    monkeypatch.setattr(cases_loss_gpu, "ELEMENTS", 3001)
    monkeypatch.setattr(cases_linear_loss_gpu, "SHAPES", [(50, 64, 700)])
    for name in ("liger_kernel", "liger_kernel.transformers", "cut_cross_entropy", "quack", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)  # not to be imported
    peers.loaded.cache_clear()
    yield
    peers.loaded.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins, called as the peers are."""
    liger, cut = ModuleType("liger_kernel.transformers"), ModuleType("cut_cross_entropy")
    liger.LigerCrossEntropyLoss = lambda: Overwriting.apply
    liger.LigerFusedLinearCrossEntropyLoss = lambda: lambda weight, x, target: F.cross_entropy(x @ weight.t(), target)
    cut.linear_cross_entropy = lambda e, c, targets, impl, filter_eps: F.cross_entropy(e @ c.t(), targets)
    for module in (ModuleType("liger_kernel"), liger, cut):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def cases():
    return {case.name: case for case in [*cases_loss_gpu.cases(), *cases_linear_loss_gpu.cases()]}


def test_every_case_is_registered(monkeypatch):
    assert {name: case.bytes for name, case in cases().items()} == BYTES
    for module in (cases_loss_gpu, cases_linear_loss_gpu):
        monkeypatch.setattr(module, "DEVICE", "cuda")
    names = [case.name for suite in ("loss", "linear_loss") for case in registry.registry(suite, "cuda")]
    assert sorted(names) == sorted(BYTES)
    assert not [
        case for suite in ("loss", "linear_loss") for case in registry.registry(suite, "cpu") if case.name in BYTES
    ]


@pytest.mark.parametrize("name", BYTES)
def test_contenders_agree_with_the_oracle_and_who_is_absent_is_named(name):
    case = cases()[name]
    rows = measured(case)
    assert {row["verdict"] for row in rows.values()} == {"ok"}, rows
    kind = "linear-cross-entropy" if "linear" in name else "" if "images" in name or "mse" in name else "cross-entropy"
    group = peers.absent(kind, "cuda")
    assert peers.found(kind, "cuda") == {} and ("liger" in " ".join(group)) == bool(kind)
    assert case.absent() == group
    assert all(row.get("absent", []) == group for row in rows.values())
    claimed = {contender for target in case.targets for contender in (target.ours, target.against)}
    assert claimed <= {*rows, *group, "torch compiled", ceilings.COPY}  # a quick run compiles nothing; copy: on a GPU
    if "linear" in name:
        allowed = (50 + 700) * 64 * BF16 + 700 * 64 * F32 + 2**30
        assert rows["fusedopt"]["allowed_mib"] == round(allowed / 2**20, 3)
        assert all(rows[c]["peak_mib"] > 0 for c in ("torch whole logits", "fusedopt", "fusedopt triton"))


@pytest.mark.parametrize("name", ["gpu-ce-40x1003-bf16", "gpu-ce-20x1003-f32", "gpu-linear-ce-50x64x700-bf16"])
def test_peers_take_part_where_they_are_installed(name, installed, monkeypatch):
    case = cases()[name]
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda package: f"{package} 1.0")
    rows = measured(case)
    present, missing = ({"liger linear", "cut-cross-entropy"}, ["quack linear"]) if "linear" in name else (
        {"liger"}, ["quack", "flash-attn"])  # fmt: skip
    assert {row["contender"] for row in rows.values() if "version" in row} == present
    assert {row["verdict"] for row in rows.values()} == {"ok"}, rows
    assert case.absent() == missing and all(row["absent"] == missing for row in rows.values())


def test_runs_in_a_row_leave_one_gradient():
    logits, target = torch.randn(20, 30), torch.randint(30, (20,))
    loss = torch.nn.CrossEntropyLoss()
    seen = []
    expected = torch.zeros(()), torch.zeros(20, 30)
    one = cases_loss_gpu.contender("one", loss, logits, target, expected, lambda g: seen.append(g.clone()) or g)
    one.error()
    one.run()
    one.run()
    one.error()
    torch.testing.assert_close(seen[0], seen[1])


def test_the_readme_names_who_was_absent():
    row = {"machine": "m", "cores": 1, "threads": 1, "instruction_set": "i", "torch": "2", "fusedopt": "1"}
    row |= {"commit": "c", "python": "3", "date": "d"}
    assert tables.provenance("loss", [row | {"absent": ["liger"]}]).endswith("Not installed: liger.")
    assert "installed" not in tables.provenance("loss", [row])
