"""Under DistributedDataParallel, FSDP2, HSDP, FSDP1, ZeRO, tensor parallelism: as one process with the whole batch."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded import here, mesh
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import fusedopt

pytestmark = pytest.mark.processes(4)

WORLD, VOCAB, DIM, LENGTH, STEPS = 4, 11, 10, 6, 5
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


class Block(nn.Module):
    """Attention and a feed-forward layer; sizes that four processes cannot share evenly."""

    def __init__(self, dim: int = DIM, hidden: int = 13) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.gains = nn.Parameter(torch.ones(2))  # two of four processes have none of it

    def forward(self, x):  # (B, T, dim)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.gains[0] * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.gains[1] * self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.aside = nn.Linear(DIM, DIM)

    def forward(self, tokens, aside: bool = True):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + self.aside(x) if aside else x))


def new_model(dtype=torch.float64):
    torch.manual_seed(1)
    return Model().to(dtype)


def batch(step, rank=None, parts=WORLD, micro=0):
    """(tokens, targets): of all processes, or one's part."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    tokens = torch.randint(VOCAB, (2 * WORLD, LENGTH + 1), generator=generator)
    tokens = tokens if rank is None else tokens.chunk(parts)[rank]
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, step, rank=None, micro=0, **keywords):
    tokens, targets = batch(step, rank, micro=micro)
    return F.cross_entropy(model(tokens, **keywords).flatten(0, 1).float().double(), targets.flatten())


@functools.cache
def alone(max_norm=None, accumulate=1, aside=(True,) * STEPS, average=None, dtype=torch.float64):
    """(weights, averages, norms) of one process, by torch's own."""
    model = new_model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    averages, norms = None, []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulate):
            (loss_of(model, step, micro=micro, aside=aside[step]) / accumulate).backward()
        if max_norm is not None:
            norms.append(float(clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        if average is not None:
            weights = [p.detach() for p in model.parameters()]
            averages = [w.clone() for w in weights] if averages is None else averages
            torch._foreach_lerp_(averages, weights, 1 - average)
    return [p.detach() for p in model.parameters()], averages, norms


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def same(params, expected, atol=1e-9):
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(whole(ours).to(theirs.dtype), theirs, rtol=0, atol=atol)


def collectives(call):
    """How many it issued."""
    with CommDebugMode() as counted:
        call()
    return sum(counted.get_comm_counts().values())


# --- DistributedDataParallel ---

DDP = {
    "default": {},
    "bucket-views": {"gradient_as_bucket_view": True},
    "static-graph": {"static_graph": True},
    "static-bucket-views": {"static_graph": True, "gradient_as_bucket_view": True},
    "small-buckets": {"bucket_cap_mb": 0.0007, "gradient_as_bucket_view": True},  # rebuilt after the first iteration
}


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("options", DDP)
def test_ddp(options, max_norm):
    model = DistributedDataParallel(new_model(), **DDP[options])
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=max_norm, ema_decay=0.75, **OPTIONS)
    weights, averages, norms = alone(max_norm=max_norm, average=0.75)
    pointers = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        pointers.add(tuple(p.grad.data_ptr() for p in model.parameters()))
        assert collectives(optimizer.step) == 0  # every process has all gradients
        if max_norm is not None:
            assert float(optimizer.grad_norm) == pytest.approx(norms[step], rel=1e-9)
    same(model.parameters(), weights)
    same([optimizer.state[p]["ema"] for p in model.parameters()], averages)
    if options == "small-buckets":
        assert len(pointers) > 1, "the buckets were not rebuilt: this test shows nothing"


def test_ddp_accumulates():
    model = DistributedDataParallel(new_model(), gradient_as_bucket_view=True)
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=0.5, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        with model.no_sync():
            (loss_of(model, step, dist.get_rank(), micro=0) / 2).backward()
        (loss_of(model, step, dist.get_rank(), micro=1) / 2).backward()
        optimizer.step()
    same(model.parameters(), alone(max_norm=0.5, accumulate=2)[0])


def test_ddp_with_unused_parameters():
    aside = (False, True, False, True, True)
    model = DistributedDataParallel(new_model(), find_unused_parameters=True)
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=0.5, ema_decay=0.75, **OPTIONS)
    weights, averages, norms = alone(max_norm=0.5, average=0.75, aside=aside)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank(), aside=aside[step]).backward()
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(norms[step], rel=1e-9)
    same(model.parameters(), weights)
    same([optimizer.state[p]["ema"] for p in model.parameters()], averages)
    assert float(optimizer.state[model.module.aside.weight]["step"]) == 3


# --- FSDP2 ---


def fully_sharded(model, **keywords):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **keywords)
    return fully_shard(model, **keywords)


def columns(param):
    """Shard the second dimension where it goes into parts evenly: FSDP2 asks for that."""
    return Shard(1) if param.dim() == 2 and param.shape[1] % WORLD == 0 else Shard(0)


FSDP2 = {
    "reshard": {"reshard_after_forward": True},
    "keep": {"reshard_after_forward": False},
    "columns": {"shard_placement_fn": columns},
    "hsdp": {"mesh": "grid"},
}


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("options", FSDP2)
def test_fsdp2(options, max_norm):
    keywords = {"mesh": "line", **FSDP2[options]}
    model = fully_sharded(new_model(), **{**keywords, "mesh": mesh(keywords["mesh"])})
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=max_norm, ema_decay=0.75, **OPTIONS)
    weights, averages, norms = alone(max_norm=max_norm, average=0.75)
    if keywords["mesh"] == "line":
        assert any(here(p).numel() == 0 for p in model.parameters()) == (dist.get_rank() >= 2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        assert collectives(optimizer.step) == (0 if max_norm is None else 1)
        if max_norm is not None:
            assert float(optimizer.grad_norm) == pytest.approx(norms[step], rel=1e-9)
    assert {row.backend for row in optimizer.backend_report()} == {"cpu"}
    same(model.parameters(), weights)
    same([optimizer.state[p]["ema"] for p in model.parameters()], averages)
    for param in model.parameters():
        for key in ("exp_avg", "exp_avg_sq", "ema"):
            state = optimizer.state[param][key]
            assert (state.device_mesh, state.placements) == (param.device_mesh, param.placements)


def test_fsdp2_accumulates():
    model = fully_sharded(new_model(), mesh=mesh("line"))
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=0.5, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            (loss_of(model, step, dist.get_rank(), micro=micro) / 2).backward()
        optimizer.step()
    same(model.parameters(), alone(max_norm=0.5, accumulate=2)[0])


@pytest.mark.parametrize("policy", ["mixed", "offload"])
def test_fsdp2_policies_are_stocks(policy):
    """bfloat16 compute, parameters on the CPU: as torch's own AdamW under the same."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    if policy == "mixed":
        keywords = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    else:
        keywords = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    trained = []
    for make in (functools.partial(fusedopt.AdamW, max_norm=0.5), torch.optim.AdamW):
        model = fully_sharded(new_model(torch.float32), mesh=mesh("line"), **keywords)
        optimizer = make(model.parameters(), eps=1e-3, **OPTIONS)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step, dist.get_rank()).backward()
            if make is torch.optim.AdamW:
                clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        trained.append([whole(p) for p in model.parameters()])
    same(*trained, atol=2e-4 if policy == "mixed" else 1e-6)  # one weight's bfloat16 may fall on the other side


# --- FSDP1 ---


def test_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        model = FullyShardedDataParallel(new_model(), use_orig_params=True, device_id=torch.device("cpu"))
        loss_of(model, 0, dist.get_rank()).backward()
    except (RuntimeError, AttributeError, AssertionError, ValueError, NotImplementedError) as error:
        pytest.skip(f"this torch's FullyShardedDataParallel does not run on the CPU: {error}")
    # a process holds a flat piece of a flat parameter: plain tensors, whose norm is every process's own
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=0.5, extra_groups=[dist.group.WORLD], **OPTIONS)
    weights, _, norms = alone(max_norm=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(norms[step], rel=1e-9)
    with FullyShardedDataParallel.summon_full_params(model):
        same(model.parameters(), weights)


# --- ZeRO ---

ZERO = {"plain": {}, "ema": {"ema_decay": 0.75}, "views": {"parameters_as_bucket_view": True}}


@pytest.mark.parametrize("options", ZERO)
def test_zero(options):
    """A share of the parameters and states to each process; one's states, whole, in all and in a plain optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(model):
        keywords = {**OPTIONS, **ZERO[options]}
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fusedopt.AdamW, **keywords)

    def step(model, optimizer, number):
        optimizer.zero_grad()
        loss_of(model, number, dist.get_rank()).backward()
        optimizer.step()

    model = DistributedDataParallel(new_model())
    optimizer = make(model)
    for number in range(STEPS - 1):
        step(model, optimizer, number)
    state = [None]
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        state = [optimizer.state_dict()]
    dist.broadcast_object_list(state)

    again, plain = (DistributedDataParallel(copy.deepcopy(model.module)) for _ in range(2))
    loaded = make(again), fusedopt.AdamW(plain.parameters(), ema_decay=ZERO[options].get("ema_decay"), **OPTIONS)
    for one in loaded:
        one.load_state_dict(copy.deepcopy(state[0]))
    weights, averages, _ = alone(average=0.75)
    for one, by in ((model, optimizer), (again, loaded[0]), (plain, loaded[1])):
        step(one, by, STEPS - 1)
        same(one.parameters(), weights)
    if options == "ema":
        same([loaded[1].state[p]["ema"] for p in plain.parameters()], averages)
        for one, by in ((model, optimizer), (again, loaded[0])):
            expected = dict(zip(one.parameters(), averages, strict=True))
            mine = by.optim.param_groups[0]["params"]
            assert 0 < len(mine) < len(averages)
            same([by.optim.state[p]["ema"] for p in mine], [expected[p] for p in mine])


def test_zero_clips_by_the_norm_of_all():
    """max_norm beside optimizer_class would be of a process's share: an error; with extra_groups it is of all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(new_model())
    for option in ({"max_norm": 0.5}, {"skip_non_finite": True}):
        with pytest.raises(ValueError, match="extra_groups"):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fusedopt.AdamW, **option)
    clipping = functools.partial(fusedopt.AdamW, max_norm=0.5, extra_groups=[dist.group.WORLD])
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=clipping, **OPTIONS)
    weights, _, norms = alone(max_norm=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
        assert float(optimizer.optim.grad_norm) == pytest.approx(norms[step], rel=1e-9)
    same(model.parameters(), weights)


# --- tensor parallelism ---


class Parallel(nn.Module):
    """A feed-forward block as Megatron splits it, its norm over a sharded sequence."""

    def __init__(self, dim: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.scale = nn.Parameter(torch.ones(dim))  # stays a plain tensor

    def forward(self, x):  # (B, T, dim)
        return self.scale * self.down(F.gelu(self.up(self.norm(x))))


def tensor_parallel(model, over):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    by_sequence = Shard(1)
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=by_sequence),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, over, plan)
    prepare = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=by_sequence, use_local_output=False)
    parallelize_module(model, over, prepare)
    return model


def squares(model, step, part=slice(None)):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    return F.mse_loss(model(x[part]), y[part])


@functools.cache
def parallel_alone(max_norm):
    torch.manual_seed(2)
    model = Parallel().double()
    optimizer, norms = torch.optim.AdamW(model.parameters(), **OPTIONS), []
    for step in range(STEPS):
        optimizer.zero_grad()
        squares(model, step).backward()
        norms.append(float(clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("data_parallel", [False, True])
def test_tensor_parallel(data_parallel):
    """Norms are replicated, their gradients Partial: summed once, together; replicas do not drift apart."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(2)
    grid, part = mesh("grid"), slice(None)
    model = tensor_parallel(Parallel().double(), grid["shards"] if data_parallel else mesh("line"))
    if data_parallel:
        fully_shard(model, mesh=grid["replicas"], ignored_params={model.scale})
        half = grid.get_local_rank("replicas")
        part = slice(2 * half, 2 * half + 2)
    optimizer = fusedopt.AdamW(model.parameters(), max_norm=0.1, **OPTIONS)
    weights, norms = parallel_alone(0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        squares(model, step, part).backward()
        if data_parallel:
            dist.all_reduce(model.scale.grad, group=grid.get_group("replicas"))
            model.scale.grad /= 2
        partial = [p for p in model.parameters() if isinstance(p.grad, DTensor) and p.grad.placements != p.placements]
        assert len(partial) == (0 if data_parallel else 2)
        # the norm over one process group, or two; the Partial gradients together
        assert collectives(optimizer.step) == 2
        assert float(optimizer.grad_norm) == pytest.approx(norms[step], rel=1e-9)
    same(model.parameters(), weights)
    for param in model.parameters():
        if isinstance(param, DTensor) and all(p.is_replicate() for p in param.placements):
            others = [torch.empty_like(here(param)) for _ in range(WORLD)]
            dist.all_gather(others, here(param))
            assert all(torch.equal(other, here(param)) for other in others)
