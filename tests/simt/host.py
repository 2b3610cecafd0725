"""Times step() where launches cost nothing, and counts them: `host.py LIBRARY TENSORS REPEATS`; prints JSON."""

import simulated  # noqa: I001
import gc
import json
import sys
import time

import torch

import fusedopt.optim

tensors, repeats = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.randn(64)) for _ in range(tensors)]
for p in params:
    p.grad = torch.randn(64)
optimizer = fusedopt.optim.AdamW(params, backend="cuda")
optimizer.step()
optimizer.step()
assert {row.backend for row in optimizer.backend_report()} == {"cuda"}

simulated.control.fusedopt_simt_set_noop(True)
seconds = []
gc.disable()
for _ in range(repeats):
    start = time.perf_counter()
    optimizer.step()
    seconds.append(time.perf_counter() - start)
simulated.control.fusedopt_simt_reset()
simulated.control.fusedopt_simt_set_noop(True)
optimizer.step()
print(json.dumps({"seconds": seconds, "launches": simulated.control.fusedopt_simt_launch_count()}))
