"""csrc/cuda/mse.cu against float64, on host memory: `mse.py LIBRARY full|few`."""

import simulated  # noqa: I001
import itertools
import sys

import torch
from mse_oracle import check_functional, check_kernels

from fusedopt.backends import cuda

torch.set_num_threads(1)
SIZES = [1, 3, 8, 1000, 4096, 8195, 20000]
if sys.argv[2] == "full":
    SIZES += [70001]
checked = 0
for n, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16, torch.float16)):
    losses = check_kernels(cuda, n, dtype)
    assert len(set(losses)) == 1, (n, dtype, losses)  # the sum's order depends on the size alone
    checked += len(losses)
check_functional("cuda")

launches = simulated.control.fusedopt_simt_launch_count
launches.restype = simulated.ctypes.c_size_t
many = 4097 * 4096 + 5 if sys.argv[2] == "full" else 4096  # more than there are blocks at once
x, y, grad = torch.arange(many) % 7 - 3.0, torch.ones(many), torch.empty(many)
simulated.control.fusedopt_simt_reset()
loss = cuda.squared_error(x, y, 1.0, grad, 2.0)
assert launches() == 2
assert torch.equal(grad, 2 * (x - y))
assert loss == (x - y).square().sum(dtype=torch.float64).float()
cuda.squared_error_backward(x, y, grad, 2.0, torch.tensor(3.0))
assert launches() == 3
assert torch.equal(grad, 6 * (x - y))
print(f"{checked} losses agree")
