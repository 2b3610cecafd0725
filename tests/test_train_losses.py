"""The loop's losses: the head inside, whole logits, a teacher; alike in what they learn, and what they are told."""

import argparse
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

from fusedopt.train import checkpoint, data, loop, losses, models  # noqa: E402
from fusedopt.train.distributed import World  # noqa: E402

__all__ = ["corpus", "no_children", "surroundings"]  # fixtures


def curves(corpus, steps, *options):
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
    contender.parallel.module.compile(backend="aot_eager")
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_distils_as_torch_does_in_half_precision(corpus, teacher, dtype):
    found = curves(corpus, 12, "--distill", teacher, "--dtype", dtype, "--accumulate", 2)
    assert found["fused"] == pytest.approx(found["stock"], rel=2e-2)
    assert found["fused"][-1] < 0.95 * found["fused"][0]


def test_stock_divergence_of_far_predictions():
    logits = torch.tensor([[400.0, 0.0, 0.0], [0.0, 300.0, 0.0]], requires_grad=True)
    log_p = torch.tensor([[0.0, 400.0, 0.0], [0.0, 300.0, 0.0]]).log_softmax(1)
    for name, expected in (("forward_kl", 400 / 2), ("reverse_kl", 400 / 2), ("jsd", math.log(2) / 2)):
        divergence = losses._divergence(log_p, logits.log_softmax(1), name)
        assert divergence.item() == pytest.approx(expected)
        assert torch.autograd.grad(divergence, logits)[0].isfinite().all()


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


def test_a_teacher_of_another_vocabulary_or_shorter_sequences_is_refused(corpus, teacher, tmp_path, capsys):
    def complaint(*options):
        with pytest.raises(SystemExit) as exit_:
            train("--out", tmp_path / "out", *options, "--distill", teacher, "--steps", 2)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "knows only 16 positions" in complaint("--data", corpus, *TINY, *BYTES, "--seq-len", 17)
    assert "another vocabulary" in complaint("--data", corpus, *TINY, "--vocab-size", 300)
    assert "--distill-hard 1.5" in complaint("--data", corpus, *TINY, *BYTES, "--distill-hard", 1.5)
    assert "--distill-temperature 0" in complaint("--data", corpus, *TINY, *BYTES, "--distill-temperature", 0)
    assert "leave it out" in complaint("--data", corpus, *TINY, *BYTES, "--inplace-loss")
    before = (teacher / checkpoint.CHECKPOINT).read_bytes()
    assert "the teacher's folder" in complaint("--data", corpus, *TINY, *BYTES, "--out", teacher, "--overwrite")
    assert (teacher / checkpoint.CHECKPOINT).read_bytes() == before


def test_bytes_are_the_same_in_every_text(teacher, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, over and over. " * 300)
    assert train("--data", other, *TINY, *BYTES, "--distill", teacher, "--steps", 2, "--out", tmp_path / "out") == 0


# --- pretrained models: what becomes of the logits after the head ---

SMALL = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 16, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
# name: (configuration, softcap, scale), or the head is more than that
GPT2 = {"vocab_size": 280, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
CAUSAL = {
    "GPT2": ({**GPT2, "bos_token_id": 0, "eos_token_id": 0}, None, 1.0),
    "Gemma2": ({**LLAMA, "head_dim": 8}, 30.0, 1.0),
    "Cohere": (LLAMA, None, 0.0625),
    "Granite": ({**LLAMA, "logits_scaling": 8.0}, None, 0.125),
    "Bert": ({**SMALL, "intermediate_size": 16, "is_decoder": True}, None, None),
}


@pytest.fixture(params=CAUSAL)
def causal(request, tmp_path):
    """A tiny causal LM in a folder, with a tokenizer for it."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{request.param}Config")(**CAUSAL[request.param][0])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "causal")
    return request.param, model, tmp_path / "causal"


def test_a_pretrained_head_is_tried_before_it_is_taken_for_linear(causal):
    name, model, folder = causal
    loaded = models.Pretrained(str(folder)).eval()
    _, softcap, scale = CAUSAL[name]
    assert (loaded.head is None) == (scale is None)
    if scale is not None:
        assert (loaded.softcap, loaded.logit_scale) == (softcap, scale)
    tokens = torch.randint(256, (2, 5))
    torch.testing.assert_close(loaded(tokens), model(tokens).logits)
    # weights of a trained model's size: the cap and the scale are felt
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
        loaded.causal_lm.get_output_embeddings().weight.mul_(100)
    torch.testing.assert_close(loaded(tokens), model(tokens).logits)
    args = argparse.Namespace(loss="linear", inplace_loss=False)
    hidden = loaded.hidden(tokens).flatten(0, 1)
    ours, theirs = (make(loaded, None, args)(hidden, tokens.flatten(), None)
                    for make in (losses.fused_loss, losses.stock_loss))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, list(loaded.parameters())[-1], retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_a_head_that_no_loss_takes_in_is_told(corpus, causal, tmp_path, capsys):
    name, _, folder = causal
    texts = [text.decode() for _, text in data.read_texts([str(corpus)])]
    data.train_bpe(texts, 280).save(str(folder / "tokenizer.json"))
    options = ("--seq-len", 16, "--threads", 1, "--device", "cpu", "--eval-batches", 2, "--steps", 3)
    assert train("--data", corpus, "--init-from", folder, *options, "--out", tmp_path / "out") == 0
    told = "using --loss logits" in capsys.readouterr().out
    assert told == (name == "Bert")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["args"]["loss"] == ("logits" if told else "linear")
