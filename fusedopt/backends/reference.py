"""PyTorch's own functions: right for every tensor that PyTorch takes, and the oracle's neighbour in the tests.

It offers no kernels: what a backend does not take, `fusedopt.optim` and `fusedopt.nn` hand to torch themselves.
"""

from __future__ import annotations

name = "reference"
device_types = None  # all


def available() -> bool:
    return True


def supports(rule: int, param: object, grad: object, state: object) -> bool:
    return False
