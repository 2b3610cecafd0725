"""Linear cross entropy over vocabulary shards: as with a whole weight, the flops counted."""

import copy

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed", allow_module_level=True)

import torch.distributed as dist
import vocab_parallel as v
from loss_oracle import composition
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

import fusedopt
from fusedopt.nn.functional import linear_cross_entropy

CUTS = [0, 11, 11, 12, 37]
N, H, V = 10, 6, 37


def shards():
    rank = dist.get_rank()
    return {"tp_group": dist.group.WORLD, "vocab_range": (CUTS[rank], CUTS[rank + 1])}


def data(dtype, bias=False, weighted=False, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, H, generator=g).to(dtype)
    head = torch.randn(V, H, generator=g).to(dtype)
    b = torch.randn(V, generator=g).to(dtype) if bias else None
    target = torch.randint(V, (N,), generator=g)
    target[2::4] = -100
    weight = (torch.rand(V, generator=g) + 0.1).to(dtype) if weighted else None
    return x, head, b, target, weight, options


def run(function, x, head, b, *arguments, dtype=None, **options):
    """Loss and gradients of copies of x, head and b."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in (x, head, b)]
    loss = function(*leaves, *arguments, **options)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    loss.backward(upstream.to(loss.dtype))
    return loss.detach().double(), *(None if t is None else t.grad.double() for t in leaves)


def by_composition(x, head, b, target, weight, **options):
    logits = torch.nn.functional.linear(x, head, b)
    return composition(logits, target, None if weight is None else weight.double(), **options)


def assert_as_good(found, dense, exact, dtype):
    """No further from float64 than the loss with a whole weight, but for some roundings of sums in another order."""
    eps = torch.finfo(dtype).eps
    for ours, theirs, right in zip(found, dense, exact, strict=True):
        if right is None or not right.numel():
            continue
        floor = (8 * eps + 1e-6 * (dtype != torch.float64)) * max(1.0, right.abs().max().item())
        error = (ours - right).abs().max()
        assert error <= 2 * (theirs - right).abs().max() + floor, (error, (theirs - right).abs().max())


def check_features(dtype):
    mine = slice(*shards()["vocab_range"])
    for seed, features in enumerate(v.FEATURES):
        reductions = ("mean", "sum", "none")
        for reduction in reductions if dtype == torch.float32 else reductions[seed % 3 :][:1]:
            x, head, b, target, weight, options = data(dtype, seed % 2 == 0, seed=seed, **features)
            options["reduction"] = reduction

            def loss_of(x, head, b, **extra):
                return linear_cross_entropy(
                    x, head, target, linear_bias=b, weight=weight, **options, **extra  # noqa: B023
                )  # fmt: skip

            exact = run(by_composition, x, head, b, target, weight, dtype=torch.float64, **options)
            dense = run(loss_of, x, head, b)
            cut = [t if t is None else t[mine] for t in (head, b)]
            expected, whole = ([e[0], e[1], *(t if t is None else t[mine] for t in e[2:])] for e in (exact, dense))
            for chunk_bytes in (None, 3 * dtype.itemsize * 25):
                found = run(loss_of, x, *cut, chunk_bytes=chunk_bytes, **shards())
                assert_as_good(found, whole, expected, dtype)
            same = run(loss_of, x, *cut, backend="reference", chunk_bytes=1, **shards())
            assert_as_good(same, whole, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hand_made_shards(dtype):
    v.on_ranks(4, check_features, dtype)


def check_rest():
    first, last = shards()["vocab_range"]
    x, head, b, target, _, _ = data(torch.float32, bias=True)
    dense, stats = linear_cross_entropy(x, head, target, linear_bias=b, return_stats=True)
    cut = head[first:last], target.view(2, 5)
    options = {"linear_bias": b[first:last], "chunk_bytes": 200, **shards()}
    loss, told = linear_cross_entropy(x.view(2, 5, H), *cut, return_stats=True, **options)
    torch.testing.assert_close(loss, dense)
    for ours, theirs in zip(told, stats, strict=True):
        torch.testing.assert_close(ours.view(-1), theirs, rtol=1e-5, atol=1e-5)
    # what needs no gradient has none
    for frozen in ("input", "weight"):
        a = x.clone().requires_grad_(frozen != "input")
        w = head[first:last].clone().requires_grad_(frozen != "weight")
        linear_cross_entropy(a, w, target, chunk_bytes=200, **shards()).backward()
        ref_x, ref_w = x.double().requires_grad_(), head.double().requires_grad_()
        composition(ref_x @ ref_w.t(), target).backward()
        if frozen == "weight":
            assert w.grad is None
            torch.testing.assert_close(a.grad.double(), ref_x.grad, rtol=1e-5, atol=1e-6)
        else:
            assert a.grad is None
            torch.testing.assert_close(w.grad.double(), ref_w.grad[first:last], rtol=1e-5, atol=1e-6)
    # nothing counts
    a, w = x.clone().requires_grad_(), head[first:last].clone().requires_grad_()
    loss = linear_cross_entropy(a, w, torch.full_like(target, -100), **shards())
    loss.backward()
    assert loss.isnan() and not a.grad.any() and not w.grad.any()
    # a graph that is kept, and autocast
    a = x.clone().requires_grad_()
    loss = linear_cross_entropy(a, w, target, **shards())
    loss.backward(retain_graph=True)
    once = a.grad.clone()
    loss.backward()
    torch.testing.assert_close(a.grad, 2 * once)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(a, w, target, **shards()), a, create_graph=True)
    a.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(a, w, target, **shards())
    loss.backward()
    assert a.grad.dtype == torch.float32
    torch.testing.assert_close(a.grad, once, rtol=0.05, atol=0.02)


def test_statistics_frozen_parts_and_autocast():
    v.on_ranks(4, check_rest)


# --- DTensors and modules ---


def check_modules():
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x, head, bias, target, weight, _ = data(torch.float32, bias=True, weighted=True)
    whole = fusedopt.nn.LinearCrossEntropyLoss(H, V, bias=True, weight=weight, label_smoothing=0.1, z_loss=1e-2)
    with torch.no_grad():
        whole.linear.weight.copy_(head)
        whole.linear.bias.copy_(bias)
    a = x.clone().requires_grad_()
    exact = whole(a, target)
    exact.backward()
    for mesh, placements in ((square["tp"], [Shard(0)]), (square, [Replicate(), Shard(0)])):
        module = copy.deepcopy(whole)
        for name, parameter in list(module.linear.named_parameters()):
            module.linear.register_parameter(
                name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
            )
        copies = [Replicate()] * mesh.ndim
        for on_mesh in (False, True):
            y, targets = x.clone(), target
            if on_mesh:
                y, targets = (distribute_tensor(t, mesh, copies) for t in (y, target))
            y.requires_grad_()
            module.zero_grad()
            loss = module(y, targets)
            assert isinstance(loss, DTensor) and list(loss.placements) == copies
            loss.backward()
            torch.testing.assert_close(loss.to_local(), exact)
            assert not on_mesh or list(y.grad.placements) == copies
            torch.testing.assert_close(y.grad.to_local() if on_mesh else y.grad, a.grad, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(module.linear.parameters(), whole.linear.parameters(), strict=True):
                assert ours.grad.placements == ours.placements
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-5, atol=1e-6)
    # by hand
    first, last = shards()["vocab_range"]
    module = fusedopt.nn.LinearCrossEntropyLoss(
        H, V, bias=True, weight=weight, label_smoothing=0.1, z_loss=1e-2, **shards()
    )  # fmt: skip
    assert module.linear.weight.shape == (last - first, H)
    with torch.no_grad():
        module.linear.weight.copy_(whole.linear.weight[first:last])
        module.linear.bias.copy_(whole.linear.bias[first:last])
    loss = module(x, target)
    loss.backward()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(module.linear.weight.grad, whole.linear.weight.grad[first:last], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_dtensors_and_modules():
    v.on_ranks(4, check_modules)


# --- what it costs ---


def added_product(_, a, b, **__):
    return 2 * a[0] * a[1] * b[1]


def check_flops():
    """2 N H V_local (3 + (k - 1) / k) for k chunks, forward and backward; see vocab_linear.py."""
    first, last = shards()["vocab_range"]
    x, head, _, target, _, _ = data(torch.float32)
    target[:] = 1
    held = last - first
    for chunks in (1, 2, 5):
        a, w = x.clone().requires_grad_(), head[first:last].clone().requires_grad_()
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
            linear_cross_entropy(a, w, target, chunk_bytes=4 * held * N // chunks or 1, **shards()).backward()
        product = 2 * N * H * held
        assert counter.get_total_flops() == product * 3 + product * (chunks - 1) // chunks
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, head[first:last], target, chunk_bytes=1, **shards())
    assert counter.get_total_flops() == 2 * N * H * held


def test_flops_are_those_that_the_docstring_states():
    v.on_ranks(4, check_flops)


# --- bad input ---


def check_bad_input():
    mesh = init_device_mesh("cpu", (2,))
    x, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    w = distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])
    b = distribute_tensor(torch.zeros(8), mesh, [Replicate()])

    def refused(match, *arguments, kind=ValueError, **options):
        with pytest.raises(kind, match=match):
            linear_cross_entropy(*arguments, **options)

    refused("linear_bias must be a DTensor that lies as", x, w, target, linear_bias=b)
    refused("linear_bias must be a DTensor that lies as", x, w, target, linear_bias=torch.zeros(8))
    refused("input has placements", distribute_tensor(x, mesh, [Shard(0)]), w, target)
    refused("target has placements", x, w, distribute_tensor(target, mesh, [Shard(0)]))
    refused("are for plain tensors", x, w, target, vocab_range=(0, 4))
    refused("class probabilities need whole logits", x, w, torch.zeros(4, 8))
    refused(r"expected target of shape \(4,\)", x, w, target[:2])
    refused("linear_weight is torch.float32, input torch.bfloat16", x.bfloat16(), w, target)
    refused("Target 8 is out of bounds", x, w, target + 8, kind=IndexError)
    group = dist.group.WORLD
    refused("go together", x, torch.zeros(4, 3), target, tp_group=group)
    rank = dist.get_rank()
    refused("class 1 more than once", x, torch.zeros(4, 3), target, tp_group=group, vocab_range=(rank, rank + 4))
    wide = torch.zeros(4, 2, 3)
    refused("it must be", x, wide, target, tp_group=group, vocab_range=(4 * rank, 4 * rank + 4))
    with pytest.raises(ValueError, match=r"vocab_range=\(4, 9\) must be"):
        fusedopt.nn.LinearCrossEntropyLoss(3, 8, tp_group=group, vocab_range=(4, 9))


def test_bad_input():
    v.on_ranks(2, check_bad_input)
