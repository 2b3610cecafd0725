"""One rank of test_vocab_parallel_processes.py: `vocab_parallel_ranks.py RANK WORLD FILE`, on gloo."""

import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import vocab_parallel as v
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from fusedopt.nn.functional import cross_entropy, linear_cross_entropy

CUTS = [0, 5, 6, 19]
H = 8


def counted(function, *arguments, **options):
    with CommDebugMode() as mode:
        result = function(*arguments, **options)
    return mode.get_total_counts(), result


def collectives(shards, mesh):
    """One all-gather forward, whatever the options; one all-reduce backward where there is an input."""
    first, last = shards["vocab_range"]
    logits, target, _, _ = v.make(6, 19, torch.float32)
    x = torch.randn(6, H, generator=torch.Generator().manual_seed(0))
    head = torch.randn(19, H, generator=torch.Generator().manual_seed(1))
    cross_entropy(logits[:, first:last], target, **shards)  # the ranges are exchanged once
    for features in v.FEATURES:
        weight = torch.ones(19) if features.get("weighted") else None
        options = {k: f for k, f in features.items() if k != "weighted"}
        for reduction in ("mean", "sum", "none"):
            options.update(reduction=reduction, return_stats=True)
            mine = logits[:, first:last].clone().requires_grad_()
            forward, (loss, _) = counted(cross_entropy, mine, target, weight, **options, **shards)
            assert (forward, counted(loss.sum().backward)[0]) == (1, 0), options
            a, w = x.clone().requires_grad_(), head[first:last].clone().requires_grad_()
            options["chunk_bytes"] = 2 * 4 * 13  # two rows
            forward, (loss, _) = counted(linear_cross_entropy, a, w, target, weight=weight, **options, **shards)
            assert (forward, counted(loss.sum().backward)[0]) == (1, 1), options
            del options["chunk_bytes"]
            forward, (loss, _) = counted(linear_cross_entropy, x, w, target, weight=weight, **options, **shards)
            assert (forward, counted(loss.sum().backward)[0]) == (1, 0), options
    of_mesh = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    forward, loss = counted(cross_entropy, of_mesh, target)
    assert (forward, counted(loss.backward)[0]) == (1, 0)
    with loss_parallel():
        theirs, loss = counted(F.cross_entropy, of_mesh, target)
        loss.backward()
    assert theirs == 3
    a = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
    w = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
    forward, loss = counted(linear_cross_entropy, a, w, target)
    assert (forward, counted(loss.backward)[0]) == (1, 1)


def values(shards):
    """The same loss on every rank, and the dense one's gradients."""
    first, last = shards["vocab_range"]
    logits, target, _, _ = v.make(6, 19, torch.float32)
    exact = logits.double().requires_grad_()
    exact_loss = F.cross_entropy(exact, target)
    exact_loss.backward()
    mine = logits[:, first:last].clone().requires_grad_()
    loss = cross_entropy(mine, target, **shards)
    loss.backward()
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), exact.grad[:, first:last], rtol=1e-5, atol=1e-7)


def disagreements(shards, rank):
    first, last = shards["vocab_range"]
    logits, target, _, _ = v.make(6, 19, torch.float32)
    mine = logits[:, first:last]
    with pytest.raises(ValueError, match=r"ranks \[.*\] of the group call the loss with other options"):
        cross_entropy(mine, target, z_loss=0.1 * (rank == 0), **shards)
    dist.barrier()
    with pytest.raises(IndexError, match="Target 19 is out of bounds"):
        cross_entropy(mine, torch.full((6,), 19), **shards)
    dist.barrier()
    # gloo would end a process that receives too much; TORCH_DISTRIBUTED_DEBUG=DETAIL looks before
    rows = 6 - (rank == 0)
    with pytest.raises(RuntimeError, match="each must call the loss with the same rows, here "):
        cross_entropy(mine[:rows], target[:rows], **shards)


def main(rank, world, file):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", f"file://{file}", timeout, world, rank)
    mesh = init_device_mesh("cpu", (world,))
    shards = {"tp_group": dist.group.WORLD, "vocab_range": (CUTS[rank], CUTS[rank + 1])}
    values(shards)
    collectives(shards, mesh)
    disagreements(shards, rank)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    print("done", flush=True)
