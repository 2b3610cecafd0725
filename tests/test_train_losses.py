"""The loop's losses: the head inside, whole logits, a teacher; alike in what they learn, and what they are told."""

import json

import pytest

torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)

from test_train import BYTES, TINY, arguments, assert_same_run, corpus, no_children, surroundings, train  # noqa: E402

from fusedopt.train import checkpoint, data, loop, losses, models  # noqa: E402
from fusedopt.train.cli import UsageError  # noqa: E402
from fusedopt.train.distributed import World  # noqa: E402

__all__ = ["corpus", "no_children", "surroundings"]  # fixtures


def curves(corpus, steps, *options, teacher=""):
    """Training losses of both contenders."""
    args = arguments("--data", corpus, *TINY, *BYTES, "--steps", steps, "--lr", 1e-2, *options)
    text = data.load(args)
    found = {}
    for name in (loop.FUSED, loop.STOCK):
        contender = loop.Contender(name, args, World(), text.digest)
        found[name] = [contender.step(data.train_batches(args, text, n, 0, 1), n).loss for n in range(steps)]
    return found


@pytest.mark.parametrize("model", ["gpt", "lstm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_fused_follows_stock(corpus, model, dtype, loss):
    if (model, dtype) == ("lstm", "float16"):
        pytest.skip("torch has no float16 LSTM on the CPU")
    found = curves(corpus, 12, "--model", model, "--dtype", dtype, "--loss", loss, "--accumulate", 2)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert found["fused"] == pytest.approx(found["stock"], rel=tolerance)
    assert found["fused"][-1] < found["fused"][0] - 0.3


def test_the_linear_loss_makes_no_whole_logits(corpus):
    args = arguments("--data", corpus, *TINY, *BYTES, "--steps", 2)
    text = data.load(args)
    contender = loop.Contender("fused", args, World())
    contender.model.head.register_forward_hook(lambda *_: pytest.fail("the head was called by itself"))
    contender.step(data.train_batches(args, text, 0, 0, 1), 0)


def test_compiled(corpus):
    args = arguments("--data", corpus, *TINY, *BYTES, "--steps", 2, "--compile")
    text = data.load(args)
    contender = loop.Contender("fused", args, World())
    contender.parallel.compile(backend="aot_eager")
    eager = loop.Contender("fused", arguments("--data", corpus, *TINY, *BYTES, "--steps", 2), World())
    for step in range(2):
        batches = data.train_batches(args, text, step, 0, 1)
        assert contender.step(batches, step).loss == pytest.approx(eager.step(batches, step).loss, rel=1e-5)


# --- a teacher ---


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory, surroundings):
    out = tmp_path_factory.mktemp("teacher") / "run"
    options = ("--dim", 32, "--steps", 60, "--lr", 1e-2, "--eval-every", 60)
    assert train("--data", corpus, *TINY, *BYTES, *options, "--out", out) == 0
    return out


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_fused_distils_as_torch_does(corpus, teacher, model, divergence):
    options = ("--model", model, "--distill", teacher, "--distill-divergence", divergence)
    found = curves(corpus, 12, *options)
    assert found["fused"] == pytest.approx(found["stock"], rel=1e-4)
    assert found["fused"][-1] < 0.95 * found["fused"][0]


def test_a_student_comes_closer_to_its_teacher(corpus, teacher, tmp_path):
    args = arguments("--data", corpus, *TINY, *BYTES, "--steps", 150, "--lr", 1e-2)
    text = data.load(args)
    args.distill, args.distill_temperature = str(teacher), 1.0
    taught = losses.load_teacher(args, text.digest)
    assert not any(p.requires_grad for p in taught.parameters())
    tokens, _ = data.validation_batches(args, text)[0]
    distances = {}
    for hard in (0.0, 1.0):
        args.distill_hard = hard
        contender = loop.Contender("fused", args, World(), text.digest)
        for step in range(150):
            contender.step(data.train_batches(args, text, step, 0, 1), step)
        with torch.no_grad():
            log_p, log_q = (m(tokens).log_softmax(-1) for m in (taught, contender.model.eval()))
        distances[hard] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert distances[0.0] < 0.9 * distances[1.0]


def test_an_interrupted_student_goes_on_to_the_same_bits(corpus, teacher, tmp_path):
    options = ("--data", corpus, *TINY, *BYTES, "--distill", teacher, "--schedule", "constant", "--warmup", 1,
               "--eval-every", 3)  # fmt: skip
    assert train(*options, "--steps", 6, "--out", tmp_path / "whole") == 0
    assert train(*options, "--steps", 3, "--out", tmp_path / "halves") == 0
    assert train(*options, "--steps", 6, "--out", tmp_path / "halves", "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(SystemExit):
        train(*options, "--distill-hard", 0.9, "--steps", 6, "--out", tmp_path / "halves", "--resume")


def test_compare_with_a_teacher_validates_on_the_text(corpus, teacher, tmp_path, no_children, capsys):
    options = ("--steps", 10, "--eval-every", 5, "--compare", "--distill", teacher)
    assert train("--data", corpus, *TINY, *BYTES, *options, "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert abs(summary["val_loss_fused_minus_stock"]) < 1e-4
    first = checkpoint.read_log(tmp_path / "out")[0]
    assert first["val_loss"] == pytest.approx(5.55, abs=0.3)  # nats per byte, untrained; no divergence in it
    assert "head and loss" in capsys.readouterr().out


def test_a_teacher_of_other_text_or_shorter_sequences_is_refused(corpus, teacher, tmp_path, capsys):
    def complaint(*options):
        with pytest.raises(SystemExit) as exit_:
            train(*options, "--distill", teacher, "--steps", 2, "--out", tmp_path / "out")
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "knows only 16 positions" in complaint("--data", corpus, *TINY, *BYTES, "--seq-len", 17)
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, over and over. " * 300)
    assert "other text" in complaint("--data", other, *TINY, *BYTES)
    assert "--distill-hard 1.5" in complaint("--data", corpus, *TINY, *BYTES, "--distill-hard", 1.5)
    assert "--distill-temperature 0" in complaint("--data", corpus, *TINY, *BYTES, "--distill-temperature", 0)
    assert "leave it out" in complaint("--data", corpus, *TINY, *BYTES, "--inplace-loss")


# --- heads that are more than a linear layer ---


@pytest.mark.parametrize("capped", [False, True])
def test_a_pretrained_head_is_tried_before_it_is_taken_for_linear(corpus, tmp_path, capped):
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if capped:
        config |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16, "final_logit_softcapping": 0.01}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config))
    else:
        config = {"vocab_size": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model.save_pretrained(tmp_path)
    loaded = models.Pretrained(str(tmp_path))
    assert (loaded.head is None) == capped
    tokens = torch.randint(256, (2, 5))
    torch.testing.assert_close(loaded.eval()(tokens), model.eval()(tokens).logits)
    args = arguments("--data", corpus, *TINY, *BYTES)
    if capped:
        with pytest.raises(UsageError, match="more than a linear layer"):
            losses.fused_loss(loaded, loaded, args)
    hidden = loaded.hidden(tokens).flatten(0, 1)
    ours = losses.fused_loss(loaded, None, args)(hidden, tokens.flatten(), None)
    theirs = losses.stock_loss(loaded, None, args)(hidden, tokens.flatten(), None)
    torch.testing.assert_close(ours, theirs)
