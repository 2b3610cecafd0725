"""What follows the hidden states: the head and the loss, of either contender, with or without a teacher."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedopt.nn import CrossEntropyLoss
from fusedopt.nn.functional import linear_cross_entropy, linear_distillation

from . import checkpoint
from .cli import BYTES_VOCAB
from .errors import UsageError
from .models import build

# (hidden states (N, H), next tokens (N,), the teacher's hidden states (N, Ht) or None) -> scalar
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Trunk(nn.Module):
    """A model up to its hidden states: what is compiled, and what DistributedDataParallel wraps, head included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, H), or (B, T, V) where the head is in it
        return self.model.hidden(tokens)


def stock_loss(model: nn.Module, teacher: nn.Module | None, args: argparse.Namespace) -> Loss:
    """Whole logits and torch's own losses."""
    criterion = nn.CrossEntropyLoss()
    if teacher is None:
        return lambda hidden, targets, _: criterion(model.logits(hidden), targets)

    def distilled(hidden: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        student = model.logits(hidden).float()
        with torch.no_grad():
            log_p = (teacher.logits(taught).float() / args.distill_temperature).log_softmax(1)
        log_q = (student / args.distill_temperature).log_softmax(1)
        soft = _divergence(log_p, log_q, args.distill_divergence) * args.distill_temperature**2
        return (1 - args.distill_hard) * soft + args.distill_hard * criterion(student, targets)

    return distilled


def _divergence(log_p: Tensor, log_q: Tensor, name: str) -> Tensor:
    """Mean over rows (N, V) of the teacher's and the student's log-probabilities."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)

    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def fused_loss(model: nn.Module, teacher: nn.Module | None, args: argparse.Namespace) -> Loss:
    """fusedopt's: the head inside the loss where both allow it."""
    head = model.head
    if teacher is not None:
        options = {
            "divergence": args.distill_divergence,
            "temperature": args.distill_temperature,
            "hard_weight": args.distill_hard,
        }
        return lambda hidden, targets, taught: linear_distillation(
            hidden, head.weight, taught, teacher.head.weight, targets, linear_bias=head.bias,
            teacher_bias=teacher.head.bias, **options,
        )  # fmt: skip
    if head is not None and args.loss == "linear":
        return lambda hidden, targets, _: linear_cross_entropy(
            hidden, head.weight, targets, linear_bias=head.bias, softcap=model.softcap, logit_scale=model.logit_scale
        )
    criterion = CrossEntropyLoss(inplace=args.inplace_loss)
    return lambda hidden, targets, _: criterion(model.logits(hidden), targets)


def load_teacher(args: argparse.Namespace, vocabulary: str) -> nn.Module:
    """The model of an earlier run's folder, frozen; `vocabulary` is the digest of the text in this run's tokens.

    Raises:
        UsageError: it knows other tokens, or shorter sequences.
    """
    path = checkpoint.latest(Path(args.distill))
    state = checkpoint.read(path)
    known = {name.removeprefix("--").replace("-", "_"): value for name, value in state["args"].items()}
    if known["model"] == "pretrained":
        raise UsageError(f"--distill {args.distill}: is a fine-tuned model; a teacher is a gpt or lstm of this loop")
    both_bytes = known["vocab_size"] == args.vocab_size == BYTES_VOCAB
    if not both_bytes and state["args"]["the digest of the --data"] != vocabulary:
        raise UsageError(
            f"--distill {args.distill}: was trained on other text or with another vocabulary, so its tokens mean "
            "something else; give the teacher's --data, --tokenizer and --vocab-size"
        )
    if known["model"] == "gpt" and known["seq_len"] < args.seq_len:
        raise UsageError(
            f"--seq-len {args.seq_len}: the teacher in {args.distill} knows only {known['seq_len']} positions"
        )
    teacher = build(argparse.Namespace(**known))
    names = list(state["contenders"])
    teacher.load_state_dict(checkpoint.weights(path, state, "fused" if "fused" in names else names[0]))
    return teacher.requires_grad_(False).eval()
