"""Which suites there are, and their cases."""

from __future__ import annotations

from . import (
    cases_linear_loss,
    cases_linear_loss_gpu,
    cases_loss,
    cases_loss_dense,
    cases_loss_gpu,
    cases_optim,
    cases_optim_gpu,
    cases_shared,
    cases_step,
    codes,
    host,
    install,
    modes,
    train,
    trial,
)
from .runner import Case

COMPARED = ("optim", "step", "loss", "linear_loss")  # suites of cases, whose contenders take turns
SINGLE = {"install": install, "host": host, "train": train}  # suites of one case, measured in a way of their own
STUDIES = {"modes": modes, "codes": codes, "peers": trial}  # training runs, and whom else there is


def registry(suite: str, device: str | None = None) -> list[Case]:
    """The cases of a suite, of one device or of all."""
    sources = {
        "optim": (cases_optim, cases_optim_gpu),
        "step": (cases_step,),
        "loss": (cases_loss, cases_loss_dense, cases_loss_gpu),
        "linear_loss": (cases_linear_loss, cases_linear_loss_gpu),
    }.get(suite, ())
    found = [case for source in sources for case in source.cases()]
    found += cases_shared.cases(suite) if suite in ("optim", "step") else []
    return [case for case in found if device in (None, case.device)]


def titles() -> dict[str, str]:
    """Of every case that takes turns, by its name."""
    return {case.name: case.title for suite in COMPARED for case in registry(suite)}
