"""LAMB on the simulated GPU, whose norms are summed in another order than the CPU's: `lamb.py LIBRARY full|few`."""

import simulated  # noqa: F401, I001
import sys

import torch
from optim_table import DTYPES, Case, close
from precision import compare, same_bits
from test_lamb import OPTIONS
from test_precision import CANNOT, MODES

import fusedopt.optim

KEPT = {"plain": {}, **{mode: MODES[mode] for mode in ("8bit", "master", "ema", "8bit-master-ema-clip")}}
FULL = [
    (options, mode, dtypes)
    for options in OPTIONS
    for mode in KEPT
    for dtypes in DTYPES
    if mode not in CANNOT.get(dtypes.split("-")[0], ())
]
FEW = [
    (OPTIONS[0], "plain", "f32"),
    (OPTIONS[0], "8bit-master-ema-clip", "bf16-f32-grads"),
    (OPTIONS[1], "ema", "f64"),
    (OPTIONS[2], "8bit", "f16"),
]


def weights_within_rounding(state, expected, _):
    """A ratio that is off by a rounding may round a weight otherwise once a step; the moments know nothing of it."""
    kind = expected["param"].dtype
    for key in ("param", "ema") if "ema" in expected else ("param",):
        close(state[key].to(kind), expected[key].to(kind), ulps=4)
    moments = expected.keys() - {"param", "ema", "master"}
    same_bits({key: state[key] for key in moments}, {key: expected[key] for key in moments}, _)


def zeros_and_many_chunks():
    """A norm of 0 makes a ratio of 1; a tensor of more chunks than a block has threads, beyond whose end 0 / 0 lies."""
    found = {}
    for backend in ("cuda", "cpu"):
        params = [torch.nn.Parameter(t) for t in (torch.zeros(300), torch.ones(300), torch.linspace(-1, 1, 4_300_001))]
        for p, grad in zip(params, (torch.ones(300), torch.zeros(300), torch.cos(params[2].detach())), strict=True):
            p.grad = grad
        groups = [{"params": params[:2]}, {"params": params[2:], "eps": 0.0}]
        fusedopt.optim.LAMB(groups, lr=0.5, always_adapt=True, backend=backend).step()
        found[backend] = [p.detach() for p in params]
    zero, still, large = found["cuda"]
    close(zero, torch.full((300,), -0.5), ulps=8)
    assert still.eq(1).all()
    close(large, found["cpu"][2], ulps=8)


torch.set_num_threads(1)
total = sum(
    compare(Case("LAMB", options), KEPT[mode], dtypes, weights_within_rounding)
    for options, mode, dtypes in (FULL if sys.argv[2] == "full" else FEW)
)
zeros_and_many_chunks()
print(f"{total} tensors agree")
