"""The arguments of ``python -m fusedopt.train``, and what their values stand for."""

from __future__ import annotations

import argparse

import torch

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


def device_of(args: argparse.Namespace) -> str:
    """Where to train: on CUDA if that is there, unless told otherwise."""
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


def flag(name: str) -> str:
    """The command-line spelling of an attribute."""
    return "--" + name.replace("_", "-")
