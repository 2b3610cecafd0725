"""The training loop on many ranks: every --parallel is one process with the whole batch, and goes on from any other."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from train_ranks import WAIT, run_jobs, started  # noqa: E402

from fusedopt.train import checkpoint, checks, cli, run  # noqa: E402
from fusedopt.train.distributed import World  # noqa: E402

MODES = ("ddp", "zero1", "fsdp", "tp")
TINY = ("--tokenizer", "bytes", "--dim", 16, "--layers", 2, "--seq-len", 16, "--eval-batches", 1,
        "--threads", 1, "--device", "cpu", "--schedule", "constant", "--warmup", 1, "--max-norm", 0.5)  # fmt: skip
# float32 sums in another order
LOSSES, WEIGHTS = {"rtol": 1e-5}, {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = np.random.default_rng(0)
    path.write_text(" ".join(draw.choice(["one", "two", "three", "four", "five"], 2000)), encoding="utf-8")
    return path


def arguments(text: Path, out: Path, *options: object) -> list[str]:
    heads = () if "lstm" in options or "--heads" in options else ("--heads", 2)
    return [str(option) for option in ("--data", text, *TINY, *heads, "--out", out, *options)]


def alone(*argv: object) -> None:
    """Train in this process."""
    args = cli.make_parser().parse_args([str(argument) for argument in argv])
    checks.check(args)
    assert run.Run(args, World()).train() == 0


def curve(out: Path, contender: str, key: str = "loss") -> list[float]:
    return [row[key] for row in checkpoint.read_log(out) if row["contender"] == contender and key in row]


def weights(out: Path, contender: str = "fused") -> dict[str, torch.Tensor]:
    path = checkpoint.latest(out)
    return checkpoint.weights(path, checkpoint.read(path), contender)


# Momentum without a scale of its own: the curve tells half of a clipped norm from the whole
SGD = ("--optimizer", "sgd", "--momentum", 0.9, "--lr", 1, "--steps", 3)
ADAMW = ("--lr", 1e-2, "--compare", "--ema", 0.5)
# name: (--parallel, the rest, and which contenders)
FRESH = {
    **{mode: (mode, ("--compare", "--ema", 0.5), ("stock", "fused")) for mode in MODES},
    "tp logits": ("tp", ("--loss", "logits"), ("fused",)),
    "zero1 lstm": ("zero1", ("--model", "lstm", "--compare"), ("stock", "fused")),
    "fsdp lstm": ("fsdp", ("--model", "lstm", "--compare"), ("stock", "fused")),
}


@pytest.fixture(scope="module")
def two_ranks(text, tmp_path_factory):
    """All that two ranks are asked for in this file, in one start: folders, and what each rank complained of."""
    folder = tmp_path_factory.mktemp("two")
    shares = {"tp": ("--batch-size", 4, "--accumulate", 2)}  # the others have 2 each
    jobs = []

    def job(name: str, out: str, mode: str, *options: object, others: tuple = ()) -> None:
        given = ("--parallel", mode, *shares.get(mode, ("--batch-size", 2, "--accumulate", 2)), *options)
        jobs.append({"name": name, "argv": arguments(text, folder / out, *given)})
        if others:
            jobs[-1]["others"] = arguments(text, folder / out, *given, *others)

    for name, (mode, options, _) in FRESH.items():
        job(name, name, mode, *SGD, *options)
    alone(*arguments(text, folder / "relay", "--batch-size", 8, *ADAMW, "--steps", 2))
    for legs, mode in enumerate(MODES, start=2):
        job(f"relay {mode}", "relay", mode, *ADAMW, "--steps", 2 * legs, "--resume")

    job("another model", "fsdp", "fsdp", *SGD, *FRESH["fsdp"][1], "--resume", "--layers", 1)
    job("another batch", "fsdp", "fsdp", *SGD, *FRESH["fsdp"][1], "--resume", "--batch-size", 3)
    job("another lr on rank 1", "fresh", "ddp", "--steps", 6, others=("--lr", 0.5))
    job("no text on rank 1", "fresh", "ddp", "--steps", 6, others=("--data", "no/such/text"))
    job("heads", "fresh", "tp", "--steps", 6, "--heads", 1)
    whole = folder / "unfinished" / "checkpoint-000004"
    whole.mkdir(parents=True)
    (whole / ".metadata").write_bytes(b"")
    (whole.parent / ".checkpoint-000008.tmp").mkdir()
    job("unfinished", "unfinished", "fsdp", "--steps", 6, "--resume")
    return folder, run_jobs(2, folder, jobs)


def test_every_mode_is_one_process(text, two_ranks, tmp_path):
    folder, complaints = two_ranks
    for name in FRESH:
        assert [rank[name] for rank in complaints] == ["", ""]
    alone(*arguments(text, tmp_path / "gpt", "--batch-size", 8, *SGD, "--compare", "--ema", 0.5))
    alone(*arguments(text, tmp_path / "lstm", "--batch-size", 8, *SGD, "--compare", "--model", "lstm"))
    for name, (_, options, contenders) in FRESH.items():
        one = tmp_path / ("lstm" if "lstm" in options else "gpt")
        for contender in contenders:
            for key in ("loss", "val_loss", *(("val_loss_ema",) if "--ema" in options else ())):
                np.testing.assert_allclose(
                    curve(folder / name, contender, key), curve(one, contender, key), **LOSSES, err_msg=f"{name} {key}"
                )
            torch.testing.assert_close(weights(folder / name, contender), weights(one, contender), **WEIGHTS)
            assert curve(folder / name, contender, "tokens") == curve(one, contender, "tokens")


def test_each_mode_goes_on_where_another_left_off(text, two_ranks, tmp_path):
    folder, complaints = two_ranks
    assert [[rank[f"relay {mode}"] for mode in MODES] for rank in complaints] == [[""] * 4] * 2
    shutil.copytree(folder / "relay", tmp_path / "relay")
    common = ("--batch-size", 8, *ADAMW, "--steps", 12)
    alone(*arguments(text, tmp_path / "relay", *common, "--resume"))
    alone(*arguments(text, tmp_path / "whole", *common))
    for contender in ("stock", "fused"):
        parts, whole = curve(tmp_path / "relay", contender), curve(tmp_path / "whole", contender)
        np.testing.assert_allclose(parts, whole, rtol=1e-4)
        averages = [curve(tmp_path / out, contender, "val_loss_ema")[-1] for out in ("relay", "whole")]
        np.testing.assert_allclose(*averages, rtol=1e-4)
    torch.testing.assert_close(weights(tmp_path / "relay"), weights(tmp_path / "whole"), rtol=0, atol=3e-4)
    # one process goes on with folders where it found one, and the last one only
    assert {path.name for path in (tmp_path / "relay").iterdir()} == {"checkpoint-000012", "log.jsonl"}


def test_bad_input_is_every_ranks(two_ranks):
    folder, complaints = two_ranks
    expected = {
        "another model": "--layers was 2 when",
        "another batch": "give --batch-size 4 --accumulate 1",
        "another lr on rank 1": "--lr is 0.5 on rank 1 and 0.001 on rank 0",
        "no text on rank 1": "rank 1: --data no/such/text: no such file",
        "heads": "2 processes cannot share --heads 1",
        "unfinished": "(.checkpoint-000008.tmp, checkpoint-000004: unfinished)",
    }
    for name, complaint in expected.items():
        first, second = (rank[name] for rank in complaints)
        assert first == second
        assert first.startswith("UsageError: ") and complaint in first
    assert not (folder / "fresh").exists()
    assert checkpoint.latest(folder / "fsdp").name == "checkpoint-000003"  # as it was


# ------------------------------------------------------------------------------------------------- ranks that die


def wait_for_steps(out: Path, count: int, ranks: list) -> None:
    end = time.monotonic() + WAIT
    log = out / checkpoint.LOG
    while not (log.exists() and log.read_bytes().count(b"\n") > count and checkpoint.latest(out)):
        assert all(process.poll() is None for process in ranks), [process.communicate()[1] for process in ranks]
        assert time.monotonic() < end
        time.sleep(0.01)


def forever(text: Path, out: Path, *options: object) -> list[str]:
    options = ("--steps", 100000, "--checkpoint-every", 3, "--eval-every", 100000, *options)
    return ["-m", "fusedopt.train", *arguments(text, out, *options)]


def test_killed_rank_is_named_and_the_run_goes_on_with_more_and_with_fewer(text, tmp_path):
    out, more, whole = (tmp_path / name for name in ("out", "more", "whole"))
    with started(2, *forever(text, out, "--parallel", "fsdp", "--batch-size", 3)) as ranks:
        wait_for_steps(out, 7, ranks)
        ranks[1].send_signal(signal.SIGKILL)
        _, complaint = ranks[0].communicate(timeout=WAIT)
        assert ranks[0].returncode == 3
    assert f"on rank 0: rank 1 (process {ranks[1].pid} on " in complaint and "has ended" in complaint
    path = checkpoint.latest(out)
    last = checkpoint.read(path)["step"] + 3
    assert last >= 9 and last % 3 == 0
    shutil.copytree(out, more)

    alone(*arguments(text, out, "--batch-size", 6, "--steps", last, "--resume"))
    options = ("--parallel", "zero1", "--batch-size", 2, "--steps", last, "--resume")
    with started(3, "-m", "fusedopt.train", *arguments(text, more, *options)) as ranks:
        complaints = [process.communicate(timeout=WAIT)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * 3, complaints

    alone(*arguments(text, whole, "--batch-size", 6, "--steps", last))
    for resumed in (out, more):
        np.testing.assert_allclose(curve(resumed, "fused"), curve(whole, "fused"), rtol=1e-3)
        assert checkpoint.latest(resumed).name == f"checkpoint-{last:06}"


@pytest.mark.thorough
def test_rank_that_hangs_is_named_after_the_timeout(text, tmp_path):
    out = tmp_path / "out"
    with started(2, *forever(text, out, "--parallel", "ddp", "--batch-size", 3, "--timeout", 8)) as ranks:
        wait_for_steps(out, 7, ranks)
        ranks[1].send_signal(signal.SIGSTOP)  # its connections stay
        _, complaint = ranks[0].communicate(timeout=WAIT)
        assert ranks[0].returncode == 3
    assert f"on rank 0: rank 1 (process {ranks[1].pid} on " in complaint and "stands still" in complaint
