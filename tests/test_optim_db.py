"""torch's own table of optimizer inputs, valid and not: the same numbers, the same errors."""

import warnings
from copy import deepcopy

import pytest
import torch
from optim_table import same_state
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fusedopt.optim

NAMES = ("Adam", "AdamW", "RMSprop", "Adagrad", "SGD")
INFOS = [info for info in optim_db if info.optim_cls.__name__ in NAMES]
INPUTS = [(info.optim_cls.__name__, entry) for info in INFOS for entry in info.optim_inputs_func(device="cpu")]
ERRORS = [
    (info.optim_cls.__name__, entry)
    for info in INFOS
    for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


def test_the_table_names_all_of_ours():
    assert sorted(info.optim_cls.__name__ for info in INFOS) == sorted(NAMES)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "entry"), INPUTS, ids=lambda x: x if isinstance(x, str) else x.desc)
def test_valid_inputs(name, entry, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).double()
    inputs = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    # optim_db's tensor lr is a float32, in which stock would then derive step sizes
    kwargs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in entry.kwargs.items()}
    optimizers = []
    for module, extra in ((fusedopt.optim, {"backend": backend}), (torch.optim, {"foreach": False})):
        twin = deepcopy(model)
        optimizer = getattr(module, name)(twin.parameters(), **deepcopy(kwargs), **extra)
        for _ in range(4):
            optimizer.zero_grad()
            twin(inputs).square().mean().backward()
            optimizer.step()
        optimizers.append(optimizer)
    same_state(*optimizers, ulps=256)  # each step's gradients are those of slightly different parameters
    for ours, theirs in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
        assert list(ours) == list(theirs)


def _raised(make):
    with warnings.catch_warnings(), pytest.raises((Exception, UserWarning)) as error:
        warnings.simplefilter("error", UserWarning)
        make()
    return type(error.value), str(error.value)


@pytest.mark.parametrize(
    ("name", "entry"), ERRORS, ids=lambda x: x if isinstance(x, str) else x.optimizer_error_input.desc
)
def test_error_inputs(name, entry):
    assert entry.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = entry.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]
    ours = _raised(lambda: getattr(fusedopt.optim, name)(deepcopy(params), **given.kwargs))
    theirs = _raised(lambda: getattr(torch.optim, name)(deepcopy(params), **given.kwargs))
    assert ours == theirs
    assert issubclass(ours[0], entry.error_type)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1}, {"lr": torch.ones(2)}],
    ids=str,
)
def test_lion_refuses_as_adamw_does(options):
    assert _raised(lambda: fusedopt.optim.Lion([nn.Parameter(torch.ones(2))], **options)) == _raised(
        lambda: torch.optim.AdamW([nn.Parameter(torch.ones(2))], **options)
    )
