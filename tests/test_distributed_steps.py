"""A step of parameters that processes share: what is sent, whose norm it is, what it refuses; on every rank alike."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import sharded
import torch
import torch.distributed as dist
from sharded import PLACED, here, make_params, mesh, placed, set_gradients
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedopt
from fusedopt.distributed import parts

pytestmark = pytest.mark.processes(4)

BACKENDS = ("auto", "reference")


def sent(call):
    """{operation: how often} of the collectives that a call issues."""
    with CommDebugMode() as counted:
        call()
    return {str(op).rpartition(".")[2]: n for op, n in counted.get_comm_counts().items() if n}


def parameter(whole, name, *placements):
    return nn.Parameter(distribute_tensor(whole, mesh(name), placements, src_data_rank=None))


def partial_gradient(whole, name, *placements):
    """A DTensor that is `whole` once it is summed; what each process has of it is another."""
    over = mesh(name)
    local = whole.clone()
    for d, placement in enumerate(placements):
        if placement.is_partial():
            rank, size = over.get_local_rank(d), over.size(d)
            share = 2 * (rank + 1) / (size * (size + 1))
            local = local * (share * size if placement.reduce_op == "avg" else share)
    return DTensor.from_local(local, over, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def snapshot(params, optimizer):
    state = {i: {k: here(torch.as_tensor(v)).clone() for k, v in optimizer.state.get(p, {}).items()}
             for i, p in enumerate(params)}  # fmt: skip
    return [here(p).clone() for p in params], state


def unchanged(params, optimizer, before):
    weights, state = snapshot(params, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
    assert {i: s.keys() for i, s in state.items()} == {i: s.keys() for i, s in before[1].items()}
    assert all(torch.equal(s[k], before[1][i][k]) for i, s in state.items() for k in s)


# --- what is sent ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_sends_nothing_but_its_norm(backend):
    for options, count in (({}, 0), ({"max_norm": 1.0}, 3), ({"skip_non_finite": True}, 3)):  # two axes, and the line
        params = make_params(torch.float32, shared=True)
        optimizer = fusedopt.AdamW(params, backend=backend, ema_decay=0.9, **options)
        for step in range(3):
            set_gradients(params, step)
            assert sent(optimizer.step) == ({"allreduce_": count} if count else {})
    line = [parameter(torch.ones(9, 3), "line", Shard(0)), parameter(torch.ones(4), "line", Replicate())]
    for param in line:
        param.grad = torch.ones_like(param)
    assert sent(fusedopt.AdamW(line, max_norm=1.0, backend=backend).step) == {"allreduce_": 1}
    replicas = line[1:]  # every process has all of them
    assert sent(fusedopt.AdamW(replicas, max_norm=1.0, backend=backend).step) == {}
    assert sent(fusedopt.SGD([nn.Parameter(torch.ones(3))], max_norm=1.0, backend=backend).step) == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_gradients_are_summed_once_and_together(backend):
    wholes = [torch.randn(4, 6), torch.randn(5), torch.randn(3, 2).double(), torch.randn(7), torch.randn(8, 3)]
    grads = [torch.randn_like(whole) for whole in wholes]
    where = [("line", Replicate()), ("line", Replicate()), ("line", Replicate()), ("grid", Replicate(), Replicate()),
             ("grid", Shard(0), Replicate())]  # fmt: skip
    shared = [parameter(whole, *at) for whole, at in zip(wholes, where, strict=True)]
    alone = [nn.Parameter(whole.clone()) for whole in wholes]
    ours, theirs = (fusedopt.AdamW(params, lr=0.1, max_norm=1.0, backend=backend) for params in (shared, alone))
    for _ in range(3):
        for q, g in zip(alone, grads, strict=True):
            q.grad = g
        for p, g in zip(shared[:3], grads, strict=False):
            p.grad = partial_gradient(g, "line", Partial())
        shared[3].grad = partial_gradient(grads[3], "grid", Partial(), Partial("avg"))
        rows = grads[4].chunk(2)[mesh("grid").get_local_rank(0)]
        share = torch.tensor([0.25, 0.75])[mesh("grid").get_local_rank(1)]
        shared[4].grad = DTensor.from_local(
            rows * share, mesh("grid"), (Shard(0), Partial()), run_check=False, shape=(8, 3), stride=(3, 1)
        )
        kept = [here(p.grad).clone() for p in shared]
        # line: one for each of two dtypes; grid: two axes for one, one axis for another; then the norm, one axis
        assert sent(ours.step) == {"allreduce_": 2 + 2 + 1 + 1}
        theirs.step()
        assert all(torch.equal(here(p.grad), g) for p, g in zip(shared, kept, strict=True))  # they are the user's
        assert float(ours.grad_norm) == pytest.approx(float(theirs.grad_norm), rel=1e-6)
    for p, q in zip(shared, alone, strict=True):
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=0, atol=2e-6)


# --- whose norm it is ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", [False, True])
def test_norm_counts_each_element_once(backend, skip):
    params = make_params(torch.float32, shared=True)
    optimizer = fusedopt.SGD(params, lr=0.0, max_norm=math.inf, skip_non_finite=skip, backend=backend)
    alone = make_params(torch.float32, shared=False)
    for step in range(3):
        for some in (params, alone):
            set_gradients(some, step)
        optimizer.step()
        exact = math.sqrt(sum(float(q.grad.double().square().sum()) for q in alone))
        assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-9)
    if skip:
        bad = [p.grad for p in params]
        bad[1] = placed(torch.full((6, 900), torch.inf if dist.get_rank() == 0 else 0.0), 1)  # in one process's part
        for p, g in zip(params, bad, strict=True):
            p.grad = g
        before = snapshot(params, optimizer)
        optimizer.step()
        unchanged(params, optimizer, before)
        assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_pipeline_stages_add_theirs(backend):
    """Ranks 0 and 1 hold one stage, 2 and 3 another: whole in each of the pair, then sharded over it."""
    rank = dist.get_rank()
    pairs = [dist.new_group(ranks) for ranks in ((0, 2), (1, 3))]  # over the stages
    stage, other = rank // 2, rank % 2
    grads = [torch.arange(5.0) + 1, torch.arange(7.0) - 3]
    param = nn.Parameter(torch.zeros(len(grads[stage])))
    optimizer = fusedopt.SGD([param], lr=1.0, max_norm=1.0, extra_groups=[pairs[other]], backend=backend)
    param.grad = grads[stage].clone()
    assert sent(optimizer.step) == {"allreduce_": 1}
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-9)
    torch.testing.assert_close(param.detach(), -grads[stage] / (norm + 1e-6))
    # stages of shared parameters: over a stage's own processes, then over the stages
    shards = [sharded.DeviceMesh("cpu", list(ranks)) for ranks in ((0, 1), (2, 3))]
    param = nn.Parameter(
        distribute_tensor(torch.zeros(len(grads[stage])), shards[stage], [Shard(0)], src_data_rank=None)
    )
    optimizer = fusedopt.SGD([param], lr=1.0, max_norm=1.0, extra_groups=[pairs[other]], backend=backend)
    param.grad = distribute_tensor(grads[stage], shards[stage], [Shard(0)], src_data_rank=None)
    assert sent(optimizer.step) == {"allreduce_": 2}
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-9)
    with pytest.raises(TypeError, match="extra_groups has 'world'"):
        fusedopt.SGD([param], extra_groups=["world"])


# --- what ranks disagree on ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["shared", "extra_groups", "clipped"])
def test_all_skip_or_none_does(backend, how):
    if how == "extra_groups":
        params = [nn.Parameter(torch.ones(3 + dist.get_rank()))]
        options = {"extra_groups": [dist.group.WORLD]}
    else:
        params, options = make_params(torch.float32, shared=True), {"max_norm": 1.0} if how == "clipped" else {}
    optimizer = fusedopt.AdamW(params, backend=backend, **options)
    for culprit in (None, 2, None, 0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.grad_scale = torch.tensor(2.0)
        optimizer.found_inf = torch.tensor(float(dist.get_rank() == culprit))
        before = snapshot(params, optimizer)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        if culprit is not None:
            unchanged(params, optimizer, before)
        else:
            assert all(not torch.equal(here(p), w) for p, w in zip(params, before[0], strict=True) if w.numel())


def test_a_rank_with_nothing():
    """No gradients in one process, no parameters in another: the others' norm, and no hang."""
    rank = dist.get_rank()
    params = [nn.Parameter(torch.ones(3))]
    if rank != 1:
        params[0].grad = torch.full((3,), float(rank))
    if rank == 3:
        params = [nn.Parameter(torch.ones(0))]
        params[0].grad = torch.ones(0)
    optimizer = fusedopt.AdamW(params, max_norm=1.0, skip_non_finite=True, extra_groups=[dist.group.WORLD])
    assert sent(optimizer.step) == {"allreduce_": 1}
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(3 * 4))


# --- what is refused ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_placed_otherwise(backend):
    first = parameter(torch.ones(8), "line", Replicate())
    second = parameter(torch.ones(8, 8), "line", Shard(0))
    optimizer = fusedopt.AdamW([first, second], max_norm=1.0, backend=backend)
    wrong = {
        "Shard(1)": distribute_tensor(torch.ones(8, 8), mesh("line"), [Shard(1)], src_data_rank=None),
        "Partial": partial_gradient(torch.ones(8, 8), "line", Partial()),
        "another mesh": distribute_tensor(torch.ones(8, 8), mesh("grid"), [Shard(0), Shard(0)], src_data_rank=None),
    }
    for steps in range(2):
        before = snapshot([first, second], optimizer)
        for gradient in wrong.values():
            first.grad = partial_gradient(torch.ones(8), "line", Partial())
            second.grad = gradient

            def step():
                with pytest.raises(RuntimeError, match=r"the gradient of a parameter of shape \(8, 8\) is placed .*"):
                    optimizer.step()

            assert sent(step) == {}
            unchanged([first, second], optimizer, before)
        second.grad = distribute_tensor(torch.ones(8, 8), mesh("line"), [Shard(0)], src_data_rank=None)
        optimizer.step()
        assert float(optimizer.state[second]["step"]) == steps + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_max_is_no_sum(backend):
    param = parameter(torch.ones(8), "line", Replicate())
    param.grad = partial_gradient(torch.ones(8), "line", Partial("max"))
    with pytest.raises(RuntimeError, match="redistribute"):
        fusedopt.AdamW([param], backend=backend).step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"ema_decay": 0.9}, {"state_dtype": "8bit"}], ids=str)
def test_placement_changed_between_steps(backend, options):
    """Its state lies as the parameter lay: an error in every process, and nothing has changed."""
    first, second = parameter(torch.ones(80, 80), "line", Shard(0)), parameter(torch.ones(80, 80), "line", Shard(0))
    optimizer = fusedopt.AdamW([first, second], backend=backend, **options)
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = distribute_tensor(here(second).repeat(4, 1), mesh("line"), [Shard(1)], src_data_rank=None)
    second._spec, second._local_tensor = other._spec, other._local_tensor  # `.data =` changes neither
    second.grad = torch.ones_like(second)
    before = snapshot([first, second], optimizer)
    with pytest.raises(ValueError, match="was that placed anew"):
        optimizer.step()
    unchanged([first, second], optimizer, before)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"state_dtype": "8bit"}], ids=str)
def test_checkpoints_that_do_not_fit(options):
    def make(rows, *placements):
        param = parameter(torch.ones(rows, 80), "line", *placements)
        optimizer = fusedopt.AdamW([param], **options)
        param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        return param, optimizer

    param, optimizer = make(80, Shard(0))
    before = snapshot([param], optimizer)
    for other, message in (
        (make(84, Shard(0)), "another model"),
        (make(80, Shard(1)), "placed"),
        (make(80, Replicate()), "placed"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other[1].state_dict())
        unchanged([param], optimizer, before)
    whole = nn.Parameter(torch.ones(80, 80))
    alone = fusedopt.AdamW([whole], **options)
    whole.grad = torch.full_like(whole, 0.5)
    alone.step()
    optimizer.load_state_dict(alone.state_dict())  # whole in every process: each takes its part
    param.grad, whole.grad = torch.full_like(param, 0.25), torch.full_like(whole, 0.25)
    param.data.copy_(distribute_tensor(whole.detach(), mesh("line"), [Shard(0)], src_data_rank=None))
    optimizer.step()
    alone.step()
    torch.testing.assert_close(param.detach().full_tensor(), whole.detach())


# --- lifetimes and copies ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_and_optimizer_are_collected(backend):
    params = make_params(torch.float32, shared=True)
    optimizer = fusedopt.AdamW(params, backend=backend, ema_decay=0.9, max_norm=1.0)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    gone = [weakref.ref(x) for x in (optimizer, *params, *(here(p) for p in params if isinstance(p, DTensor)))]
    locals_ = [weakref.ref(p._local_tensor) for p in params if isinstance(p, DTensor)]
    del params, optimizer
    gc.collect()
    assert not any(ref() is not None for ref in [*gone, *locals_])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on(how):
    params = [parameter(torch.ones(8, 6), "line", Shard(0)), nn.Parameter(torch.ones(4))]
    optimizer = fusedopt.AdamW(params, lr=0.1, max_norm=1.0, ema_decay=0.9)

    def step(one):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 0.5)
        one.step()

    step(optimizer)
    again = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    for one in (optimizer, again):
        step(one)
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert p is not q and torch.equal(here(p), here(q))
        for key, value in optimizer.state[p].items():
            assert torch.equal(here(value), here(again.state[q][key]))


def test_average_in_the_weights_place():
    params = make_params(torch.float32, shared=True)
    optimizer = fusedopt.AdamW(params, lr=0.1, ema_decay=0.5)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    own = [here(p).clone() for p in params]
    with optimizer.ema_weights():
        assert all(torch.equal(here(p), here(optimizer.state[p]["ema"])) for p in params)
        assert any(not torch.equal(here(p), w) for p, w in zip(params, own, strict=True) if w.numel())
    assert all(torch.equal(here(p), w) for p, w in zip(params, own, strict=True))
    assert all(parts.is_shared(p) == (row[1] is not None) for p, row in zip(params, PLACED, strict=True))
