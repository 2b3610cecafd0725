"""What every test starts from: one seed, and process-wide switches put back afterwards."""

import pytest
import torch

from fusedopt.backends import cpu


@pytest.fixture(autouse=True)
def _same_start():
    threads, isa = torch.get_num_threads(), cpu.isa() if cpu.available() is True else None
    # small parallel loops stall where other processes hold the cores; tests of threads ask for them
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        cpu._native.use_cpu_isa(isa)
