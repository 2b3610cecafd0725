"""fusedopt: drop-in fused optimizers and losses for PyTorch.

import torch.optim as optim          ->  from fusedopt import optim
criterion = nn.CrossEntropyLoss()    ->  criterion = fusedopt.nn.CrossEntropyLoss()
"""

from fusedopt import backends, nn, optim
from fusedopt._version import __version__
from fusedopt.nn import CrossEntropyLoss, LinearCrossEntropyLoss, LinearDistillationLoss, MSELoss
from fusedopt.optim import LAMB, SGD, Adagrad, Adam, AdamW, Lion, RMSprop

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "Lion",
    "MSELoss",
    "RMSprop",
    "__version__",
    "backends",
    "nn",
    "optim",
]
