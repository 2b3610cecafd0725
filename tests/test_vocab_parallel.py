"""Cross entropy over vocabulary shards: as over whole rows in float64, for one collective."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed", allow_module_level=True)

import torch.distributed as dist
import vocab_parallel as v
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import composition
from simt import build
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import fusedopt
from fusedopt.nn.functional import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CUTS = [0, 5, 5, 6, 19]
INF = float("inf")


def world():
    return dist.group.WORLD, init_device_mesh("cpu", (dist.get_world_size(),))


def upstream_of(loss):
    return torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


def truth(logits, target, weight, **options):
    """Loss and gradient in float64."""
    x = logits.detach().double().requires_grad_()
    loss = composition(x, target, None if weight is None else weight.double(), **options)
    loss.backward(upstream_of(loss))
    return loss.detach(), x.grad


def close(actual, expected, logits, options, what):
    loss_error, grad_error = v.roundings(logits, torch.tensor(1.5), options)
    n = max(1, len(logits)) if options.get("reduction") == "sum" else 1
    atol = loss_error * n if what == "loss" else grad_error
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=atol, equal_nan=True)


# --- the local passes, on every kernel, without a group ---


@pytest.mark.parametrize("kernels", v.KERNELS)
def test_every_feature_and_dtype(kernels):
    assert v.check_kernels(v.KERNELS[kernels](), DTYPES) == 192


@pytest.mark.timeout(900)
def test_on_cuda_s_kernels():
    if reason := build.missing("plain"):
        pytest.skip(f"the CUDA sources were not run on the CPU: {reason}")
    command = [sys.executable, Path(v.__file__), "cuda", build.build("plain", "_native.so")]
    run = build.run("plain", command)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "144 losses agree"), run.stdout


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_on_triton_s_kernels():
    pytest.importorskip("triton")
    command = [sys.executable, v.__file__, "triton"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "144 losses agree\n"), run.stdout + run.stderr


@st.composite
def cases(draw):
    classes = draw(st.integers(1, 70))
    cuts = sorted(draw(st.lists(st.integers(0, classes), max_size=4)))
    ranks = len(cuts) + 1
    return {
        "rows": draw(st.integers(0, 9)),
        "classes": classes,
        "ranges": v.ranges_of([0, *cuts, classes], draw(st.permutations(range(ranks)))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 99)),
        "features": draw(st.sampled_from(v.FEATURES)),
        "ignore_index": draw(st.sampled_from([-100, 0, classes - 1, classes])),
        "spread": draw(st.sampled_from([0.0, 1.0, 30.0])),
        "infinite": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "with_stats": draw(st.booleans()),
        "kernels": draw(st.sampled_from(list(v.KERNELS))),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_any_shards(case):
    features, ignore_index = case["features"], case["ignore_index"]
    if case["infinite"]:  # smoothing, a cap or a negative scale make another loss of it
        features = {}
    logits, target, weight, options = v.make(
        case["rows"], case["classes"], case["dtype"], seed=case["seed"], spread=case["spread"], **features
    )
    target[target == -100] = ignore_index
    if case["infinite"]:
        g = torch.Generator().manual_seed(case["seed"])
        masked = torch.rand(logits.shape, generator=g) < case["infinite"]
        columns = target.clamp(0, case["classes"] - 1)
        logits = logits.masked_fill(masked.scatter(1, columns[:, None], False), -INF)
    options["ignore_index"] = ignore_index
    v.assert_as_dense(
        logits, target, weight, case["ranges"], v.KERNELS[case["kernels"]](), case["with_stats"], **options
    )


# --- plain tensors, tp_group and vocab_range ---


def check_hand_made(combinations):
    group, _ = world()
    first, last = CUTS[dist.get_rank()], CUTS[dist.get_rank() + 1]
    for number, (dtype, reduction, features, backend) in enumerate(combinations):
        logits, target, weight, options = v.make(11, CUTS[-1], dtype, seed=number, **features)
        options["reduction"] = reduction
        exact_loss, exact_grad = truth(logits, target, weight, **options)
        x = logits[:, first:last].clone().requires_grad_()
        arguments = {"tp_group": group, "vocab_range": (first, last), "backend": backend, "return_stats": True}
        loss, stats = cross_entropy(x, target, weight, **options, **arguments)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        loss.backward(upstream_of(loss).to(loss.dtype))
        close(loss.detach(), exact_loss, logits, options, "loss")
        assert x.grad.dtype == dtype and x.grad.shape == x.shape
        close(x.grad, exact_grad[:, first:last], logits, options, "grad")
        _, dense = cross_entropy(logits.double(), target, **options, return_stats=True)
        for name, ours, theirs in zip(dense._fields, stats, dense, strict=True):
            assert ours.dtype == (theirs.dtype if name in ("argmax", "correct") else loss.dtype)
            torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-5, atol=1e-5)


def test_hand_made_shards():
    combinations = [
        (dtype, reduction, features, ("auto", "reference")[number % 2])
        for number, features in enumerate(v.FEATURES)
        for dtype in DTYPES
        for reduction in ("mean", "sum", "none")
    ]
    combinations += [(torch.float32, "mean", features, "reference") for features in v.FEATURES[::2]]
    v.on_ranks(4, check_hand_made, combinations)


def check_layouts():
    group, mesh = world()
    first, last = CUTS[dist.get_rank()], CUTS[dist.get_rank() + 1]
    shards = {"tp_group": group, "vocab_range": (first, last)}
    for shape, dim in (((19,), 0), ((3, 19, 2, 5), 1), ((0, 19), 1)):
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(shape, generator=g)
        target = torch.randint(19, shape[:dim] + shape[dim + 1 :], generator=g)
        for reduction in ("mean", "none"):
            exact = logits.double().requires_grad_()
            exact_loss = torch.nn.functional.cross_entropy(exact, target, reduction=reduction)
            exact_loss.sum().backward()
            x = logits.narrow(dim, first, last - first).clone().requires_grad_()
            loss = cross_entropy(x, target, reduction=reduction, **shards)
            loss.sum().backward()
            torch.testing.assert_close(loss.double(), exact_loss, equal_nan=True, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                x.grad.double(), exact.grad.narrow(dim, first, last - first), rtol=1e-5, atol=1e-7
            )
            whole = distribute_tensor(logits, mesh, [Shard(dim)]).requires_grad_()
            of_mesh = cross_entropy(whole, target, reduction=reduction)
            of_mesh.sum().backward()
            torch.testing.assert_close(of_mesh.to_local(), loss, equal_nan=True)
            torch.testing.assert_close(whole.grad.full_tensor().double(), exact.grad, rtol=1e-5, atol=1e-7)


def check_pending():
    """Logits and targets whose collective is still under way."""
    _, mesh = world()
    logits, target, _, _ = v.make(8, 20, torch.float32)
    exact_loss, exact_grad = truth(logits, target, None)
    for reduction in ("mean", "none"):
        pending = distribute_tensor(logits, mesh, [Shard(0)]).redistribute(placements=[Replicate()], async_op=True)
        each = 20 // dist.get_world_size()
        first = each * dist.get_rank()
        mine = pending.to_local()[:, first : first + each].detach().requires_grad_()
        assert type(mine) is not torch.Tensor
        targets = distribute_tensor(target, mesh, [Shard(0)]).redistribute(placements=[Replicate()], async_op=True)
        shards = {"tp_group": dist.group.WORLD, "vocab_range": (first, first + each)}
        loss = cross_entropy(mine, targets.to_local(), reduction=reduction, **shards)
        if reduction == "mean":
            loss.backward(upstream_of(exact_loss).float())
            close(mine.grad, exact_grad[:, first : first + each], logits, {}, "grad")
            close(loss.detach(), exact_loss, logits, {}, "loss")
        else:
            loss.sum().backward()


def test_what_is_still_being_gathered():
    v.on_ranks(4, check_pending)


def test_vectors_images_and_no_rows():
    v.on_ranks(4, check_layouts)


def check_infinities():
    group, _ = world()
    first, last = CUTS[dist.get_rank()], CUTS[dist.get_rank() + 1]
    logits = torch.randn(8, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([1, 5, 7, 18, 2, 3, 4, -100])
    logits[0, 6:] = -INF  # all of the last rank's, as where a vocabulary is padded
    logits[1, 6:] = -INF
    logits[2, 7] = -INF  # the target
    logits[3, 6:] = -INF  # the target and all beside it
    logits[4, 8] = INF
    logits[5] = -INF
    logits[6, 0] = torch.nan
    for smoothing in (0.0, 0.1):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            whole = logits.to(dtype).double().clone().requires_grad_()
            exact = torch.nn.functional.cross_entropy(whole, target, reduction="none", label_smoothing=smoothing)
            exact.sum().backward()
            for with_stats in (False, True):
                x = logits.to(dtype)[:, first:last].clone().requires_grad_()
                arguments = {"tp_group": group, "vocab_range": (first, last), "return_stats": with_stats}
                loss = cross_entropy(x, target, reduction="none", label_smoothing=smoothing, **arguments)
                loss, stats = loss if with_stats else (loss, None)
                loss.sum().backward()
                torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
                eps = torch.finfo(dtype).eps
                grad = whole.grad[:, first:last]
                torch.testing.assert_close(x.grad.double(), grad, rtol=1e-5, atol=eps + 1e-6, equal_nan=True)
                if with_stats:
                    _, dense = cross_entropy(logits.to(dtype), target, reduction="none", return_stats=True)
                    for ours, theirs in zip(stats, dense, strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_infinite_logits_and_padded_vocabularies():
    v.on_ranks(4, check_infinities)


def check_ties():
    """Of equal logits the first class is the largest, whichever rank holds it."""
    group, _ = world()
    ranges = [(2, 4), (0, 2)]
    first, last = ranges[dist.get_rank()]
    logits = torch.tensor([[0.0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    target = torch.tensor([1, 0, 3])
    options = {"tp_group": group, "vocab_range": (first, last), "return_stats": True}
    _, stats = cross_entropy(logits[:, first:last], target, **options)
    assert stats.argmax.tolist() == [1, 0, 0] and stats.correct.tolist() == [True, True, False]


def test_ties():
    v.on_ranks(2, check_ties)


def test_nearly_certain_rows_keep_their_digits():
    logits = torch.full((1, 8), 1000.0)  # a float32 log-sum-exp is known to 6e-5 there
    logits[0, 2] += 12
    target = torch.tensor([2])
    upstream = torch.ones(1)
    losses, grad, _ = v.without_a_group(logits, target, None, ((0, 4), (4, 8)), v.KERNELS["cpu"](), upstream)
    true_losses, true_grad = v.exact(logits, target, None, upstream)
    torch.testing.assert_close(losses.double(), true_losses, rtol=1e-2, atol=0)
    torch.testing.assert_close(grad[:, 2].double(), true_grad[:, 2], rtol=1e-2, atol=0)


def check_everything_ignored():
    group, _ = world()
    first, last = CUTS[dist.get_rank()], CUTS[dist.get_rank() + 1]
    target = torch.full((4,), 0)
    for reduction, value in (("mean", torch.nan), ("sum", 0.0)):
        x = torch.randn(4, last - first, requires_grad=True)
        options = {"ignore_index": 0, "reduction": reduction, "tp_group": group, "vocab_range": (first, last)}
        loss = cross_entropy(x, target, **options)
        loss.backward()
        torch.testing.assert_close(loss.detach(), torch.tensor(value), equal_nan=True)
        assert not x.grad.any()


def test_everything_ignored():
    v.on_ranks(4, check_everything_ignored)


def check_memory():
    group, _ = world()
    first, last = CUTS[dist.get_rank()], CUTS[dist.get_rank() + 1]
    shards = {"tp_group": group, "vocab_range": (first, last)}
    logits, target, _, _ = v.make(6, 19, torch.float32)
    for inplace in (False, True):
        leaf = logits[:, first:last].clone().requires_grad_()
        x = leaf * 1.0
        x.retain_grad()
        memory = x.untyped_storage().data_ptr()
        loss = cross_entropy(x, target, inplace=inplace, **shards)
        if not inplace:
            x.data.mul_(0)  # stock permits it
        loss.backward(torch.tensor(0.5), retain_graph=True)
        first_grad = leaf.grad.clone()
        loss.backward(torch.tensor(0.5))
        torch.testing.assert_close(leaf.grad, 2 * first_grad)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        with torch.no_grad():
            assert cross_entropy(logits[:, first:last], target, **shards) == loss
        y = logits[:, first:last].clone().requires_grad_() * 1.0
        cross_entropy(y, target, inplace=inplace, **shards)
        if last > first:
            assert torch.equal(y.detach(), logits[:, first:last]) != inplace
        assert x.untyped_storage().data_ptr() == memory
    x = logits[:, first:last].clone().requires_grad_()
    loss = cross_entropy(x, target, **shards)
    with pytest.raises(RuntimeError, match=r"create_graph=True: .* has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
    x = logits[:, first:last].clone().requires_grad_()
    y = x * 1.0
    loss = cross_entropy(y, target, reduction="none", **shards)
    y.mul_(2)
    if last > first:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_what_may_be_changed_and_when():
    v.on_ranks(4, check_memory)


# --- DTensors ---


def check_dtensors():
    _, mesh = world()
    for number, features in enumerate(v.FEATURES):
        for dtype in (torch.float32, torch.bfloat16):
            logits, target, weight, options = v.make(7, 37, dtype, seed=number, **features)
            options["reduction"] = ("mean", "sum", "none")[number % 3]
            exact_loss, exact_grad = truth(logits, target, weight, **options)
            for placement in (Shard(1), Shard(-1)):
                x = distribute_tensor(logits, mesh, [placement]).requires_grad_()
                targets = target
                if number % 2:
                    targets = distribute_tensor(target, mesh, [Replicate()])
                    weight = None if weight is None else distribute_tensor(weight, mesh, [Replicate()])
                loss = fusedopt.nn.CrossEntropyLoss(weight, **options)(x, targets)
                assert isinstance(loss, DTensor) and loss.placements == (Replicate(),)
                loss.backward(distribute_tensor(upstream_of(exact_loss).to(loss.dtype), mesh, [Replicate()]))
                assert x.grad.placements == x.placements and x.grad.dtype == dtype and x.grad.shape == x.shape
                close(loss.detach().to_local(), exact_loss, logits, options, "loss")
                close(x.grad.full_tensor(), exact_grad, logits, options, "grad")
    x = distribute_tensor(torch.zeros(2, 10), mesh, [Shard(1)]).requires_grad_()
    loss, stats = cross_entropy(x, torch.tensor([0, 9]), return_stats=True)
    loss.backward()
    assert abs(loss.item() - torch.tensor(10.0).log().item()) < 1e-6
    assert stats.argmax.full_tensor().tolist() == [0, 0] and stats.correct.full_tensor().tolist() == [True, False]


def test_dtensors():
    v.on_ranks(4, check_dtensors)


def check_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    logits, target, weight, options = v.make(7, 19, torch.float32, weighted=True, label_smoothing=0.1)
    for rows in (Shard(0), Replicate()):
        for placements, target_placements in (
            ([rows, Shard(1)], [rows, Replicate()]),
            ([Shard(1), rows], [Replicate(), rows]),
        ):
            for reduction in ("mean", "sum", "none"):
                for ignored in (False, True):
                    t = target.clone()
                    if ignored:
                        t[4:] = -100  # all that the second half holds
                    exact_loss, exact_grad = truth(logits, t, weight, reduction=reduction, **options)
                    for theirs in (target_placements, [Replicate()] * 2):
                        x = distribute_tensor(logits, mesh, placements).requires_grad_()
                        loss, stats = cross_entropy(
                            x,
                            distribute_tensor(t, mesh, theirs),
                            weight,
                            reduction=reduction,
                            return_stats=True,
                            **options,
                        )
                        upstream = distribute_tensor(upstream_of(exact_loss).float(), mesh, loss.placements)
                        loss.backward(upstream)
                        expected = target_placements if reduction == "none" else [Replicate()] * 2
                        assert list(loss.placements) == expected and x.grad.placements == x.placements
                        assert loss.shape == exact_loss.shape and stats.lse.shape == (7,)
                        close(loss.full_tensor(), exact_loss, logits, {"reduction": reduction, **options}, "loss")
                        close(x.grad.full_tensor(), exact_grad, logits, options, "grad")
                        torch.testing.assert_close(stats.lse.full_tensor(), logits.logsumexp(1))


def test_other_mesh_dimensions_hold_rows_or_copies():
    v.on_ranks(4, check_two_dimensions)


def check_whole_dtensors():
    """Not sharded over the classes: torch's own operators, and their placements."""
    _, mesh = world()
    logits, target, _, _ = v.make(8, 19, torch.float32)
    x = distribute_tensor(logits, mesh, [Shard(0)]).requires_grad_()
    loss = cross_entropy(x, distribute_tensor(target, mesh, [Shard(0)]), reduction="sum", z_loss=1e-3)
    loss.full_tensor().backward()
    exact_loss, _ = truth(logits, target, None, reduction="sum", z_loss=1e-3)
    torch.testing.assert_close(loss.full_tensor().double(), exact_loss, rtol=1e-5, atol=1e-5)


def test_dtensors_with_whole_classes_are_torch_s():
    v.on_ranks(2, check_whole_dtensors)


# --- bad input ---


def check_bad_shards():
    group, mesh = world()
    rank = dist.get_rank()
    x, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)

    def refused(kind, match, logits=x, **options):
        options = {"tp_group": group, **options}
        with pytest.raises(kind, match=match):
            cross_entropy(logits, options.pop("target", target), **options)

    refused(ValueError, "go together")
    refused(ValueError, "go together", tp_group=None, vocab_range=(0, 3))
    refused(TypeError, "must be a torch.distributed.ProcessGroup, not DeviceMesh", tp_group=mesh, vocab_range=(0, 3))
    for wrong in (3, (0,), (0.0, 3.0), "03"):
        refused(TypeError, "must be two integers", vocab_range=wrong)
    # said on every rank, whichever is wrong
    refused(ValueError, r"class 1 more than once", vocab_range=(rank, rank + 3))
    refused(ValueError, r"class 3 nowhere", vocab_range=(4 * rank, 4 * rank + 3))
    refused(ValueError, r"class 0 nowhere", vocab_range=(3 * rank + 1, 3 * rank + 4))
    refused(ValueError, r"on rank 1 .* names 2 classes from 3.* have 3", vocab_range=(3 * rank, 3 * rank + 3 - rank))
    refused(ValueError, "no rank of tp_group holds a class", x[:, :0], vocab_range=(0, 0))
    mine = (3 * rank, 3 * rank + 3)
    rows = 4 - rank
    refused(
        ValueError,
        r"different numbers of rows: \[4, 3\]; each must hold all",
        x[:rows],
        target=target[:rows],
        vocab_range=mine,
    )
    refused(ValueError, "with different options", vocab_range=mine, label_smoothing=0.1 * rank)
    cross_entropy(x, target, tp_group=group, vocab_range=mine)
    refused(ValueError, f"ranks \\[{1 - rank}\\] of the group call the loss with other options", vocab_range=mine,
            ignore_index=rank)  # fmt: skip
    refused(ValueError, "have 2", x[:, :2], vocab_range=mine)
    for wrong in (-1, 6):
        refused(IndexError, f"Target {wrong} is out of bounds", vocab_range=mine, target=torch.tensor([0, wrong, 1, 2]))
    refused(ValueError, "class probabilities need whole logits", vocab_range=mine, target=torch.rand(4, 6))
    refused(ValueError, r"expected target of shape \(4,\)", vocab_range=mine, target=target[:3])
    refused(ValueError, "int64", vocab_range=mine, target=target.int())
    refused(
        RuntimeError, r"weight has shape \(3,\).*weights of all classes, \(6,\)", vocab_range=mine, weight=torch.ones(3)
    )
    refused(ValueError, "not a valid value for reduction", vocab_range=mine, reduction="average")
    refused(RuntimeError, "label_smoothing must be between", vocab_range=mine, label_smoothing=1.5)
    refused(ValueError, "is not one of", vocab_range=mine, backend="tpu")


def test_bad_shards_are_named_on_every_rank():
    v.on_ranks(2, check_bad_shards)


def check_bad_dtensors():
    _, mesh = world()
    square = init_device_mesh("cpu", (2, 2))
    logits, target = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)

    def refused(match, placements, mesh=square, target=target, logits=logits, **options):
        with pytest.raises(ValueError, match=match):
            cross_entropy(distribute_tensor(logits, mesh, placements), target, **options)

    refused("may be sharded over one dimension", [Shard(1), Shard(1)])
    partial = DTensor.from_local(torch.zeros(4, 4), square, [Partial(), Shard(1)])
    with pytest.raises(ValueError, match=r"must be Replicate\(\) or Shard\(0\)"):
        cross_entropy(partial, target)
    refused("must be Replicate", [Shard(2), Shard(1)], logits=torch.zeros(2, 8, 2), target=torch.zeros(2, 2).long())
    refused("target is a plain tensor", [Shard(0), Shard(1)])
    refused(
        "target has placements",
        [Replicate(), Shard(1)],
        target=distribute_tensor(target, square, [Replicate(), Shard(0)]),
    )
    refused("target has placements", [Shard(1)], mesh, distribute_tensor(target, square, [Replicate(), Replicate()]))
    refused("every rank needs all of it", [Shard(1)], mesh, weight=distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    refused("are for plain tensors", [Shard(1)], mesh, vocab_range=(0, 2))
    refused("expected target of shape", [Shard(1)], mesh, target=target[:3])


def test_bad_dtensors():
    v.on_ranks(4, check_bad_dtensors)


# --- imports ---

LIGHT = """
import sys, torch
import fusedopt
x = torch.zeros(3, 4, requires_grad=True)
fusedopt.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2])).backward()
fusedopt.nn.LinearCrossEntropyLoss(4, 5)(x, torch.tensor([0, 1, 2])).backward()
loaded = [m for m in sys.modules if m.startswith(("fusedopt.distributed.vocab", "torch.distributed.tensor"))]
assert not loaded, loaded
"""


def test_importing_fusedopt_loads_nothing_of_this():
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=120)


@pytest.mark.thorough
def test_compiled_models():
    """The loss breaks the graph."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        _, mesh = world()
        logits, target, _, _ = v.make(6, 19, torch.float32)
        for x, options in (
            (logits.clone(), {"tp_group": dist.group.WORLD, "vocab_range": (0, 19)}),
            (distribute_tensor(logits, mesh, [Shard(1)]), {}),
        ):

            def model(x, options=options):
                return cross_entropy(x * 2, target, **options)

            x.requires_grad_()
            (expected,) = torch.autograd.grad(model(x), x)
            (grad,) = torch.autograd.grad(torch.compile(model, backend="aot_eager")(x), x)
            torch.testing.assert_close(grad, expected)
    finally:
        dist.destroy_process_group()
