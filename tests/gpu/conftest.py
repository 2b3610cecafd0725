"""What only a GPU can show; `make gpu` runs it. Elsewhere every test here is skipped, with the reason."""

from pathlib import Path

import pytest
import torch

from fusedopt import backends


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make gpu"))


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = backends.module(request.param).available()
    if reason is not True:
        pytest.fail(f"backend {request.param!r} is off on a machine with a GPU: {reason}")
    return request.param
