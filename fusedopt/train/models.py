"""The models, from tokens (B, T) to logits (B, T, V): a pre-norm transformer, an LSTM, a pretrained one.

Each stops at its hidden states (B, T, H) if asked, so that a loss may take the head in. Where the logits are made in a
way that no loss can take in, `head` is None and the hidden states are the logits.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm causal attention and MLP (Radford et al. 2019)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, dim)
        # heads outermost: a tensor-parallel rank has rows of qkv next to each other, and so its heads' q, k and v
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4)
        )  # (B, heads, T, d)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    """`hidden(tokens)`, `head`, and what becomes of the logits after it."""

    head: nn.Linear | None
    softcap: float | None = None
    logit_scale: float = 1.0

    def hidden(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden if self.head is None else self.scaled(self.head(hidden))

    def scaled(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64
        return self.logits(self.hidden(tokens))


class GPT(LanguageModel):
    """Learned positions, pre-norm blocks, an untied head without bias."""

    def __init__(self, vocab_size: int, seq_len: int, layers: int, dim: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # each block adds two residual terms, hence 2 * layers (Radford et al. 2019)
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LSTM(LanguageModel):
    """Embedding, stacked LSTM from a zero state, linear head."""

    def __init__(self, vocab_size: int, layers: int, dim: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, layers, batch_first=True)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.lstm(self.tokens(tokens))[0].contiguous()  # not a view, of which FSDP warns


class Pretrained(LanguageModel):
    """A Hugging Face causal LM that returns its logits and nothing else."""

    def __init__(self, folder: str):
        super().__init__()
        from transformers import AutoModelForCausalLM  # optional dependency; slow to import

        self.causal_lm = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float()
        config = self.causal_lm.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        if getattr(config, "logits_scaling", None):  # Granite
            self.logit_scale = 1 / config.logits_scaling
        elif isinstance(getattr(config, "logit_scale", None), (int, float)):  # Cohere; MPT's may be a word
            self.logit_scale = config.logit_scale
        self.plain = self._head_is_plain()

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        """Whether the logits are a linear layer's of the last hidden states, scaled and capped, and nothing more.

        It is tried, on enlarged hidden states: the small logits of a new model hardly show a cap.
        """
        head, trunk = self.causal_lm.get_output_embeddings(), self.causal_lm.base_model
        if type(head) is not nn.Linear or trunk is self.causal_lm:
            return False
        tokens = {"input_ids": torch.arange(4)[None], "use_cache": False}
        seen = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) or (1e3 * inputs[0],))
        logits = self.causal_lm(**tokens).logits
        hook.remove()
        hidden = trunk(**tokens)[0]
        pairs = zip([hidden, self.scaled(head(1e3 * hidden))], [*seen, logits], strict=False)
        return len(seen) == 1 and all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in pairs)

    @property
    def head(self) -> nn.Linear | None:
        return self.causal_lm.get_output_embeddings() if self.plain else None

    def hidden(self, tokens: Tensor) -> Tensor:
        if self.plain:
            return self.causal_lm.base_model(input_ids=tokens, use_cache=False)[0]
        return self.causal_lm(input_ids=tokens, use_cache=False).logits


def build(args: argparse.Namespace) -> nn.Module:
    """The model that the arguments ask for, its weights drawn from ``--seed``."""
    torch.manual_seed(args.seed)
    if args.model == "pretrained":
        return Pretrained(args.init_from)
    if args.model == "lstm":
        return LSTM(args.vocab_size, args.layers, args.dim)
    return GPT(args.vocab_size, args.seq_len, args.layers, args.dim, args.heads)
