"""Every check of the arguments that needs no work, and the defaults that depend on other arguments."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path

import torch

from . import checkpoint
from .cli import BYTES_VOCAB, FINE_TUNE_LR, MODEL_DEFAULTS, OPTIMIZERS, SMALLEST_BPE, device_of, flag
from .distributed import World
from .errors import UsageError

ALONE = World()


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
