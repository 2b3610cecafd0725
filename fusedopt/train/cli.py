"""The arguments of ``python -m fusedopt.train`` and every check that needs no work."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path

import torch

from . import checkpoint
from .distributed import World
from .errors import UsageError

# lr: the default, tried on the default model and data. momentum: whether the optimizer has it. squares: whether a state
# is one. weight_decay: the default, where it is not the optimizer's own
OPTIMIZERS: dict[str, dict] = {
    "adam": {"name": "Adam", "lr": 1e-3, "momentum": False, "squares": True},
    "adamw": {"name": "AdamW", "lr": 1e-3, "momentum": False, "squares": True},
    "rmsprop": {"name": "RMSprop", "lr": 1e-3, "momentum": True, "squares": True},
    "adagrad": {"name": "Adagrad", "lr": 1e-2, "momentum": False, "squares": True},
    "sgd": {"name": "SGD", "lr": 0.3, "momentum": True, "squares": False},
    "lion": {"name": "Lion", "lr": 2e-4, "momentum": False, "squares": False},
    # without a decay, LAMB's trust ratio is 1 and it is Adam
    "lamb": {"name": "LAMB", "lr": 2e-2, "momentum": False, "squares": True, "weight_decay": 0.01},
}
FINE_TUNE_LR = 0.1  # --init-from: the default rate is this share of the one above
SCHEDULES = ("constant", "exponential", "step", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
# --state and --weights as fusedopt's options; all weights but the first are bfloat16 parameters
STATES: dict[str, dict] = {
    "f32": {"state_dtype": torch.float32},
    "bf16": {"state_dtype": torch.bfloat16},
    "8bit": {"state_dtype": "8bit"},
    "8bit-stochastic": {"state_dtype": "8bit", "stochastic_rounding": True},
}
WEIGHTS: dict[str, dict] = {
    "f32": {},
    "bf16": {},
    "bf16-master": {"master_weights": True},
    "bf16-stochastic": {"stochastic_rounding": True},
}
PARALLEL = ("ddp", "zero1", "fsdp", "tp")
ALONE = World()
BYTES_VOCAB = 256
SMALLEST_BPE = BYTES_VOCAB + 1  # all bytes and the end of a text
# the vocabulary is 64 times the width: GPT-2 small has 65, Llama 3.2 1B 63, Qwen2.5 0.5B 170
MODEL_DEFAULTS = {"layers": 4, "dim": 128, "heads": 4}


def make_parser() -> argparse.ArgumentParser:
    """Build the parser. Defaults that depend on other arguments are None here; ``check`` resolves them."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt.train",
        description="Train a small language model with fusedopt, or --compare it with stock PyTorch. "
        "Under torchrun the same command trains on many processes.",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files or folders (default: the source of Python's standard library)",
    )
    add(
        "--tokenizer",
        choices=("bpe", "bytes"),
        help="byte-level BPE trained on the data, or bytes (default: bpe)",
    )
    add("--vocab-size", type=int, metavar="N", help="size of the BPE vocabulary (default: 8192)")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=("gpt", "lstm"), help="default: gpt")
    add("--init-from", metavar="DIR", help="fine-tune the Hugging Face causal LM saved in this folder")
    add("--layers", type=int, metavar="N", help=f"default: {MODEL_DEFAULTS['layers']}")
    add("--dim", type=int, metavar="N", help=f"width (default: {MODEL_DEFAULTS['dim']})")
    add("--heads", type=int, metavar="N", help=f"attention heads of gpt (default: {MODEL_DEFAULTS['heads']})")
    add("--seq-len", type=int, default=128, metavar="N", help="tokens per sequence (default: %(default)s)")

    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: %(default)s")
    add(
        "--lr",
        type=float,
        help="default: "
        + ", ".join(f"{name} {row['lr']:g}" for name, row in OPTIMIZERS.items())
        + "; a tenth with --init-from",
    )
    add("--weight-decay", type=float, help="of the matrices; vectors have none (default: the optimizer's; lamb 0.01)")
    add("--momentum", type=float, help="of sgd and rmsprop (default: 0)")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        help="after the warm-up: exponential and step fall to 1/100, cosine to 0 (default: %(default)s)",
    )
    add("--warmup", type=int, metavar="STEPS", help="linear warm-up (default: a tenth of --steps)")
    add("--steps", type=int, default=700, help="default: %(default)s")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="sequences per micro-batch and process (default: %(default)s)",
    )
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: %(default)s)")
    add("--max-norm", type=float, default=1.0, help="clip the gradient's total norm; 0 does not (default: %(default)s)")
    add("--ema", type=float, metavar="DECAY", help="keep an average of the weights, and validate it too; 0.999, say")
    add(
        "--state",
        choices=STATES,
        help="of the optimizer: how it is kept; 8bit-stochastic rounds the codes of squares at random (default: f32; "
        "--stock: as the weights are)",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        default="f32",
        help="bf16: parameters and computation; -master keeps what bfloat16 lacks of a float32, -stochastic rounds at "
        "random (default: %(default)s)",
    )

    add = parser.add_argument_group("what runs").add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stock", action="store_true", help="torch's optimizer and loss instead of fusedopt's")
    which.add_argument(
        "--compare",
        action="store_true",
        help="stock and fused on the same batches, step by step in turn, and a table at the end",
    )
    add(
        "--loss",
        choices=("linear", "logits"),
        help="of fusedopt: linear takes the head in, and the logits are never whole in memory; logits makes them "
        "first, as stock does (default: linear, where the head is a linear layer, scaled or capped or not)",
    )
    add(
        "--inplace-loss",
        action="store_true",
        help="--loss logits whose gradient is written over the logits",
    )
    add(
        "--distill",
        metavar="DIR",
        help="learn from the model of an earlier run's folder too: on the same text, or on any in bytes",
    )
    add("--distill-divergence", choices=("forward_kl", "reverse_kl", "jsd"), default="forward_kl",
        help="from the teacher's predictions (default: %(default)s)")  # fmt: skip
    add("--distill-temperature", type=float, default=2.0, metavar="T", help="softens both (default: %(default)s)")
    add(
        "--distill-hard", type=float, default=0.5, metavar="SHARE", help="of the text's own loss (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, help="CPU threads per process (default: torch's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the computation: autocast, and a gradient scaler for float16; weights stay float32 "
        "(default: float32, or bfloat16 where --weights are)",
    )
    add("--compile", action="store_true", help="torch.compile the model")

    add = parser.add_argument_group("under torchrun").add_argument
    add(
        "--parallel",
        choices=PARALLEL,
        help="ddp: everything on every process; zero1: optimizer states in shards; fsdp: weights and gradients too; "
        "tp: every tensor of a gpt's blocks and head split over all processes (default: ddp)",
    )
    add(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="after which a process that keeps the others waiting is given up, and the run ends (default: %(default)g)",
    )

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="default: runs/<model>-<optimizer>[-stock|-compare]")
    add("--eval-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    add("--eval-batches", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS", help="default: %(default)s")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--overwrite", action="store_true", help="start afresh although --out holds a checkpoint")
    return parser


def seconds(text: str) -> float:
    """A positive number, which is needed before the processes can agree on a complaint."""
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def check(args: argparse.Namespace, world: World = ALONE) -> None:
    """Resolve the defaults that depend on other arguments; raise UsageError for what cannot work."""
    for name in (
        "layers",
        "dim",
        "heads",
        "seq_len",
        "steps",
        "batch_size",
        "accumulate",
        "threads",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag(name)} {value}: expected at least 1")
    if args.lr is not None and not (math.isfinite(args.lr) and args.lr > 0):
        raise UsageError(f"--lr {args.lr}: expected a positive number")
    for name in ("weight_decay", "momentum", "max_norm", "warmup", "seed"):
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UsageError(f"{flag(name)} {value}: expected 0 or more")
    if not args.seed < 1 << 63:
        raise UsageError(f"--seed {args.seed}: expected less than 2**63")
    if args.warmup is None:
        args.warmup = args.steps // 10
    if args.warmup >= args.steps:
        raise UsageError(f"--warmup {args.warmup}: expected fewer than --steps {args.steps}")

    _check_optimizer(args)
    _check_precision(args)
    _check_teacher(args)
    if args.init_from is None:
        _check_model(args)
    else:
        _check_pretrained(args)
    for path in args.data or ():
        if not Path(path).exists():
            raise UsageError(f"--data {path}: no such file or folder")
    _check_parallel(args, world)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu")
    args.device = device_of(args)
    _check_out(args)


def device_of(args: argparse.Namespace) -> str:
    """Where to train: on CUDA if that is there, unless told otherwise."""
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


def flag(name: str) -> str:
    """The command-line spelling of an attribute."""
    return "--" + name.replace("_", "-")


def _check_optimizer(args: argparse.Namespace) -> None:
    row = OPTIMIZERS[args.optimizer]
    if not hasattr(torch.optim, row["name"]) and (args.stock or args.compare):
        raise UsageError(
            f"--optimizer {args.optimizer}: torch.optim has no {row['name']}, so there is nothing stock to run; "
            f"leave out --{'stock' if args.stock else 'compare'} or choose another optimizer"
        )
    if args.momentum is not None and not row["momentum"]:
        raise UsageError(
            f"--momentum {args.momentum}: {args.optimizer} has no such option; only "
            + " and ".join(name for name, row in OPTIMIZERS.items() if row["momentum"])
            + " have"
        )
    if args.inplace_loss and args.stock:
        raise UsageError("--inplace-loss: torch's loss has no such option; leave out --stock")
    if args.loss and args.stock:
        raise UsageError(f"--loss {args.loss}: torch's loss takes whole logits; leave out --stock")
    if args.inplace_loss and args.loss == "linear":
        raise UsageError("--inplace-loss: --loss linear has no logits to overwrite; use --loss logits")
    if args.inplace_loss and args.distill:
        raise UsageError("--inplace-loss: a teacher's loss takes the head in; leave it out, or --distill")
    if args.loss == "logits" and args.distill:
        raise UsageError("--loss logits: a teacher's loss takes the head in; leave it out, or --distill")
    if args.loss is None:
        args.loss = "logits" if args.inplace_loss or args.stock else "linear"
    if args.weight_decay is None:
        args.weight_decay = row.get("weight_decay")
    if args.lr is None:
        args.lr = row["lr"] * (FINE_TUNE_LR if args.init_from else 1)


def _check_precision(args: argparse.Namespace) -> None:
    if args.ema is not None and not 0 <= args.ema < 1:
        raise UsageError(f"--ema {args.ema}: expected a decay from 0 to less than 1, such as 0.999")
    as_weights = "f32" if args.weights == "f32" else "bf16"
    if args.stock and args.weights not in ("f32", "bf16"):
        raise UsageError(
            f"--weights {args.weights}: torch's optimizers keep no master and round to nearest; leave out --stock, or "
            "use --weights f32 or bf16"
        )
    if args.stock and args.state not in (None, as_weights):
        raise UsageError(
            f"--state {args.state}: torch's optimizers keep states as the weights are, here {as_weights}; leave out "
            "--stock or --state"
        )
    if args.state == "8bit-stochastic" and not OPTIMIZERS[args.optimizer]["squares"]:
        raise UsageError(
            f"--state {args.state}: {args.optimizer} keeps no squares to round at random; use --state 8bit"
        )
    if args.state in ("bf16", "8bit") and args.optimizer == "sgd" and not args.momentum:
        raise UsageError(f"--state {args.state}: sgd without momentum keeps no state; give --momentum, or leave it out")
    if args.state is None:
        args.state = as_weights if args.stock else "f32"
    if args.dtype is None:
        args.dtype = "float32" if args.weights == "f32" else "bfloat16"
    elif args.weights != "f32" and args.dtype != "bfloat16":
        raise UsageError(
            f"--dtype {args.dtype}: with --weights {args.weights} the model computes in bfloat16; leave out --dtype, "
            "or use --weights f32"
        )


def _check_parallel(args: argparse.Namespace, world: World) -> None:
    if not world.launched:
        if args.parallel is not None:
            raise UsageError(
                f"--parallel {args.parallel}: spreads a run over processes; start them with torchrun "
                "--nproc-per-node=N -m fusedopt.train, or leave it out"
            )
        return
    args.parallel = args.parallel or "ddp"
    if args.parallel != "tp":
        return
    if args.model != "gpt":
        raise UsageError(f"--parallel tp: splits a gpt, and the model is {args.model}; use ddp, zero1 or fsdp")
    if args.heads % world.size:
        raise UsageError(
            f"--parallel tp: {world.size} processes cannot share --heads {args.heads} evenly; "
            "start as many processes as divide it, or change --heads"
        )
    if args.distill:
        raise UsageError("--parallel tp: --distill reads a whole head; use ddp, zero1 or fsdp")


def _check_teacher(args: argparse.Namespace) -> None:
    if args.distill is None:
        return
    if checkpoint.latest(Path(args.distill)) is None:
        raise UsageError(
            f"--distill {args.distill}: no {checkpoint.CHECKPOINT} there, and no whole {checkpoint.FOLDER}<step>; "
            "expected the --out of an earlier run"
        )
    if args.init_from is not None:
        raise UsageError("--distill: a teacher of this loop and --init-from have different vocabularies")
    if not (math.isfinite(args.distill_temperature) and args.distill_temperature > 0):
        raise UsageError(f"--distill-temperature {args.distill_temperature}: expected a positive number")
    if not 0 <= args.distill_hard <= 1:
        raise UsageError(f"--distill-hard {args.distill_hard}: expected a share, 0 to 1")


def _check_model(args: argparse.Namespace) -> None:
    args.model = args.model or "gpt"
    if args.model == "lstm" and args.heads is not None:
        raise UsageError(f"--heads {args.heads}: an lstm has no attention heads; leave it out")
    for name, default in MODEL_DEFAULTS.items():
        if getattr(args, name) is None and not (args.model == "lstm" and name == "heads"):
            setattr(args, name, default)
    if args.model == "gpt" and args.dim % args.heads:
        raise UsageError(f"--heads {args.heads}: does not divide --dim {args.dim}")
    args.tokenizer = args.tokenizer or "bpe"
    if args.tokenizer == "bytes" and args.vocab_size is not None:
        raise UsageError(
            f"--vocab-size {args.vocab_size}: bytes are {BYTES_VOCAB}; leave it out or use --tokenizer bpe"
        )
    if args.vocab_size is None:
        args.vocab_size = BYTES_VOCAB if args.tokenizer == "bytes" else 8192
    if args.tokenizer == "bpe" and args.vocab_size < SMALLEST_BPE:
        raise UsageError(
            f"--vocab-size {args.vocab_size}: expected at least {SMALLEST_BPE}, all bytes and the end of a text"
        )


def _check_pretrained(args: argparse.Namespace) -> None:
    for name in ("model", "layers", "dim", "heads", "tokenizer", "vocab_size"):
        if getattr(args, name) is not None:
            raise UsageError(f"{flag(name)} {getattr(args, name)}: --init-from brings its own; leave it out")
    folder = Path(args.init_from)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--init-from {folder}: expected a folder with a config.json, as save_pretrained writes it")
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"--init-from {folder}: no tokenizer.json there, so its text cannot be encoded; write one with "
            "AutoTokenizer.from_pretrained(NAME, use_fast=True).save_pretrained(DIR)"
        )
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("--init-from: needs transformers: pip install 'fusedopt[hf]'")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    args.vocab_size = config.get("vocab_size")
    if args.vocab_size is None:
        raise UsageError(f"--init-from {folder}: config.json has no vocab_size; expected a causal language model")
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if longest is not None and args.seq_len > longest:
        raise UsageError(f"--seq-len {args.seq_len}: the model in {folder} takes at most {longest} positions")
    args.model, args.tokenizer = "pretrained", "pretrained"


def _check_out(args: argparse.Namespace) -> None:
    if args.out is None:
        mode = "-stock" if args.stock else "-compare" if args.compare else ""
        args.out = f"runs/{args.model}-{args.optimizer}{mode}"
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; expected a folder")
    if args.distill and Path(args.distill).resolve() == out.resolve():
        raise UsageError(f"--out {out}: is the teacher's folder, which the run would overwrite; choose another --out")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite: choose one")
    exists = checkpoint.latest(out) is not None
    if args.resume and not exists:
        partial = ", ".join(checkpoint.unfinished(out))
        raise UsageError(
            f"--resume: no {checkpoint.CHECKPOINT} in {out}, and no whole {checkpoint.FOLDER}<step>"
            + (f" ({partial}: unfinished)" if partial else "")
            + "; leave out --resume to start there"
        )
    if exists and not (args.resume or args.overwrite):
        raise UsageError(
            f"--out {out}: holds the checkpoint of an earlier run; continue it with --resume, "
            "replace it with --overwrite, or choose another --out"
        )
