"""One thread and one seed for all micro cases."""

import pytest
import torch

from fusedopt.backends import cpu


@pytest.fixture(autouse=True)
def _one_thread():
    if cpu.available() is not True:
        pytest.skip(str(cpu.available()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
