"""Losses over vocabulary shards: the ranks as threads of one process, or one after the other without a group.

`vocab_parallel.py BACKEND [SIMULATED LIBRARY]`: the local passes on that backend's kernels, in a process whose only
backend it is, against float64; see loss_features.py.
"""

import functools
import itertools
import sys

if __name__ == "__main__":
    if sys.argv[1] == "cuda":
        sys.argv[1:2] = []
        sys.path.insert(0, __file__.rsplit("/", 1)[0] + "/simt")
        import simulated  # noqa: F401
    else:
        sys.path.insert(0, __file__.rsplit("/", 2)[0])
        import triton_interpreter  # noqa: F401

import torch
from loss_oracle import composition

from fusedopt import backends
from fusedopt.distributed import vocab_rows
from fusedopt.distributed.vocab import VocabShards
from fusedopt.nn import rows as torch_rows
from fusedopt.nn.cross_entropy import Rule

FEATURES = [
    {},
    {"z_loss": 1e-2, "logit_scale": 0.7},
    {"softcap": 5.0, "logit_scale": -0.5},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"label_smoothing": 0.2, "z_loss": 0.5, "softcap": 3.0},
    {"weighted": True, "z_loss": 1e-2},
    {"weighted": True, "label_smoothing": 0.3, "softcap": 4.0, "z_loss": 1e-2, "logit_scale": 1.5},
]


def on_ranks(world, function, *arguments):
    """function(*arguments) on `world` threads, each a rank of a process group; raises what one of them raises."""
    from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

    threads = torch.get_num_threads()
    results = {}

    @spawn_threads_and_init_comms(world_size=world)
    @functools.wraps(function)
    def run(_self):
        torch.set_num_threads(threads)
        results[torch.distributed.get_rank()] = function(*arguments)

    run(None)
    return [results[rank] for rank in range(world)]


def ranges_of(cuts, order=None):
    """[first, last) between neighbouring cuts, to the ranks in `order`."""
    ranges = list(itertools.pairwise(cuts))
    return tuple(ranges[i] for i in order or range(len(ranges)))


def without_a_group(logits, target, weight, ranges, kernels, upstream, with_stats=False, strided=False, **options):
    """(losses (N,), gradient (N, V), stats) of every rank in turn."""
    classes = weight if weight is None else weight.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    rule = Rule(classes, **options)
    ranks = [VocabShards(None, rank, ranges) for rank in range(len(ranges))]
    parts = [logits[:, first:last] if strided else logits[:, first:last].contiguous() for first, last in ranges]
    told = []
    for shards, part in zip(ranks, parts, strict=True):
        columns = vocab_rows.new_columns(rule, with_stats, len(part), part.dtype, part.device)
        targets = vocab_rows.targets_of(target, rule, shards)
        vocab_rows.statistics(part, targets, rule, shards, columns.values, with_stats, kernels)
        told.append(columns.values)
    grad = torch.full_like(logits, 7.0)
    for shards, part in zip(ranks, parts, strict=True):
        targets = vocab_rows.targets_of(target, rule, shards)
        rows = vocab_rows.merge(torch.stack(told), target, targets, rule, shards, with_stats)
        out = torch.full_like(part, 7.0)
        vocab_rows.gradient(
            part, targets, rule, shards, rows.lse, rows.from_target, upstream.to(rows.lse.dtype), out, kernels
        )
        grad[:, shards.first : shards.last] = out
    return rows.loss, grad, rows.stats


def exact(logits, target, weight, upstream, **options):
    """(losses, gradient) in float64, over whole rows."""
    x = logits.detach().double().requires_grad_()
    if logits.isfinite().all():
        losses = composition(x, target, None if weight is None else weight.double(), reduction="none", **options)
    else:  # of 0 * inf
        losses = torch.nn.functional.cross_entropy(x, target, weight, reduction="none", **options)
    losses.backward(upstream.double())
    return losses.detach(), x.grad


def roundings(logits, upstream, options):
    """How far a loss, and a gradient, may be from float64: a rounding of the log-sum-exp, of the gradient, and what the
    kernels' exp and tanh lack (csrc/softmax.h: 2e-7 + 2e-8 |x|; 4e-7 times the cap)."""
    eps = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).eps
    s = logits.double() * options.get("logit_scale", 1.0)
    if (cap := options.get("softcap")) is not None:
        s = cap * torch.tanh(s / cap)
    largest = s.where(s.isfinite(), 0).abs().max().item() if s.numel() else 0.0
    kernels = 0.0 if logits.dtype == torch.float64 else 4e-7 + 4e-8 * largest + 8e-7 * (cap or 0.0)
    relative = kernels + eps * (8 + 2 * largest)
    z = options.get("z_loss", 0.0)
    loss = relative * (1 + 2 * z * (largest + 8) + 2 * z * largest**2)
    steepness = (1 + 2 * z * (largest + 8)) * abs(options.get("logit_scale", 1.0)) * upstream.abs().max().item()
    return loss, (loss + torch.finfo(logits.dtype).eps) * steepness


def assert_as_dense(logits, target, weight, ranges, kernels, with_stats=False, strided=False, **options):
    upstream = torch.rand(len(logits), generator=torch.Generator().manual_seed(3)) + 0.5
    losses, grad, _ = without_a_group(logits, target, weight, ranges, kernels, upstream, with_stats, strided, **options)
    true_losses, true_grad = exact(logits, target, weight, upstream, **options)
    if not len(logits):
        return
    loss_error, grad_error = roundings(logits, upstream, options)
    heaviest = 1.0 if weight is None else max(1.0, weight.abs().max().item())
    torch.testing.assert_close(losses.double(), true_losses, rtol=1e-6, atol=loss_error * heaviest, equal_nan=True)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-6, atol=grad_error * heaviest, equal_nan=True)


def make(rows, classes, dtype, weighted=False, seed=0, spread=3.0, ignored=True, **options):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g) * spread).to(dtype)
    target = torch.randint(classes, (rows,), generator=g)
    if ignored:
        target[1::4] = -100
    weight = (torch.rand(classes, generator=g) + 0.1).to(dtype) if weighted else None
    return logits, target, weight, options


def check_kernels(kernels, dtypes):
    """How many losses agree with float64."""
    done = 0
    for dtype in dtypes:
        for seed, features in enumerate(FEATURES):
            for cuts in ([0, 1, 1, 24, 37], [0, 37], [0, 12, 37]):
                logits, target, weight, options = make(9, 37, dtype, seed=seed, **features)
                ranges = ranges_of(cuts, range(len(cuts) - 2, -1, -1))
                for with_stats, strided in ((False, True), (True, False)):
                    assert_as_dense(logits, target, weight, ranges, kernels, with_stats, strided, **options)
                    done += 1
    return done


if __name__ == "__main__":
    name = "cuda" if "simulated" in sys.modules else sys.argv[1]
    torch.set_num_threads(1)
    print(check_kernels(backends.module(name), (torch.float32, torch.bfloat16, torch.float16)), "losses agree")


KERNELS = {"cpu": lambda: backends.module("cpu"), "torch": lambda: torch_rows}
