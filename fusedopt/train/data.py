"""Text to batches: files, split, vocabulary, cached token ids, and batches as a function of the step."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .checkpoint import atomic
from .errors import UsageError

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 20  # one in so many
FORMAT = "1"  # of the cache: raise it when the split, the vocabulary or the encoding changes
Batch = tuple[Tensor, Tensor]  # tokens, next tokens: (B, T) int64


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, and a digest of them that a resumed run must match."""

    train: np.ndarray  # (tokens,) uint16 or uint32
    validation: np.ndarray
    digest: str


def load(args: argparse.Namespace) -> Corpus:
    """Read the text of ``--data``, and encode it or find it encoded in the cache.

    Raises UsageError for no text, a vocabulary that it cannot fill, and a split shorter than ``--seq-len``.
    """
    texts = read_texts(args.data)
    if not any(text for _, text in texts):
        raise UsageError(f"--data {' '.join(args.data or ['(standard library)'])}: no text there")
    train, validation = split(texts)

    key = hashlib.sha256(FORMAT.encode())
    for name, text in texts:
        key.update(f"\0{name}\0{len(text)}\0".encode())
        key.update(text)
    key.update(f"\0{args.tokenizer} {args.vocab_size}".encode())
    if args.tokenizer == "pretrained":
        config = json.loads((Path(args.init_from) / "config.json").read_text(encoding="utf-8"))
        key.update((Path(args.init_from) / "tokenizer.json").read_bytes() + str(config.get("eos_token_id")).encode())

    stem = cache_dir() / key.hexdigest()[:32]
    paths = [stem.with_suffix(f".{name}.npy") for name in ("train", "validation")]
    try:
        encoded = [np.load(path, mmap_mode="r") for path in paths]
    except (OSError, ValueError):  # not there, or not whole: a cache is rebuilt, never mended
        encoded = encode(args, train, validation)
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, tokens in zip(paths, encoded, strict=True):
            with atomic(path) as file:
                np.save(file, tokens)

    for name, tokens in zip(("training", "validation"), encoded, strict=True):
        if len(tokens) <= args.seq_len:
            raise UsageError(
                f"--seq-len {args.seq_len}: the {name} text has only {len(tokens)} tokens and "
                f"{args.seq_len + 1} are needed; shorten it or give more --data"
            )
    digest = hashlib.sha256()
    for tokens in encoded:
        digest.update(tokens)
    return Corpus(*encoded, digest=digest.hexdigest()[:16])


def read_texts(paths: list[str] | None) -> list[tuple[str, bytes]]:
    """(name, bytes) of every text file, in an order that does not depend on the machine.

    Hidden and binary files are passed over. Without paths: the standard library, less its tests.
    """
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        files = [(file.relative_to(root), file) for file in root.rglob("*.py")]
        files = [(name, file) for name, file in files if not skipped & set(name.parts)]
    else:
        files = []
        for path in map(Path, paths):
            if path.is_dir():
                inside = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file()]
                files += [(name, file) for name, file in inside if not any(p.startswith(".") for p in name.parts)]
            else:
                files.append((Path(path.name), path))
    texts = sorted((name.as_posix(), file.read_bytes()) for name, file in files)
    return [(name, text) for name, text in texts if b"\0" not in text]


def split(texts: list[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Training and validation texts: by file, from a hash of its name; of fewer than 20 the end of each."""
    if len(texts) < VALIDATION_SHARE:
        ends = [len(text) - len(text) // VALIDATION_SHARE for _, text in texts]
        return (
            [text[:end] for (_, text), end in zip(texts, ends, strict=True)],
            [text[end:] for (_, text), end in zip(texts, ends, strict=True)],
        )
    held_out = [hashlib.sha256(name.encode()).digest()[0] * VALIDATION_SHARE < 256 for name, _ in texts]
    return (
        [text for (_, text), held in zip(texts, held_out, strict=True) if not held],
        [text for (_, text), held in zip(texts, held_out, strict=True) if held],
    )


def encode(args: argparse.Namespace, train: list[bytes], validation: list[bytes]) -> list[np.ndarray]:
    """Token ids of both splits, each text followed by the end-of-text token; for bytes, by a zero byte."""
    if args.tokenizer == "bytes":
        return [
            np.frombuffer(b"".join(text + b"\0" for text in texts), np.uint8).astype(np.uint16)
            for texts in (train, validation)
        ]
    decoded = [[text.decode("utf-8", errors="replace") for text in texts] for texts in (train, validation)]
    if args.tokenizer == "pretrained":
        folder = Path(args.init_from)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.get_vocab_size() > args.vocab_size:
            raise UsageError(
                f"--init-from {folder}: its tokenizer has {tokenizer.get_vocab_size()} tokens and its model "
                f"only {args.vocab_size}; they do not belong together"
            )
        end = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
        ends = [] if end is None else end[:1] if isinstance(end, list) else [end]
    else:
        tokenizer = train_bpe(decoded[0], args.vocab_size)
        ends = [tokenizer.token_to_id(END_OF_TEXT)]
    dtype = np.uint16 if args.vocab_size <= 1 << 16 else np.uint32
    encoded = []
    for texts in decoded:
        ids = [entry.ids + ends for entry in tokenizer.encode_batch(texts, add_special_tokens=False)]
        encoded.append(np.concatenate([np.asarray(i, dtype) for i in ids] or [np.empty(0, dtype)]))
    return encoded


def train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocab_size`` tokens (Radford et al. 2019), or UsageError."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if tokenizer.get_vocab_size() < vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size}: the text yields no more than {tokenizer.get_vocab_size()} tokens; "
            "ask for at most that, or give more --data"
        )
    return tokenizer


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/fusedopt``, or ``~/.cache/fusedopt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedopt"


def train_batches(args: argparse.Namespace, corpus: Corpus, step: int, rank: int, world_size: int) -> list[Batch]:
    """The ``--accumulate`` micro-batches of one step on one rank.

    A function of (seed, step, rank) alone, so a resumed run needs no state. The sequences of a step are drawn
    together and dealt out: N ranks with batch B see what one process with batch N * B sees, or with N micro-batches.
    """
    shape = (args.accumulate, world_size, args.batch_size)
    starts = np.random.default_rng((args.seed, step)).integers(len(corpus.train) - args.seq_len, size=shape)
    return [windows(corpus.train, starts[micro, rank], args.seq_len) for micro in range(args.accumulate)]


def validation_batches(args: argparse.Namespace, corpus: Corpus, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """One rank's share of ``--eval-batches`` times as many sequences as a step has, spread evenly over the text.

    As many for every rank: under FSDP all take part in each other's forward.
    """
    shape = (args.eval_batches * args.accumulate, world_size, args.batch_size)
    starts = np.linspace(0, len(corpus.validation) - args.seq_len - 1, math.prod(shape)).astype(int).reshape(shape)
    return [windows(corpus.validation, rows[rank], args.seq_len) for rows in starts]


def windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Batch:
    """Sequences of ``seq_len`` tokens from each start, and the same one token later."""
    rows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)  # (B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
