"""The loop's --ema, --state and --weights: what is kept and at which size, what the average is, and resumed runs."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)

from test_train import (  # noqa: E402
    BYTES,
    TINY,
    arguments,
    assert_same_run,
    corpus,
    no_children,
    surroundings,
    train,
)

from fusedopt.train import checkpoint, cli, data, errors, loop, precision, report, run  # noqa: E402
from fusedopt.train.distributed import World  # noqa: E402

__all__ = ["corpus", "no_children", "surroundings"]  # fixtures

MODES = [(state, weights) for state in cli.STATES for weights in cli.WEIGHTS]


def contender(corpus, *options, name=loop.FUSED):
    args = arguments("--data", corpus, *TINY, *BYTES, "--steps", 12, "--lr", 1e-2, *options)
    text = data.load(args)
    made = loop.Contender(name, args, World())

    def steps():
        for step in range(1, 13):
            yield made.step(data.train_batches(args, text, step, 0, 1), step).loss

    return made, steps(), data.validation_batches(args, text)


@pytest.mark.parametrize(("state", "weights"), MODES)
def test_what_is_kept_and_its_bytes(corpus, state, weights):
    made, steps, _ = contender(corpus, "--state", state, "--weights", weights, "--ema", 0.9)
    _, plain, _ = contender(corpus)
    # bfloat16 keeps 8 bits of a logit; rounding weights to them changes the loss of 12 steps by that order
    assert list(steps) == pytest.approx(list(plain), rel=2e-2 if weights != "f32" else 1e-2)

    wide = weights == "f32"
    params = list(made.model.parameters())
    assert {p.dtype for p in params} == {torch.float32 if wide else torch.bfloat16}
    count = sum(p.numel() for p in params)
    coded = [p.numel() for p in params if p.numel() >= 4096 and state.startswith("8bit")]  # smaller ones stay float32
    states = 4 * count if state == "bf16" else 8 * count - 6 * sum(coded) + 2 * 4 * sum(-(-n // 256) for n in coded)
    assert bool(coded) == state.startswith("8bit")
    expected = {
        "weights": 4.0 if wide else 2.0,
        "states": (states + 4 * len(params)) / count,  # and a step counter each
        "masters": 2.0 if weights == "bf16-master" else 0.0,
        "average": 4.0,
    }
    assert precision.bytes_per_parameter(made.model, made.optimizer, made.average) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [loop.FUSED, loop.STOCK])
def test_the_average_is_validated(corpus, name):
    decay = 0.8
    made, steps, validation = contender(corpus, "--ema", decay, name=name)
    losses = made.validate(validation)
    assert losses["val_loss"] == losses["val_loss_ema"]  # before the first step
    average = None
    for _ in steps:
        weights = [p.detach().double() for p in made.model.parameters()]
        average = weights if average is None else [
            decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)
        ]  # fmt: skip
    losses = made.validate(validation)
    own = [p.detach().clone() for p in made.model.parameters()]
    assert made.validate(validation) == losses  # the weights are back
    with torch.no_grad():
        for p, value in zip(made.model.parameters(), average, strict=True):
            p.copy_(value)
    assert made.validate(validation)["val_loss"] == pytest.approx(losses["val_loss_ema"], rel=1e-6)
    assert losses["val_loss_ema"] != pytest.approx(losses["val_loss"], rel=1e-3)
    assert any(not torch.equal(p, old) for p, old in zip(made.model.parameters(), own, strict=True))


# each state, weight and average at least once, and an optimizer that counts no steps
RESUMED = {
    "8bit": ("--state", "8bit"),
    "bf16-stochastic": ("--state", "bf16", "--weights", "bf16-stochastic", "--ema", 0.9),
    "8bit, bf16-master": ("--state", "8bit", "--weights", "bf16-master", "--ema", 0.9),
    "sgd": ("--optimizer", "sgd", "--momentum", 0.9, "--state", "8bit", "--weights", "bf16-stochastic", "--ema", 0.9),
    "lamb": ("--optimizer", "lamb", "--weights", "bf16-master"),
    "compare": ("--compare", "--weights", "bf16", "--ema", 0.9),
}


@pytest.mark.parametrize("mode", RESUMED.values(), ids=RESUMED)
def test_resumed_run_is_the_uninterrupted_run(corpus, tmp_path, mode):
    def trained(out, steps, *more):
        options = ("--schedule", "constant", "--warmup", 2, "--eval-every", 5, "--steps", steps)
        args = arguments("--data", corpus, *TINY, *BYTES, *options, *mode, "--out", tmp_path / out, *more)
        assert run.Run(args, World()).train() == 0

    trained("whole", 10)
    trained("parts", 5)
    trained("parts", 10, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(errors.UsageError, match="--ema was"):
        trained("parts", 10, "--resume", "--ema", 0.5)


def test_compare_tells_what_stock_cannot(corpus, tmp_path, no_children, capsys):
    options = ("--steps", 6, "--eval-every", 3, "--state", "8bit", "--weights", "bf16-stochastic", "--ema", 0.9)
    assert train("--data", corpus, *TINY, *BYTES, *options, "--compare", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.count("stock has bfloat16 weights and states, rounded to nearest") == 2
    assert "of the average" in printed and "states, bytes/param" in printed
    rows = [row for row in checkpoint.read_log(tmp_path) if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 6, 6]
    summary = json.loads((tmp_path / report.SUMMARY).read_text(encoding="utf-8"))
    for row in rows[-2:]:
        figures = summary["contenders"][row["contender"]]
        assert (figures["val_loss"], figures["val_loss_ema"]) == (row["val_loss"], row["val_loss_ema"])
    held = {name: figures["bytes_per_parameter"] for name, figures in summary["contenders"].items()}
    assert held["stock"]["weights"] == held["stock"]["average"] == 2.0  # AveragedModel's is the parameter's dtype
    assert held["fused"]["average"] == 4.0
    assert held["stock"]["states"] == pytest.approx(4.0, abs=0.1)


def test_stock_does_the_same_work_where_it_can(corpus):
    losses = {}
    for name in (loop.FUSED, loop.STOCK):
        made, steps, validation = contender(corpus, "--weights", "bf16", "--state", "bf16", "--ema", 0.5, name=name)
        assert precision.stock_falls_short(made.args) == ""
        losses[name] = [*steps, *made.validate(validation).values()]
        assert {s["exp_avg"].dtype for s in made.optimizer.state.values()} == {torch.bfloat16}
    # both round every weight to 8 bits at each of 12 steps, after sums in another order
    assert losses[loop.FUSED] == pytest.approx(losses[loop.STOCK], rel=2e-2)


@pytest.mark.parametrize("weights", ["bf16", "bf16-master"])
def test_a_teacher_and_an_lstm_in_bfloat16(corpus, tmp_path, weights):
    out = tmp_path / "teacher"
    options = ("--data", corpus, *TINY, *BYTES, "--model", "lstm")
    args = arguments(*options, "--weights", weights, "--steps", 2, "--out", out)
    assert run.Run(args, World()).train() == 0
    for kept in ("f32", weights):
        _, steps, _ = contender(corpus, "--model", "lstm", "--distill", out, "--weights", kept)
        found = list(steps)
        assert all(map(math.isfinite, found)) and found[-1] < found[0]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--ema", "1"], "--ema 1.0: expected a decay from 0 to less than 1"),
        (["--ema", "nan"], "--ema nan"),
        (["--stock", "--weights", "bf16-master"], "--weights bf16-master: torch's optimizers keep no master"),
        (["--stock", "--weights", "bf16-stochastic"], "leave out --stock"),
        (["--stock", "--state", "8bit"], "--state 8bit: torch's optimizers keep states as the weights are, here f32"),
        (["--stock", "--weights", "bf16", "--state", "f32"], "as the weights are, here bf16"),
        (["--optimizer", "sgd", "--state", "8bit"], "sgd without momentum keeps no state; give --momentum"),
        (
            ["--optimizer", "lion", "--state", "8bit-stochastic"],
            "lion keeps no squares to round at random; use --state",
        ),
        (["--dtype", "float16", "--weights", "bf16"], "--dtype float16: with --weights bf16 the model computes in"),
        (["--dtype", "float32", "--weights", "bf16-master"], "or use --weights f32"),
        (["--optimizer", "lamb", "--stock"], "torch.optim has no LAMB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_before_any_work(corpus, tmp_path, capsys, argv, complaint):
    with pytest.raises(SystemExit) as exit_:
        train("--data", corpus, *TINY, "--out", tmp_path / "out", *argv)
    assert exit_.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_defaults_follow_the_weights():
    assert vars(arguments("--stock", "--weights", "bf16")).items() >= {"state": "bf16", "dtype": "bfloat16"}.items()
    assert vars(arguments("--weights", "bf16")).items() >= {"state": "f32", "dtype": "bfloat16"}.items()
    assert vars(arguments()).items() >= {"state": "f32", "dtype": "float32", "weights": "f32"}.items()
    assert precision.fused_options(arguments("--max-norm", 0)) == {}
