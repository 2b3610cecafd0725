"""Precisions, a scaler, a teacher, optimizers and compiled models on two ranks, as on one; and ranks without work."""

from __future__ import annotations

import signal

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)

from test_train_parallel import alone, arguments, cache, curve, forever, text, wait_for_steps  # noqa: E402
from train_ranks import WAIT, run_jobs, started  # noqa: E402

from fusedopt.train import checkpoint, data  # noqa: E402

__all__ = ["cache", "text"]  # fixtures
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1200)]

# name: (options, relative difference of losses: of sums in another order, rounded to half the bits)
OPTIONS = {
    "float16": (("--dtype", "float16", "--compare"), 5e-4),
    "bfloat16": (("--dtype", "bfloat16", "--compare"), 5e-4),
    "masters": (("--weights", "bf16-master", "--state", "bf16"), 5e-4),
    "8bit": (("--weights", "bf16-stochastic", "--state", "8bit", "--ema", 0.5), 2e-3),
    "compiled": (("--compile",), 1e-5),
    "adagrad": (("--optimizer", "adagrad", "--compare"), 1e-5),
    "lamb": (("--optimizer", "lamb"), 1e-5),
}


def test_options_on_two_ranks_are_those_of_one(text, tmp_path):
    alone(*arguments(text, tmp_path / "teacher", "--batch-size", 8, "--steps", 4, "--dim", 32))
    options = {**OPTIONS, "distilled": (("--distill", tmp_path / "teacher", "--compare"), 1e-5)}
    jobs, shares = [], {"tp": ("--batch-size", 8)}
    for name, (given, _) in options.items():
        eager = [option for option in given if option != "--compile"]
        alone(*arguments(text, tmp_path / "one" / name, "--batch-size", 8, "--lr", 1e-2, "--steps", 6, *eager))
        for mode in ("ddp", "zero1", "fsdp", "tp"):
            for steps, resume in ((3, ()), (6, ("--resume",))):
                argv = arguments(text, tmp_path / mode / name, "--parallel", mode, "--lr", 1e-2, "--steps", steps,
                                 *shares.get(mode, ("--batch-size", 4)), *given, *resume)  # fmt: skip
                jobs.append({"name": f"{mode} {name} {steps}", "argv": argv})
    jobs = [job for job in jobs if not job["name"].startswith("tp distilled")]
    complaints = run_jobs(2, tmp_path, jobs, wait=900)
    assert complaints == [{job["name"]: "" for job in jobs}] * 2
    for name, (given, tolerance) in options.items():
        for mode in ("ddp", "zero1", "fsdp", *(() if name == "distilled" else ("tp",))):
            for contender in ("stock", "fused") if "--compare" in given else ("fused",):
                found, expected = (curve(tmp_path / out / name, contender) for out in (mode, "one"))
                if "--ema" in given:
                    found, expected = ([*losses, curve(tmp_path / out / name, contender, "val_loss_ema")[-1]]
                                       for losses, out in ((found, mode), (expected, "one")))  # fmt: skip
                np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=f"{mode} {name} {contender}")


def test_ranks_without_parameters(text, tmp_path):
    """ZeRO deals out six parameters to seven ranks; optimizers without states on all of them are another case."""
    for optimizer in ("adamw", "adagrad", "sgd"):
        options = ("--model", "lstm", "--parallel", "zero1", "--batch-size", 1, "--optimizer", optimizer)
        one = ("--model", "lstm", "--batch-size", 7, "--optimizer", optimizer, "--steps", 4)
        jobs = [
            {"name": str(steps), "argv": arguments(text, tmp_path / optimizer, *options, "--steps", steps, *resume)}
            for steps, resume in ((2, ()), (4, ("--resume",)))
        ]
        assert run_jobs(7, tmp_path, jobs, wait=600) == [{"2": "", "4": ""}] * 7
        alone(*arguments(text, tmp_path / "one" / optimizer, *one))
        curves = (curve(tmp_path / out / optimizer, "fused") for out in ("", "one"))
        np.testing.assert_allclose(*curves, rtol=1e-4)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(text, tmp_path):
    out = tmp_path / "out"
    with started(2, *forever(text, out, "--parallel", "zero1", "--batch-size", 3)) as ranks:
        wait_for_steps(out, 7, ranks)
        ranks[1].send_signal(signal.SIGTERM)
        for process in ranks:
            process.communicate(timeout=WAIT)
            assert process.returncode == 128 + signal.SIGTERM
    last = checkpoint.read_log(out)[-1]["step"]
    assert checkpoint.read(checkpoint.latest(out))["step"] == last


def test_fine_tuned_model_is_written_whole(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    base.mkdir()
    data.train_bpe([text.read_text()], 270).save(str(base / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=270, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )).save_pretrained(base)  # fmt: skip
    given = ("--data", text, "--init-from", base, "--seq-len", 16, "--threads", 1, "--device", "cpu",
             "--eval-batches", 1, "--steps", 4, "--lr", 1e-3)  # fmt: skip
    models = {}
    for mode, processes in (("ddp", 1), ("zero1", 2), ("fsdp", 2)):
        out = tmp_path / mode
        command = ("-m", "fusedopt.train", *given, "--out", out, "--parallel", mode, "--batch-size", 4 // processes)
        with started(processes, *command) as ranks:
            complaints = [process.communicate(timeout=WAIT)[1] for process in ranks]
            assert all(process.returncode == 0 for process in ranks), complaints
        models[mode] = transformers.GPT2LMHeadModel.from_pretrained(out / "model").state_dict()
    for mode in ("zero1", "fsdp"):
        torch.testing.assert_close(models[mode], models["ddp"], rtol=0, atol=5e-5)
