"""The training loop: what it learns, what it writes, that an interrupted run continues to the same bits, and errors."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)

from fusedopt.train import checkpoint, checks, cli, data, loop, report, run  # noqa: E402
from fusedopt.train.__main__ import main  # noqa: E402
from fusedopt.train.distributed import World  # noqa: E402

# one thread: two that wait for each other in tiny operations crawl when another process wants the core
TINY = (
    "--dim",
    "16",
    "--layers",
    "1",
    "--seq-len",
    "16",
    "--batch-size",
    "4",
    "--threads",
    "1",
    "--device",
    "cpu",
)
BYTES = ("--tokenizer", "bytes", "--eval-batches", "2")


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    """A cache of our own, and the number of threads as it was for the tests that follow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Forty files of sentences over a few words: a bigram model already does far better than the uniform one."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    words = [
        "the",
        "loss",
        "of",
        "a",
        "fused",
        "step",
        "is",
        "same",
        "as",
        "stock",
        "but",
        "it",
        "takes",
        "less",
        "time",
    ]
    for index in range(40):
        lines = (" ".join(draw.choice(words, 8)) + ".\n" for _ in range(40))
        (folder / f"{index:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def no_children(monkeypatch):
    """The processes that measure memory take seconds and are not what most tests are about."""
    monkeypatch.setattr(run, "peak_memory", lambda name, args: 1.0)


def arguments(*argv: object) -> argparse.Namespace:
    args = cli.make_parser().parse_args([str(argument) for argument in argv])
    checks.check(args)
    return args


def train(*argv: object) -> int:
    return main([str(argument) for argument in argv])


def rows_without_times(out: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "ms"} for row in checkpoint.read_log(out)]


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    state = torch.load(out / checkpoint.CHECKPOINT, weights_only=True)
    return {name: contender["model"] for name, contender in state["contenders"].items()}


def assert_identical(a: object, b: object) -> None:
    """The same containers, numbers and tensors, to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_identical(left, right)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Same rows of the log; same weights, optimizer, schedule and arguments in the checkpoint."""
    assert rows_without_times(a) == rows_without_times(b)
    assert_identical(*(torch.load(out / checkpoint.CHECKPOINT, weights_only=True) for out in (a, b)))


# ---------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("model", ["gpt", "lstm"])
@pytest.mark.parametrize("mode", [(), ("--stock",)], ids=["fused", "stock"])
def test_loss_goes_down(corpus, tmp_path, model, mode):
    out = tmp_path / "out"
    options = ("--steps", 120, "--lr", 1e-2, "--eval-every", 60, "--model", model)
    assert train("--data", corpus, *TINY, *BYTES, *options, *mode, "--out", out) == 0
    rows = checkpoint.read_log(out)
    validation = [row["val_loss"] for row in rows if "val_loss" in row]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 60, 120]
    assert validation[0] == pytest.approx(math.log(256), abs=0.3)  # untrained: uniform over the bytes
    # the entropy of the single letters of the text is 2.57 nats: less shows that the model uses its context
    assert validation[-1] < 2.5
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.pt", "log.jsonl", "summary.json", "loss.png", "timing.png"
    }  # fmt: skip


@pytest.mark.parametrize("schedule", cli.SCHEDULES)
@pytest.mark.parametrize("optimizer", cli.OPTIMIZERS)
def test_every_optimizer_under_every_schedule(corpus, optimizer, schedule):
    """Fused follows stock step by step, and learns; Lion and LAMB have no stock to follow."""
    momentum = ("--momentum", 0.9) if cli.OPTIMIZERS[optimizer]["momentum"] else ()
    lr = {"sgd": 0.1, "lion": 3e-3, "rmsprop": 1e-3, "adagrad": 3e-2, "lamb": 0.1}.get(optimizer, 1e-2)
    args = arguments("--data", corpus, *TINY, *BYTES, "--optimizer", optimizer, "--schedule", schedule, "--lr", lr,
                     "--steps", 40, "--weight-decay", 0.01, *momentum)  # fmt: skip
    text = data.load(args)
    losses = {}
    in_torch = hasattr(torch.optim, cli.OPTIMIZERS[optimizer]["name"])
    for name in (loop.FUSED, loop.STOCK) if in_torch else (loop.FUSED,):
        contender = loop.Contender(name, args, World())
        steps = (contender.step(data.train_batches(args, text, step, 0, 1), step) for step in range(40))
        losses[name] = [result.loss for result in steps]
    fused = losses[loop.FUSED]
    assert all(math.isfinite(loss) for loss in fused)
    assert np.mean(fused[-5:]) < fused[0] - 0.5
    if loop.STOCK in losses:
        # float32 sums in another order; 40 steps magnify that, most where g / sqrt(v) has a small v
        np.testing.assert_allclose(fused, losses[loop.STOCK], rtol=2e-4)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", cli.SCHEDULES)
def test_schedule_follows_its_formula(schedule, warmup):
    steps, left = 30, 30 - warmup
    formula = {
        "constant": lambda t: 1.0,
        "exponential": lambda t: 0.01 ** (t / left),
        "step": lambda t: 0.1 ** (t // math.ceil(left / 3)),
        "cosine": lambda t: (1 + math.cos(math.pi * t / left)) / 2,
    }[schedule]
    args = arguments("--schedule", schedule, "--warmup", warmup, "--steps", steps, "--lr", 0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler = loop.make_scheduler(optimizer, args)
    for step in range(steps):
        factor = (step + 1) / (warmup + 1) if step < warmup else formula(step - warmup)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factor, rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(corpus, tmp_path, dtype):
    options = ("--data", corpus, *TINY, *BYTES, "--steps", 20, "--lr", 3e-3)
    assert train(*options, "--out", tmp_path / "full") == 0
    assert train(*options, "--out", tmp_path / "half", "--dtype", dtype) == 0
    full, half = (checkpoint.read_log(tmp_path / name) for name in ("full", "half"))
    # bfloat16 has 8 bits: logits are off by 2^-9 of their size, and 20 steps leave that order of magnitude
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=5e-3)
    state = torch.load(tmp_path / "half" / checkpoint.CHECKPOINT, weights_only=True)["contenders"]["fused"]
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    assert bool(state["scaler"]) == (dtype == "float16")


def test_accumulated_micro_batches_are_one_batch(corpus, tmp_path):
    options = ("--data", corpus, *TINY, *BYTES, "--steps", 5, "--warmup", 0)
    assert train(*options, "--out", tmp_path / "whole", "--batch-size", 8) == 0
    assert train(*options, "--out", tmp_path / "parts", "--batch-size", 2, "--accumulate", 4) == 0
    # float32 rounding of a mean of means, through 5 steps of Adam
    torch.testing.assert_close(weights(tmp_path / "whole"), weights(tmp_path / "parts"), rtol=0, atol=2e-5)


def test_phases_partition_the_step(corpus, tmp_path):
    out = tmp_path / "out"
    assert train("--data", corpus, *TINY, *BYTES, "--steps", 5, "--accumulate", 3, "--out", out) == 0
    for row in checkpoint.read_log(out)[1:]:
        phases = [row["ms"][phase] for phase in loop.PHASES]
        assert min(phases) > 0
        assert sum(phases) == pytest.approx(row["ms"]["step"], abs=1e-3)  # the log rounds to 1e-4 ms
        assert row["tokens"] == 3 * 4 * 16


def test_inplace_loss_changes_no_number(corpus, tmp_path):
    options = ("--data", corpus, *TINY, *BYTES, "--steps", 10)
    assert train(*options, "--out", tmp_path / "a", "--loss", "logits") == 0
    assert train(*options, "--out", tmp_path / "b", "--inplace-loss") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------------------- comparison


def test_compare_writes_its_report(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--steps", 30, "--eval-every", 10, "--lr", 3e-3)
    assert train("--data", corpus, *TINY, *BYTES, *options, "--compare", "--out", out) == 0
    rows = checkpoint.read_log(out)
    stock, fused = ([row for row in rows if row["contender"] == name] for name in (loop.STOCK, loop.FUSED))
    assert [row["step"] for row in stock] == [row["step"] for row in fused] == list(range(31))
    assert all({"step", "contender", "loss", "lr", "tokens", "ms"} <= row.keys() for row in rows if row["step"])
    # the same weights and batches; float32 sums in another order, magnified by 30 steps of Adam
    np.testing.assert_allclose([row["loss"] for row in fused[1:]], [row["loss"] for row in stock[1:]], rtol=1e-4)
    assert fused[1]["loss"] == pytest.approx(stock[1]["loss"], rel=1e-6)

    summary = json.loads((out / report.SUMMARY).read_text(encoding="utf-8"))
    for name, of_name in ((loop.STOCK, stock), (loop.FUSED, fused)):
        figures = summary["contenders"][name]
        for phase in (*loop.PHASES, "step"):
            assert figures["ms"][phase]["median"] == pytest.approx(np.median([r["ms"][phase] for r in of_name[1:]]))
        assert figures["tokens_per_second"] == pytest.approx(4 * 16 / figures["ms"]["step"]["median"] * 1e3)
        assert figures["val_loss"] == of_name[-1]["val_loss"]
        assert figures["peak_mib"] > 0 or sys.platform not in ("linux", "darwin")
    medians = [summary["contenders"][name]["ms"]["step"]["median"] for name in (loop.STOCK, loop.FUSED)]
    assert summary["stock_over_fused"]["step"] == pytest.approx(medians[0] / medians[1])
    assert summary["val_loss_fused_minus_stock"] == fused[-1]["val_loss"] - stock[-1]["val_loss"]
    assert {"machine", "versions", "command", "args", "share_of_stock_step"} <= summary.keys()
    printed = capsys.readouterr().out
    assert "stock / fused" in printed and "step 30/30" in printed
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "timing.png"))


# ---------------------------------------------------------------------------------------- stopping and resuming


def long_options(corpus, mode):
    return [str(option) for option in (
        "--data", corpus, *TINY, *BYTES, "--steps", 400, "--checkpoint-every", 30, "--eval-every", 50, *mode
    )]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """Trains a mode's long run, once, whichever signals others of it meet."""

    @functools.cache
    def run_of(mode):
        whole = tmp_path_factory.mktemp("whole") / "run"
        assert train(*long_options(corpus, mode), "--out", whole) == 0
        return whole

    return run_of


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("mode", [(), ("--compare",)], ids=["fused", "compare"])
def test_resumed_run_is_the_uninterrupted_run(corpus, tmp_path, no_children, uninterrupted, number, mode):
    options, cut = long_options(corpus, mode), tmp_path / "cut"
    log = cut / checkpoint.LOG
    command = [sys.executable, "-m", "fusedopt.train", *options, "--out", str(cut)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (log.exists() and log.read_bytes().count(b"\n") > 75 * (1 + bool(mode))):
            assert process.poll() is None, "finished before it could be stopped"
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(60) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    finally:
        process.kill()
    reached = max(row["step"] for row in checkpoint.read_log(cut)) if number == signal.SIGTERM else None
    step = torch.load(cut / checkpoint.CHECKPOINT, weights_only=True)["step"]
    assert step < 400
    assert step == reached if number == signal.SIGTERM else step % 30 == 0
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"step": 39')  # a row that the kill cut short

    assert train(*options, "--out", cut, "--resume") == 0
    assert_same_run(uninterrupted(mode), cut)


def test_constant_schedule_can_be_made_longer(corpus, tmp_path):
    options = ("--data", corpus, *TINY, *BYTES, "--schedule", "constant", "--warmup", 3)
    assert train(*options, "--steps", 20, "--out", tmp_path / "whole") == 0
    assert train(*options, "--steps", 8, "--out", tmp_path / "parts") == 0
    assert train(*options, "--steps", 20, "--out", tmp_path / "parts", "--resume") == 0
    assert_identical(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_existing_checkpoint_is_neither_lost_nor_mixed_up(corpus, tmp_path, capsys):
    options = ("--data", corpus, *TINY, *BYTES, "--steps", 4, "--out", tmp_path)
    assert train(*options) == 0
    before = (tmp_path / checkpoint.CHECKPOINT).read_bytes()
    for changed, complaint in (
        ((), "--overwrite"),
        (("--resume", "--lr", 0.5), "--lr was 0.001"),
        (("--resume", "--seq-len", 8), "--seq-len was 16"),
        (("--resume", "--stock"), "the list of contenders was ['fused']"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train(*options, *changed)
        assert exit_.value.code == 2
        assert complaint in capsys.readouterr().err
        assert (tmp_path / checkpoint.CHECKPOINT).read_bytes() == before
    assert train(*options, "--overwrite", "--steps", 2) == 0
    assert [row["step"] for row in checkpoint.read_log(tmp_path)] == [0, 1, 2]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), checkpoint.atomic(path) as file:
        file.write(b"new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with checkpoint.atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


# -------------------------------------------------------------------------------------------------------- data


def test_split_is_by_file_and_does_not_depend_on_the_others(corpus):
    texts = data.read_texts([str(corpus)])
    assert [name for name, _ in texts] == [f"{index:02}.txt" for index in range(40)]
    training, validation = data.split(texts)
    assert len(training) + len(validation) == 40 and len(validation) > 0
    assert not set(training) & set(validation)
    fewer, held_out = data.split(texts[:30])
    assert set(fewer) <= set(training) and set(held_out) <= set(validation)


def test_single_file_is_split_at_its_end(tmp_path):
    text = bytes(range(1, 201))
    (tmp_path / "only.txt").write_bytes(text)
    assert data.split(data.read_texts([str(tmp_path / "only.txt")])) == ([text[:190]], [text[190:]])


def test_bpe_vocabulary_and_its_cache(corpus, monkeypatch):
    args = arguments("--data", corpus, *TINY, "--vocab-size", 300)
    trained = []
    train_bpe = data.train_bpe
    monkeypatch.setattr(data, "train_bpe", lambda *a: trained.append(train_bpe(*a)) or trained[-1])
    first = data.load(args)
    assert len(trained) == 1 and trained[0].get_vocab_size() == 300
    training, _ = data.split(data.read_texts([str(corpus)]))
    text = "<|endoftext|>".join(text.decode() for text in training) + "<|endoftext|>"
    assert trained[0].decode(first.train.tolist(), skip_special_tokens=False) == text

    second = data.load(args)
    assert len(trained) == 1  # nothing was trained: it came from the cache
    assert second.digest == first.digest and np.array_equal(second.train, first.train)

    broken = [path for path in data.cache_dir().iterdir() if np.array_equal(np.load(path), first.train)]
    assert len(broken) == 1
    del first, second
    broken[0].write_bytes(broken[0].read_bytes()[:200])  # as a machine that lost power may leave it
    third = data.load(args)
    assert len(trained) == 2 and third.train.max() < 300


def test_ranks_share_out_the_batch_of_one_process(corpus):
    alone = arguments("--data", corpus, *TINY, *BYTES, "--batch-size", 12)
    ranks = arguments("--data", corpus, *TINY, *BYTES, "--batch-size", 2, "--accumulate", 2)
    text = data.load(alone)
    ((tokens, targets),) = data.train_batches(alone, text, 7, 0, 1)
    shared = [data.train_batches(ranks, text, 7, rank, 3)[micro] for micro in range(2) for rank in range(3)]
    assert torch.equal(torch.cat([part for part, _ in shared]), tokens)
    assert torch.equal(targets[:, :-1], tokens[:, 1:])
    assert not torch.equal(data.train_batches(alone, text, 8, 0, 1)[0][0], tokens)


# -------------------------------------------------------------------------------------------------- pretrained


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory) -> Path:
    """A tiny GPT-2, dropout included, with a tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pretrained")
    texts = [text.decode() for _, text in data.read_texts([str(corpus)])]
    data.train_bpe(texts, 280).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )).save_pretrained(folder)  # fmt: skip
    return folder


def test_fine_tunes_a_pretrained_model(corpus, tmp_path, pretrained, no_children):
    from transformers import GPT2LMHeadModel

    options = ("--data", corpus, "--init-from", pretrained, "--seq-len", 16, "--threads", 1, "--device", "cpu",
               "--eval-batches", 2, "--steps", 60, "--lr", 1e-2)  # fmt: skip
    out = tmp_path / "out"
    assert train(*options, "--out", out) == 0
    validation = [row["val_loss"] for row in checkpoint.read_log(out) if "val_loss" in row]
    assert validation[-1] < validation[0] - 1

    # the first value is that of the model as it was saved, and the last that of the model which the run saves
    args = arguments(*options, "--out", tmp_path / "unused")
    text = data.load(args)
    for folder, loss in ((pretrained, validation[0]), (out / "model", validation[-1])):
        model = GPT2LMHeadModel.from_pretrained(folder).eval()
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).item()
                      for tokens, targets in data.validation_batches(args, text)]  # fmt: skip
        assert np.mean(losses) == pytest.approx(loss, rel=1e-5)

    # dropout draws the same masks for both contenders
    assert train(*options, "--compare", "--steps", 10, "--out", tmp_path / "both") == 0
    stock, fused = ([row["loss"] for row in checkpoint.read_log(tmp_path / "both")[2:] if row["contender"] == name]
                    for name in (loop.STOCK, loop.FUSED))  # fmt: skip
    np.testing.assert_allclose(fused, stock, rtol=1e-4)


def test_pretrained_model_must_be_complete(corpus, tmp_path, pretrained, monkeypatch, capsys):
    def complaint(*argv: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            train("--data", corpus, "--out", tmp_path / "out", *argv)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "config.json" in complaint("--init-from", corpus)
    assert "at most 32 positions" in complaint("--init-from", pretrained, "--seq-len", 33)
    assert "--dim 8" in complaint("--init-from", pretrained, "--dim", 8)
    (tmp_path / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    assert "tokenizer.json" in complaint("--init-from", tmp_path)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fusedopt[hf]'" in complaint("--init-from", pretrained)


# ------------------------------------------------------------------------------------------------------ errors


def test_non_finite_loss_stops_the_run(corpus, tmp_path, capsys):
    options = ("--optimizer", "sgd", "--lr", 1e30, "--max-norm", 0, "--steps", 20, "--checkpoint-every", 1, "--stock")
    assert train("--data", corpus, *TINY, *BYTES, *options, "--out", tmp_path) == 1
    rows = checkpoint.read_log(tmp_path)
    error = capsys.readouterr().err
    assert f"at step {rows[-1]['step'] + 1} " in error
    assert "--lr" in error and "--max-norm" in error
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
    assert not (tmp_path / report.SUMMARY).exists()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--data", "no/such/file"], "no/such/file"),
        (["--heads", "3"], "does not divide --dim 16"),
        (["--model", "lstm", "--heads", "2"], "no attention heads"),
        (["--vocab-size", "100"], "at least 257"),
        (["--tokenizer", "bytes", "--vocab-size", "300"], "bytes are 256"),
        (["--vocab-size", "60000"], "yields no more than"),
        (["--tokenizer", "bytes", "--seq-len", "1000000"], "1000001 are needed"),
        (["--steps", "0"], "--steps 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--max-norm", "-1"], "--max-norm -1"),
        (["--steps", "10", "--warmup", "10"], "fewer than --steps 10"),
        (["--optimizer", "adamw", "--momentum", "0.9"], "only rmsprop and sgd"),
        (["--optimizer", "lion", "--stock"], "leave out --stock"),
        (["--optimizer", "lion", "--compare"], "leave out --compare"),
        (["--inplace-loss", "--stock"], "leave out --stock"),
        (["--loss", "linear", "--stock"], "leave out --stock"),
        (["--loss", "linear", "--inplace-loss"], "use --loss logits"),
        (["--distill", "no/such/run"], "no checkpoint.pt there"),
        (["--stock", "--compare"], "not allowed with"),
        (["--resume", "--overwrite"], "choose one"),
        (["--resume"], "no checkpoint.pt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_named_before_any_work(corpus, tmp_path, capsys, argv, complaint):
    with pytest.raises(SystemExit) as exit_:
        train("--data", corpus, *TINY, "--out", tmp_path / "out", *argv)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [[], [b""], [b"\0\1\2 binary"]], ids=["no file", "empty file", "binary file"])
def test_folder_without_text(tmp_path, capsys, content):
    for index, text in enumerate(content):
        (tmp_path / f"{index}.txt").write_bytes(text)
    with pytest.raises(SystemExit) as exit_:
        train("--data", tmp_path, *TINY, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert exit_.value.code == 2
    assert "no text there" in capsys.readouterr().err


def test_gpu_that_is_not_there(corpus, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit) as exit_:
        train("--data", corpus, "--device", "cuda")
    assert exit_.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_default_text_is_the_standard_library():
    names = [name for name, _ in data.read_texts(None)]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
