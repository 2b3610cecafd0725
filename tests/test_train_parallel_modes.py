"""Every precision, a scaler, a teacher, other optimizers and compiled models on two ranks, as on one; ranks without work."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)

from test_train_parallel import alone, arguments, cache, curve, text  # noqa: E402
from train_ranks import run_jobs  # noqa: E402

__all__ = ["cache", "text"]  # fixtures
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1200)]

# name: (options, relative difference of losses). float16 and bfloat16 round what was summed in another order
OPTIONS = {
    "float16": (("--dtype", "float16", "--compare"), 2e-2),
    "bfloat16": (("--dtype", "bfloat16", "--compare"), 2e-2),
    "masters": (("--weights", "bf16-master", "--state", "bf16"), 2e-2),
    "8bit": (("--weights", "bf16-stochastic", "--state", "8bit", "--ema", 0.5), 2e-2),
    # "compiled": (("--compile",), 1e-4),
    "sgd": (("--optimizer", "sgd", "--compare"), 1e-4),
    "adagrad": (("--optimizer", "adagrad", "--compare"), 1e-4),
    "lamb": (
        (
            "--optimizer",
            "lamb",
        ),
        1e-4,
    ),
}


def test_options_on_two_ranks_are_those_of_one(text, tmp_path):
    alone(*arguments(text, tmp_path / "teacher", "--batch-size", 8, "--steps", 4, "--dim", 32))
    options = {**OPTIONS, "distilled": (("--distill", tmp_path / "teacher", "--compare"), 1e-4)}
    jobs, shares = [], {"tp": ("--batch-size", 8)}
    for name, (given, _) in options.items():
        alone(*arguments(text, tmp_path / "one" / name, "--batch-size", 8, "--steps", 6, *given))
        for mode in ("ddp", "zero1", "fsdp", "tp"):
            for steps, resume in ((3, ()), (6, ("--resume",))):
                argv = arguments(text, tmp_path / mode / name, "--parallel", mode, "--steps", steps,
                                 *shares.get(mode, ("--batch-size", 4)), *given, *resume)  # fmt: skip
                jobs.append({"name": f"{mode} {name} {steps}", "argv": argv})
    jobs = [job for job in jobs if not job["name"].startswith("tp distilled")]
    complaints = run_jobs(2, tmp_path, jobs, wait=900)
    assert complaints == [{job["name"]: "" for job in jobs}] * 2
    for name, (given, tolerance) in options.items():
        for mode in ("ddp", "zero1", "fsdp", *(() if name == "distilled" else ("tp",))):
            for contender in ("stock", "fused") if "--compare" in given else ("fused",):
                for key in ("loss", "val_loss_ema") if "--ema" in given else ("loss",):
                    np.testing.assert_allclose(
                        curve(tmp_path / mode / name, contender, key),
                        [*curve(tmp_path / "one" / name, contender, key)],
                        rtol=tolerance,
                        err_msg=f"{mode} {name} {contender} {key}",
                    )
